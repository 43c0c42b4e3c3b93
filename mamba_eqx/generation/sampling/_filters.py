"""Filters: functions of logits that exclude tokens by setting their logits to `-inf`, and leave the
other logits unchanged. All of them act along the last axis, with any number of leading axes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._dtypes import at_least_float32
from ._checks import check_min_p, check_temperature, check_top_k, check_top_p, check_typical_p
from ._threshold import Prefix, keep_only, keep_prefix, maximum


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
    return keep_prefix(logits, prefix_top_k(k))


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
    return keep_prefix(logits, prefix_top_p(logits, p))


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
    return keep_only(logits, logits - maximum(logits) >= jnp.log(jnp.asarray(p, logits.dtype)))


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
    return keep_prefix(logits, prefix_typical_p(logits, p))


def prefix_top_k(k: int | Int[Array, ""]) -> Prefix:
    check_top_k(k)
    return Prefix(jnp.asarray(k, jnp.int32))


def prefix_top_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]) -> Prefix:
    check_top_p(p)
    largest, _, weight = _weights(logits)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return Prefix(total * jnp.asarray(p, total.dtype), largest)


def prefix_typical_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, ""]) -> Prefix:
    check_typical_p(p)
    largest, below, weight = _weights(logits)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    # What is excluded already has no weight, and adds nothing.
    sum_below = jnp.sum(jnp.where(weight > 0, weight * below, 0), axis=-1, keepdims=True)
    # log p_i is l_i but for a constant: the tokens whose information is closest to the entropy are
    # those whose logits are closest to the expected logit.
    centre = largest + sum_below / total
    return Prefix(total * jnp.asarray(p, total.dtype), largest, centre)


def _weights(
    logits: Float[Array, "*batch vocab"],
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch vocab"], Float[Array, "*batch vocab"]]:
    """The largest logit, how far each is below it, and the exponential of that."""
    logits = logits.astype(at_least_float32(logits))
    largest = maximum(logits)
    below = logits - largest
    return largest, below, jnp.exp(below)
