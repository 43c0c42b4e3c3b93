"""The search for the threshold of a filter, along the last axis of the logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


_LARGEST = 128  # the number of largest logits among which a threshold is searched first
_GROUP = 32  # the number of logits in a group; groups are first compared by their maxima
LANES = 512  # the number of values in a tile, which are summed together


class Prefix(NamedTuple):
    """A prefix of the tokens sorted by `order`, largest first: the shortest whose total weight
    reaches `target`, or all tokens if none does. Tied tokens are kept or excluded together.

    The order of a token is its logit `l_i`, or `-|l_i - centre|` if there is a `centre`. Its weight
    is `exp(l_i - largest)`, or 1 if `largest` is `None`.
    """

    target: Float[Array, "*batch 1"] | Int[Array, ""]
    largest: Float[Array, "*batch 1"] | None = None
    centre: Float[Array, "*batch 1"] | None = None

    def order(self, logits: Array) -> Array:
        return logits if self.centre is None else -jnp.abs(logits - self.centre)

    def weight(self, logits: Array) -> Array:
        if self.largest is None:
            return jnp.ones(logits.shape, jnp.int32)
        return jnp.exp(logits.astype(self.largest.dtype) - self.largest)


def keep_only(
    logits: Float[Array, "*batch vocab"], keep: Bool[Array, "*batch vocab"]
) -> Float[Array, "*batch vocab"]:
    """Sets the logits of all other tokens to `-inf`."""
    return jnp.where(keep, logits, jnp.full_like(logits, -jnp.inf))


# Outside `jit`, JAX would otherwise compile the loops anew in every call.
@jax.jit
def keep_prefix(
    logits: Float[Array, "*batch vocab"], prefix: Prefix
) -> Float[Array, "*batch vocab"]:
    """Keeps the logits of the tokens in `prefix`.

    The threshold is mostly among the few largest values of `order`. A CPU selects these from 50,000
    tokens within 0.2 ms, while sorting all of them takes 20 ms (benchmarks/generate.py).
    """
    order, weight = prefix.order, prefix.weight
    few, where = largest(order(logits))
    total = jnp.cumsum(weight(jnp.take_along_axis(logits, where, axis=-1)), axis=-1)
    enough = total >= prefix.target
    found = jnp.any(enough, axis=-1, keepdims=True)
    t = jnp.take_along_axis(few, jnp.argmax(enough, axis=-1, keepdims=True), axis=-1)

    def search_all(logits: Array) -> Array:
        return _search(order(logits), weight(logits), prefix.target)

    # The head computes the logits of several rows column by column. The loop returns them laid out
    # row by row, which is faster for everything that follows.
    logits, t = unless_found(found, t, search_all, logits)
    return keep_only(logits, order(logits) >= t)


def unless_found(
    found: Bool[Array, "*batch"],
    value: Shaped[Array, "*batch"],
    search: Callable[[Array], Array],
    logits: Float[Array, "*rows vocab"],
) -> tuple[Float[Array, "*rows vocab"], Shaped[Array, "*batch"]]:
    """Returns the logits, and the value where it was found and `search(logits)` elsewhere. The
    search runs only if a value is missing."""

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Without the barrier, XLA would move the search out of the loop as loop-invariant code.
        logits, value, done = lax.optimization_barrier(carry)
        return logits, jnp.where(found, value, search(logits)), jnp.ones_like(done)

    # A loop of at most one round is used since `vmap` would run both branches of a `cond`.
    begin = (logits, value, jnp.all(found))
    logits, value, _ = lax.while_loop(lambda carry: ~carry[-1], body, begin)
    return logits, value


def largest(
    order: Float[Array, "*batch vocab"],
) -> tuple[Float[Array, "*batch few"], Int[Array, "*batch few"]]:
    """Returns the few largest values, the largest first, and their indices."""
    size = order.shape[-1]
    if size <= _LARGEST * _GROUP:
        return _top(order, min(_LARGEST, size))
    # The n groups with the largest maxima contain the n largest values. XLA:CPU uses one core for
    # the top-k of a row, but all cores for the maxima of groups.
    groups = tiles(order, -jnp.inf, _GROUP)
    _, group = _top(jnp.max(groups, axis=-1), _LARGEST)
    members = jnp.take_along_axis(groups, group[..., None], axis=-2)
    few, at = _top(members.reshape(*order.shape[:-1], -1), _LARGEST)
    where = jnp.take_along_axis(group, at // _GROUP, axis=-1) * _GROUP + at % _GROUP
    # The padding of the last group has indices beyond the row. It is `-inf`, so that it is selected
    # only among other values of `-inf`.
    return few, jnp.minimum(where, size - 1)


def _top(
    values: Float[Array, "*batch n"], count: int
) -> tuple[Float[Array, "*batch few"], Int[Array, "*batch few"]]:
    # If only a part of the result is used, XLA:CPU would replace top-k by a full sort without the
    # barrier.
    few, where = lax.optimization_barrier(lax.top_k(values, count))
    return few, where


def _search(
    order: Float[Array, "*batch vocab"],
    weight: Float[Array, "*batch vocab"] | Int[Array, "*batch vocab"],
    target: Float[Array, "*batch 1"] | Int[Array, ""],
) -> Float[Array, "*batch 1"]:
    """Returns the largest `t` for which the tokens with `order_i >= t` weigh at least `target`, or
    `-inf` if there is none.

    The bit patterns of floating-point numbers, read as integers, have the same order as the
    numbers. Therefore `t` is found exactly, bit by bit.
    """
    bits = 8 * order.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    # -0.0 equals 0.0, but its bits differ.
    raw = lax.bitcast_convert_type(jnp.where(order == 0, jnp.zeros_like(order), order), unsigned)
    integers = jnp.where(raw < sign, raw | sign, ~raw)
    # Without the barrier, XLA would recompute both in every round.
    both = lax.optimization_barrier((tiles(integers), tiles(weight)))

    def set_bit(i: Int[Array, ""], t: Array) -> Array:
        higher = t | (sign >> i.astype(unsigned))
        integer, tile_weight = both
        counted = jnp.where(integer >= higher[..., None], tile_weight, jnp.zeros_like(tile_weight))
        total = jnp.sum(jnp.sum(counted, axis=-1), axis=-1, keepdims=True)
        return jnp.where(total >= target, higher, t)

    t = lax.fori_loop(0, bits, set_bit, jnp.zeros((*order.shape[:-1], 1), unsigned))
    value = lax.bitcast_convert_type(jnp.where(t < sign, ~t, t ^ sign), order.dtype)
    # 0 means that no threshold was reached; it is not the bit pattern of a number.
    return jnp.where(t > 0, value, jnp.full_like(value, -jnp.inf))


def tiles(
    values: Shaped[Array, "*batch vocab"], fill: float = 0, lanes: int = LANES
) -> Shaped[Array, "*batch tile lane"]:
    """Reshapes rows into tiles of `lanes` values, and pads the last tile. XLA sums many short tiles
    in parallel, but one long row sequentially."""
    missing = -values.shape[-1] % lanes
    padding = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    filled = jnp.pad(values, padding, constant_values=fill)
    return filled.reshape(*values.shape[:-1], -1, lanes)


def take_tile(
    values: Shaped[Array, "*batch tile lane"], tile: Int[Array, "*batch 1"]
) -> Shaped[Array, "*batch lane"]:
    """Returns the values of one tile."""
    return jnp.take_along_axis(values, tile[..., None], axis=-2)[..., 0, :]


def maximum(logits: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    """Returns the largest value, keeping the axis."""
    return jnp.max(logits, axis=-1, keepdims=True)
