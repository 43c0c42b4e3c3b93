"""From logits to a token: the greedy choice, and drawing after a temperature and filters.

All functions act along the last axis, with any number of leading axes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._dtypes import at_least_float32
from . import _filters
from ._checks import check_min_p, check_top_k, check_top_p, check_typical_p
from ._draw import draw, draw_from_prefix
from ._threshold import keep_only, largest, unless_found


class Filters(NamedTuple):
    """The filters to apply one after the other, in this order. `None` is no filter."""

    top_k: int | Int[Array, "*batch"] | None = None
    top_p: float | Float[Array, "*batch"] | None = None
    min_p: float | Float[Array, "*batch"] | None = None
    typical_p: float | Float[Array, "*batch"] | None = None


def greedy(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    r"""Returns the most likely token, $\arg\max_i l_i$; the first one if several are equally
    likely.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.

    **Returns:**

    The token ids, of shape `(...)`.
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
    r"""Draws a token from $\mathrm{softmax}(l)$ after the temperature and the filters that are not
    `None`, in the order `top_k`, `top_p`, `min_p`, `typical_p`. Each filter acts on what the
    previous ones have kept.

    A uniform number $u$ is drawn and the distribution function inverted,

    $$\min \{ i : p_0 + \dots + p_i > u \},$$

    which takes a third of the time of Gumbel's method over a large vocabulary. If the last filter
    excludes that token, another token is drawn among those before it in the order of the filter,
    until one is kept. An excluded token is never returned, and the kept tokens have exactly the
    filtered distribution. If `top_k` keeps only a few tokens, the draw is made among these alone,
    largest first.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype. If the model pads its
        vocabulary, remove the padding first: `logits[..., :model.vocab_size]`.
    - `key`: one key; the tokens of different leading indices are drawn independently.
    - `temperature`: as for [`mamba_eqx.sampling.temperature`][].
    - `top_k`: as for [`mamba_eqx.sampling.top_k`][].
    - `top_p`: as for [`mamba_eqx.sampling.top_p`][].
    - `min_p`: as for [`mamba_eqx.sampling.min_p`][].
    - `typical_p`: as for [`mamba_eqx.sampling.typical_p`][].

    **Returns:**

    The token ids, of shape `(...)`.

    **Raises:** `ValueError` if an option is out of range (values traced by JAX are not checked).
    """
    filters = Filters(top_k, top_p, min_p, typical_p)
    # Compiled functions see tracers only, so that values are checked here.
    checks = (check_top_k, check_top_p, check_min_p, check_typical_p)
    for check, value in zip(checks, filters, strict=True):
        if value is not None:
            check(value)
    return sample_filtered(logits, key, temperature, filters)


def sample_filtered(
    logits: Float[Array, "*batch vocab"],
    key: PRNGKeyArray,
    temperature: float | Float[Array, ""],
    filters: Filters,
) -> Int[Array, "*batch"]:
    """Draws a token like `sample`, with the filters in one record."""
    logits = filtered(logits, temperature, Filters())
    draw_token = _draw_by_trial if filters.top_k is None else _draw_among_largest
    return draw_token(logits, key, filters)


def filtered(
    logits: Float[Array, "*batch vocab"], temperature: float | Float[Array, ""], filters: Filters
) -> Float[Array, "*batch vocab"]:
    """Returns the logits of the distribution that `sample` draws from."""
    logits = _filters.temperature(logits.astype(at_least_float32(logits)), temperature)
    return _apply(logits, filters)


def _apply(logits: Float[Array, "*batch vocab"], filters: Filters) -> Float[Array, "*batch vocab"]:
    if filters.top_k is not None:
        logits = _filters.top_k(logits, filters.top_k)
    if filters.top_p is not None:
        logits = _filters.top_p(logits, filters.top_p)
    if filters.min_p is not None:
        logits = _filters.min_p(logits, filters.min_p)
    if filters.typical_p is not None:
        logits = _filters.typical_p(logits, filters.typical_p)
    return logits


@jax.jit
def _draw_among_largest(
    logits: Float[Array, "*batch vocab"], key: PRNGKeyArray, filters: Filters
) -> Int[Array, "*batch"]:
    """Draws a token when there is a `top_k` filter.

    The tokens that `top_k` keeps are mostly among the few largest logits, and the other filters and
    the draw then need these logits only.
    """
    few, where = largest(logits)
    last = jnp.minimum(jnp.asarray(filters.top_k, jnp.int32), few.shape[-1]) - 1
    threshold = jnp.take(few, last[None], axis=-1)
    chosen = _draw_by_trial(keep_only(few, few >= threshold), key, filters._replace(top_k=None))
    token = jnp.take_along_axis(where, chosen[..., None], axis=-1)[..., 0]
    if few.shape[-1] == logits.shape[-1]:
        return token
    # Other tokens may be tied with the last one kept, or `top_k` may exceed the few largest.
    found = (few[..., -1:] < threshold)[..., 0]
    return unless_found(found, token, lambda all_: _draw_by_trial(all_, key, filters), logits)[1]


def _draw_by_trial(
    logits: Float[Array, "*batch vocab"], key: PRNGKeyArray, filters: Filters
) -> Int[Array, "*batch"]:
    # Drawing by trial needs no threshold for the last filter other than `min_p`. `min_p` excludes
    # the last tokens in the order of `top_k` and `top_p`, so that it does not change what they
    # keep and can be applied before them.
    top_k, top_p, min_p, typical_p = filters
    prefix = None
    if typical_p is not None:
        logits = _apply(logits, filters._replace(typical_p=None))
        prefix = _filters.prefix_typical_p(logits, typical_p)
    elif top_p is not None:
        logits = _apply(logits, Filters(top_k))
        prefix = _filters.prefix_top_p(logits, top_p)
    elif top_k is not None:
        prefix = _filters.prefix_top_k(top_k)
    if min_p is not None and typical_p is None:
        logits = _filters.min_p(logits, min_p)
    return draw(logits, key) if prefix is None else draw_from_prefix(logits, prefix, key)
