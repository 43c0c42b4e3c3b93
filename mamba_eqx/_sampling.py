"""From logits to a token. Everything works along the last axis; put `jax.vmap` or leading axes
around it as you like. Filters set the logits they exclude to `-inf` and leave the others alone."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from .ops._precision import at_least_float32


_TINY = float(np.finfo(np.float32).tiny)
_LARGEST = 128  # among how many of the largest logits a threshold is looked for first
_LANES = 512  # how many numbers are added up at a time


def temperature(
    logits: Float[Array, "*batch vocab"], value: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Sharpens (below 1) or flattens (above 1) a distribution:

    $$p_i \propto \exp(l_i / \tau).$$

    The largest logit is moved to zero first, which changes no probability, so that a tiny $\tau$
    tends to the greedy choice instead of overflowing.

    Reference: Ackley, Hinton and Sejnowski, *A Learning Algorithm for Boltzmann Machines* (1985).

    **Arguments:**

    - `logits`: of any floating-point dtype.
    - `value`: $\tau$, positive and finite. For the limit of 0 see [`mamba_eqx.greedy`][].

    **Returns:** the new logits.

    **Raises:** `ValueError` if `value` is out of range (values traced by JAX are not checked).
    """
    check_temperature(value)
    return (logits - _max(logits)) / jnp.asarray(value, logits.dtype)


def top_k(
    logits: Float[Array, "*batch vocab"], k: int | Int[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the `k` most likely tokens:

    $$\{i : l_i \ge l_{(k)}\}, \qquad l_{(1)} \ge l_{(2)} \ge \dots$$

    Tokens tied with the last of them are kept as well. `k` may be traced: another one does not
    recompile.

    Reference: Fan, Lewis and Dauphin, *Hierarchical Neural Story Generation* (2018), section 5.1.

    **Arguments:**

    - `logits`: of any floating-point dtype.
    - `k`: at least 1. Beyond the size of the vocabulary nothing is excluded.

    **Returns:** the logits, those of excluded tokens being `-inf`.

    **Raises:** `ValueError` if `k` is out of range (values traced by JAX are not checked).
    """
    check_top_k(k)
    one = lambda logits: jnp.ones(logits.shape, jnp.int32)  # noqa: E731
    return _only_first(logits, _itself, one, jnp.asarray(k, jnp.int32))


def top_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the smallest set of most likely tokens that has at least the probability `p`, known
    as nucleus sampling:

    $$\{i : l_i \ge t\}, \qquad t = \max \Big\{ t : \sum_{l_i \ge t} p_i \ge p \Big\},
      \qquad p = \mathrm{softmax}(l).$$

    Equally likely tokens are kept or excluded together.

    Reference: Holtzman et al., *The Curious Case of Neural Text Degeneration* (2020), section 3.1.

    **Arguments:**

    - `logits`: of any floating-point dtype.
    - `p`: within `0 < p <= 1`. The most likely token is always kept.

    **Returns:** the logits, those of excluded tokens being `-inf`.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    check_top_p(p)
    wide = at_least_float32(logits)
    total = jax.nn.logsumexp(logits.astype(wide), axis=-1, keepdims=True)
    probs = lambda logits: jnp.exp(logits.astype(wide) - total)  # noqa: E731
    return _only_first(logits, _itself, probs, jnp.asarray(p, wide))


def min_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the tokens that are at least `p` times as likely as the most likely one:

    $$\{i : p_i \ge p \max_j p_j\} = \{i : l_i \ge \max_j l_j + \log p\}.$$

    The maximum is the true one. (Where it filters by `min_p`, the official `generate` takes the
    first logit for the largest, although they are not sorted there.)

    Reference: Nguyen et al., *Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs* (2024), section 3.

    **Arguments:**

    - `logits`: of any floating-point dtype.
    - `p`: within `0 <= p <= 1`.

    **Returns:** the logits, those of excluded tokens being `-inf`.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    check_min_p(p)
    return _only(logits, logits - _max(logits) >= jnp.log(jnp.asarray(p, logits.dtype)))


def typical_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the smallest set of tokens with at least the probability `p` whose information is
    closest to what is expected, the entropy $H$; known as locally typical sampling:

    $$\{i : |{-\log p_i} - H| \le t\}, \qquad H = -\sum_i p_i \log p_i.$$

    Tokens equally far from it are kept or excluded together. The most likely token may be
    excluded.

    Reference: Meister et al., *Locally Typical Sampling* (2023), section 4.

    **Arguments:**

    - `logits`: of any floating-point dtype.
    - `p`: within `0 < p <= 1`.

    **Returns:** the logits, those of excluded tokens being `-inf`.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    check_typical_p(p)
    wide = at_least_float32(logits)
    total = jax.nn.logsumexp(logits.astype(wide), axis=-1, keepdims=True)
    log_probs = lambda logits: logits.astype(wide) - total  # noqa: E731
    probs = lambda logits: jnp.exp(log_probs(logits))  # noqa: E731
    # What is excluded already has the probability 0, and adds nothing.
    finite = jnp.where(probs(logits) > 0, log_probs(logits), jnp.zeros(logits.shape, wide))
    entropy = -jnp.sum(probs(logits) * finite, axis=-1, keepdims=True)
    closeness = lambda logits: -jnp.abs(log_probs(logits) + entropy)  # noqa: E731
    return _only_first(logits, closeness, probs, jnp.asarray(p, wide))


def greedy(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    r"""The most likely token, $\arg\max_i l_i$; the first one if several are equally likely.

    **Arguments:**

    - `logits`: of any floating-point dtype.

    **Returns:** the token.
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "*batch vocab"],
    key: PRNGKeyArray,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
    typical_p: float | Float[Array, ""] | None = None,
) -> Int[Array, "*batch"]:
    r"""Draws a token from $\mathrm{softmax}(l)$, after the temperature and then those filters that
    are not `None`, in the order `top_k`, `top_p`, `min_p`, `typical_p`, each on what the one before
    has left.

    One uniform number $u$ is drawn and the distribution function inverted,

    $$\min \{ i : p_0 + \dots + p_i > u \},$$

    which takes a third of the time of Gumbel's method over a large vocabulary. An excluded token
    is never drawn.

    **Arguments:**

    - `logits`: of any floating-point dtype. Where the model pads its vocabulary, cut the padding
        off: `logits[..., :model.vocab_size]`.
    - `key`: for the uniform number.
    - `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`: see the functions of these names.

    **Returns:** the token.

    **Raises:** `ValueError` if an argument is out of range (values traced by JAX are not checked).
    """
    logits = filtered(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    return draw(logits, key)


def filtered(
    logits: Float[Array, "*batch vocab"],
    *,
    temperature: float | Float[Array, ""],
    top_k: int | Int[Array, ""] | None,
    top_p: float | Float[Array, ""] | None,
    min_p: float | Float[Array, ""] | None,
    typical_p: float | Float[Array, ""] | None,
) -> Float[Array, "*batch vocab"]:
    """The logits of the distribution from which `sample` draws."""
    logits = _temperature(logits.astype(at_least_float32(logits)), temperature)
    if top_k is not None:
        logits = _top_k(logits, top_k)
    if top_p is not None:
        logits = _top_p(logits, top_p)
    if min_p is not None:
        logits = _min_p(logits, min_p)
    if typical_p is not None:
        logits = _typical_p(logits, typical_p)
    return logits


def draw(logits: Float[Array, "*batch vocab"], key: PRNGKeyArray) -> Int[Array, "*batch"]:
    """A token from `softmax(logits)`."""
    tiles = _tiles(jnp.exp(logits - _max(logits)))
    u = jr.uniform(key, (*logits.shape[:-1], 1), logits.dtype)
    # First which tile, then which of its tokens: a sum over a few hundred numbers twice, instead
    # of one over the whole vocabulary.
    sums = jnp.sum(tiles, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    value = u * _max(cumulative)
    tile = _first_above(cumulative, sums, value)
    rest = value - jnp.take_along_axis(cumulative - sums, tile, axis=-1)
    probs = jnp.take_along_axis(tiles, tile[..., None], axis=-2)[..., 0, :]
    lane = _first_above(jnp.cumsum(probs, axis=-1), probs, rest)
    return (tile * _LANES + lane)[..., 0].astype(jnp.int32)


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
    above = (cumulative > value) | (cumulative >= _max(cumulative))
    return jnp.argmax(above, axis=-1, keepdims=True)


# `sample` names its arguments as the functions are named.
_temperature, _top_k, _top_p, _min_p, _typical_p = temperature, top_k, top_p, min_p, typical_p


def check_temperature(value: Any) -> None:
    value = _number("temperature", value)
    if value is not None and not _TINY <= value < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, but got temperature={value}."
            + (" For a temperature of 0 use `greedy`." if value == 0 else "")
        )


def check_top_k(k: Any) -> None:
    value = _number("top_k", k)
    if value is not None and (value < 1 or value != int(value)):
        raise ValueError(f"`top_k` must be an integer of at least 1, but got top_k={value}.")


def check_top_p(p: Any) -> None:
    value = _number("top_p", p)
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"`top_p` must be within 0 < top_p <= 1, but got top_p={value}.")


def check_min_p(p: Any) -> None:
    value = _number("min_p", p)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"`min_p` must be within 0 <= min_p <= 1, but got min_p={value}.")


def check_typical_p(p: Any) -> None:
    value = _number("typical_p", p)
    if value is not None and not 0 < value <= 1:
        raise ValueError(
            f"`typical_p` must be within 0 < typical_p <= 1, but got typical_p={value}."
        )


def _number(name: str, value: Any) -> float | int | None:
    """The value as a Python number, or `None` if it is traced and so unknown."""
    if isinstance(value, Tracer):
        return None
    is_scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not is_scalar or isinstance(value, bool):
        raise ValueError(f"`{name}` must be one number, but got {name}={value!r}.")
    return np.asarray(value).item()


def _max(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch 1"]:
    return jnp.max(logits, axis=-1, keepdims=True)


def _only(
    logits: Float[Array, "*batch vocab"], keep: Bool[Array, "*batch vocab"]
) -> Float[Array, "*batch vocab"]:
    return jnp.where(keep, logits, jnp.full_like(logits, -jnp.inf))


def _itself(logits: Array) -> Array:
    return logits


def _only_first(
    logits: Float[Array, "*batch vocab"],
    order: Callable[[Array], Array],
    weight: Callable[[Array], Array],
    target: Float[Array, ""] | Int[Array, ""],
) -> Float[Array, "*batch vocab"]:
    """The logits of the smallest `{i : order(l_i) >= t}` that weighs at least `target`; all of them
    if nothing does. `order` and `weight` are functions of each logit by itself.

    It is mostly found among the few that come first, which a CPU picks out of 50,000 within a fifth
    of a millisecond, where sorting them all takes twenty (benchmarks/generate.py).
    """
    largest, where = lax.top_k(order(logits), min(_LARGEST, logits.shape[-1]))
    weighs = jnp.cumsum(weight(jnp.take_along_axis(logits, where, axis=-1)), axis=-1)
    enough = weighs >= target
    found = jnp.any(enough, axis=-1, keepdims=True)
    first = jnp.argmax(enough, axis=-1, keepdims=True)
    t = jnp.take_along_axis(largest, first, axis=-1)

    def look_everywhere(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The barrier keeps XLA from taking the search out of the loop, since nothing in it changes.
        logits, t, done = lax.optimization_barrier(carry)
        t = jnp.where(found, t, _search(order(logits), weight(logits), target))
        return logits, t, jnp.ones_like(done)

    # A loop of one round or none rather than a `cond`, which `vmap` turns into both its branches.
    # Of several rows the head gives the logits column by column; what comes out of the loop is laid
    # out row by row, for all that follows.
    begin = (logits, t, jnp.all(found))
    logits, t, _ = lax.while_loop(lambda carry: ~carry[-1], look_everywhere, begin)
    return _only(logits, order(logits) >= t)


def _search(
    order: Float[Array, "*batch vocab"],
    weight: Float[Array, "*batch vocab"] | Int[Array, "*batch vocab"],
    target: Float[Array, ""] | Int[Array, ""],
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
    tiles = lax.optimization_barrier((_tiles(integers), _tiles(weight)))

    def body(i: Any, t: Array) -> Array:
        higher = t | (sign >> i.astype(unsigned))
        integer, tile_weight = tiles
        counted = jnp.where(integer >= higher[..., None], tile_weight, jnp.zeros_like(tile_weight))
        weighs = jnp.sum(jnp.sum(counted, axis=-1), axis=-1, keepdims=True)
        return jnp.where(weighs >= target, higher, t)

    t = lax.fori_loop(0, bits, body, jnp.zeros((*order.shape[:-1], 1), unsigned))
    value = lax.bitcast_convert_type(jnp.where(t < sign, ~t, t ^ sign), order.dtype)
    # 0, which nothing reached, stands for no number.
    return jnp.where(t > 0, value, jnp.full_like(value, -jnp.inf))


def _tiles(values: Shaped[Array, "*batch vocab"]) -> Shaped[Array, "*batch tile lane"]:
    """Rows of `_LANES` values, the last one filled up with zeros. XLA adds up each of many short
    rows by itself, in parallel, and one long row number by number."""
    missing = -values.shape[-1] % _LANES
    padding = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    return jnp.pad(values, padding).reshape(*values.shape[:-1], -1, _LANES)
