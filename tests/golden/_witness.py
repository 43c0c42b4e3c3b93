"""Shared by all golden cases: float64 for other people's code, the answers of a plain loop over
tokens, and the comparison of the two."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
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
Sizes = TypeVar("Sizes")


# --- float64 in code that calls `.float()` -------------------------------------------------------


class OnlyFloat64(TorchDispatchMode):
    """Raises if any operation, forward or backward, returns another floating-point dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                assert leaf.dtype == torch.float64, f"{func} returned {leaf.dtype}"
        return out


@contextlib.contextmanager
def honest_float64() -> Iterator[None]:
    """Turns casts to float32 into casts to float64, and checks that nothing else is computed."""
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


# --- what a loop over tokens answers -------------------------------------------------------------


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def loop_answers(
    loop: Callable[[Tensors, torch.Tensor, Sizes], Tensors],
    weights: Tensors,
    tokens: torch.Tensor,
    sizes: Sizes,
) -> Tensors:
    """Runs a loop over tokens, and adds its loss, the gradients and the greedy continuation.

    **Arguments:**

    - `loop`: a model as a plain loop. It takes the weights, the tokens and the sizes, and returns
        the logits, the residual stream and the final states.
    - `weights`: by their names in the checkpoint.
    - `tokens`: one sequence.
    - `sizes`: the third argument of `loop`.
    """
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
    """Continues greedily without a cache, running the whole sequence again for every token."""
    for _ in range(GREEDY_TOKENS):
        best = forward(tokens)[-1].topk(2)
        gap = (best.values[0] - best.values[1]).item()
        assert gap > GREEDY_MARGIN, f"the best tokens are only {gap} apart: change the seed"
        tokens = torch.cat([tokens, best.indices[:1]])
    return tokens[-GREEDY_TOKENS:]


def check(case: str, witness: Tensors, ours: Tensors, tolerance: float = TOLERANCE) -> None:
    """Raises unless all arrays agree; prints the largest difference by kind of array."""
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
    """Writes `golden.safetensors`, with token ids as int32."""
    narrow = {torch.int64: torch.int32}
    arrays = {k: v.detach().to(narrow.get(v.dtype, v.dtype)) for k, v in arrays.items()}
    numpy = {k: v.contiguous().numpy() for k, v in arrays.items()}
    save_file(numpy, folder / "golden.safetensors")


# --- random weights, and checks that they are useful ---------------------------------------------


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draws a weight such that hidden values are of order one and no gradient is small."""

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
    """Raises if a gradient is too small, or hidden values too far from one, to show a mistake."""
    gradients = {k: v.abs().max().item() for k, v in answer.items() if k.startswith("grad.")}
    hidden = {k: v.std().item() for k, v in answer.items() if k.startswith("hidden_states.")}
    assert len(answer["greedy"].unique()) > GREEDY_TOKENS // 3, answer["greedy"]
    assert min(gradients.values()) > SMALLEST_GRADIENT, gradients
    assert all(0.3 < size < 8 for size in hidden.values()), hidden
    low, high = min(gradients.values()), max(gradients.values())
    print(f"  largest gradient by parameter {low:.1e} to {high:.1e}", end=";")
    print(f" hidden values {min(hidden.values()):.2f} to {max(hidden.values()):.2f}")


def publish(folder: Path, to: Path) -> None:
    """Copies the files of a finished case to their place."""
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, to / file.name)
