"""Low-rank adaptation of every linear map of a model."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._checks import check_positive
from ..._dtypes import at_least_float32
from ..._trees import path_name
from ...layers import Linear


_Model = TypeVar("_Model", bound=PyTree)


class LoRAPair(eqx.Module):
    """The change of one weight, `scale * b @ a`.

    The axes in front are those that the weight has before its own two: the layers of a
    [`mamba_eqx.Stacked`][], the members of an ensemble.
    """

    a: Float[Array, "*stack rank in_features"]
    b: Float[Array, "*stack out_features rank"]


class LoRA(eqx.Module):
    r"""Low-rank adaptation: what is trained instead of a model, a small change of its linear maps,

    $$W' = W + \frac{\alpha}{r} B A, \qquad A \in \mathbb{R}^{r \times \text{in}},\;
      B \in \mathbb{R}^{\text{out} \times r}.$$

    The model itself stays as it is. `merge`, inside the loss, gives an ordinary model with the
    changed weights, through which gradients flow into `A` and `B`:

    ```python
    lora = LoRA.init(model, rank=8, key=key)
    loss, grads = jax.value_and_grad(lambda lora: loss_of(lora.merge(model), tokens))(lora)
    ```

    $B$ starts at zero, and so the merged model as the model. The pairs are at least float32, and
    the sum is rounded to the dtype of the weight. In bfloat16 that rounding swallows small changes,
    so that a model stored in bfloat16 is better cast inside the loss, `lora.merge(mbx.cast(model,
    jnp.float32))`, which costs a copy of its weights.

    The usual design adds $B A x$ to the output of each layer, by a wrapper around it. Merging
    instead works for whatever reads a `weight`, past a wrapper too, needs no change to any module,
    and what comes out can be saved, scanned and stepped like any model. Its price are the
    gradients of the merged weights, which a wrapper avoids, while a wrapper keeps more for the
    reverse pass. Measured (`python benchmarks/lora.py`, medians in turns): a gradient of the model
    that ships, on 2048 tokens, took 1.01 times as long as with wrappers, in 10 % less temporary
    memory; at the width of mamba-130m, with four layers, 1.16 times, in 6 % less. There
    is no dropout in front of $A$, for which merging has no place.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021), section 4.
    """

    pairs: dict[str, LoRAPair]
    scale: float = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        model: PyTree,
        *,
        rank: int,
        alpha: float | int | None = None,
        targets: Sequence[str] | Callable[[str], bool] | None = None,
        key: PRNGKeyArray,
    ) -> "LoRA":
        r"""New pairs, which change nothing yet.

        **Arguments:**

        - `model`: any pytree with [`mamba_eqx.layers.Linear`][] or `equinox.nn.Linear` in it.
        - `rank`: $r$.
        - `alpha`: $\alpha$; by default `rank`, that is a scale of 1.
        - `targets`: which linear maps: the ends of their paths, such as `"in_proj"` or
            `"layers.0.mixer.out_proj"`, or a function of the path. By default all.
        - `key`: for $A$, uniform within $\pm 1/\sqrt{\text{in}}$ as in PEFT.

        **Raises:** `ValueError` if no linear map is chosen, or a target names none.
        """
        check_positive("rank", rank)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"`alpha` must be positive, but got alpha={alpha}.")
        chosen = _chosen(linear_maps(model), targets)
        keys = jr.split(key, len(chosen))
        pairs = {
            path: _new_pair(linear.weight, rank, pair_key)
            for (path, linear), pair_key in zip(chosen.items(), keys, strict=True)
        }
        return cls(pairs, 1.0 if alpha is None else alpha / rank)

    def merge(self, model: _Model) -> _Model:
        """The model with changed weights, in the dtypes of its own.

        **Arguments:**

        - `model`: the one that this was made for, or one of its structure.

        **Raises:** `ValueError` if the model lacks a linear map that this changes, or has it in
        another shape.
        """
        missing = sorted(self.pairs.keys() - linear_maps(model).keys())
        if missing:
            raise ValueError(
                f"The model has no linear map at {', '.join(missing)}, which this LoRA changes. "
                "Give the model that it was made for (a `Stacked` one has other paths than an "
                "`Unrolled` one)."
            )

        def merged(path: Any, node: Any) -> Any:
            name = path_name(path)
            return self._merged(name, node, self.pairs[name]) if name in self.pairs else node

        return jax.tree_util.tree_map_with_path(merged, model, is_leaf=_is_linear)

    def _merged(self, path: str, linear: Any, pair: LoRAPair) -> Any:
        weight = linear.weight
        change = self.scale * jnp.matmul(pair.b, pair.a)
        if change.shape != weight.shape:
            raise ValueError(
                f"The weight of {path} is of shape {weight.shape}, but this LoRA was made for one "
                f"of shape {change.shape}. Give the model that it was made for."
            )
        new = (weight.astype(change.dtype) + change).astype(weight.dtype)
        return eqx.tree_at(lambda linear: linear.weight, linear, new)


def linear_maps(model: PyTree) -> dict[str, Any]:
    """The linear maps of a model, by path."""
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear)
    return {path_name(path): node for path, node in nodes if _is_linear(node)}


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear | eqx.nn.Linear)


def _chosen(
    linears: dict[str, Any], targets: Sequence[str] | Callable[[str], bool] | None
) -> dict[str, Any]:
    if targets is None:
        found = linears
    elif callable(targets):
        found = {path: linear for path, linear in linears.items() if targets(path)}
    else:
        if isinstance(targets, str):
            raise ValueError(f"`targets` must be a list of names, but got {targets!r} alone.")
        ends = {name: [p for p in linears if f".{p}".endswith(f".{name}")] for name in targets}
        for name, paths in ends.items():
            if not paths:
                raise ValueError(
                    f"`targets` names {name!r}, but no linear map of the model has a path that "
                    f"ends so. There are {', '.join(linears) or 'none'}."
                )
        wanted = {path for paths in ends.values() for path in paths}
        found = {path: linear for path, linear in linears.items() if path in wanted}
    if not found:
        raise ValueError(f"No linear map was chosen. The model has {', '.join(linears) or 'none'}.")
    return found


def _new_pair(weight: Array, rank: int, key: PRNGKeyArray) -> LoRAPair:
    *stack, out_features, in_features = weight.shape
    dtype, bound = at_least_float32(weight), in_features**-0.5
    return LoRAPair(
        a=jr.uniform(key, (*stack, rank, in_features), dtype, -bound, bound),
        b=jnp.zeros((*stack, out_features, rank), dtype),
    )
