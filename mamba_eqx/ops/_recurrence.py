from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from ._masks import append_axes, fill_padding, mask_resets, real_tokens


Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


def combine(earlier: Pair, later: Pair) -> Pair:
    """Composes two affine maps `h -> a h + b`, with `earlier` applied first.

    Composition is associative, so a recurrence is a prefix sum under it (Blelloch, 1990).
    """
    a1, b1 = earlier
    a2, b2 = later
    return a1 * a2, a2 * b1 + b2


@partial(jax.jit, static_argnames="method")
@jax.named_scope("mamba_eqx.ops.linear_recurrence")
def linear_recurrence(
    a: Float[Array, "seq *shape"],
    b: Float[Array, "seq *shape"],
    *,
    state: Float[Array, "*shape"] | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    method: Literal["sequential", "associative"] | None = None,
) -> tuple[Float[Array, "seq *shape"], Float[Array, "*shape"]]:
    r"""Computes every term of the linear recurrence

    $$h_t = a_t h_{t-1} + b_t.$$

    All `seq` terms are in memory at once. [`mamba_eqx.ops.selective_scan`][] avoids this by running
    one chunk at a time.

    **Arguments:**

    - `a`: the factors $a_t$, shape `(seq, *shape)`.
    - `b`: the terms $b_t$, shape `(seq, *shape)`.
    - `state`: the term $h_{-1}$ before the first, shape `(*shape)`; zero if `None`.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`. There $a_t$ counts
        as 0, so that all finite terms are forgotten, but NaN and infinities are not.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens.
    - `method`: `"sequential"` (a `jax.lax.scan`) or `"associative"` (a `jax.lax.associative_scan`,
        which has logarithmic depth and suits accelerators). `None` selects `"sequential"`, which
        is faster on a CPU.

    **Returns:**

    All terms $h_t$, shape `(seq, *shape)`, and the state after the last real token, shape
    `(*shape)`.

    **Raises:** `ValueError` if `method` is unknown.
    """
    if state is None:
        state = jnp.zeros(b.shape[1:], b.dtype)
    real = real_tokens(b.shape[0], length)
    a, b = fill_padding(real, a, 1), fill_padding(real, b, 0)
    if reset is not None:
        a = jnp.where(append_axes(mask_resets(reset, real), a), 0, a)
    if method in (None, "sequential"):

        def step(
            h: Float[Array, "*shape"], ab: Pair
        ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
            h = ab[0] * h + ab[1]
            return h, h

        last, h = lax.scan(step, state, (a, b))
        return h, last
    if method == "associative":
        if b.shape[0] == 0:
            return b, state
        _, h = lax.associative_scan(combine, (a, b.at[0].add(a[0] * state)))
        return h, h[-1]
    raise ValueError(f'`method` must be "sequential", "associative" or None, but got {method!r}.')
