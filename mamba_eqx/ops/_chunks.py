"""Helpers for ops that run one chunk of tokens after another."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def visibility(
    reset: Bool[Array, " chunk"] | None, size: int
) -> tuple[Bool[Array, "chunk chunk"], Bool[Array, " chunk"]]:
    """Returns two masks of a chunk, in which no token sees beyond the last reset before it.

    **Arguments:**

    - `reset`: true at the first token of every new document, or `None` if there is none.
    - `size`: the number of tokens in the chunk.

    **Returns:**

    Whether a token (first axis) sees another (second axis), shape `(chunk, chunk)`; and whether it
    sees the state before the chunk, shape `(chunk,)`.
    """
    document = jnp.zeros(size, jnp.int32) if reset is None else jnp.cumsum(reset, dtype=jnp.int32)
    return jnp.tril(document[:, None] == document), document == 0


def decays_between(
    logs: Float[Array, "*heads chunk"], visible: Bool[Array, "chunk chunk"]
) -> Float[Array, "*heads chunk chunk"]:
    """Returns the decay from every token to every later token of a chunk.

    The decay from token s to token l is summed from s on. As a difference of two sums from the
    start of the chunk it would have the rounding errors of both.

    **Arguments:**

    - `logs`: the logarithm of every token's decay, shape `(*heads, chunk)`.
    - `visible`: whether token l (first axis) sees token s (second axis), shape `(chunk, chunk)`.

    **Returns:**

    The decays, shape `(*heads, l, s)`: zero where l does not see s.
    """
    ones = jnp.ones(visible.shape, bool)
    # A matrix product computes the sums several times as fast as `jnp.cumsum`. The clamp avoids
    # infinity times zero, which is NaN.
    logs = jnp.maximum(logs, jnp.finfo(logs.dtype).min)
    terms = jnp.where(jnp.tril(ones, -1), logs[..., None], jnp.zeros_like(logs)[..., None])
    upto = jnp.tril(ones).astype(logs.dtype)
    between = jnp.einsum("lt,...ts->...ls", upto, terms, precision=lax.Precision.HIGHEST)
    return jnp.exp(jnp.where(visible, between, -jnp.inf))


def keep_where(
    mask: Bool[Array, "*#shape"], array: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns `array` where `mask` is true, and zero elsewhere.

    `jnp.where` is needed because a forgotten entry may be NaN, which times zero is NaN. Gradients
    are finite only if the factors of such an entry are masked as well.
    """
    return jnp.where(mask, array, jnp.zeros_like(array))
