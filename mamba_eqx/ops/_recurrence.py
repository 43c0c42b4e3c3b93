from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._trees import vary_together
from ._masks import append_axes, document_starts, fill_padding, mask_resets, real_tokens
from ._pieces import refuse_piece


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
        as 0, and NaN is forgotten too; `"associative"` forgets NaN in `state`, but not in `b`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens.
    - `method`: `"sequential"` (a `jax.lax.scan`) or `"associative"` (a `jax.lax.associative_scan`,
        which has logarithmic depth and suits accelerators). `None` selects `"sequential"`, which
        is faster on a CPU.

    **Returns:**

    All terms $h_t$, shape `(seq, *shape)`, and the state after the last real token, shape
    `(*shape)`.

    **Raises:** `ValueError` if `method` is unknown, or `b` is a piece of a sequence
        ([`mamba_eqx.context_scan`][]).
    """
    refuse_piece("linear_recurrence", b)
    if state is None:
        state = jnp.zeros(b.shape[1:], b.dtype)
    real = real_tokens(b.shape[0], length)
    a, b = fill_padding(real, a, 1), fill_padding(real, b, 0)
    forget = None
    if reset is not None:
        forget = append_axes(mask_resets(reset, real), a)
        a = jnp.where(forget, 0, a)
    a, b, state, forget = vary_together((a, b, state, forget))
    if method in (None, "sequential"):

        def step(
            h: Float[Array, "*shape"], token: tuple[Array, Array, Array | None]
        ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
            a, b, forget = token
            if forget is not None:  # NaN times zero would be NaN.
                h = jnp.where(forget, 0, h)
            h = a * h + b
            return h, h

        last, h = lax.scan(step, state, (a, b, forget))
        return h, last
    if method == "associative":
        if b.shape[0] == 0:
            return b, state
        if forget is not None:
            # A state that the first reset has not forgotten is added at the end.
            factors, h = lax.associative_scan(combine, (a, b))
            forgotten = append_axes(document_starts(b.shape[0], reset, real) >= 0, a)
            h += jnp.where(forgotten, 0, factors * state)
            return h, h[-1]
        _, h = lax.associative_scan(combine, (a, b.at[0].add(a[0] * state)))
        return h, h[-1]
    raise ValueError(f'`method` must be "sequential", "associative" or None, but got {method!r}.')
