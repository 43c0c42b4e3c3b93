"""The optimiser of the Mamba papers, and the parameters that it decays."""

import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import optax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from ..layers import GatedRMSNorm, recurrence_mask


_NORMS = (eqx.nn.RMSNorm, eqx.nn.LayerNorm, eqx.nn.GroupNorm, GatedRMSNorm)


def decay_mask(model: PyTree, *, embeddings: bool = True) -> PyTree[bool]:
    """Selects the leaves of a model that weight decay applies to: matrices and convolution
    weights.

    The parameters of recurrences (`A_log`, `D`, `dt_bias`), which set time scales, are not
    decayed; the official code marks exactly these with `_no_weight_decay`. Norms and biases are
    not decayed either, as usual, however many axes they have: Mamba-3's `B_bias` has three, and in
    a [`mamba_eqx.Stacked`][] every parameter has one more. The weight of a router of experts
    ([`mamba_eqx.layers.Router`][]) is decayed like other matrices: by default Megatron-LM exempts
    only biases and parameters of one axis, and transformers' `Trainer` only biases and norms. Its
    `correction_bias`, being a bias, is not decayed. Of a quantised weight
    ([`mamba_eqx.layers.QuantizedLinear`][]), the scales are decayed, and the weight with them.

    **Arguments:**

    - `model`: any pytree. Leaves that are not floating-point arrays are not decayed.
    - `embeddings`: whether to decay `equinox.nn.Embedding`s, such as the `embedding` of a
        [`mamba_eqx.LanguageModel`][], which is its head too if they are tied. The official recipe
        decays them.

    **Returns:**

    The same tree with `True` or `False` in place of each leaf, for the `mask` of
    `optax.adamw`.
    """
    exempt = _NORMS if embeddings else (*_NORMS, eqx.nn.Embedding)

    def is_exempt(node: object) -> bool:
        return isinstance(node, exempt)

    def decays(path: KeyPath, node: PyTree) -> PyTree[bool]:
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
    r"""Builds the optimiser of the Mamba papers: AdamW with $\beta = (0.9, 0.95)$, gradients
    clipped to a global norm, a linear warm-up, and a cosine decay to almost zero.

    Reference: Gu and Dao, *Mamba* (2023), appendix E.2.1. Its peak learning rates are five times
    those of GPT-3: `3e-3` for 130 million parameters, `1e-3` for 1.4 billion.

    **Arguments:**

    - `model`: the model to optimise. Only its structure is used.
    - `learning_rate`: the peak learning rate, at least `final`.
    - `steps`: the total number of steps, warm-up included.
    - `warmup`: the number of warm-up steps; by default a tenth of `steps`.
    - `final`: the learning rate at the end of the decay, at least 0.
    - `weight_decay`: the weight decay of AdamW.
    - `clip`: the global norm that gradients are clipped to.
    - `decay`: a function from the model to the leaves that are decayed, such as
        `functools.partial(decay_mask, embeddings=False)`.

    **Returns:**

    An optax optimiser, whose state contains the learning rate.

    **Raises:** `ValueError` if the warm-up is not shorter than `steps`, or `final` is above
    `learning_rate`.
    """
    warmup = max(1, steps // 10) if warmup is None else warmup
    if not 0 <= warmup < steps:
        raise ValueError(
            f"`warmup` must be at least 0 and below `steps`, but got warmup={warmup} and "
            f"steps={steps}."
        )
    if not 0 <= final <= learning_rate:
        raise ValueError(
            f"`final` must be between 0 and `learning_rate`, but got final={final} and "
            f"learning_rate={learning_rate}."
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, final)
    # `inject_hyperparams` puts the learning rate into the state. Nothing else changes over time.
    others = set(inspect.signature(optax.adamw).parameters) - {"learning_rate"}
    adamw = optax.inject_hyperparams(optax.adamw, static_args=others)(
        schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decay(model)
    )
    return optax.chain(optax.clip_by_global_norm(clip), adamw)
