"""Filters, which exclude tokens by setting their logits to `-inf`, and the temperature.

All functions act along the last axis, with any number of leading axes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._dtypes import at_least_float32
from ._checks import check_min_p, check_temperature, check_top_k, check_top_p, check_typical_p
from ._threshold import Prefix, keep_only, keep_prefix, maximum


def temperature(
    logits: Float[Array, "*batch vocab"], value: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Sharpens a distribution (`value` below 1) or flattens it (above 1):

    $$p_i \propto \exp(l_i / \tau).$$

    The largest logit is subtracted first. This changes no probability, and a tiny $\tau$ then tends
    to the greedy choice instead of overflowing.

    Reference: Ackley, Hinton and Sejnowski, *A Learning Algorithm for Boltzmann Machines* (1985).

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.
    - `value`: the temperature $\tau$, positive and finite. For the limit of 0 see
        [`mamba_eqx.sampling.greedy`][].

    **Returns:**

    The new logits, of the same shape and dtype.

    **Raises:** `ValueError` if `value` is out of range (values traced by JAX are not checked).
    """
    check_temperature(value)
    return (logits - maximum(logits)) / jnp.asarray(value, logits.dtype)


def top_k(
    logits: Float[Array, "*batch vocab"], k: int | Int[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the `k` most likely tokens:

    $$\{i : l_i \ge l_{(k)}\}, \qquad l_{(1)} \ge l_{(2)} \ge \dots$$

    Tokens that are tied with the last of them are kept as well. `k` may be traced: another value
    does not recompile.

    Reference: Fan, Lewis and Dauphin, *Hierarchical Neural Story Generation* (2018), section 5.1.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.
    - `k`: an integer of at least 1. Nothing is excluded if it exceeds the size of the vocabulary.

    **Returns:**

    The logits, with `-inf` for excluded tokens.

    **Raises:** `ValueError` if `k` is out of range (values traced by JAX are not checked).
    """
    return keep_prefix(logits, prefix_top_k(k))


def top_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the smallest set of most likely tokens with a total probability of at least `p`, known
    as nucleus sampling:

    $$\{i : l_i \ge t\}, \qquad t = \max \Big\{ s : \sum_{l_i \ge s} p_i \ge p \Big\},
      \qquad p_i = \mathrm{softmax}(l)_i.$$

    Equally likely tokens are kept or excluded together.

    Reference: Holtzman et al., *The Curious Case of Neural Text Degeneration* (2020), section 3.1.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.
    - `p`: within `0 < p <= 1`. The most likely token is always kept.

    **Returns:**

    The logits, with `-inf` for excluded tokens.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    return keep_prefix(logits, prefix_top_p(logits, p))


def min_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the tokens that are at least `p` times as likely as the most likely one:

    $$\{i : p_i \ge p \max_j p_j\} = \{i : l_i \ge \max_j l_j + \log p\}.$$

    The maximum is taken over all logits. (The official `generate` takes the first logit for the
    largest one when it filters by `min_p`, although the logits are not sorted there.)

    Reference: Nguyen et al., *Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs* (2024), section 3.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.
    - `p`: within `0 <= p <= 1`.

    **Returns:**

    The logits, with `-inf` for excluded tokens.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    check_min_p(p)
    return keep_only(logits, logits - maximum(logits) >= jnp.log(jnp.asarray(p, logits.dtype)))


def typical_p(
    logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    r"""Keeps the smallest set of tokens with a total probability of at least `p` whose information
    $-\log p_i$ is closest to its expectation, the entropy $H$. Known as locally typical sampling:

    $$\{i : |{-\log p_i} - H| \le t\}, \qquad H = -\sum_i p_i \log p_i.$$

    Tokens that are equally far from $H$ are kept or excluded together. The most likely token may be
    excluded.

    Reference: Meister et al., *Locally Typical Sampling* (2023), section 4.

    **Arguments:**

    - `logits`: of shape `(..., vocab_size)` and any floating-point dtype.
    - `p`: within `0 < p <= 1`.

    **Returns:**

    The logits, with `-inf` for excluded tokens.

    **Raises:** `ValueError` if `p` is out of range (values traced by JAX are not checked).
    """
    return keep_prefix(logits, prefix_typical_p(logits, p))


def prefix_top_k(k: int | Int[Array, ""]) -> Prefix:
    """Returns the tokens that `top_k` keeps."""
    check_top_k(k)
    return Prefix(jnp.asarray(k, jnp.int32))


def prefix_top_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]) -> Prefix:
    """Returns the tokens that `top_p` keeps."""
    check_top_p(p)
    weights = _weights(logits)
    total = jnp.sum(weights.weight, axis=-1, keepdims=True)
    return Prefix(total * jnp.asarray(p, total.dtype), weights.largest)


def prefix_typical_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]) -> Prefix:
    """Returns the tokens that `typical_p` keeps."""
    check_typical_p(p)
    largest, below, weight = _weights(logits)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    # Excluded tokens have no weight, and their logits of `-inf` must not enter the sum.
    sum_below = jnp.sum(jnp.where(weight > 0, weight * below, 0), axis=-1, keepdims=True)
    # log p_i equals l_i up to a constant. Hence the tokens whose information is closest to the
    # entropy are the tokens whose logits are closest to the expected logit.
    centre = largest + sum_below / total
    return Prefix(total * jnp.asarray(p, total.dtype), largest, centre)


class _Weights(NamedTuple):
    """Unnormalised probabilities of tokens."""

    largest: Float[Array, "*batch 1"]
    below: Float[Array, "*batch vocab"]
    """Each logit minus the largest."""
    weight: Float[Array, "*batch vocab"]
    """The exponential of `below`."""


def _weights(logits: Float[Array, "*batch vocab"]) -> _Weights:
    logits = logits.astype(at_least_float32(logits))
    largest = maximum(logits)
    below = logits - largest
    return _Weights(largest, below, jnp.exp(below))
