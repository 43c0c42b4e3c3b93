"""What a filter keeps, and one token of it. Everything works along the last axis of the logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


_LARGEST = 128  # among how many of the largest logits a threshold is looked for first
_GROUP = 32  # of how many logits only the largest is looked at before
LANES = 512  # how many numbers are added up at a time


class Prefix(NamedTuple):
    """The tokens that a filter keeps: the smallest `{i : order_i >= t}` that weighs at least
    `target`, or all of them if nothing does. In other words, those tokens of which the ones before
    weigh less than `target`.

    They are ordered by `l_i`, or by `-|l_i - centre|` where there is a centre. A token weighs
    `exp(l_i - largest)`, or 1 where `largest` is `None`.
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
    return jnp.where(keep, logits, jnp.full_like(logits, -jnp.inf))


# Compiled by themselves, since outside of `jit` JAX compiles a loop anew whenever it meets it.
@jax.jit
def keep_prefix(
    logits: Float[Array, "*batch vocab"], prefix: Prefix
) -> Float[Array, "*batch vocab"]:
    """The logits of what is among `first`.

    The threshold is mostly found among the few that come first, which a CPU picks out of 50,000
    within a fifth of a millisecond, where sorting them all takes twenty (benchmarks/generate.py).
    """
    order, weight = prefix.order, prefix.weight
    few, where = largest(order(logits))
    weighs = jnp.cumsum(weight(jnp.take_along_axis(logits, where, axis=-1)), axis=-1)
    enough = weighs >= prefix.target
    found = jnp.any(enough, axis=-1, keepdims=True)
    t = jnp.take_along_axis(few, jnp.argmax(enough, axis=-1, keepdims=True), axis=-1)

    def look_everywhere(logits: Array) -> Array:
        return _search(order(logits), weight(logits), prefix.target)

    # Of several rows the head gives the logits column by column; what comes out of the loop is laid
    # out row by row, for all that follows.
    logits, t = unless_found(found, t, look_everywhere, logits)
    return keep_only(logits, order(logits) >= t)


def unless_found(
    found: Bool[Array, "*batch"],
    value: Shaped[Array, "*batch"],
    look: Callable[[Array], Array],
    logits: Float[Array, "*rows vocab"],
) -> tuple[Float[Array, "*rows vocab"], Shaped[Array, "*batch"]]:
    """The logits, and the value where it was found and `look(logits)` elsewhere, which is computed
    only if one is missing."""

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The barrier keeps XLA from taking the work out of the loop, since nothing in it changes.
        logits, value, done = lax.optimization_barrier(carry)
        return logits, jnp.where(found, value, look(logits)), jnp.ones_like(done)

    # A loop of one round or none rather than a `cond`, which `vmap` turns into both its branches.
    begin = (logits, value, jnp.all(found))
    logits, value, _ = lax.while_loop(lambda carry: ~carry[-1], body, begin)
    return logits, value


def largest(
    order: Float[Array, "*batch vocab"],
) -> tuple[Float[Array, "*batch few"], Int[Array, "*batch few"]]:
    """The largest few, the largest one first, and where they are."""
    size = order.shape[-1]
    if size <= _LARGEST * _GROUP:
        return _top(order, min(_LARGEST, size))
    # As many groups as numbers are wanted, those with the largest maxima, hold all of them. XLA
    # takes the largest of each row by one core, and the maxima of groups by all.
    groups = tiles(order, -jnp.inf, _GROUP)
    _, group = _top(jnp.max(groups, axis=-1), _LARGEST)
    members = jnp.take_along_axis(groups, group[..., None], axis=-2)
    few, at = _top(members.reshape(*order.shape[:-1], -1), _LARGEST)
    where = jnp.take_along_axis(group, at // _GROUP, axis=-1) * _GROUP + at % _GROUP
    # What fills up the last group is beyond all others, and comes up only beside other `-inf`.
    return few, jnp.minimum(where, size - 1)


def _top(
    values: Float[Array, "*batch n"], count: int
) -> tuple[Float[Array, "*batch few"], Int[Array, "*batch few"]]:
    # The barrier: where only a part of the result is used, XLA forgets that it is not to sort all.
    few, where = lax.optimization_barrier(lax.top_k(values, count))
    return few, where


def _search(
    order: Float[Array, "*batch vocab"],
    weight: Float[Array, "*batch vocab"] | Int[Array, "*batch vocab"],
    target: Float[Array, "*batch 1"] | Int[Array, ""],
) -> Float[Array, "*batch 1"]:
    """The largest `t` such that `{i : order_i >= t}` weighs at least `target`; `-inf` if none does.

    As integers, floating-point numbers are ordered like the numbers they stand for, so that `t`
    is found bit by bit, exactly.
    """
    bits = 8 * order.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    # -0.0 equals 0.0 but has other bits.
    raw = lax.bitcast_convert_type(jnp.where(order == 0, jnp.zeros_like(order), order), unsigned)
    integers = jnp.where(raw < sign, raw | sign, ~raw)
    # The barrier keeps XLA from computing both anew in every round.
    both = lax.optimization_barrier((tiles(integers), tiles(weight)))

    def body(i: Any, t: Array) -> Array:
        higher = t | (sign >> i.astype(unsigned))
        integer, tile_weight = both
        counted = jnp.where(integer >= higher[..., None], tile_weight, jnp.zeros_like(tile_weight))
        weighs = jnp.sum(jnp.sum(counted, axis=-1), axis=-1, keepdims=True)
        return jnp.where(weighs >= target, higher, t)

    t = lax.fori_loop(0, bits, body, jnp.zeros((*order.shape[:-1], 1), unsigned))
    value = lax.bitcast_convert_type(jnp.where(t < sign, ~t, t ^ sign), order.dtype)
    # 0, which nothing reached, stands for no number.
    return jnp.where(t > 0, value, jnp.full_like(value, -jnp.inf))


def tiles(
    values: Shaped[Array, "*batch vocab"], fill: float = 0, lanes: int = LANES
) -> Shaped[Array, "*batch tile lane"]:
    """Rows of `lanes` values, the last one filled up. XLA adds up each of many short rows by
    itself, in parallel, and one long row number by number."""
    missing = -values.shape[-1] % lanes
    padding = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    filled = jnp.pad(values, padding, constant_values=fill)
    return filled.reshape(*values.shape[:-1], -1, lanes)


def take_tile(
    values: Shaped[Array, "*batch tile lane"], tile: Int[Array, "*batch 1"]
) -> Shaped[Array, "*batch lane"]:
    return jnp.take_along_axis(values, tile[..., None], axis=-2)[..., 0, :]


def maximum(logits: Float[Array, "*batch n"]) -> Float[Array, "*batch 1"]:
    return jnp.max(logits, axis=-1, keepdims=True)
