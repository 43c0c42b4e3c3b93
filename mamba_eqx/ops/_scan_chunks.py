"""The selective scan in chunks of tokens, in operations of JAX, and its derivatives.

The state has the shape `(d_state, d_inner)`, and `At` is `A` transposed to match. With the many
channels last, every elementwise operation of the loop is a vector operation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._exp import exp


State = Float[Array, "d_state d_inner"]
Chunks = Float[Array, "chunks chunk d_inner"]


class Tokens(NamedTuple):
    """One token, or a sequence of tokens, or chunks of tokens."""

    x: Float[Array, "*seq d_inner"]
    dt: Float[Array, "*seq d_inner"]
    B: Float[Array, "*seq d_state"]
    C: Float[Array, "*seq d_state"]
    reset: Bool[Array, "*seq"] | None


class Residuals(NamedTuple):
    """The values of the forward pass that the derivatives of a scan are computed from."""

    tokens: Tokens
    At: State
    starts: Float[Array, "chunks d_state d_inner"]
    """The state at the start of every chunk."""


Inputs = tuple[Tokens, State, State]
"""The arguments of a scan, or their tangents or cotangents, which have `reset=None`."""


def forget(reset: Bool[Array, ""] | None, h: State) -> State:
    """Returns the state `h`, or zeros where a token forgets everything before it."""
    return h if reset is None else jnp.where(reset, jnp.zeros_like(h), h)


class _Terms(NamedTuple):
    """What the recurrence needs of every token of a chunk, or of one token."""

    decay: Float[Array, "*chunk d_state d_inner"]
    dt_x: Float[Array, "*chunk d_inner"]
    B: Float[Array, "*chunk d_state"]
    reset: Bool[Array, "*chunk"] | None


def _terms(At: State, tokens: Tokens) -> _Terms:
    """Returns the terms of a chunk. XLA:CPU computes the exponentials of many tokens at once on all
    cores, but not those of one token in the loop over time."""
    decay = exp(tokens.dt[:, None, :] * At)
    return _Terms(decay, tokens.dt * tokens.x, tokens.B, tokens.reset)


def _advance(h: State, token: _Terms) -> tuple[State, State]:
    """Returns the state before a token, without what the token forgets, and the state after it."""
    before = forget(token.reset, h)
    return before, token.decay * before + token.B[:, None] * token.dt_x


def _over_state(weights: Float[Array, " d_state"], h: State) -> Float[Array, " d_inner"]:
    # In a loop, a matrix product is faster than the chain of `_sum_over_state`.
    return jnp.matmul(weights, h, precision=lax.Precision.HIGHEST)


def _over_channels(h: State, weights: Float[Array, " d_inner"]) -> Float[Array, " d_state"]:
    return jnp.matmul(h, weights, precision=lax.Precision.HIGHEST)


def run_chunks(
    tokens: Tokens, At: State, h: State
) -> tuple[Chunks, State, Float[Array, "chunks d_state d_inner"]]:
    """Returns the outputs, the last state, and the state at the start of every chunk."""

    def step(h: Array, inputs: tuple[_Terms, Array]) -> tuple[Array, Array]:
        terms, C = inputs
        _, h = _advance(h, terms)
        return h, _over_state(C, h)

    def chunk(start: Array, tokens: Tokens) -> tuple[Array, tuple[Array, Array]]:
        h, y = lax.scan(step, start, (_terms(At, tokens), tokens.C))
        return h, (y, start)

    h, (y, starts) = lax.scan(chunk, h, tokens)
    return y, h, starts


def push(residuals: Residuals, tangents: Inputs) -> tuple[Chunks, State]:
    """Returns the tangents of the outputs and of the last state of a scan."""
    tokens, At, starts = residuals
    tokens_dot, At_dot, h_dot = tangents

    def step(
        carry: tuple[Array, Array], inputs: tuple[_Terms, Tokens, Tokens, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        h, h_dot = carry
        terms, token, token_dot, dt_x_dot = inputs
        before, h = _advance(h, terms)
        log_decay_dot = token_dot.dt * At + token.dt * At_dot
        h_dot = forget(terms.reset, h_dot) + log_decay_dot * before
        h_dot = terms.decay * h_dot
        h_dot = h_dot + token_dot.B[:, None] * terms.dt_x + terms.B[:, None] * dt_x_dot
        return (h, h_dot), _over_state(token_dot.C, h) + _over_state(token.C, h_dot)

    def chunk(h_dot: Array, inputs: tuple[Tokens, Tokens, Array]) -> tuple[Array, Array]:
        tokens, tokens_dot, start = inputs
        dt_x_dot = tokens_dot.dt * tokens.x + tokens.dt * tokens_dot.x
        rows = (_terms(At, tokens), tokens, tokens_dot, dt_x_dot)
        (_, h_dot), y_dot = lax.scan(step, (start, h_dot), rows)
        return h_dot, y_dot

    h_dot, y_dot = lax.scan(chunk, h_dot, (tokens, tokens_dot, starts))
    return y_dot, h_dot


def _sum_over_state(t: Float[Array, "d_state d_inner"]) -> Float[Array, " d_inner"]:
    # Under `vmap` over a batch of one, XLA's CPU backend turns `jnp.sum` over the leading axis,
    # fused with what produces `t`, into scalar code: ten times slower than this chain of vector
    # additions (docs/speed.md).
    total = t[0]
    for n in range(1, t.shape[0]):
        total = total + t[n]
    return total


def pull(residuals: Residuals, cotangents: tuple[Chunks, State]) -> Inputs:
    """Returns the cotangents of the arguments of a scan, the transpose of `push`."""
    # The reverse pass recomputes the states of a chunk from the state at its start. The adjoint
    # g_t = dL/dh_t then runs from the chunk's end, g_{t-1} = exp(dt_t A) g_t + C_{t-1} dL/dy_{t-1}.
    tokens, At, starts = residuals
    y_bar, h_bar = cotangents

    def again(h: Array, inputs: tuple[_Terms, Array]) -> tuple[Array, tuple[Array, Array]]:
        terms, y_bar = inputs
        before, h = _advance(h, terms)
        return h, (before, _over_channels(h, y_bar))

    def step(
        carry: tuple[Array, Array], inputs: tuple[_Terms, Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        g, At_bar = carry
        terms, dt, C, y_bar, before = inputs
        g = g + C[:, None] * y_bar
        B_bar = _over_channels(g, terms.dt_x)
        dt_x_bar = _over_state(terms.B, g)
        g = terms.decay * g
        log_decay_bar = g * before
        dt_bar = _sum_over_state(log_decay_bar * At)
        At_bar = At_bar + log_decay_bar * dt
        return (forget(terms.reset, g), At_bar), (B_bar, dt_x_bar, dt_bar)

    def chunk(
        carry: tuple[Array, Array], inputs: tuple[Tokens, Array, Array]
    ) -> tuple[tuple[Array, Array], Tokens]:
        tokens, y_bar, start = inputs
        x, dt, _, C, _ = tokens
        terms = _terms(At, tokens)
        _, (before, C_bar) = lax.scan(again, start, (terms, y_bar))
        rows = (terms, dt, C, y_bar, before)
        carry, (B_bar, dt_x_bar, dt_bar) = lax.scan(step, carry, rows, reverse=True)
        dt_bar = dt_bar + x * dt_x_bar
        return carry, Tokens(x=dt * dt_x_bar, dt=dt_bar, B=B_bar, C=C_bar, reset=None)

    carry = (h_bar, jnp.zeros_like(At))
    (h_bar, At_bar), tokens_bar = lax.scan(chunk, carry, (tokens, y_bar, starts), reverse=True)
    return tokens_bar, At_bar, h_bar
