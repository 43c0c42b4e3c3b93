import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from ..layers import GatedRMSNorm, recurrence_mask


_NORMS = (eqx.nn.RMSNorm, eqx.nn.LayerNorm, eqx.nn.GroupNorm, GatedRMSNorm)


def decay_mask(model: PyTree, *, embeddings: bool = True) -> PyTree[bool]:
    """Which leaves of a model get weight decay: the matrices, and the weights of convolutions.

    Not the parameters of recurrences (`A_log`, `D`, `dt_bias`), which set time scales. They are
    all that the official code marks with `_no_weight_decay`. And not norms and biases, as usual,
    whatever the number of their axes: Mamba-3's `B_bias` has three, and in a
    [`mamba_eqx.Stacked`][] everything has one more.

    **Arguments:**

    - `model`: any pytree. Leaves that are no floating-point arrays are not decayed.
    - `embeddings`: whether the `embedding` of a [`mamba_eqx.LanguageModel`][], which is its head
        too if they are tied, and `equinox.nn.Embedding`s elsewhere are decayed. They are in the
        official recipe.

    **Returns:** the same tree with `True` or `False` in place of its leaves, as for `mask` of
    `optax.adamw`.
    """
    exempt = _NORMS if embeddings else (*_NORMS, eqx.nn.Embedding)

    def is_exempt(node: Any) -> bool:
        return isinstance(node, exempt)

    def decays(path: tuple[Any, ...], node: Any) -> PyTree[bool]:
        if is_exempt(node):
            return jax.tree.map(lambda _: False, node)
        name = jax.tree_util.keystr(path[-1:])
        return eqx.is_inexact_array(node) and node.ndim > 1 and not name.endswith("bias")

    mask = jax.tree_util.tree_map_with_path(decays, model, is_leaf=is_exempt)
    return jax.tree.map(lambda decayed, r: decayed and not r, mask, recurrence_mask(model))


def recipe(
    model: PyTree,
    *,
    learning_rate: float,
    steps: int,
    warmup: int | None = None,
    final: float = 1e-5,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    decay: Callable[[PyTree], PyTree[bool]] = decay_mask,
) -> optax.GradientTransformation:
    r"""The optimiser of the Mamba papers: AdamW with $\beta = (0.9, 0.95)$, gradients clipped to a
    global norm, a linear warm-up, and a cosine down to almost nothing.

    Reference: Gu and Dao, *Mamba* (2023), appendix E.2.1. Its peak learning rates are five times
    those of GPT-3: `3e-3` for 130 million parameters, `1e-3` for 1.4 billion.

    **Arguments:**

    - `model`: what is optimised; only its structure matters.
    - `learning_rate`: at the peak.
    - `steps`: of the whole training, warm-up included.
    - `warmup`: the steps of it; by default a tenth.
    - `final`: the learning rate at the end.
    - `weight_decay`, `clip`: as in the paper.
    - `decay`: which leaves are decayed, as a function of the model:
        `functools.partial(decay_mask, embeddings=False)`, say.

    **Returns:** an optimiser of optax.

    **Raises:** `ValueError` if the warm-up is not shorter than the training, or `final` is above
    the peak.
    """
    warmup = max(1, steps // 10) if warmup is None else warmup
    if not 0 <= warmup < steps:
        raise ValueError(
            f"`warmup` must be at least 0 and below `steps`, but got warmup={warmup} and "
            f"steps={steps}."
        )
    if not 0 <= final <= learning_rate:
        raise ValueError(
            f"`final` must be within 0 and the peak, but got final={final} and "
            f"learning_rate={learning_rate}."
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, final)
    # So that the state tells the learning rate. All else is no hyperparameter that changes.
    others = set(inspect.signature(optax.adamw).parameters) - {"learning_rate"}
    adamw = optax.inject_hyperparams(optax.adamw, static_args=others)(
        schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decay(model)
    )
    return optax.chain(optax.clip_by_global_norm(clip), adamw)
