"""Losses of language models."""

from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_positive
from .._trees import repeated
from ..models import LanguageModel
from .data import Batch


class LossAux(NamedTuple):
    """The second result of a loss."""

    weight: Float[Array, ""] | Int[Array, ""]
    """The number of targets that the loss is a mean over. Groups of rows are averaged with these
    weights."""

    carry: PyTree
    """The state after the batch, with a first axis of rows."""


def next_token_loss(
    model: LanguageModel,
    batch: Batch,
    carry: PyTree | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> tuple[Float[Array, ""], LossAux]:
    r"""Computes the mean cross-entropy of the next token, in nats, over the targets that count:

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

    **Returns:**

    The loss, a scalar that is 0 if no target counts, and a
    [`mamba_eqx.training.LossAux`][].

    **Raises:** `ValueError` for an option out of range.
    """

    tokens, targets, reset, mask = (jnp.asarray(array) for array in batch)

    def row(tokens: Array, reset: Array, carry: PyTree) -> tuple[Array, PyTree]:
        return model.backbone(tokens, carry, reset=reset)

    if len(tokens) == 1:
        # `vmap` over one row is slower than the row alone.
        first = jax.tree.map(lambda leaf: leaf[0], (tokens, reset, carry))
        features, carry = jax.tree.map(lambda leaf: leaf[None], row(*first))
    else:
        features, carry = jax.vmap(row)(tokens, reset, carry)
    loss = cross_entropy(
        model,
        features,
        targets,
        mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk=chunk,
    )
    return loss, LossAux(jnp.sum(mask), carry)


def cross_entropy(
    model: LanguageModel,
    features: Float[Array, "*batch d_model"],
    targets: Int[Array | np.ndarray, "*batch"],
    mask: Bool[Array | np.ndarray, "*batch"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> Float[Array, ""]:
    r"""Computes the mean cross-entropy of targets under the head of a model, in chunks of tokens.

    The logits of a long batch would be the largest array of a training step. In chunks, only the
    logits of `chunk` tokens exist at a time, also in the reverse pass, which recomputes them.

    The softmax includes the rows of the embedding beyond `model.vocab_size`, which are never a
    target. transformers' loss includes all columns of the logits too, and the logits of the
    official models have them all. Training therefore makes these rows improbable. Without them in
    the loss their logits would keep their initial values, and sampling from all columns could draw
    them. Label smoothing gives them no probability.

    **Arguments:**

    - `model`: the model whose `logits` are the head.
    - `features`: the result of [`mamba_eqx.LanguageModel.backbone`][].
    - `targets`: the tokens to predict. Targets are arbitrary where `mask` is false.
    - `mask`: true where the target counts.
    - `label_smoothing`: $\epsilon$, within `0 <= epsilon < 1`: the probability that is spread over
        the `vocab_size` tokens. The same as `label_smoothing` of torch's `cross_entropy`; Szegedy
        et al., *Rethinking the Inception Architecture* (2016), section 7.
    - `z_loss`: $\zeta$, at least 0: keeps $\log Z$ near 0, so that logits do not drift in
        bfloat16. Chowdhery et al., *PaLM* (2022), section 5, where it is `1e-4`.
    - `chunk`: the number of tokens whose logits exist at the same time, at least 1.

    **Returns:**

    The mean over the targets that count, a scalar in float32 or wider; 0 if there are
    none.

    **Raises:** `ValueError` for an option out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "`label_smoothing` must be within 0 <= label_smoothing < 1, but got "
            f"label_smoothing={label_smoothing}."
        )
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"`z_loss` must be finite and at least 0, but got z_loss={z_loss}.")
    check_positive("chunk", chunk)

    def piece_loss(features: Array, targets: Array, mask: Array) -> Array:
        logits = model.logits(features)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = log_z - (1 - label_smoothing) * right
        if label_smoothing:
            loss = loss - label_smoothing * jnp.mean(logits[..., : model.vocab_size], axis=-1)
        if z_loss:
            loss = loss + z_loss * log_z**2
        return jnp.sum(jnp.where(mask, loss, jnp.zeros_like(loss)))

    rows = features.reshape(-1, features.shape[-1])
    # A target that does not count may be an invalid token id.
    targets, mask = jnp.where(mask, targets, 0).reshape(-1), mask.reshape(-1)
    size = min(chunk, len(rows))
    missing = -len(rows) % size
    pieces = jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)).reshape(
            -1, size, *leaf.shape[1:]
        ),
        (rows, targets, mask),
    )

    def body(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(piece_loss)(*piece), None

    dtype = jax.eval_shape(piece_loss, *jax.tree.map(lambda leaf: leaf[0], pieces)).dtype
    total, _ = lax.scan(body, jnp.zeros((), dtype), pieces)
    return total / jnp.maximum(jnp.sum(mask), 1).astype(dtype)


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
