"""Drawing a token, along the last axis of the logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._threshold import LANES, Prefix, maximum, take_tile, tiles


def draw(logits: Float[Array, "*batch vocab"], key: PRNGKeyArray) -> Int[Array, "*batch"]:
    """Draws a token from `softmax(logits)`."""
    weights = tiles(jnp.exp(logits - maximum(logits)))
    return _invert(jnp.sum(weights, axis=-1), lambda tile: take_tile(weights, tile), key)[..., 0]


class _Trial(NamedTuple):
    """The carry of `draw_from_prefix` after some trials."""

    token: Int[Array, "*batch 1"]
    pivot: Float[Array, "*batch 1"]
    """The order of the last drawn token. Only tokens above it are candidates."""
    sums: Float[Array, "*batch tile"]
    """The total weight of the candidates, tile by tile."""
    kept: Bool[Array, "*batch 1"]
    tries: Int[Array, ""]


@jax.jit
def draw_from_prefix(
    logits: Float[Array, "*batch vocab"], prefix: Prefix, key: PRNGKeyArray
) -> Int[Array, "*batch"]:
    """Draws a token from `softmax(logits)` among the tokens of `prefix`, by rejection.

    A token is drawn among all tokens, and kept if the tokens before it weigh less than the target.
    Otherwise neither this token nor any later token is in the prefix, and the next token is drawn
    from the tokens before it. Rejections do not change the distribution of the kept token. As in a
    search with random pivots, each round removes half of the excess on average. A round reads all
    logits once, and one round mostly suffices; finding the largest logits costs ten times as much.

    Reference: FlashInfer's kernels for sampling reject tokens in the same way (*Sorting-Free GPU
    Kernels for LLM Sampling*, 2025).
    """
    orders = tiles(prefix.order(logits), -jnp.inf)
    weights = tiles(jnp.exp(logits - maximum(logits)))
    target = prefix.target.astype(weights.dtype)

    def try_once(last: _Trial) -> _Trial:
        def lanes(tile: Array) -> Array:
            left = take_tile(orders, tile) > last.pivot
            probs = take_tile(weights, tile)
            return jnp.where(left, probs, jnp.zeros_like(probs))

        token = _invert(last.sums, lanes, jr.fold_in(key, last.tries))
        order = take_tile(orders, token // LANES)
        pivot = jnp.take_along_axis(order, token % LANES, axis=-1)
        before = orders > pivot[..., None]
        sums = jnp.sum(jnp.where(before, weights, jnp.zeros_like(weights)), axis=-1)
        total = sums
        if prefix.largest is None:
            # Without the barrier, XLA would merge this sum and the next one into one long sum.
            # Floating-point numbers are summed faster than integers, and count exactly up to 2^24.
            total = lax.optimization_barrier(jnp.sum(before.astype(sums.dtype), axis=-1))
        total = jnp.sum(total, axis=-1, keepdims=True)
        # The conditions are negated so that NaN ends the loop too.
        keep = ~(total >= target) | ~(jnp.sum(sums, axis=-1, keepdims=True) > 0)
        token = jnp.where(last.kept, last.token, token)
        return _Trial(token, pivot, sums, last.kept | keep, last.tries + 1)

    rows = (*logits.shape[:-1], 1)
    begin = _Trial(
        token=jnp.zeros(rows, jnp.int32),
        pivot=jnp.full(rows, -jnp.inf, orders.dtype),
        sums=jnp.sum(weights, axis=-1),
        kept=jnp.zeros(rows, bool),
        tries=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(lambda now: ~jnp.all(now.kept), try_once, begin).token[..., 0]


def _invert(
    sums: Float[Array, "*batch tile"],
    lanes: Callable[[Int[Array, "*batch 1"]], Float[Array, "*batch lane"]],
    key: PRNGKeyArray,
) -> Int[Array, "*batch 1"]:
    """Draws a token by inverting the distribution function at a uniform number.

    Finding first the tile and then the token in the tile takes two sums over a few hundred numbers,
    instead of one over the whole vocabulary.

    **Arguments:**

    - `sums`: the total weight of each tile.
    - `lanes`: returns the weights of the tokens of a tile, given the index of the tile.
    - `key`: the random key.

    **Returns:**

    The token ids, keeping the axis.
    """
    cumulative = jnp.cumsum(sums, axis=-1)
    u = jr.uniform(key, (*sums.shape[:-1], 1), sums.dtype)
    value = u * maximum(cumulative)
    tile = _first_above(cumulative, sums, value)
    rest = value - jnp.take_along_axis(cumulative - sums, tile, axis=-1)
    probs = lanes(tile)
    lane = _first_above(jnp.cumsum(probs, axis=-1), probs, rest)
    return (tile * LANES + lane).astype(jnp.int32)


def _first_above(
    cumulative: Float[Array, "*batch n"],
    weight: Float[Array, "*batch n"],
    value: Float[Array, "*batch 1"],
) -> Int[Array, "*batch 1"]:
    """Returns the first place where the cumulative weight exceeds `value`, skipping zero weights.
    If rounding leaves no such place, returns the place where the cumulative weight is largest."""
    # A parallel cumulative sum is not monotone to the last bit: it may rise by a rounding error at
    # a token of zero weight.
    cumulative = jnp.where(weight > 0, cumulative, jnp.zeros_like(cumulative))
    above = (cumulative > value) | (cumulative >= maximum(cumulative))
    return jnp.argmax(above, axis=-1, keepdims=True)
