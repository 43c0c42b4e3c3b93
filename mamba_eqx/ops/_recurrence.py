from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._masks import expand, freeze, mask_resets, real_tokens


Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


def combine(earlier: Pair, later: Pair) -> Pair:
    """The composition of two affine maps `h -> a h + b`, `earlier` applied first.

    It is associative, so that a recurrence is a prefix sum under it (Blelloch, 1990).
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
    length: Int[Array, ""] | int | None = None,
    method: Literal["sequential", "associative"] | None = None,
) -> tuple[Float[Array, "seq *shape"], Float[Array, "*shape"]]:
    r"""Every term of the linear recurrence

    $$h_t = a_t h_{t-1} + b_t.$$

    It holds all `seq` terms in memory; [`mamba_eqx.ops.selective_scan`][], which must not, uses
    it a chunk at a time.

    **Arguments:**

    - `a`, `b`: the factors and the terms, time first.
    - `state`: $h_{-1}$; zero if `None`.
    - `reset`: where true, everything before that token is forgotten ($a_t$ counts as 0).
    - `length`: only the first `length` tokens are real; the state returned is the one after them.
    - `method`: `"sequential"` (a `jax.lax.scan`) or `"associative"` (a
        `jax.lax.associative_scan`: logarithmic depth, for accelerators). `None` is
        `"sequential"`, the faster one on a CPU.

    **Returns:**

    All $h_t$, and the state after the last real token.
    """
    if state is None:
        state = jnp.zeros(b.shape[1:], b.dtype)
    real = real_tokens(b.shape[0], length)
    a, b = freeze(real, a, 1), freeze(real, b, 0)
    if reset is not None:
        a = jnp.where(expand(mask_resets(reset, real), a), 0, a)
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
