"""What the ops that run in chunks share, within one chunk."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree


def documents(
    reset: Bool[Array, " chunk"] | None, size: int
) -> tuple[Bool[Array, "chunk chunk"], Bool[Array, " chunk"]]:
    """Which tokens (of the first axis) see which others, and which see what came before the chunk:
    none beyond the last reset."""
    document = jnp.zeros(size, jnp.int32) if reset is None else jnp.cumsum(reset, dtype=jnp.int32)
    return jnp.tril(document[:, None] == document), document == 0


def decays(
    logs: Float[Array, "*heads chunk"], visible: Bool[Array, "chunk chunk"]
) -> Float[Array, "*heads chunk chunk"]:
    """The decay of every token (last axis) until every later one that sees it; otherwise zero.

    The decay from token s to token l is summed from s on. As a difference of two sums from the
    start of the chunk it would have the rounding errors of both.

    **Arguments:**

    - `logs`: the logarithm of every token's decay.
    """
    ones = jnp.ones(visible.shape, bool)
    # The sums as a product of matrices, several times as fast as `jnp.cumsum`. Infinity times zero
    # would not be a number.
    logs = jnp.maximum(logs, jnp.finfo(logs.dtype).min)
    terms = jnp.where(jnp.tril(ones, -1), logs[..., None], jnp.zeros_like(logs)[..., None])
    upto = jnp.tril(ones).astype(logs.dtype)
    between = jnp.einsum("lt,...ts->...ls", upto, terms, precision=lax.Precision.HIGHEST)
    return jnp.exp(jnp.where(visible, between, -jnp.inf))


def only(mask: Bool[Array, "*#shape"], array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`array` where `mask` is true, zero elsewhere.

    A `where`, because what is forgotten need not be a number. Its derivative need not be one
    either, unless its factors are masked as well.
    """
    return jnp.where(mask, array, jnp.zeros_like(array))


def cut_into_chunks(chunk_size: int, tokens: PyTree[Array]) -> PyTree[Array]:
    """Arrays over tokens as arrays over chunks of tokens, the last chunk filled with zeros."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, but got chunk_size={chunk_size}.")

    def cut(t: Array) -> Array:
        size = max(1, min(chunk_size, t.shape[0]))
        t = jnp.pad(t, ((0, -t.shape[0] % size),) + ((0, 0),) * (t.ndim - 1))
        return t.reshape((-1, size, *t.shape[1:]))

    return jax.tree.map(cut, tokens)
