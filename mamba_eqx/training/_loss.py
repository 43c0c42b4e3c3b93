"""Losses of language models."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Num, PyTree

from .._checks import check_positive
from .._dtypes import at_least_float32
from .._trees import cut_into_chunks, repeated, vary_together
from ..layers import Routes
from ..models import LanguageModel
from ._load_balance import load_balancing_loss
from ._row_sharding import total_over_rows
from .data import Batch


_IGNORED = -100


class LossAux(NamedTuple):
    """The second result of a loss."""

    weight: Float[Array, ""] | Int[Array, ""]
    """The number of targets that the loss is a mean over, or the sum of their weights. Groups of
    rows are averaged with these weights."""

    carry: PyTree
    """The state after the batch, with a first axis of rows."""


def next_token_loss(
    model: LanguageModel,
    batch: Batch,
    carry: PyTree | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    balance: float = 0.0,
    chunk: int = 256,
) -> tuple[Float[Array, ""], LossAux]:
    r"""Computes the mean cross-entropy of the next token, in nats, over the targets that count,
    weighted by the mask $m$:

    $$\frac{1}{\sum_i m_i} \sum_i m_i \left[ (1 - \epsilon)\, (-\log p_i) - \frac{\epsilon}{V}
      \sum_{v < V} \log p_{iv} + \zeta \log^2 Z_i \right],
      \qquad p_{iv} = e^{l_{iv}} / Z_i, \quad Z_i = \sum_v e^{l_{iv}}.$$

    See [`mamba_eqx.training.cross_entropy`][] for the terms.

    **Arguments:**

    - `model`: the model. Gradients are with respect to this argument.
    - `batch`: the tokens and targets. `batch.reset` keeps documents in one row independent.
    - `carry`: the state of each row before the batch, with a first axis of rows, for truncated
        backpropagation through time; `None` for the empty state. No gradient flows through it
        unless it is differentiated.
    - `label_smoothing`, `z_loss`, `chunk`: see [`mamba_eqx.training.cross_entropy`][].
    - `balance`: a factor, at least 0, of [`mamba_eqx.training.load_balancing_loss`][] of the tokens
        whose targets count, which is added for a model with experts. transformers' default is
        `0.001`. With `accumulate` of [`mamba_eqx.training.TrainStep`][], every group of rows is
        balanced by itself.

    **Returns:**

    The loss, a scalar that is 0 if no target counts, and a
    [`mamba_eqx.training.LossAux`][].

    **Raises:** `ValueError` for an option out of range, `balance` for a model without experts, or
    a batch whose targets and mask have different shapes.
    """
    # The factor `True` would be 1, hundreds of times the usual one.
    if isinstance(balance, bool) or not 0 <= balance < float("inf"):
        raise ValueError(
            "`balance` must be a factor, finite and at least 0, such as 0.001, but got "
            f"balance={balance}."
        )
    tokens, targets, reset, mask = (jnp.asarray(array) for array in batch)
    tokens = tokens.astype(jnp.int32)  # Layers take signed integers.

    def row(tokens: Array, reset: Array, carry: PyTree) -> tuple[Array, PyTree, tuple[Routes, ...]]:
        if balance:
            return model.backbone_with_routes(tokens, carry, reset=reset)
        return (*model.backbone(tokens, carry, reset=reset), ())

    if len(tokens) == 1:
        # `vmap` over one row is slower than the row alone.
        first = jax.tree.map(lambda leaf: leaf[0], (tokens, reset, carry))
        features, carry, routes = jax.tree.map(lambda leaf: leaf[None], row(*first))
    else:
        features, carry, routes = jax.vmap(row)(tokens, reset, carry)
    if balance and not routes:
        raise ValueError(
            f"`balance` needs a model with experts, but got balance={balance} and a model without "
            "a `MixtureOfExperts` in its blocks. Leave `balance` out."
        )
    mask = _without_ignored(mask, targets)
    loss = cross_entropy(
        model,
        features,
        targets,
        mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk=chunk,
    )
    if balance:
        loss = loss + balance * load_balancing_loss(routes, mask)
    return loss, LossAux(_total(mask), carry)


def cross_entropy(
    model: LanguageModel,
    features: Float[Array, "*batch d_model"],
    targets: Integer[Array | np.ndarray, "*batch"],
    mask: Bool[Array | np.ndarray, "*batch"] | Num[Array | np.ndarray, "*batch"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> Float[Array, ""]:
    r"""Computes the mean cross-entropy of targets under the head of a model, in chunks of tokens.

    With weights in place of a mask of bools, the mean is weighted:
    $\sum_i m_i \ell_i / \sum_i m_i$. A target of -100 never counts, as with torch's
    `cross_entropy` and in transformers. Every other target that is no token id, such as -1 or one
    beyond the logits, makes the loss NaN where it counts, and is not taken for another token.

    The logits of a long batch would be the largest array of a training step. In chunks, only the
    logits of `chunk` tokens exist at a time, also in the reverse pass, which recomputes them. Rows
    are cut along time, so that there is at least one token of every row. If the rows are sharded
    over devices, no features are exchanged. In a [`mamba_eqx.training.TrainStep`][], or in a mesh
    with explicit axes, every device runs chunks of its own rows, and the gradient of the head is
    summed over the devices once.

    The softmax includes the rows of the embedding beyond `model.vocab_size`, which are never a
    target. transformers' loss includes all columns of the logits too, and the logits of the
    official models have them all. Training therefore makes these rows improbable. Without them in
    the loss their logits would keep their initial values, and sampling from all columns could draw
    them. Label smoothing gives them no probability.

    **Arguments:**

    - `model`: the model whose `logits` are the head.
    - `features`: the result of [`mamba_eqx.LanguageModel.backbone`][].
    - `targets`: the tokens to predict, of any integer dtype. Targets are arbitrary where `mask` is
        false or 0.
    - `mask`: true where the target counts; or the weight of each target, at least 0.
    - `label_smoothing`: $\epsilon$, within `0 <= epsilon < 1`: the probability that is spread over
        the `vocab_size` tokens. The same as `label_smoothing` of torch's `cross_entropy`; Szegedy
        et al., *Rethinking the Inception Architecture* (2016), section 7.
    - `z_loss`: $\zeta$, at least 0: keeps $\log Z$ near 0, so that logits do not drift in
        bfloat16. Chowdhery et al., *PaLM* (2022), section 5, where it is `1e-4`.
    - `chunk`: the number of tokens whose logits exist at the same time, at least 1.

    **Returns:**

    The mean over the targets that count, a scalar in float32 or wider; 0 if there are
    none.

    **Raises:** `ValueError` for an option out of range, or if the shapes of `targets` and `mask`
    are not that of `features` without its last axis.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "`label_smoothing` must be within 0 <= label_smoothing < 1, but got "
            f"label_smoothing={label_smoothing}."
        )
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"`z_loss` must be finite and at least 0, but got z_loss={z_loss}.")
    check_positive("chunk", chunk)

    targets, mask = jnp.asarray(targets), jnp.asarray(mask)
    weights = _without_ignored(mask, targets)
    if features.shape[:-1] != targets.shape:
        raise ValueError(
            "`targets` must have the shape of `features` without its last axis, but got "
            f"{targets.shape} for features of shape {features.shape}. Broadcast the targets."
        )

    def piece_loss(head: LanguageModel, features: Array, targets: Array, weights: Array) -> Array:
        counts = weights.astype(jnp.bool_)
        # Zero times NaN is NaN, so NaN in the features of padding would reach the gradient.
        features = jnp.where(counts[..., None], features, jnp.zeros_like(features))
        logits = head.logits(features)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # `take_along_axis` counts negative indices from the end, whatever its mode.
        right = jnp.where(targets < 0, jnp.full_like(right, jnp.nan), right)
        loss = log_z - (1 - label_smoothing) * right
        if label_smoothing:
            loss = loss - label_smoothing * jnp.mean(logits[..., : model.vocab_size], axis=-1)
        if z_loss:
            loss = loss + z_loss * log_z**2
        return jnp.sum(jnp.where(counts, weights.astype(loss.dtype) * loss, jnp.zeros_like(loss)))

    # A target that does not count may be an invalid token id. int32 holds every token id, and
    # dtypes such as uint8 do not hold the number of tokens.
    targets = jnp.where(weights.astype(jnp.bool_), targets, jnp.zeros_like(targets)).astype(
        jnp.int32
    )

    if targets.ndim == 0:
        features, targets, weights = features[None], targets[None], weights[None]

    parameters, static = eqx.partition(model, eqx.is_array)

    def total_loss(parameters: PyTree, tokens: tuple[Array, Array, Array]) -> Array:
        *rows, _ = tokens[1].shape
        # Every piece has tokens of all rows. Pieces of consecutive tokens would exchange the
        # features of rows that are sharded over devices.
        by_time = jax.tree.map(lambda array: jnp.moveaxis(array, len(rows), 0), tokens)
        pieces = cut_into_chunks(max(1, chunk // max(1, math.prod(rows))), by_time)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), pieces)
        dtype = jax.eval_shape(piece_loss, eqx.combine(parameters, static), *shapes).dtype
        # Inside `jax.shard_map`, the reverse pass sums over devices where parameters begin to vary.
        zero, pieces, parameters = vary_together((jnp.zeros((), dtype), pieces, parameters))
        head = eqx.combine(parameters, static)

        def body(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
            return total + jax.checkpoint(piece_loss)(head, *piece), None

        return lax.scan(body, zero, pieces)[0]

    tokens = (features, targets, weights)
    if targets.ndim > 1:
        total = total_over_rows(total_loss, parameters, tokens)
    else:  # The first axis is the time.
        total = total_loss(parameters, tokens)
    weight = _total(weights).astype(total.dtype)
    return total / jnp.where(weight == 0, jnp.ones_like(weight), weight)


def _without_ignored(mask: Array, targets: Array) -> Array:
    """Returns the mask, or the weights, with zeros for the targets that are ignored.

    **Raises:** `ValueError` if the shapes differ.
    """
    if mask.shape != targets.shape:
        raise ValueError(
            f"`mask` must have the shape of `targets`, but got {mask.shape} and {targets.shape}. "
            "Broadcast the mask."
        )
    if jnp.iinfo(targets.dtype).min > _IGNORED:
        return mask  # The dtype does not hold the ignored id.
    return jnp.where(targets == _IGNORED, jnp.zeros_like(mask), mask)


def _total(weights: Array) -> Array:
    """Returns the number of targets that count, or the sum of their weights."""
    if jnp.issubdtype(weights.dtype, jnp.floating):
        weights = weights.astype(at_least_float32(weights))
    return jnp.sum(weights)


@runtime_checkable
class HasState(Protocol):
    """A model or a layer with an empty state."""

    def init_state(self) -> PyTree:
        """Returns the empty state of one sequence."""
        ...


def empty_carry(model: HasState, rows: int) -> PyTree:
    """Returns the empty state of each row of a batch, for the `carry` of a loss.

    **Arguments:**

    - `model`: a [`mamba_eqx.LanguageModel`][], a layer, or any other module with `init_state`.
    - `rows`: the number of rows.

    **Returns:**

    `model.init_state()`, each array repeated along a new first axis of `rows`.
    """
    return repeated(eqx.filter_jit(model.init_state)(), rows)
