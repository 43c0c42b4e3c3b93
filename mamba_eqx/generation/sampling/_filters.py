"""From logits to a token. Everything works along the last axis; put `jax.vmap` or leading axes
around it as you like. Filters set the logits they exclude to `-inf` and leave the others alone."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._dtypes import at_least_float32
from ._draw import First, draw, draw_first, largest, maximum, only, only_first, unless_found


_TINY = float(np.finfo(np.float32).tiny)


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
    - `value`: $\tau$, positive and finite. For the limit of 0 see [`mamba_eqx.sampling.greedy`][].

    **Returns:** the new logits.

    **Raises:** `ValueError` if `value` is out of range (values traced by JAX are not checked).
    """
    check_temperature(value)
    return (logits - maximum(logits)) / jnp.asarray(value, logits.dtype)


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
    return only_first(logits, _first_k(k))


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
    return only_first(logits, _first_p(logits, p))


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
    return only(logits, logits - maximum(logits) >= jnp.log(jnp.asarray(p, logits.dtype)))


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
    return only_first(logits, _first_typical(logits, p))


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

    A uniform number $u$ is drawn and the distribution function inverted,

    $$\min \{ i : p_0 + \dots + p_i > u \},$$

    which takes a third of the time of Gumbel's method over a large vocabulary. Where the last
    filter excludes that token, another one is drawn among those that come before it, until one is
    kept: an excluded token is never drawn, and the kept ones have exactly the distribution that
    the filters leave. What `top_k` keeps is drawn from by itself, largest first, if it is few.

    **Arguments:**

    - `logits`: of any floating-point dtype. Where the model pads its vocabulary, cut the padding
        off: `logits[..., :model.vocab_size]`.
    - `key`: for the uniform numbers.
    - `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`: see the functions of these names.

    **Returns:** the token.

    **Raises:** `ValueError` if an argument is out of range (values traced by JAX are not checked).
    """
    filters = _Filters(top_k, top_p, min_p, typical_p)
    # What is compiled does not see the values.
    checks = _Filters(check_top_k, check_top_p, check_min_p, check_typical_p)
    for check, value in zip(checks, filters, strict=True):
        if value is not None:
            check(value)
    logits = filtered(logits, temperature=temperature)
    choose = _draw_by_trial if top_k is None else _draw_of_largest
    return choose(logits, key, filters)


class _Filters(NamedTuple):
    """Those that are not `None` are put on one after the other."""

    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None


@jax.jit
def _draw_of_largest(
    logits: Float[Array, "*batch vocab"], key: PRNGKeyArray, filters: _Filters
) -> Int[Array, "*batch"]:
    """What `top_k` keeps is mostly found among the few largest logits; then all else is done with
    those alone."""
    few, where = largest(logits)
    last = jnp.minimum(jnp.asarray(filters.top_k, jnp.int32), few.shape[-1]) - 1
    threshold = jnp.take(few, last[None], axis=-1)
    chosen = _draw_by_trial(only(few, few >= threshold), key, filters._replace(top_k=None))
    token = jnp.take_along_axis(where, chosen[..., None], axis=-1)[..., 0]
    if few.shape[-1] == logits.shape[-1]:
        return token
    # Unless others are tied with the last one kept, or more are wanted than were looked at.
    found = (few[..., -1:] < threshold)[..., 0]
    return unless_found(found, token, lambda all_: _draw_by_trial(all_, key, filters), logits)[1]


def _draw_by_trial(
    logits: Float[Array, "*batch vocab"], key: PRNGKeyArray, filters: _Filters
) -> Int[Array, "*batch"]:
    # The last filter but `min_p` needs no threshold to draw by. `min_p` leaves out what comes last
    # in the order of `top_k` and `top_p`, and changes nothing about what they keep.
    top_k, top_p, min_p, typical_p = filters
    first = None
    if typical_p is not None:
        logits = _filter(logits, filters._replace(typical_p=None))
        first = _first_typical(logits, typical_p)
    elif top_p is not None:
        logits = _filter(logits, _Filters(top_k))
        first = _first_p(logits, top_p)
    elif top_k is not None:
        first = _first_k(top_k)
    if min_p is not None and typical_p is None:
        logits = _min_p(logits, min_p)
    return draw(logits, key) if first is None else draw_first(logits, first, key)


def filtered(
    logits: Float[Array, "*batch vocab"],
    *,
    temperature: float | Float[Array, ""],
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
    typical_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch vocab"]:
    """The logits of the distribution from which `sample` draws."""
    logits = _temperature(logits.astype(at_least_float32(logits)), temperature)
    return _filter(logits, _Filters(top_k, top_p, min_p, typical_p))


def _filter(
    logits: Float[Array, "*batch vocab"], filters: _Filters
) -> Float[Array, "*batch vocab"]:
    steps = _Filters(_top_k, _top_p, _min_p, _typical_p)
    for step, value in zip(steps, filters, strict=True):
        if value is not None:
            logits = step(logits, value)
    return logits


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


def _first_k(k: Any) -> First:
    check_top_k(k)
    return First(jnp.asarray(k, jnp.int32))


def _first_p(logits: Float[Array, "*batch vocab"], p: Any) -> First:
    check_top_p(p)
    largest, _, weight = _weights(logits)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return First(total * jnp.asarray(p, total.dtype), largest)


def _first_typical(logits: Float[Array, "*batch vocab"], p: Any) -> First:
    check_typical_p(p)
    largest, below, weight = _weights(logits)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    # What is excluded already has no weight, and adds nothing.
    sum_below = jnp.sum(jnp.where(weight > 0, weight * below, 0), axis=-1, keepdims=True)
    # log p_i is l_i but for a constant: the tokens whose information is closest to the entropy are
    # those whose logits are closest to the expected logit.
    centre = largest + sum_below / total
    return First(total * jnp.asarray(p, total.dtype), largest, centre)


def _weights(
    logits: Float[Array, "*batch vocab"],
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch vocab"], Float[Array, "*batch vocab"]]:
    """The largest logit, how far each is below it, and the exponential of that."""
    logits = logits.astype(at_least_float32(logits))
    largest = maximum(logits)
    below = logits - largest
    return largest, below, jnp.exp(below)
