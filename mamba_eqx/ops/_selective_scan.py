from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from .._trees import cut_into_chunks, vary_together
from ._arguments import size_or_default
from ._linear_map import linear_map
from ._masks import fill_padding, mask_resets, real_tokens
from ._pieces import is_piece, scan_pieces
from ._recurrence import linear_recurrence
from ._scan_chunks import Chunks, Inputs, Residuals, State, Tokens, forget, pull, push, run_chunks
from ._scan_native import is_native, native_chunks, native_pull


# In this file the state has the shape `(d_state, d_inner)`, and `At` is `A` transposed to match.

_Run = Callable[[Tokens, State, State], tuple[Chunks, State]]


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

    - `"chunked"`: one loop over time. On CPUs it runs in the kernels of the package
        mamba-eqx-native if that is installed and no array is float64. Its reverse pass keeps only
        the states at the starts of the chunks and recomputes the others, so that the memory for
        training grows as `seq * d_inner`. Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`)
        has a rule of its own as well. The reverse mode of second derivatives keeps the states of
        all tokens.
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

    def run(h: Array) -> tuple[Array, Array]:
        tokens, *states = vary_together((Tokens(x, dt, B, C, reset), At, h))
        if method in (None, "chunked"):
            size = size_or_default("chunk_size", chunk_size, 32)
            return _by_chunks(_chunked, size, tokens, *states)
        if method == "associative":
            size = size_or_default("chunk_size", chunk_size, 128)
            return _by_chunks(_associative, size, tokens, *states)
        if method == "sequential":
            return _sequential(tokens, *states)
        raise ValueError(
            f'`method` must be "chunked", "sequential", "associative" or None, but got {method!r}.'
        )

    if is_piece(x):
        y, h = scan_pieces(run, jnp.exp(jnp.sum(dt, axis=0) * At), h, reset)
    else:
        y, h = run(h)
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
    # Neither does the loop compute the step sizes again for every row of the state.
    dt = lax.optimization_barrier(dt)
    h = jnp.exp(dt * At) * state.astype(dtype) + B[:, None] * (dt * x)
    # Each row is multiplied on its own, since XLA's CPU backend would write all of `C[:, None] * h`
    # to memory before it adds its rows.
    y = C[0] * h[0]
    for n in range(1, len(h)):
        y = y + C[n] * h[n]
    if D is not None:
        y = y + D.astype(dtype) * x
    return y.astype(y_dtype), h


def _sequential(tokens: Tokens, At: State, h: State) -> tuple[Float[Array, "seq d_inner"], State]:
    def step(h: Array, token: Tokens) -> tuple[Array, Array]:
        h = forget(token.reset, h)
        y, h = selective_scan_step(token.x, token.dt, At.T, token.B, token.C, None, state=h)
        return h, y

    h, y = lax.scan(step, h, tokens)
    return y, h


def _by_chunks(
    run: _Run, chunk_size: int, tokens: Tokens, At: State, h: State
) -> tuple[Float[Array, "seq d_inner"], State]:
    """Calls `run` with the tokens cut into chunks. Tokens with `dt = 0` fill up the last chunk."""
    y, h = run(cut_into_chunks(chunk_size, tokens), At, h)
    return y.reshape((-1, *y.shape[2:]))[: tokens.x.shape[0]], h


def _associative(tokens: Tokens, At: State, h: State) -> tuple[Chunks, State]:
    @jax.checkpoint
    def chunk(h: Array, tokens: Tokens) -> tuple[Array, Array]:
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
def _chunked(tokens: Tokens, At: State, h: State) -> tuple[Chunks, State]:
    y, h, _ = _run_chunks(tokens, At, h, keep_starts=False)
    return y, h


@_chunked.defjvp
def _chunked_jvp(
    primals: Inputs, tangents: Inputs
) -> tuple[tuple[Chunks, State], tuple[Chunks, State]]:
    tokens, At, h = primals
    tokens_dot, At_dot, h_dot = tangents
    y, h, starts = _run_chunks(tokens, At, h, keep_starts=True)
    residuals = Residuals(tokens, At, starts)
    tangents = (tokens_dot._replace(reset=None), At_dot, h_dot)
    derivative = partial(push, residuals)
    transpose = partial(native_pull if is_native(tokens) else pull, residuals)
    return (y, h), linear_map(derivative, transpose, tangents, (y, h))


def _run_chunks(
    tokens: Tokens, At: State, h: State, *, keep_starts: bool
) -> tuple[Chunks, State, Array]:
    if is_native(tokens):
        return native_chunks(tokens, At, h, keep_starts=keep_starts)
    return run_chunks(tokens, At, h)
