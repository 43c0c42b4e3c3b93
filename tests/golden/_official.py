"""Cases of the official code for Mamba-1: its scan, and its whole language model."""

import importlib
import json
import sys
import tempfile
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from tests.golden._loop_mamba1 import Sizes, loop
from tests.golden._witness import (
    Tensors,
    check,
    check_size_of_values,
    greedy,
    honest_float64,
    loop_answers,
    publish,
    random_weight,
    save,
)


# --- the official code ---------------------------------------------------------------------------


def import_official(sdist: Path) -> types.SimpleNamespace:
    """Imports the official modules from source, with stand-ins for their CUDA and Triton parts.

    The scan and the norm become the official pure-torch references of the same files.
    """
    if "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(sdist / "mamba_ssm")]  # its `__init__.py` does not run
        modules: dict[str, Any] = sys.modules
        modules["mamba_ssm"] = package
        for name in ("selective_scan_cuda", "triton", "triton.language", "triton.testing"):
            modules[name] = mock.MagicMock(name=name)
            modules[name].Config.return_value.num_warps = 1
        for name in ("modules.mamba2", "modules.mha", "utils.determinism"):
            modules[f"mamba_ssm.{name}"] = mock.MagicMock(name=name)
        modules["mamba_ssm.ops.triton.selective_state_update"] = None  # an ImportError
        generation: Any = types.ModuleType("mamba_ssm.utils.generation")
        generation.GenerationMixin = type("GenerationMixin", (), {})
        modules["mamba_ssm.utils.generation"] = generation

    scan: Any = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    norm: Any = importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    model: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")

    def fused(x, weight, bias, *, residual, prenorm, residual_in_fp32, eps, is_rms_norm):
        assert (is_rms_norm, residual_in_fp32) == (True, True)
        return norm.rms_norm_ref(
            x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, upcast=True
        )

    block: Any = importlib.import_module("mamba_ssm.modules.block")
    model.layer_norm_fn = block.layer_norm_fn = fused
    mixer: Any = importlib.import_module("mamba_ssm.modules.mamba_simple")
    mixer.selective_scan_fn = scan.selective_scan_ref
    return types.SimpleNamespace(
        selective_scan_ref=scan.selective_scan_ref, MambaLMHeadModel=model.MambaLMHeadModel
    )


# Pre-softplus step sizes far from zero; torch's softplus is the identity above 20.
EDGES = [-60.0, -35.0, -18.0, -12.0, -8.0, 0.0, 8.0, 15.0, 19.5, 19.999, 20.001, 20.5, 23.0, 40.0]
SCAN_CASES = {"selective_scan_ref": False, "selective_scan_ref_softplus": True}


def make_scan(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a case of the scan alone, which needs the official code."""
    assert sdist is not None
    selective_scan_ref = import_official(sdist).selective_scan_ref
    softplus = SCAN_CASES[case]
    seq, d_inner, d_state = 11, 7, 5
    rng = np.random.default_rng(5 + softplus)
    inputs = {
        "x": rng.standard_normal((seq, d_inner)),
        "A": -np.exp(rng.uniform(-1.5, 1.2, (d_inner, d_state))),
        "B": rng.standard_normal((seq, d_state)),
        "C": rng.standard_normal((seq, d_state)),
        "D": rng.standard_normal(d_inner),
    }
    if softplus:
        inputs["dt_bias"] = rng.uniform(-2, 1, d_inner)
        raw = 1.5 * rng.standard_normal((seq, d_inner))  # with the bias: near zero
        where = rng.permutation(seq * d_inner)[: len(EDGES)]
        raw.ravel()[where] = EDGES - np.tile(inputs["dt_bias"], seq)[where]
        inputs["dt_raw"] = raw
    else:
        inputs["dt"] = np.logaddexp(0, rng.uniform(-3, 2, (seq, d_inner)))
    weight = {
        "y": torch.from_numpy(rng.standard_normal((seq, d_inner))),
        "state": torch.from_numpy(rng.standard_normal((d_inner, d_state))),
    }

    def with_gradients(scan):
        leaves = {k: torch.from_numpy(v).clone().requires_grad_() for k, v in inputs.items()}
        y, state = scan(leaves)
        objective = (weight["y"] * y).sum() + (weight["state"] * state).sum()
        gradients = torch.autograd.grad(objective, list(leaves.values()))
        answer = {"y": y, "state": state, "objective": objective}
        answer |= {f"grad.{k}": g for k, g in zip(leaves, gradients, strict=True)}
        return {k: v.detach().contiguous() for k, v in answer.items()}

    def official(v):
        y, state = selective_scan_ref(
            v["x"].T[None],
            v["dt_raw" if softplus else "dt"].T[None],
            v["A"],
            v["B"].T[None],
            v["C"].T[None],
            v["D"],
            delta_bias=v.get("dt_bias"),
            delta_softplus=softplus,
            return_last_state=True,
        )
        return y[0].T, state[0]

    def plain(threshold):
        def scan(v):
            if softplus:
                total = v["dt_raw"] + v["dt_bias"]
                dt = torch.where(total > threshold, total, torch.log1p(torch.exp(total)))
            else:
                dt = v["dt"]
            state, ys = torch.zeros_like(v["A"]), []
            for t in range(seq):
                write = (dt[t] * v["x"][t])[:, None] * v["B"][t][None, :]
                state = torch.exp(dt[t][:, None] * v["A"]) * state + write
                ys.append((state * v["C"][t]).sum(1) + v["D"] * v["x"][t])
            return torch.stack(ys), state

        return scan

    with honest_float64():
        witness = with_gradients(official)
    check(case, witness, with_gradients(plain(threshold=20.0)))
    if softplus:
        print("  and against the softplus without a threshold:")
        check(f"  {case}", witness, with_gradients(plain(threshold=np.inf)), tolerance=1e-8)
        witness["dt"] = F.softplus(torch.from_numpy(inputs["dt_raw"] + inputs["dt_bias"]))
    arrays = {k: torch.from_numpy(v) for k, v in inputs.items()}
    arrays |= {f"weight.{k}": v for k, v in weight.items()} | witness
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary), arrays)
        publish(Path(temporary), out / case)


STATE_SPACES_CONFIG = {
    "d_model": 13,
    "n_layer": 2,
    "vocab_size": 37,  # 40 rows, the padding included
    "ssm_cfg": {"d_state": 7, "d_conv": 5, "expand": 3, "dt_rank": 3, "bias": True},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def make_state_spaces(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a checkpoint of the official layout from the plain loop."""
    config, ssm = STATE_SPACES_CONFIG, STATE_SPACES_CONFIG["ssm_cfg"]
    d_model, d_inner = config["d_model"], ssm["expand"] * config["d_model"]
    padded = -config["vocab_size"] % config["pad_vocab_size_multiple"] + config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (padded, d_model)}
    for i in range(config["n_layer"]):
        mixer: dict[str, tuple[int, ...]] = {
            "A_log": (d_inner, ssm["d_state"]),
            "D": (d_inner,),
            "in_proj.weight": (2 * d_inner, d_model),
            "in_proj.bias": (2 * d_inner,),
            "conv1d.weight": (d_inner, 1, ssm["d_conv"]),
            "conv1d.bias": (d_inner,),
            "x_proj.weight": (ssm["dt_rank"] + 2 * ssm["d_state"], d_inner),
            "dt_proj.weight": (d_inner, ssm["dt_rank"]),
            "dt_proj.bias": (d_inner,),
            "out_proj.weight": (d_model, d_inner),
            "out_proj.bias": (d_model,),
        }
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (d_model,)

    rng = np.random.default_rng(2)
    weights = {name: random_weight(rng, name, shape) for name, shape in shapes.items()}
    tokens = torch.from_numpy(rng.integers(config["vocab_size"], size=15))
    sizes = Sizes(
        n_layer=config["n_layer"],
        d_inner=d_inner,
        d_state=ssm["d_state"],
        d_conv=ssm["d_conv"],
        dt_rank=ssm["dt_rank"],
        eps=1e-5,
        act="silu",
    )
    answer = loop_answers(loop, weights, tokens, sizes)
    check_size_of_values(answer)
    publish_official(case, config, weights, tokens, answer, out, sdist)


def publish_official(
    case: str,
    config: dict[str, Any],
    weights: Tensors,
    tokens: torch.Tensor,
    answer: Tensors,
    out: Path,
    sdist: Path | None,
) -> None:
    """Writes a case as an official checkpoint if the official model agrees with `answer`."""
    assert answer["greedy"].max() < config["vocab_size"], "a padding row was chosen"
    renamed: Any = OrderedDict(
        (name.replace("embeddings", "embedding"), w) for name, w in weights.items()
    )
    if "lm_head.weight" not in renamed:
        renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]  # one storage, as upstream
    # `Module.state_dict()` adds this, so published files contain it.
    renamed._metadata = module_versions(list(renamed))
    answer = {name.replace("embeddings", "embedding"): value for name, value in answer.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")
        torch.save(renamed, folder / "pytorch_model.bin")
        if sdist is None:
            print(f"{case}: from the plain loop alone; --official compares it")
        else:
            check(case, official_answers(folder, tokens, sdist), answer)
        save(folder, {"tokens": tokens, **answer})
        publish(folder, out / case)


def module_versions(names: list[str]) -> OrderedDict[str, dict[str, int]]:
    """Returns the `_metadata` of a state dict: all modules above a parameter, parents first."""
    modules = OrderedDict()
    for name in names:
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[:i]): {"version": 1} for i in range(len(parts) + 1)}
    return modules


def official_answers(folder: Path, tokens: torch.Tensor, sdist: Path) -> Tensors:
    """Runs the official model on a checkpoint, in float64."""
    official = import_official(sdist)
    model = official.MambaLMHeadModel.from_pretrained(str(folder)).double()
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert list(stored) == list(model.state_dict())
    hidden = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: hidden.append(sum(out)))
        for layer in model.backbone.layers
    ]
    hooks.append(model.backbone.register_forward_hook(lambda m, args, out: hidden.append(out)))
    memory = types.SimpleNamespace(
        key_value_memory_dict={},
        seqlen_offset=0,
        batch_size_offset=0,
        lengths_per_sample=None,
        max_seqlen=len(tokens),
    )
    with honest_float64():
        logits = model(tokens[None]).logits[0]
        for hook in hooks:
            hook.remove()
        loss = F.cross_entropy(logits[:-1], tokens[1:])
        loss.backward()
        chosen = greedy(lambda t: model(t[None]).logits[0], tokens)
        with torch.no_grad():
            model(tokens[None], inference_params=memory)
    answer = {"logits": logits, "loss": loss, "greedy": chosen}
    for name, value in zip([*range(len(hidden) - 1), "norm_f"], hidden, strict=True):
        answer[f"hidden_states.{name}"] = value[0]
    for i, (first, second) in memory.key_value_memory_dict.items():
        if i in model.config.attn_layer_idx:  # the other is a bug: see `MHA.forward`
            k, v = first[0].permute(1, 2, 0, 3)
            answer |= {f"state.{i}.k": k, f"state.{i}.v": v}
        else:
            answer |= {f"state.{i}.conv": first[0], f"state.{i}.ssm": second[0]}
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}
