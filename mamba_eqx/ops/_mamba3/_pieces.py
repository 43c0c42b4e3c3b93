"""Mamba-3 over a sequence whose pieces lie on different devices."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._pieces import at_start, forgets, of_all_pieces
from .._rotary import wrap
from ._step import per_rank
from ._types import Parameters, State, Tokens


def scan_pieces(
    run: Callable[[State], tuple[Array, State]],
    turn: Float[Array, "nheads pairs"],
    tokens: Tokens,
    parameters: Parameters,
    before: State,
    reset: Bool[Array, " seq"] | None,
    real: Bool[Array, " seq"] | None,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    """Runs the piece of every device from the state before it.

    The angles cross first, because the keys depend on them. The hidden state is then
    $h' = a (h + p) + b$ over a piece, where $p$ is the term that the last token before the piece
    adds in its first token.

    **Arguments:**

    - `run`: a function of the state before the piece to the outputs and the state after it.
    - `turn`: the angle after the piece, if it is zero before.
    - `tokens`, `parameters`, `reset`, `real`: those of the piece; padding is zero.
    - `before`: the state before the whole sequence.

    **Returns:**

    The outputs of the piece, and the state after the whole sequence.
    """
    turns, lost = of_all_pieces((turn, forgets(reset)))
    angles = [before.angle]
    for own, forget in zip(turns, lost, strict=True):
        angles.append(wrap(own + jnp.where(forget, jnp.zeros_like(own), angles[-1])))

    zeros = State(*(jnp.zeros_like(t) for t in before))
    _, added = run(zeros._replace(angle=at_start(angles[:-1])))
    has_tokens = jnp.array(True) if real is None else jnp.any(real)
    late = (1 - tokens.trap[0]) * tokens.dt[0]
    decay = jnp.exp(jnp.sum(tokens.dt * tokens.A, axis=0))
    summaries = of_all_pieces((decay, late, added._replace(angle=late), has_tokens))

    states = [before]
    for j, forget in enumerate(lost):
        a, late, b, has = (summaries[0][j], summaries[1][j], summaries[2], summaries[3][j])
        _, h, k, x = states[-1]
        values = per_rank(x, parameters.mimo_x)
        h = h + jnp.einsum("rhn,rhp->hpn", late[:, None] * k, values)
        # What a reset forgets may be NaN, in the decay too.
        a = jnp.where(forget, jnp.ones_like(a), a)
        h = a[:, None, None] * jnp.where(forget, jnp.zeros_like(h), h) + b.h[j]
        k, x = jnp.where(has, b.k[j], k), jnp.where(has, b.x[j], x)
        states.append(State(angles[j + 1], h, k, x))
    y, _ = run(at_start(states[:-1]))
    return y, states[-1]
