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
    """A token from `softmax(logits)`."""
    weights = tiles(jnp.exp(logits - maximum(logits)))
    return _invert(jnp.sum(weights, axis=-1), lambda tile: take_tile(weights, tile), key)[..., 0]


class _Trial(NamedTuple):
    """One trial of `draw_from_prefix`."""

    token: Int[Array, "*batch 1"]
    pivot: Float[Array, "*batch 1"]
    """The order of the token: only tokens above it are still drawn from."""
    sums: Float[Array, "*batch tile"]
    """The total weights of these tokens, tile by tile."""
    kept: Bool[Array, "*batch 1"]
    tries: Int[Array, ""]


@jax.jit
def draw_from_prefix(
    logits: Float[Array, "*batch vocab"], prefix: Prefix, key: PRNGKeyArray
) -> Int[Array, "*batch"]:
    """A token from `softmax(logits)` among those of `first`, by trial.

    A token is drawn among all and kept if those before it weigh less than the target. If they do
    not, neither it nor anything after it is among the first, and the next one is drawn from those
    before it. Whatever was refused, what is kept has the distribution wanted; and as in a search
    with random pivots, half of the excess goes in each round, on average. A round costs one look
    at all logits, and the first one mostly suffices, where finding the largest costs ten of them.

    Reference: FlashInfer's kernels for sampling refuse tokens in the same way (*Sorting-Free GPU
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
        weigh = sums
        if prefix.largest is None:
            # The barrier keeps XLA from making one long sum of this and the next one. It adds up
            # floating-point numbers faster than integers; below 2^24 they count as well.
            weigh = lax.optimization_barrier(jnp.sum(before.astype(sums.dtype), axis=-1))
        weigh = jnp.sum(weigh, axis=-1, keepdims=True)
        # Written so that NaN ends it too.
        keep = ~(weigh >= target) | ~(jnp.sum(sums, axis=-1, keepdims=True) > 0)
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
    """The token at which the distribution function passes a uniform number. First which tile, then
    which of its tokens: a sum over a few hundred numbers twice, instead of one over the whole
    vocabulary."""
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
    """The first place where the sum of the weights is above `value`, never one of no weight; if it
    is so nowhere, by a rounding error, where the sum is largest."""
    # A parallel sum is not monotone to the last bit: between two weights it may rise by a rounding
    # error over an excluded one.
    cumulative = jnp.where(weight > 0, cumulative, jnp.zeros_like(cumulative))
    above = (cumulative > value) | (cumulative >= maximum(cumulative))
    return jnp.argmax(above, axis=-1, keepdims=True)
