from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._dtypes import at_least_float32
from ._chunks import cut_into_chunks
from ._masks import freeze, mask_resets, real_tokens
from ._recurrence import linear_recurrence


# Inside this file the state is (d_state, d_inner) and `A` has been transposed to match: with the
# many channels last, every elementwise operation of the loop is a vector operation.


# Compiled, or else every call outside of `jax.jit` would compile its loops anew.
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
    length: Int[Array, ""] | int | None = None,
    method: Literal["sequential", "associative", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq d_inner"], Float[Array, "d_state d_inner"]]:
    r"""The selective state-space model of Mamba (Gu and Dao, 2023, section 3, algorithm 2), for
    every channel $d$ of $x$ with its own hidden state $h \in \mathbb{R}^{N}$:

    $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t.$$

    The decay is discretised exactly (zero-order hold), the input by Euler's rule, as in the
    official code (`selective_scan_fn`). Nothing of size `seq * d_inner * d_state` is ever held.

    The methods give the same result:

    - `"chunked"`: one loop over time. Its reverse pass keeps only the states at the starts of the
        chunks and recomputes the others, so that memory for training grows as `seq * d_inner`. It
        has a custom reverse rule, for which JAX offers no forward mode.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.selective_scan_step`][], with JAX's own
        derivatives: the one to use with `jax.jvp`, `jax.jacfwd` or `jax.linearize`. As fast
        forward; slower, and with `d_state` times the memory, in reverse.
    - `"associative"`: a parallel prefix sum inside each chunk, the chunks one after another.
        Shorter critical path, several times the work: for accelerators with idle lanes.

    **Arguments:**

    - `x`: the inputs.
    - `dt`: the step sizes $\Delta$, positive (softplus is the caller's). Zero leaves the state as
        it is.
    - `A`: negative, one per channel and state dimension.
    - `B`, `C`: the input and output maps of every token, shared over channels.
    - `D`: the skip connection, or `None`.
    - `state`: the hidden state before the first token; zero if `None`.
    - `reset`: where true, everything before that token is forgotten.
    - `length`: only the first `length` tokens are real. The state returned is the one after them,
        and the outputs after them mean nothing.
    - `method`: as above; `None` is `"chunked"`, the fastest measured on a CPU.
    - `chunk_size`: tokens per chunk; `None` is 32 for `"chunked"` and 128 for `"associative"`.

    **Returns:**

    The outputs, in the dtype of `x`, and the state after the last real token, in float32 (float64
    if any input is).
    """
    seq = x.shape[0]
    dtype = at_least_float32(x, dt, A, B, C, state)
    u, dt, At, B, C = (t.astype(dtype) for t in (x, dt, A.T, B, C))
    h = jnp.zeros(At.shape, dtype) if state is None else state.astype(dtype)
    real = real_tokens(seq, length)
    u, dt, B, C = freeze(real, u, 0), freeze(real, dt, 0), freeze(real, B, 0), freeze(real, C, 0)
    if reset is not None:
        reset = mask_resets(reset, real)

    if method in (None, "chunked"):
        y, h = _by_chunks(_chunked, chunk_size or 32, u, dt, At, B, C, h, reset)
    elif method == "associative":
        y, h = _by_chunks(_associative, chunk_size or 128, u, dt, At, B, C, h, reset)
    elif method == "sequential":
        y, h = _sequential(u, dt, At, B, C, h, reset)
    else:
        raise ValueError(
            f'`method` must be "chunked", "sequential", "associative" or None, but got {method!r}.'
        )
    if D is not None:
        y = y + D.astype(dtype) * u
    return y.astype(x.dtype), h


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
    """One token of [`mamba_eqx.ops.selective_scan`][]: the same arguments, for one token."""
    dtype = at_least_float32(x, dt, A, B, C, state)
    # The barrier keeps the transposition out of the loop over the state, which reads it in order.
    At = lax.optimization_barrier(A.T)
    u, dt, At, B, C = (t.astype(dtype) for t in (x, dt, At, B, C))
    h, _ = _advance(At, state.astype(dtype), u, dt, B, None)
    y = _sum_state(C[:, None] * h)
    if D is not None:
        y = y + D.astype(dtype) * u
    return y.astype(x.dtype), h


def _sum_state(t: Float[Array, "d_state d_inner"]) -> Float[Array, " d_inner"]:
    # Under `vmap` over a batch of one, XLA's CPU backend turns `jnp.sum` over the leading axis,
    # fused with what produces `t`, into scalar code: ten times slower than this chain of vector
    # additions (docs/speed.md).
    total = t[0]
    for n in range(1, t.shape[0]):
        total = total + t[n]
    return total


def _advance(
    At: Float[Array, "d_state d_inner"],
    h: Float[Array, "d_state d_inner"],
    u: Float[Array, " d_inner"],
    dt: Float[Array, " d_inner"],
    B: Float[Array, " d_state"],
    reset: Bool[Array, ""] | None,
) -> tuple[Float[Array, "d_state d_inner"], Float[Array, "d_state d_inner"]]:
    """The state after a token, and the part of it that came from the state before."""
    kept = _decay(At, dt, h, reset)
    return kept + B[:, None] * (dt * u), kept


def _decay(
    At: Float[Array, "d_state d_inner"],
    dt: Float[Array, " d_inner"],
    h: Float[Array, "d_state d_inner"],
    reset: Bool[Array, ""] | None,
) -> Float[Array, "d_state d_inner"]:
    kept = jnp.exp(dt * At) * h
    return kept if reset is None else jnp.where(reset, jnp.zeros_like(kept), kept)


def _sequential(
    u: Float[Array, "seq d_inner"],
    dt: Float[Array, "seq d_inner"],
    At: Float[Array, "d_state d_inner"],
    B: Float[Array, "seq d_state"],
    C: Float[Array, "seq d_state"],
    h: Float[Array, "d_state d_inner"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[Float[Array, "seq d_inner"], Float[Array, "d_state d_inner"]]:
    def step(h: Array, token: Any) -> tuple[Array, Array]:
        u, dt, B, C, reset = token
        if reset is not None:
            h = jnp.where(reset, jnp.zeros_like(h), h)
        y, h = selective_scan_step(u, dt, At.T, B, C, None, state=h)
        return h, y

    h, y = lax.scan(step, h, (u, dt, B, C, reset))
    return y, h


def _by_chunks(
    run: Any,
    chunk_size: int,
    u: Float[Array, "seq d_inner"],
    dt: Float[Array, "seq d_inner"],
    At: Float[Array, "d_state d_inner"],
    B: Float[Array, "seq d_state"],
    C: Float[Array, "seq d_state"],
    h: Float[Array, "d_state d_inner"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[Float[Array, "seq d_inner"], Float[Array, "d_state d_inner"]]:
    """Cuts the tokens into chunks for `run`, the last one filled with tokens of `dt = 0`."""
    y, h = run(cut_into_chunks(chunk_size, (u, dt, B, C, reset)), At, h)
    return y.reshape((-1, *y.shape[2:]))[: u.shape[0]], h


def _associative(
    tokens: Any, At: Float[Array, "d_state d_inner"], h: Float[Array, "d_state d_inner"]
) -> tuple[Float[Array, "chunks chunk d_inner"], Float[Array, "d_state d_inner"]]:
    @jax.checkpoint
    def chunk(h: Array, tokens: Any) -> tuple[Array, Array]:
        u, dt, B, C, reset = tokens
        hs, h = linear_recurrence(
            jnp.exp(dt[:, None, :] * At),
            B[:, :, None] * (dt * u)[:, None, :],
            state=h,
            reset=reset,
            method="associative",
        )
        return h, jnp.einsum("tn,tnd->td", C, hs)

    h, y = lax.scan(chunk, h, tokens)
    return y, h


@jax.custom_vjp
def _chunked(
    tokens: Any, At: Float[Array, "d_state d_inner"], h: Float[Array, "d_state d_inner"]
) -> tuple[Float[Array, "chunks chunk d_inner"], Float[Array, "d_state d_inner"]]:
    (y, h), _ = _chunked_fwd(tokens, At, h)
    return y, h


def _chunked_fwd(
    tokens: Any, At: Float[Array, "d_state d_inner"], h: Float[Array, "d_state d_inner"]
) -> tuple[Any, Any]:
    def step(h: Array, token: Any) -> tuple[Array, Array]:
        u, dt, B, C, reset = token
        h, _ = _advance(At, h, u, dt, B, reset)
        return h, _sum_state(C[:, None] * h)

    def chunk(start: Array, tokens: Any) -> tuple[Array, tuple[Array, Array]]:
        h, y = lax.scan(step, start, tokens)
        return h, (y, start)

    h, (y, starts) = lax.scan(chunk, h, tokens)
    return (y, h), (tokens, At, starts)


def _chunked_bwd(residuals: Any, cotangents: Any) -> Any:
    # Backwards through a chunk: its states are computed again from the state at its start, then
    # the adjoint g_t = dL/dh_t runs from its end, g_{t-1} = exp(dt_t A) g_t + C_{t-1} dL/dy_{t-1}.
    tokens, At, starts = residuals
    y_bar, h_bar = cotangents

    def recompute(h: Array, token: Any) -> tuple[Array, Array]:
        u, dt, B, _, reset = token
        return _advance(At, h, u, dt, B, reset)

    def step(carry: tuple[Array, Array], token: Any) -> tuple[Any, Any]:
        g, At_bar = carry
        (u, dt, B, C, reset), y_bar, kept = token
        du = dt * u
        g = g + C[:, None] * y_bar
        C_bar = (kept + B[:, None] * du) @ y_bar
        B_bar = g @ du
        du_bar = _sum_state(g * B[:, None])
        log_decay_bar = g * kept
        dt_bar = _sum_state(log_decay_bar * At) + u * du_bar
        At_bar = At_bar + log_decay_bar * dt
        return (_decay(At, dt, g, reset), At_bar), (dt * du_bar, dt_bar, B_bar, C_bar)

    def chunk(carry: tuple[Array, Array], chunk: Any) -> tuple[Any, Any]:
        tokens, y_bar, start = chunk
        _, kept = lax.scan(recompute, start, tokens)
        return lax.scan(step, carry, (tokens, y_bar, kept), reverse=True)

    carry = (h_bar, jnp.zeros_like(At))
    (h_bar, At_bar), tokens_bar = lax.scan(chunk, carry, (tokens, y_bar, starts), reverse=True)
    return (*tokens_bar, None), At_bar, h_bar


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
