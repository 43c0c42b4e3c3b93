"""Makes this folder's golden files: what transformers and the official code say, in float64.

    python tests/golden/make_golden.py                        # every case but the official scan
    python tests/golden/make_golden.py --official SDIST       # those too, and more checks
    python tests/golden/make_golden.py --case mamba_tiny --out somewhere

Nothing of `mamba_eqx` is imported here. Each case is computed twice, by the witness and by a plain
loop over tokens written below, and is written only if the two agree to `TOLERANCE`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


TOLERANCE = 1e-11  # relative to the largest entry of an array
WEIGHTS = "model.safetensors"
GREEDY_TOKENS = 16
GREEDY_MARGIN = 1e-2  # between the two best logits, so that float32 chooses the same token
SMALLEST_GRADIENT = 1e-4  # every parameter's largest gradient is above this

Tensors = dict[str, torch.Tensor]


# --- float64 in code that says `.float()` -------------------------------------------------------


class OnlyFloat64(TorchDispatchMode):
    """Raises when any operation, forward or backward, answers in another floating type."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                assert leaf.dtype == torch.float64, f"{func} answered in {leaf.dtype}"
        return out


@contextlib.contextmanager
def honest_float64() -> Iterator[None]:
    """Within it, casts to float32 cast to float64, and nothing floating is anything but float64."""
    to: Callable[..., torch.Tensor] = torch.Tensor.to

    def widened(value):
        return torch.float64 if value is torch.float32 else value

    def patched_to(self, *args, **kwargs):
        args = [widened(arg) for arg in args]
        kwargs = {name: widened(arg) for name, arg in kwargs.items()}
        return to(self, *args, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", patched_to),
        mock.patch.object(torch.Tensor, "float", lambda self: to(self, torch.float64)),
        OnlyFloat64(),
    ):
        yield


# --- the independent loop -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    n_layer: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    eps: float
    act: str


def silu(x):
    return x / (1 + torch.exp(-x))


ACTIVATIONS: dict[str, Callable] = {
    "silu": silu,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def loop(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """One token at a time, one layer at a time: Mamba-1 as its recurrence."""
    s = sizes
    conv = [torch.zeros(s.d_inner, s.d_conv, dtype=torch.float64) for _ in range(s.n_layer)]
    ssm = [torch.zeros(s.d_inner, s.d_state, dtype=torch.float64) for _ in range(s.n_layer)]
    embedding = weights["backbone.embeddings.weight"]
    head = weights.get("lm_head.weight", embedding)
    stream: dict[str, list] = {f"hidden_states.{i}": [] for i in range(s.n_layer)}
    stream |= {"hidden_states.norm_f": [], "logits": []}
    for token in tokens.tolist():
        h = embedding[token]
        for i in range(s.n_layer):
            w = {
                name.removeprefix(f"backbone.layers.{i}."): value
                for name, value in weights.items()
                if name.startswith(f"backbone.layers.{i}.")
            }
            u = rms_norm(h, w["norm.weight"], s.eps)
            xz = w["mixer.in_proj.weight"] @ u + w.get("mixer.in_proj.bias", 0)
            x, z = xz[: s.d_inner], xz[s.d_inner :]
            conv[i] = torch.cat([conv[i][:, 1:], x[:, None]], dim=1)
            x = (conv[i] * w["mixer.conv1d.weight"][:, 0]).sum(1) + w.get("mixer.conv1d.bias", 0)
            x = ACTIVATIONS[s.act](x)
            dbc = w["mixer.x_proj.weight"] @ x
            dt = w["mixer.dt_proj.weight"] @ dbc[: s.dt_rank] + w["mixer.dt_proj.bias"]
            dt = torch.logaddexp(dt, torch.zeros_like(dt))
            b, c = dbc[s.dt_rank : s.dt_rank + s.d_state], dbc[s.dt_rank + s.d_state :]
            decay = torch.exp(-torch.exp(w["mixer.A_log"]) * dt[:, None])
            ssm[i] = decay * ssm[i] + (dt * x)[:, None] * b[None, :]
            y = (ssm[i] * c[None, :]).sum(1) + w["mixer.D"] * x
            h = h + w["mixer.out_proj.weight"] @ (y * silu(z)) + w.get("mixer.out_proj.bias", 0)
            stream[f"hidden_states.{i}"].append(h)
        h = rms_norm(h, weights["backbone.norm_f.weight"], s.eps)
        stream["hidden_states.norm_f"].append(h)
        stream["logits"].append(head @ h)
    answer = {name: torch.stack(rows) for name, rows in stream.items()}
    for i in range(s.n_layer):
        answer |= {f"state.{i}.conv": conv[i], f"state.{i}.ssm": ssm[i]}
    return answer


def loop_answers(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """`loop`, its loss, the loss's gradients and the greedy continuation."""
    weights = {name: w.double().clone().requires_grad_() for name, w in weights.items()}
    answer = loop(weights, tokens, sizes)
    surprise = torch.logsumexp(answer["logits"], 1)[:-1]
    surprise = surprise - answer["logits"][torch.arange(len(tokens) - 1), tokens[1:]]
    answer["loss"] = surprise.mean()
    gradients = torch.autograd.grad(answer["loss"], list(weights.values()))
    answer |= {f"grad.{name}": g for name, g in zip(weights, gradients, strict=True)}
    answer["greedy"] = greedy(lambda t: loop(weights, t, sizes)["logits"], tokens)
    return {name: value.detach() for name, value in answer.items()}


@torch.no_grad()
def greedy(forward: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Without any cache: the whole sequence again for every token."""
    for _ in range(GREEDY_TOKENS):
        best = forward(tokens)[-1].topk(2)
        gap = (best.values[0] - best.values[1]).item()
        assert gap > GREEDY_MARGIN, f"the two best tokens are only {gap} apart: take another seed"
        tokens = torch.cat([tokens, best.indices[:1]])
    return tokens[-GREEDY_TOKENS:]


def check(case: str, witness: Tensors, ours: Tensors, tolerance: float = TOLERANCE) -> None:
    """Raises unless every array of the two agrees; prints the largest difference by kind."""
    assert witness.keys() == ours.keys(), witness.keys() ^ ours.keys()
    worst: dict[str, float] = {}
    for name, value in witness.items():
        other = ours[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        gap = ((value - other).abs().max() / other.abs().max()).item()
        assert gap <= tolerance, f"{case}: {name} differs by {gap}"  # NaN fails too
        kind = name.rsplit(".", 1)[-1] if name.startswith("state.") else name.split(".")[0]
        worst[kind] = max(worst.get(kind, 0.0), gap)
    print(f"{case}:", ", ".join(f"{kind} {gap:.1e}" for kind, gap in worst.items()))


def save(folder: Path, arrays: Tensors) -> None:
    narrow = {torch.int64: torch.int32}
    arrays = {k: v.detach().to(narrow.get(v.dtype, v.dtype)) for k, v in arrays.items()}
    numpy = {k: v.contiguous().numpy() for k, v in arrays.items()}
    save_file(numpy, folder / "golden.safetensors")


# --- weights ------------------------------------------------------------------------------------


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Nothing at its initial value, hidden values of order one, no small gradients."""

    def normal(scale):
        return scale * rng.standard_normal(shape)

    draws: dict[str, Callable[[], np.ndarray]] = {
        "embeddings.weight": lambda: normal(0.7),
        "lm_head.weight": lambda: normal(1.5 / shape[-1] ** 0.5),
        "norm.weight": lambda: rng.uniform(0.5, 1.6, shape),
        "norm_f.weight": lambda: rng.uniform(0.5, 1.6, shape),
        "A_log": lambda: rng.uniform(-1.5, 1.2, shape),
        "D": lambda: normal(0.8),
        "in_proj.weight": lambda: normal(1.3 / shape[-1] ** 0.5),
        "conv1d.weight": lambda: normal(1.2 / shape[-1] ** 0.5),
        "x_proj.weight": lambda: normal(0.9 / shape[-1] ** 0.5),
        "dt_proj.weight": lambda: normal(0.9 / shape[-1] ** 0.5),
        "dt_proj.bias": lambda: rng.uniform(-2.0, 1.0, shape),
        "out_proj.weight": lambda: normal(0.8 / shape[-1] ** 0.5),
        "in_proj.bias": lambda: normal(0.4),
        "conv1d.bias": lambda: normal(0.4),
        "out_proj.bias": lambda: normal(0.4),
    }
    (draw,) = [draw for end, draw in draws.items() if f".{name}".endswith(f".{end}")]
    return torch.from_numpy(draw().astype(np.float32))


# --- transformers -------------------------------------------------------------------------------

# Sizes are odd and different from one another, so that no axis can stand in for another. Options
# that do not touch the result are off their defaults as well, since a reader must accept them; not
# `rescale_prenorm_residual`, with which transformers 5.24 rescales `out_proj` whenever it loads.
NOT_THE_DEFAULT = {
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "time_step_scale": 1.5,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 2e-4,
    "time_step_init_scheme": "constant",
    "use_associative_scan": False,
    "use_cache": False,
}

TRANSFORMERS_CASES: dict[str, dict[str, Any]] = {
    # `intermediate_size` contradicts `expand`, and wins
    "mamba_tiny": {
        "seed": 2,
        "length": 13,
        "config": {
            "vocab_size": 37,
            "hidden_size": 19,
            "intermediate_size": 45,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": True,
            "layer_norm_epsilon": 3e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    },
    # rank "auto" is ceil(17 / 16) = 2; transformers resolves it before it writes the config
    "mamba_tied": {
        "seed": 7,
        "length": 11,
        "config": {
            "vocab_size": 41,
            "hidden_size": 17,
            "expand": 3,
            "intermediate_size": 23,
            "state_size": 7,
            "conv_kernel": 5,
            "time_step_rank": "auto",
            "num_hidden_layers": 3,
            "use_bias": False,
            "use_conv_bias": False,
            "layer_norm_epsilon": 2e-3,
            "residual_in_fp32": False,
            "tie_word_embeddings": True,
        },
    },
    # the exact gelu (erf), on the convolution only: the gate stays a silu
    "mamba_act": {
        "seed": 1,
        "length": 17,
        "config": {
            "vocab_size": 29,
            "hidden_size": 11,
            "expand": 3,
            "state_size": 3,
            "conv_kernel": 5,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 7e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    },
}


def make_transformers(case: str, out: Path, sdist: Path | None) -> None:
    del sdist
    for package in ("mamba_ssm", "causal_conv1d", "mambapy"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    spec = TRANSFORMERS_CASES[case]
    rng = np.random.default_rng(spec["seed"])
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(**NOT_THE_DEFAULT, **spec["config"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = transformers.MambaForCausalLM.from_pretrained(folder).eval()
        config = model.config
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} is not what the file holds"
        tokens = torch.from_numpy(rng.integers(config.vocab_size, size=spec["length"]))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        assert logits_float32.dtype == torch.float32

        witness = transformers_answers(model.double(), tokens)
        sizes = Sizes(
            n_layer=config.num_hidden_layers,
            d_inner=config.intermediate_size,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            dt_rank=int(config.time_step_rank),
            eps=config.layer_norm_epsilon,
            act=config.hidden_act,
        )
        check(case, witness, loop_answers(weights, tokens, sizes))
        check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits are {rounding:.1e} off; greedy {witness['greedy'].tolist()}")
        save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        publish(folder, out / case)


def transformers_answers(model: transformers.MambaForCausalLM, tokens: torch.Tensor) -> Tensors:
    with honest_float64():
        out = model(tokens[None], use_cache=False, output_hidden_states=True)
        loss = F.cross_entropy(out.logits[0, :-1], tokens[1:])
        loss.backward()
        with torch.no_grad():
            cached = model(tokens[None], use_cache=True)
            chosen = greedy(lambda t: model(t[None], use_cache=False).logits[0], tokens)
    assert torch.equal(out.logits, cached.logits)

    # transformers gives the stream after each block, then after the final norm: our definition, and
    # `loop` holds it to that
    n_layer = model.config.num_hidden_layers
    names = [*range(n_layer), "norm_f"]
    answer = {
        f"hidden_states.{name}": hidden[0]
        for name, hidden in zip(names, out.hidden_states, strict=True)
    }
    answer |= {"logits": out.logits[0], "loss": loss, "greedy": chosen}
    for i, layer in enumerate(cached.cache.layers):
        answer[f"state.{i}.conv"] = layer.conv_states[0][0]
        answer[f"state.{i}.ssm"] = layer.recurrent_states[0][0]
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}


def check_size_of_values(answer: Tensors) -> None:
    gradients = {k: v.abs().max().item() for k, v in answer.items() if k.startswith("grad.")}
    hidden = {k: v.std().item() for k, v in answer.items() if k.startswith("hidden_states.")}
    assert len(answer["greedy"].unique()) > GREEDY_TOKENS // 3, answer["greedy"]
    assert min(gradients.values()) > SMALLEST_GRADIENT, gradients
    assert all(0.3 < size < 8 for size in hidden.values()), hidden
    low, high = min(gradients.values()), max(gradients.values())
    print(f"  largest gradient by parameter {low:.1e} to {high:.1e}", end=";")
    print(f" hidden values {min(hidden.values()):.2f} to {max(hidden.values()):.2f}")


def publish(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, to / file.name)


# --- the official code --------------------------------------------------------------------------


def import_official(sdist: Path) -> types.SimpleNamespace:
    """The official modules from source, with stand-ins for their CUDA and Triton parts.

    The scan and the norm become the official pure-torch references of the same files.
    """
    if "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(sdist / "mamba_ssm")]  # its `__init__.py` does not run
        modules: dict[str, Any] = sys.modules
        modules["mamba_ssm"] = package
        for name in ("selective_scan_cuda", "triton", "triton.language"):
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
    if sdist is None:
        print(f"{case}: left out, it needs --official")
        return
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
    answer = loop_answers(weights, tokens, sizes)
    check_size_of_values(answer)
    assert answer["greedy"].max() < config["vocab_size"], "a padding row was chosen"
    renamed: Any = OrderedDict(
        (name.replace("embeddings", "embedding"), w) for name, w in weights.items()
    )
    renamed["lm_head.weight"] = renamed["backbone.embedding.weight"]  # one storage, as upstream
    # what `Module.state_dict()` carries along, and published files therefore hold
    renamed._metadata = module_versions(list(renamed))
    answer = {name.replace("embeddings", "embedding"): value for name, value in answer.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")
        torch.save(renamed, folder / "pytorch_model.bin")
        if sdist is None:
            print(f"{case}: from the plain loop alone, --official would check it")
        else:
            check(case, official_answers(folder, tokens, sdist), answer)
        save(folder, {"tokens": tokens, **answer})
        publish(folder, out / case)


def module_versions(names: list[str]) -> OrderedDict[str, dict[str, int]]:
    """The `_metadata` of a state dict: every module on the way to a parameter, parents first."""
    modules = OrderedDict()
    for name in names:
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[:i]): {"version": 1} for i in range(len(parts) + 1)}
    return modules


def official_answers(folder: Path, tokens: torch.Tensor, sdist: Path) -> Tensors:
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
    for i, (conv, ssm) in memory.key_value_memory_dict.items():
        answer |= {f"state.{i}.conv": conv[0], f"state.{i}.ssm": ssm[0]}
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}


# --- all of them --------------------------------------------------------------------------------

CASES: dict[str, Callable[[str, Path, Path | None], None]] = {
    **dict.fromkeys(TRANSFORMERS_CASES, make_transformers),
    **dict.fromkeys(SCAN_CASES, make_scan),
    "state_spaces_mamba": make_state_spaces,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--case", choices=CASES, action="append", help="default: every case")
    parser.add_argument("--official", type=Path, help="an unpacked source archive of mamba-ssm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for case in args.case or CASES:
        CASES[case](case, args.out, args.official)


if __name__ == "__main__":
    main()
