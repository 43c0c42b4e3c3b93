from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from .._trees import cut_into_chunks, vary_together
from ._arguments import check_groups, size_or_default
from ._chunks import decays_between, keep_where, visibility
from ._masks import append_axes, fill_padding, mask_resets, real_tokens
from ._pieces import is_piece, scan_pieces


# Subscripts: l, s tokens (of output and input), g groups, r heads of a group, p channels of a head,
# n state dimensions, x the channels of all heads of a group. Because the heads of a group are
# neighbours, one matrix product multiplies B or C with all of them, and neither is repeated.


class _Tokens(NamedTuple):
    """One token, or a sequence of tokens."""

    x: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq ngroups d_state"]
    C: Float[Array, "*seq ngroups d_state"]
    reset: Bool[Array, "*seq"] | None


class _ChunkTokens(NamedTuple):
    """The tokens of one chunk, or of all chunks, with the heads in groups."""

    x: Float[Array, "*chunk ngroups heads headdim"]
    log_decay: Float[Array, "*chunk ngroups heads"]
    dt: Float[Array, "*chunk ngroups heads"]
    B: Float[Array, "*chunk ngroups d_state"]
    C: Float[Array, "*chunk ngroups d_state"]
    reset: Bool[Array, "*chunk"] | None


_State = Float[Array, "d_state nheads headdim"]


# Without this `jax.jit`, every call outside a compiled function would compile the loops again.
@partial(jax.jit, static_argnames=("method", "chunk_size"))
@jax.named_scope("mamba_eqx.ops.ssd")
def ssd(
    x: Float[Array, "seq nheads headdim"],
    dt: Float[Array, "seq nheads"],
    A: Float[Array, " nheads"],
    B: Float[Array, "seq ngroups d_state"],
    C: Float[Array, "seq ngroups d_state"],
    D: Float[Array, " nheads"] | Float[Array, "nheads headdim"] | None,
    *,
    state: Float[Array, "d_state nheads headdim"] | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    method: Literal["sequential", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq nheads headdim"], Float[Array, "d_state nheads headdim"]]:
    r"""Computes the state-space model of Mamba-2 (Dao and Gu, 2024). Every head, with channels
    $x_t \in \mathbb{R}^P$, has a hidden state $h \in \mathbb{R}^{N \times P}$ that decays at one
    rate,

    $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t^\top, \qquad
      y_t = h_t^\top C_t + D \odot x_t.$$

    Because the decay is a scalar, a stretch of tokens is a masked attention without softmax,

    $$y_t = \sum_{s \le t} e^{(\Delta_{s+1} + \dots + \Delta_t) A}\, C_t^\top B_s\, \Delta_s x_s,$$

    which runs as matrix products ("state-space duality"). `ngroups` divides `nheads`, and head $i$
    uses the $B$ and $C$ of group $\lfloor i / (\texttt{nheads} / \texttt{ngroups}) \rfloor$.

    Both methods give the same result and support all of JAX's derivatives:

    - `"chunked"`: attention within chunks, with the state carried from one to the next (section 6
        and listing 1 of the paper; official `ssd_minimal_discrete`, `mamba_chunk_scan_combined`).
        Unlike these, it runs the chunks one after another, so that only one chunk's attention is in
        memory at a time. Its reverse pass keeps only the states at the starts of the chunks. A
        non-finite token makes its whole chunk and the state after it non-finite, even if a reset
        follows in the same chunk.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.ssd_step`][]. It is slower, and its
        reverse pass keeps the state of every token.

    **Arguments:**

    - `x`: the inputs, shape `(seq, nheads, headdim)`.
    - `dt`: the step sizes $\Delta$, shape `(seq, nheads)`. They must be positive (apply softplus
        before), or zero, which leaves the state unchanged.
    - `A`: the negated rate of decay of every head, which is negative, shape `(nheads,)`.
    - `B`, `C`: the input and output maps of every token, shared by the heads of a group, shape
        `(seq, ngroups, d_state)`.
    - `D`: the skip connection, shape `(nheads,)` or `(nheads, headdim)`, or `None`.
    - `state`: the hidden state before the first token, shape `(d_state, nheads, headdim)`; zero if
        `None`.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.
    - `method`: one of the above; `None` selects `"chunked"`.
    - `chunk_size`: tokens per chunk, at least 1; `None` selects 32, the fastest measured on a CPU
        (docs/speed.md). Larger chunks are usual on accelerators: the official code uses 256.
        `"sequential"` ignores it.

    **Returns:**

    The outputs, shape `(seq, nheads, headdim)`, in the dtype of `x`, and the state after the last
    real token, shape `(d_state, nheads, headdim)`, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`, `method` is unknown, or
    `chunk_size` is less than 1.
    """
    check_groups(A.shape[0], B.shape[1])
    seq, y_dtype = x.shape[0], x.dtype
    dtype = at_least_float32(x, dt, A, B, C, state)
    x, dt, A, B, C = (t.astype(dtype) for t in (x, dt, A, B, C))
    shape = (B.shape[2], *x.shape[1:])
    h = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    real = real_tokens(seq, length)
    x, dt, B, C = (fill_padding(real, t, 0) for t in (x, dt, B, C))
    reset = None if reset is None else mask_resets(reset, real)

    def run(h: Array) -> tuple[Array, Array]:
        tokens, *states = vary_together((_Tokens(x, dt, B, C, reset), A, h))
        if method in (None, "chunked"):
            return _chunked(size_or_default("chunk_size", chunk_size, 32), tokens, *states)
        if method == "sequential":
            return _sequential(tokens, *states)
        raise ValueError(f'`method` must be "chunked", "sequential" or None, but got {method!r}.')

    if is_piece(x):
        y, h = scan_pieces(run, jnp.exp(jnp.sum(dt, axis=0) * A)[:, None], h, reset)
    else:
        y, h = run(h)
    return _add_skip(D, x, y).astype(y_dtype), h


@jax.named_scope("mamba_eqx.ops.ssd_step")
def ssd_step(
    x: Float[Array, "nheads headdim"],
    dt: Float[Array, " nheads"],
    A: Float[Array, " nheads"],
    B: Float[Array, "ngroups d_state"],
    C: Float[Array, "ngroups d_state"],
    D: Float[Array, " nheads"] | Float[Array, "nheads headdim"] | None,
    *,
    state: Float[Array, "d_state nheads headdim"],
) -> tuple[Float[Array, "nheads headdim"], Float[Array, "d_state nheads headdim"]]:
    """Computes one token of [`mamba_eqx.ops.ssd`][].

    **Arguments:**

    - `x`: the input, shape `(nheads, headdim)`.
    - `dt`: the positive step sizes, shape `(nheads,)`.
    - `A`: the negated rate of decay of every head, shape `(nheads,)`.
    - `B`, `C`: the input and output maps, shape `(ngroups, d_state)`.
    - `D`: the skip connection, shape `(nheads,)` or `(nheads, headdim)`, or `None`.
    - `state`: the hidden state before the token, shape `(d_state, nheads, headdim)`.

    **Returns:**

    The output, shape `(nheads, headdim)`, in the dtype of `x`, and the state after the token, shape
    `(d_state, nheads, headdim)`, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`.
    """
    ngroups = B.shape[0]
    check_groups(A.shape[0], ngroups)
    y_dtype, dtype = x.dtype, at_least_float32(x, dt, A, B, C, state)
    x, dt, A, B, C, h = (t.astype(dtype) for t in (x, dt, A, B, C, state))
    # Explicit sharding allows a reshape to split an axis or to join some, but not both.
    by_group = (ngroups, x.shape[0] // ngroups, x.shape[1])
    dt_x = (dt[:, None] * x).reshape(by_group).reshape(ngroups, -1)[None]
    written = (B.T[:, :, None] * dt_x).reshape(-1, *by_group).reshape(h.shape)
    h = jnp.exp(dt * A)[:, None] * h + written
    # XLA's CPU backend would compile a sum over `d_state` to scalar code, hence the matrix product
    # (docs/speed.md).
    y = jnp.einsum("gn,ngx->gx", C, h.reshape(-1, *by_group).reshape(-1, *dt_x.shape[1:]))
    y = y.reshape(by_group).reshape(x.shape)
    return _add_skip(D, x, y).astype(y_dtype), h


def _add_skip(
    D: Float[Array, " nheads"] | Float[Array, "nheads headdim"] | None,
    x: Float[Array, "*seq nheads headdim"],
    y: Float[Array, "*seq nheads headdim"],
) -> Float[Array, "*seq nheads headdim"]:
    if D is None:
        return y
    return y + (D if D.ndim == 2 else D[:, None]).astype(x.dtype) * x


def _sequential(
    tokens: _Tokens, A: Float[Array, " nheads"], h: _State
) -> tuple[Float[Array, "seq nheads headdim"], _State]:
    def step(h: Array, token: _Tokens) -> tuple[Array, Array]:
        if token.reset is not None:
            h = jnp.where(token.reset, jnp.zeros_like(h), h)
        y, h = ssd_step(token.x, token.dt, A, token.B, token.C, None, state=h)
        return h, y

    h, y = lax.scan(step, h, tokens)
    return y, h


def _chunked(
    chunk_size: int, tokens: _Tokens, A: Float[Array, " nheads"], h: _State
) -> tuple[Float[Array, "seq nheads headdim"], _State]:
    """Runs one chunk after another. Tokens with `dt = 0` fill up the last chunk."""
    x, dt, B, C, reset = tokens
    seq, nheads, headdim = x.shape
    ngroups, d_state = B.shape[1:]

    # `prevent_cse=True` is needed outside loops only.
    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(h: Array, tokens: _ChunkTokens) -> tuple[Array, Array]:
        y, h = _chunk(tokens, h)
        return h, y

    by_group = (ngroups, nheads // ngroups, headdim)
    grouped = h.reshape(d_state, *by_group).swapaxes(0, 1)
    chunk_tokens = _ChunkTokens(
        x=x.reshape(seq, *by_group),
        log_decay=(dt * A).reshape(seq, *by_group[:2]),
        dt=dt.reshape(seq, *by_group[:2]),
        B=B,
        C=C,
        reset=reset,
    )
    grouped, y = lax.scan(chunk, grouped, cut_into_chunks(chunk_size, chunk_tokens))
    # Explicit sharding allows a reshape to join axes in one place only.
    y = y.reshape(-1, *by_group)[:seq].reshape(seq, nheads, headdim)
    return y, grouped.swapaxes(0, 1).reshape(d_state, nheads, headdim)


def _chunk(
    tokens: _ChunkTokens, h: Float[Array, "ngroups d_state heads headdim"]
) -> tuple[
    Float[Array, "chunk ngroups heads headdim"], Float[Array, "ngroups d_state heads headdim"]
]:
    """Runs one chunk from the state `h`, and returns its outputs and the state after it."""
    x, log_decay, dt, B, C, reset = tokens
    visible, sees_start = visibility(reset, x.shape[0])
    decay = decays_between(jnp.moveaxis(log_decay, 0, -1), visible)  # (ngroups, heads, l, s)
    since_start = keep_where(
        append_axes(sees_start, log_decay), jnp.exp(jnp.cumsum(log_decay, axis=0))
    )

    weight = decay * jnp.moveaxis(dt, 0, -1)[..., None, :]
    y = jnp.einsum("grls,sgrp->lgrp", jnp.einsum("lgn,sgn->gls", C, B)[:, None] * weight, x)
    from_start = jnp.einsum("lgn,gnrp->lgrp", keep_where(append_axes(sees_start, C), C), h)
    y = y + keep_where(append_axes(sees_start, from_start), since_start[..., None] * from_start)

    to_end = jnp.moveaxis(weight[:, :, -1, :], -1, 0)[..., None] * x
    kept = keep_where(sees_start[-1], since_start[-1][:, None, :, None] * h)
    return y, kept + jnp.einsum("sgn,sgrp->gnrp", B, to_end)
