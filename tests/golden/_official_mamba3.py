"""Cases of the official code for Mamba-3.

Its kernels need a GPU, but its tests compare them with references in plain torch. These compute
here in float64: alone (`mamba3_ref`), and in place of the kernels inside the official language
model (`state_spaces_mamba3`, `state_spaces_mamba3_mimo`).
"""

import functools
import importlib
import importlib.util
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

from tests.golden._loop_mamba3 import heavy_tail, loop
from tests.golden._official import import_official, module_versions
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


@functools.cache
def import_references(checkout: Path) -> types.SimpleNamespace:
    """Imports the references of the official tests, and the official model, made to run on them."""
    import_official(checkout)
    modules: dict[str, Any] = sys.modules
    for name in (
        "triton.mamba3.mamba3_siso_combined",
        "triton.mamba3.mamba3_siso_step",
        "triton.mamba3.mamba3_mimo_rotary_step",
        "triton.mamba3",
        "tilelang.mamba3.mamba3_mimo",
        "tilelang.mamba3",
        "tilelang",
    ):
        modules[f"mamba_ssm.ops.{name}"] = mock.MagicMock(name=name)
    siso = load(checkout / "tests/ops/triton/test_mamba3_siso.py")
    mimo = load(checkout / "tests/ops/tilelang/test_mamba3_mimo.py")
    mixer: Any = importlib.import_module("mamba_ssm.modules.mamba3")
    gated: Any = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    model: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")

    def norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        return gated.rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)

    gated.rmsnorm_fn = norm

    def siso_kernel(*, Input_States, return_final_states, cu_seqlens, **inputs):
        assert (Input_States, cu_seqlens) == (None, None)
        y, states = siso.mamba3_siso_fwd_ref(**inputs, dtype=torch.float64)
        return (y, *states) if return_final_states else y

    def mimo_kernel(*, dtype, chunk_size, cu_seqlens, return_state, **inputs):
        del dtype, chunk_size  # The reference takes whole chunks, so all is one chunk.
        assert cu_seqlens is None
        y, states = mimo_chunk_ref(mimo, **inputs)
        return (y, *states) if return_state else y

    mixer.mamba3_siso_combined, mixer.mamba3_mimo_combined = siso_kernel, mimo_kernel
    return types.SimpleNamespace(
        siso_step=siso.mamba3_siso_step_ref,
        siso_forward=siso.mamba3_siso_fwd_ref,
        mimo=lambda **inputs: mimo_chunk_ref(mimo, **inputs),
        mixer=mixer,
        model=model,
    )


def zeros_in_float64(*shape: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    """Stands in for `torch.zeros`, because the official code asks for float32."""
    del dtype, device
    return torch.from_numpy(np.zeros(shape[0] if len(shape) == 1 else shape))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mimo_chunk_ref(
    mimo, *, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, Z,
    rotary_dim_divisor, chunk_size=None,
):  # fmt: skip
    """Calls `mamba3_MIMO_chunk_ref` with the kernel's arguments, and returns the kernel's states.

    Of the references, this one pairs dimensions as the kernels do.
    """
    chunk_size = chunk_size or Q.shape[1]
    sums = torch.cumsum(ADT.unflatten(-1, (-1, chunk_size)), dim=-1)
    angles = mimo.apply_angle_dt_reference(Angles, DT.transpose(1, 2))
    y, ssm, k = mimo.mamba3_MIMO_chunk_ref(
        Q, K, V, Q_bias, K_bias, MIMO_V, MIMO_Out, Z, MIMO_Z, angles,
        sums.flatten(-2), (sums[..., -1:] - sums).flatten(-2), DT, Trap, D,
        chunk_size=chunk_size,
        rotary_dim_divisor=rotary_dim_divisor,
        return_final_state=True,
        dtype=torch.float64,
        contract_mimo_out=MIMO_Out is not None,
    )  # fmt: skip
    # The reference has the state as (d_state, headdim), the kernel the other way round.
    return y, (angles[:, -1], ssm.transpose(-1, -2), k, V[:, -1])


# --- the recurrences alone -----------------------------------------------------------------------

SISO = {"seq": 12, "groups": 2, "nheads": 4, "headdim": 3, "d_state": 10, "pairs": 2}
MIMO = SISO | {"d_state": 8, "rank": 3, "pairs": 2, "divisor": 4}
MIMO_FULL = MIMO | {"rank": 2, "pairs": 4, "divisor": 2, "nheads": 2, "seq": 9}
OPS: dict[str, dict[str, int]] = {"siso": SISO, "mimo": MIMO, "mimo_full": MIMO_FULL}


def make_op(name: str, references: Any) -> Tensors:
    """Runs one of `OPS` in two ways, and returns inputs and answers."""
    s, rng = OPS[name], np.random.default_rng(4)
    rank = (s["rank"],) if "rank" in s else ()
    of_heads = (s["nheads"], *rank)
    shapes = {
        "Q": (1, s["seq"], *rank, s["groups"], s["d_state"]),
        "K": (1, s["seq"], *rank, s["groups"], s["d_state"]),
        "V": (1, s["seq"], s["nheads"], s["headdim"]),
        "A": (1, s["nheads"], s["seq"]),
        "DT": (1, s["nheads"], s["seq"]),
        "Trap": (1, s["nheads"], s["seq"]),
        "Q_bias": (*of_heads, s["d_state"]),
        "K_bias": (*of_heads, s["d_state"]),
        "Angles": (1, s["seq"], 1, s["pairs"]),
        "D": (s["nheads"],),
    }
    if rank:
        shapes["MIMO_V"] = (*of_heads, s["headdim"])
    else:
        shapes["state.angle"] = (1, s["nheads"], s["pairs"])
        shapes["state.ssm"] = (1, s["nheads"], s["headdim"], s["d_state"])
        shapes["state.k"] = (1, s["nheads"], s["d_state"])
        shapes["state.v"] = (1, s["nheads"], s["headdim"])
    inputs = {k: torch.from_numpy(rng.standard_normal(shape)) for k, shape in shapes.items()}
    inputs["DT"] = F.softplus(inputs["DT"])
    inputs["A"] = -torch.exp(inputs["A"])
    weights: Tensors = {}

    def answers(run: Any) -> Tensors:
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        arguments = {k: v for k, v in leaves.items() if not k.startswith("state.")}
        arguments["ADT"] = arguments.pop("A") * arguments["DT"]
        arguments["Angles"] = arguments["Angles"].expand(-1, -1, s["nheads"], -1)
        out = dict(zip(("y", "angle", "ssm", "k", "v"), run(leaves, arguments), strict=True))
        for k, v in out.items():
            weights.setdefault(k, torch.from_numpy(rng.standard_normal(v.shape)))
        objective = torch.stack([(weights[k] * v).sum() for k, v in out.items()]).sum()
        grads = torch.autograd.grad(objective, list(leaves.values()))
        out |= {f"grad.{k}": g for k, g in zip(leaves, grads, strict=True)}
        return {k: v.detach().contiguous() for k, v in out.items()}

    def flat(answer: Any) -> Any:
        y, states = answer
        return y, *states

    with honest_float64():
        if rank:
            options: dict[str, Any] = {"MIMO_Z": None, "MIMO_Out": None, "Z": None}
            options["rotary_dim_divisor"] = s["divisor"]
            witness, other = (
                answers(
                    lambda _, arguments, c=c: flat(
                        references.mimo(**arguments, **options, chunk_size=c)
                    )
                )
                for c in (3, s["seq"])
            )
        else:
            state = lambda leaves: [v for k, v in leaves.items() if k.startswith("state.")]
            witness = answers(
                lambda leaves, arguments: flat(
                    references.siso_step(**arguments, Input_States=state(leaves))
                )
            )
            other = answers(
                lambda leaves, arguments: flat(
                    references.siso_forward(
                        **arguments, Initial_States=state(leaves), dtype=torch.float64
                    )
                )
            )
    check(name, witness, other)
    return inputs | {f"weight.{k}": v for k, v in weights.items()} | witness


# --- the language model --------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "d_model": 10,
    "n_layer": 2,
    "vocab_size": 29,  # 32 rows, the padding included
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
}
SISO_CFG: dict[str, Any] = {
    "layer": "Mamba3",
    "d_state": 12,
    "expand": 2,
    "headdim": 5,
    "chunk_size": 64,
}
MIMO_CFG = SISO_CFG | {
    "d_state": 8,
    "ngroups": 2,
    "rope_fraction": 1.0,
    "is_mimo": True,
    "mimo_rank": 3,
    "is_outproj_norm": True,
    "A_floor": 0.3,
    "A_activation": "softplus",  # A field of ours; the official code up to 2.3.2 has only this.
}
MODELS: dict[str, dict[str, Any]] = {
    "state_spaces_mamba3": COMMON | {"ssm_cfg": SISO_CFG},
    "state_spaces_mamba3_mimo": COMMON | {"ssm_cfg": MIMO_CFG},
}


def random_parameter(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    draws: dict[str, Any] = {
        "dt_bias": lambda: rng.uniform(-2.0, 1.0, shape),
        "B_bias": lambda: rng.standard_normal(shape),
        "C_bias": lambda: rng.standard_normal(shape),
        "mimo_x": lambda: rng.standard_normal(shape),
        "mimo_z": lambda: 1 + rng.standard_normal(shape),
        "mimo_o": lambda: rng.standard_normal(shape),
    }
    draw = draws.get(name.rsplit(".", 1)[-1])
    if draw is not None:
        return torch.from_numpy(draw().astype(np.float32))
    if name.endswith("_norm.weight"):
        name = name.replace("B_norm", "norm").replace("C_norm", "norm")
    return random_weight(rng, name.replace("embedding", "embeddings"), shape)


def make_model(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a checkpoint of the official layout from the official model on its references."""
    assert sdist is not None
    references = import_references(sdist)
    config = MODELS[case]
    cfg = dict(config["ssm_cfg"])
    softplus = cfg.pop("A_activation", "heavy_tail") == "softplus"
    kind = cfg.pop("layer")
    assert kind == "Mamba3"
    model_type, mixer = references.model.MambaLMHeadModel, references.mixer

    class Activations:
        """A stand-in for `torch.nn.functional`, whose softplus of `dd_A` is the heavy-tail one."""

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

        def softplus(self, u: torch.Tensor) -> torch.Tensor:
            # `dd_A` is a view of the output of `in_proj`; the step size is a sum with its bias.
            of_A = getattr(u, "_base", None) is not None
            return heavy_tail(u) if of_A and not softplus else F.softplus(u)

    fields = {k: v for k, v in config.items() if k != "ssm_cfg"}
    with (
        mock.patch.object(references.model, "Mamba2", mixer.Mamba3),
        mock.patch.object(mixer, "F", Activations()),
        mock.patch.object(torch, "zeros", zeros_in_float64),
    ):
        official_config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
        made = official_config(**fields, ssm_cfg={"layer": "Mamba2", **cfg})
        model = model_type(made)
        rng = np.random.default_rng(6)
        weights: Any = OrderedDict(model.state_dict())
        for name, value in weights.items():
            if name != "lm_head.weight":
                weights[name] = random_parameter(rng, name, tuple(value.shape))
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]  # one storage, as upstream
        model.load_state_dict(weights)
        tokens = torch.from_numpy(rng.integers(config["vocab_size"], size=14))
        answer = model_answers(model.double(), tokens)
    own = {
        name.replace("backbone.embedding.", "backbone.embeddings."): value
        for name, value in weights.items()
        if name != "lm_head.weight"
    }
    ours = loop_answers(loop, own, tokens, config["ssm_cfg"])
    ours = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in ours.items()}
    for name, value in ours.items():
        if name.endswith(".angle"):  # Only the SISO reference reduces it modulo 2 pi.
            period = 2 * torch.pi
            ours[name] = value + period * torch.round((answer[name] - value) / period)
    check(case, answer, ours)
    check_size_of_values(answer)
    assert answer["greedy"].max() < config["vocab_size"], "a padding row was chosen"
    weights._metadata = module_versions(list(weights))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")
        torch.save(weights, folder / "pytorch_model.bin")
        save(folder, {"tokens": tokens, **answer})
        publish(folder, out / case)


def model_answers(model: Any, tokens: torch.Tensor) -> Tensors:
    hidden = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: hidden.append(sum(out)))
        for layer in model.backbone.layers
    ]
    hooks.append(model.backbone.register_forward_hook(lambda m, args, out: hidden.append(out)))
    memory = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
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
    for i, states in memory.key_value_memory_dict.items():
        for name, state in zip(("angle", "ssm", "k", "v"), states, strict=True):
            answer[f"state.{i}.{name}"] = state[0]
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}


def make_references(case: str, out: Path, sdist: Path | None) -> None:
    """Makes the case of the recurrences alone."""
    assert sdist is not None
    references = import_references(sdist)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arrays: Tensors = {}
        for name in OPS:
            arrays |= {f"{name}.{k}": v for k, v in make_op(name, references).items()}
        save(folder, arrays)
        publish(folder, out / case)
