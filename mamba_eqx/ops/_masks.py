import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def document_positions(
    seq: int,
    *,
    start: Int[Array, ""] | int = 0,
    reset: Bool[Array, " seq"] | None = None,
    length: Int[Array, ""] | int | None = None,
) -> Int[Array, " seq"]:
    """How many tokens there are before each, since the last reset.

    **Arguments:**

    - `seq`: the number of tokens.
    - `start`: how many there are before the first.
    - `reset`, `length`: as for [`mamba_eqx.ops.attention`][].
    """
    begin = last_resets(seq, reset, real_tokens(seq, length))
    return jnp.arange(seq, dtype=jnp.int32) - jnp.where(begin < 0, -start, begin)


def last_resets(
    seq: int, reset: Bool[Array, " seq"] | None, real: Bool[Array, " seq"] | None
) -> Int[Array, " seq"]:
    """Where each token's document begins: -1 if before the first token."""
    if reset is None:
        return jnp.full(seq, -1, jnp.int32)
    places = jnp.where(mask_resets(reset, real), jnp.arange(seq, dtype=jnp.int32), -1)
    return lax.cummax(places)


# How `length` and `reset` act, the same in every recurrence of this package: a token that is not
# real leaves the state as it is, and cannot reset it.


def real_tokens(seq: int, length: Int[Array, ""] | int | None) -> Bool[Array, " seq"] | None:
    """Which tokens are among the first `length`; `None` stands for all of them."""
    return None if length is None else jnp.arange(seq) < length


def mask_resets(
    reset: Bool[Array, " seq"], real: Bool[Array, " seq"] | None
) -> Bool[Array, " seq"]:
    return reset if real is None else reset & real


def freeze(
    real: Bool[Array, " seq"] | None, array: Float[Array, "seq *shape"], value: int
) -> Float[Array, "seq *shape"]:
    """`array` with `value` (one that leaves the state as it is) in the tokens that are not real."""
    if real is None:
        return array
    return jnp.where(expand(real, array), array, jnp.asarray(value, array.dtype))


def expand(mask: Bool[Array, " seq"], array: Float[Array, "seq *shape"]) -> Bool[Array, "seq ..."]:
    """`mask` with trailing axes of size one, to broadcast against `array`."""
    return mask.reshape(mask.shape + (1,) * (array.ndim - 1))
