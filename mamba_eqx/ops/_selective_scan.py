from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from .._trees import cut_into_chunks
from ._arguments import size_or_default
from ._linear_map import linear_map
from ._masks import fill_padding, mask_resets, real_tokens
from ._recurrence import linear_recurrence


# In this file the state has the shape `(d_state, d_inner)`, and `At` is `A` transposed to match.
# With the many channels last, every elementwise operation of the loop is a vector operation.


class _Tokens(NamedTuple):
    """One token, or a sequence of tokens, or chunks of tokens."""

    x: Float[Array, "*seq d_inner"]
    dt: Float[Array, "*seq d_inner"]
    B: Float[Array, "*seq d_state"]
    C: Float[Array, "*seq d_state"]
    reset: Bool[Array, "*seq"] | None


_State = Float[Array, "d_state d_inner"]
_Chunks = Float[Array, "chunks chunk d_inner"]
_Run = Callable[[_Tokens, _State, _State], tuple[_Chunks, _State]]


# Without this `jax.jit`, every call outside a compiled function would compile the loops again.
@partial(jax.jit, static_argnames=("method", "chunk_size"))
@jax.named_scope("mamba_eqx.ops.selective_scan")
def selective_scan(
    x: Float[Array, "seq d_inner"],
    dt: Float[Array, "seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "seq d_state"],
    C: Float[Array, "seq d_state"],
    D: Float[Array, " d_inner"] | None,
    *,
    state: Float[Array, "d_state d_inner"] | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    method: Literal["sequential", "associative", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq d_inner"], Float[Array, "d_state d_inner"]]:
    r"""Computes the selective state-space model of Mamba (Gu and Dao, 2023, section 3, algorithm
    2). Every channel of $x$ has its own hidden state $h \in \mathbb{R}^{N}$:

    $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t.$$

    The decay is discretised exactly (zero-order hold), the input by Euler's rule, as in the
    official code (`selective_scan_fn`). With the default method, no array of size
    `seq * d_inner * d_state` is ever held.

    All methods give the same result and support all of JAX's derivatives:

    - `"chunked"`: one loop over time. Its reverse pass keeps only the states at the starts of the
        chunks and recomputes the others, so that the memory for training grows as `seq * d_inner`.
        Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) has a rule of its own as well. The
        reverse mode of second derivatives keeps the states of all tokens.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.selective_scan_step`][], with JAX's own
        derivatives. Its forward pass is as fast; its reverse pass is slower and needs `d_state`
        times the memory.
    - `"associative"`: a parallel prefix sum inside each chunk, the chunks one after another. It has
        a shorter critical path but does several times the work, which suits accelerators with idle
        lanes. A non-finite token makes the rest of its chunk and the state after it non-finite,
        even if a reset follows in the same chunk.

    **Arguments:**

    - `x`: the inputs, shape `(seq, d_inner)`.
    - `dt`: the step sizes $\Delta$, shape `(seq, d_inner)`. They must be positive (apply softplus
        before), or zero, which leaves the state unchanged.
    - `A`: the negated rates of decay, which are negative, shape `(d_inner, d_state)`.
    - `B`, `C`: the input and output maps of every token, shared by all channels, shape
        `(seq, d_state)`.
    - `D`: the skip connection, shape `(d_inner,)`, or `None`.
    - `state`: the hidden state before the first token, shape `(d_state, d_inner)`; zero if `None`.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.
    - `method`: one of the above; `None` selects `"chunked"`, the fastest measured on a CPU.
    - `chunk_size`: tokens per chunk, at least 1; `None` selects 32 for `"chunked"` and 128 for
        `"associative"`. `"sequential"` ignores it.

    **Returns:**

    The outputs, shape `(seq, d_inner)`, in the dtype of `x`, and the state after the last real
    token, shape `(d_state, d_inner)`, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `method` is unknown or `chunk_size` is less than 1.
    """
    seq, y_dtype = x.shape[0], x.dtype
    dtype = at_least_float32(x, dt, A, B, C, state)
    x, dt, At, B, C = (t.astype(dtype) for t in (x, dt, A.T, B, C))
    h = jnp.zeros(At.shape, dtype) if state is None else state.astype(dtype)
    real = real_tokens(seq, length)
    x, dt, B, C = (fill_padding(real, t, 0) for t in (x, dt, B, C))
    reset = None if reset is None else mask_resets(reset, real)
    tokens = _Tokens(x, dt, B, C, reset)

    if method in (None, "chunked"):
        y, h = _by_chunks(_chunked, size_or_default("chunk_size", chunk_size, 32), tokens, At, h)
    elif method == "associative":
        size = size_or_default("chunk_size", chunk_size, 128)
        y, h = _by_chunks(_associative, size, tokens, At, h)
    elif method == "sequential":
        y, h = _sequential(tokens, At, h)
    else:
        raise ValueError(
            f'`method` must be "chunked", "sequential", "associative" or None, but got {method!r}.'
        )
    if D is not None:
        y = y + D.astype(dtype) * x
    return y.astype(y_dtype), h


@jax.named_scope("mamba_eqx.ops.selective_scan_step")
def selective_scan_step(
    x: Float[Array, " d_inner"],
    dt: Float[Array, " d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, " d_state"],
    C: Float[Array, " d_state"],
    D: Float[Array, " d_inner"] | None,
    *,
    state: Float[Array, "d_state d_inner"],
) -> tuple[Float[Array, " d_inner"], Float[Array, "d_state d_inner"]]:
    """Computes one token of [`mamba_eqx.ops.selective_scan`][].

    **Arguments:**

    - `x`: the input, shape `(d_inner,)`.
    - `dt`: the positive step sizes, shape `(d_inner,)`.
    - `A`: the negated rates of decay, shape `(d_inner, d_state)`.
    - `B`, `C`: the input and output maps, shape `(d_state,)`.
    - `D`: the skip connection, shape `(d_inner,)`, or `None`.
    - `state`: the hidden state before the token, shape `(d_state, d_inner)`.

    **Returns:**

    The output, shape `(d_inner,)`, in the dtype of `x`, and the state after the token, shape
    `(d_state, d_inner)`, in float32 (float64 if any input is).
    """
    y_dtype, dtype = x.dtype, at_least_float32(x, dt, A, B, C, state)
    # The barrier keeps the transposition out of the loop over the state, which reads it in order.
    At = lax.optimization_barrier(A.T)
    x, dt, At, B, C = (t.astype(dtype) for t in (x, dt, At, B, C))
    h, _ = _advance(At, state.astype(dtype), x, dt, B, None)
    y = _sum_over_state(C[:, None] * h)
    if D is not None:
        y = y + D.astype(dtype) * x
    return y.astype(y_dtype), h


def _sum_over_state(t: Float[Array, "d_state d_inner"]) -> Float[Array, " d_inner"]:
    # Under `vmap` over a batch of one, XLA's CPU backend turns `jnp.sum` over the leading axis,
    # fused with what produces `t`, into scalar code: ten times slower than this chain of vector
    # additions (docs/speed.md).
    total = t[0]
    for n in range(1, t.shape[0]):
        total = total + t[n]
    return total


def _advance(
    At: _State,
    h: _State,
    x: Float[Array, " d_inner"],
    dt: Float[Array, " d_inner"],
    B: Float[Array, " d_state"],
    reset: Bool[Array, ""] | None,
) -> tuple[_State, _State]:
    """Returns the state after a token, and the part of it that comes from the previous state."""
    kept = _decay(At, dt, h, reset)
    return kept + B[:, None] * (dt * x), kept


def _decay(
    At: _State,
    dt: Float[Array, " d_inner"],
    h: _State,
    reset: Bool[Array, ""] | None,
) -> _State:
    kept = jnp.exp(dt * At) * h
    return kept if reset is None else jnp.where(reset, jnp.zeros_like(kept), kept)


def _sequential(
    tokens: _Tokens, At: _State, h: _State
) -> tuple[Float[Array, "seq d_inner"], _State]:
    def step(h: Array, token: _Tokens) -> tuple[Array, Array]:
        if token.reset is not None:
            h = jnp.where(token.reset, jnp.zeros_like(h), h)
        y, h = selective_scan_step(token.x, token.dt, At.T, token.B, token.C, None, state=h)
        return h, y

    h, y = lax.scan(step, h, tokens)
    return y, h


def _by_chunks(
    run: _Run, chunk_size: int, tokens: _Tokens, At: _State, h: _State
) -> tuple[Float[Array, "seq d_inner"], _State]:
    """Calls `run` with the tokens cut into chunks. Tokens with `dt = 0` fill up the last chunk."""
    y, h = run(cut_into_chunks(chunk_size, tokens), At, h)
    return y.reshape((-1, *y.shape[2:]))[: tokens.x.shape[0]], h


def _associative(tokens: _Tokens, At: _State, h: _State) -> tuple[_Chunks, _State]:
    @jax.checkpoint
    def chunk(h: Array, tokens: _Tokens) -> tuple[Array, Array]:
        x, dt, B, C, reset = tokens
        hs, h = linear_recurrence(
            jnp.exp(dt[:, None, :] * At),
            B[:, :, None] * (dt * x)[:, None, :],
            state=h,
            reset=reset,
            method="associative",
        )
        return h, jnp.einsum("tn,tnd->td", C, hs)

    h, y = lax.scan(chunk, h, tokens)
    return y, h


# In reverse mode, JAX's own derivatives would keep the state of every token, and a `jax.custom_vjp`
# would exclude forward mode.
@jax.custom_jvp
def _chunked(tokens: _Tokens, At: _State, h: _State) -> tuple[_Chunks, _State]:
    y, h, _ = _run_chunks(tokens, At, h)
    return y, h


class _Residuals(NamedTuple):
    """The values of the forward pass that the derivatives of `_chunked` are computed from."""

    tokens: _Tokens
    At: _State
    starts: Float[Array, "chunks d_state d_inner"]
    """The state at the start of every chunk."""


_Inputs = tuple[_Tokens, _State, _State]
"""The arguments of `_chunked`, or their tangents or cotangents, which have `reset=None`."""


@_chunked.defjvp
def _chunked_jvp(
    primals: _Inputs, tangents: _Inputs
) -> tuple[tuple[_Chunks, _State], tuple[_Chunks, _State]]:
    tokens, At, h = primals
    tokens_dot, At_dot, h_dot = tangents
    y, h, starts = _run_chunks(tokens, At, h)
    residuals = _Residuals(tokens, At, starts)
    tangents = (tokens_dot._replace(reset=None), At_dot, h_dot)
    derivative, transpose = partial(_push, residuals), partial(_pull, residuals)
    return (y, h), linear_map(derivative, transpose, tangents, (y, h))


def _run_chunks(
    tokens: _Tokens, At: _State, h: _State
) -> tuple[_Chunks, _State, Float[Array, "chunks d_state d_inner"]]:
    """Returns the outputs, the last state, and the state at the start of every chunk."""

    def step(h: Array, token: _Tokens) -> tuple[Array, Array]:
        h, _ = _advance(At, h, token.x, token.dt, token.B, token.reset)
        return h, _sum_over_state(token.C[:, None] * h)

    def chunk(start: Array, tokens: _Tokens) -> tuple[Array, tuple[Array, Array]]:
        h, y = lax.scan(step, start, tokens)
        return h, (y, start)

    h, (y, starts) = lax.scan(chunk, h, tokens)
    return y, h, starts


def _kept_in_chunk(
    At: _State, tokens: _Tokens, start: _State
) -> Float[Array, "chunk d_state d_inner"]:
    """Returns the part of every token's state that comes from the state before the token."""

    def step(h: Array, token: _Tokens) -> tuple[Array, Array]:
        return _advance(At, h, token.x, token.dt, token.B, token.reset)

    return lax.scan(step, start, tokens)[1]


def _push(residuals: _Residuals, tangents: _Inputs) -> tuple[_Chunks, _State]:
    """Returns the tangents of the outputs and of the last state of `_chunked`."""
    tokens, At, starts = residuals
    tokens_dot, At_dot, h_dot = tangents

    def step(h_dot: Array, inputs: tuple[_Tokens, _Tokens, Array]) -> tuple[Array, Array]:
        (x, dt, B, C, reset), token_dot, kept = inputs
        dt_x = dt * x
        dt_x_dot = token_dot.dt * x + dt * token_dot.x
        log_decay_dot = token_dot.dt * At + dt * At_dot
        h_dot = _decay(At, dt, h_dot, reset) + log_decay_dot * kept
        h_dot = h_dot + token_dot.B[:, None] * dt_x + B[:, None] * dt_x_dot
        h = kept + B[:, None] * dt_x
        return h_dot, _sum_over_state(token_dot.C[:, None] * h + C[:, None] * h_dot)

    def chunk(h_dot: Array, inputs: tuple[_Tokens, _Tokens, Array]) -> tuple[Array, Array]:
        tokens, tokens_dot, start = inputs
        kept = _kept_in_chunk(At, tokens, start)
        return lax.scan(step, h_dot, (tokens, tokens_dot, kept))

    h_dot, y_dot = lax.scan(chunk, h_dot, (tokens, tokens_dot, starts))
    return y_dot, h_dot


def _pull(residuals: _Residuals, cotangents: tuple[_Chunks, _State]) -> _Inputs:
    """Returns the cotangents of the arguments of `_chunked`, the transpose of `_push`."""
    # The reverse pass recomputes the states of a chunk from the state at its start. The adjoint
    # g_t = dL/dh_t then runs from the chunk's end, g_{t-1} = exp(dt_t A) g_t + C_{t-1} dL/dy_{t-1}.
    tokens, At, starts = residuals
    y_bar, h_bar = cotangents

    def step(
        carry: tuple[Array, Array], inputs: tuple[_Tokens, Array, Array]
    ) -> tuple[tuple[Array, Array], _Tokens]:
        g, At_bar = carry
        (x, dt, B, C, reset), y_bar, kept = inputs
        dt_x = dt * x
        g = g + C[:, None] * y_bar
        C_bar = (kept + B[:, None] * dt_x) @ y_bar
        B_bar = g @ dt_x
        dt_x_bar = _sum_over_state(g * B[:, None])
        log_decay_bar = g * kept
        dt_bar = _sum_over_state(log_decay_bar * At) + x * dt_x_bar
        At_bar = At_bar + log_decay_bar * dt
        g = _decay(At, dt, g, reset)
        token_bar = _Tokens(x=dt * dt_x_bar, dt=dt_bar, B=B_bar, C=C_bar, reset=None)
        return (g, At_bar), token_bar

    def chunk(
        carry: tuple[Array, Array], inputs: tuple[_Tokens, Array, Array]
    ) -> tuple[tuple[Array, Array], _Tokens]:
        tokens, y_bar, start = inputs
        kept = _kept_in_chunk(At, tokens, start)
        return lax.scan(step, carry, (tokens, y_bar, kept), reverse=True)

    carry = (h_bar, jnp.zeros_like(At))
    (h_bar, At_bar), tokens_bar = lax.scan(chunk, carry, (tokens, y_bar, starts), reverse=True)
    return tokens_bar, At_bar, h_bar
