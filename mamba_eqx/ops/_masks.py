"""Masks for the arguments `reset` and `length`, which have the same meaning in every op.

A token at or after `length` is padding: it leaves the state unchanged and cannot reset it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer, Shaped


def document_positions(
    seq: int,
    *,
    start: Integer[Array, ""] | int = 0,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
) -> Int[Array, " seq"]:
    """Returns the position of every token in its document.

    A document begins at each reset; its first token has position 0. Packed documents therefore get
    the position embeddings that each would get alone.

    **Arguments:**

    - `seq`: the number of tokens.
    - `start`: the position of the first token, unless a reset sets it to 0.
    - `reset`: true at the first token of every new document, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding and their resets are ignored.

    **Returns:**

    The positions, shape `(seq,)`.
    """
    begin = document_starts(seq, reset, real_tokens(seq, length))
    return jnp.arange(seq, dtype=jnp.int32) - jnp.where(begin < 0, -as_int32(start), begin)


def document_starts(
    seq: int, reset: Bool[Array, " seq"] | None, real: Bool[Array, " seq"] | None
) -> Int[Array, " seq"]:
    """Returns the index at which each token's document starts; -1 if it starts before token 0."""
    if reset is None:
        return jnp.full(seq, -1, jnp.int32)
    places = jnp.where(mask_resets(reset, real), jnp.arange(seq, dtype=jnp.int32), -1)
    return lax.cummax(places)


def real_tokens(seq: int, length: Integer[Array, ""] | int | None) -> Bool[Array, " seq"] | None:
    """Returns a mask of the first `length` tokens, or `None` if `length` is `None`."""
    return None if length is None else jnp.arange(seq, dtype=jnp.int32) < as_int32(length)


def as_int32(count: Integer[Array, ""] | int) -> Int[Array, ""] | int:
    """Returns a number of tokens as int32, whatever its integer dtype; a Python integer stays.

    With strict promotion, JAX compares and adds only integers of the same dtype.
    """
    return count if isinstance(count, int) else jnp.asarray(count, jnp.int32)


def mask_resets(
    reset: Bool[Array, " seq"], real: Bool[Array, " seq"] | None
) -> Bool[Array, " seq"]:
    """Returns `reset` without the resets of padding."""
    return reset if real is None else reset & real


def fill_padding(
    real: Bool[Array, " seq"] | None, array: Shaped[Array, "seq *shape"], value: int
) -> Shaped[Array, "seq *shape"]:
    """Returns `array` with `value` at every padding token.

    Ops pass the value that leaves the state unchanged. Padding may hold anything, even NaN, and the
    reverse pass of an op multiplies its inputs by the zero gradients of the padding's outputs.
    """
    if real is None:
        return array
    return jnp.where(append_axes(real, array), array, jnp.asarray(value, array.dtype))


def append_axes(
    mask: Bool[Array, " seq"], array: Shaped[Array, "seq *shape"]
) -> Bool[Array, "seq ..."]:
    """Returns `mask` with trailing axes of size one, so that it broadcasts against `array`."""
    return mask.reshape(mask.shape + (1,) * (array.ndim - 1))
