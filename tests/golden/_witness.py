"""The second witness: Mamba-1 as a plain loop over tokens, in float64, and what compares the two.

Imported by `make_golden.py`. Nothing of `mamba_eqx` is imported here.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file
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
    select_eps: float | None = None  # of Falcon-Mamba's norms on dt, B and C


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
            dt, b, c = dbc.split([s.dt_rank, s.d_state, s.d_state])
            if s.select_eps is not None:
                dt, b, c = (rms_norm(part, 1, s.select_eps) for part in (dt, b, c))
            dt = w["mixer.dt_proj.weight"] @ dt + w["mixer.dt_proj.bias"]
            dt = torch.logaddexp(dt, torch.zeros_like(dt))
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


# --- weights, and whether they are good ones -----------------------------------------------------


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
