from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._dtypes import at_least_float32
from ._chunks import cut_into_chunks, decays, documents, only
from ._heads import check_groups
from ._masks import expand, freeze, mask_resets, real_tokens


# Subscripts: l, s tokens (of output and input), g groups, r heads of a group, p channels of a head,
# n state dimensions, x the channels of a group (all its heads'). With the heads of a group beside
# one another, B and C meet all of them in one matrix product and are never repeated. `d_inner` is
# `nheads * headdim`.


# Compiled, or else every call outside of `jax.jit` would compile its loops anew.
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
    length: Int[Array, ""] | int | None = None,
    method: Literal["sequential", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq nheads headdim"], Float[Array, "d_state nheads headdim"]]:
    r"""The state-space model of Mamba-2 (Dao and Gu, 2024): for every head with channels
    $x_t \in \mathbb{R}^P$, a hidden state $h \in \mathbb{R}^{N \times P}$ that decays at one rate,

    $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t^\top, \qquad
      y_t = h_t^\top C_t + D \odot x_t.$$

    Because the decay is a scalar, a stretch of tokens is a masked attention without softmax,

    $$y_t = \sum_{s \le t} e^{(\Delta_{s+1} + \dots + \Delta_t) A}\, C_t^\top B_s\, \Delta_s x_s,$$

    which runs as matrix products: "state-space duality". `ngroups` divides `nheads`, and head $i$
    uses the $B$ and $C$ of group $\lfloor i / (\texttt{nheads} / \texttt{ngroups}) \rfloor$.

    The methods give the same result, and both have all of JAX's derivatives:

    - `"chunked"`: attention within chunks, the state carried from one to the next (section 6 and
        listing 1 of the paper; official `ssd_minimal_discrete`, `mamba_chunk_scan_combined`). It
        differs from them in running the chunks one after another: this holds the attention of one
        chunk at a time. Its reverse pass keeps only the states at the starts of the chunks. A
        token that is not finite spoils its whole chunk, earlier tokens included.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.ssd_step`][]. Slower, and in reverse it
        keeps the state of every token.

    **Arguments:**

    - `x`: the inputs.
    - `dt`: the step sizes $\Delta$, positive (softplus is the caller's). Zero leaves the state as
        it is.
    - `A`: negative, one per head.
    - `B`, `C`: the input and output maps of every token, shared over the heads of a group.
    - `D`: the skip connection, per head or per channel, or `None`.
    - `state`: the hidden state before the first token; zero if `None`.
    - `reset`: where true, everything before that token is forgotten.
    - `length`: only the first `length` tokens are real. The state returned is the one after them,
        and the outputs after them mean nothing.
    - `method`: as above; `None` is `"chunked"`.
    - `chunk_size`: tokens per chunk; `None` is 32, the fastest measured on a CPU (docs/speed.md).
        On accelerators larger ones are usual: upstream has 256.

    **Returns:**

    The outputs, in the dtype of `x`, and the state after the last real token, in float32 (float64
    if any input is).
    """
    check_groups(A.shape[0], B.shape[1])
    seq = x.shape[0]
    dtype = at_least_float32(x, dt, A, B, C, state)
    u, dt, A, B, C = (t.astype(dtype) for t in (x, dt, A, B, C))
    shape = (B.shape[2], *x.shape[1:])
    h = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    real = real_tokens(seq, length)
    u, dt, B, C = freeze(real, u, 0), freeze(real, dt, 0), freeze(real, B, 0), freeze(real, C, 0)
    if reset is not None:
        reset = mask_resets(reset, real)

    if method in (None, "chunked"):
        y, h = _chunked(32 if chunk_size is None else chunk_size, u, dt, A, B, C, h, reset)
    elif method == "sequential":
        y, h = _sequential(u, dt, A, B, C, h, reset)
    else:
        raise ValueError(f'`method` must be "chunked", "sequential" or None, but got {method!r}.')
    return _skip(D, u, y).astype(x.dtype), h


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
    """One token of [`mamba_eqx.ops.ssd`][]: the same arguments, for one token."""
    ngroups = B.shape[0]
    check_groups(A.shape[0], ngroups)
    dtype = at_least_float32(x, dt, A, B, C, state)
    u, dt, A, B, C, h = (t.astype(dtype) for t in (x, dt, A, B, C, state))
    written = (dt[:, None] * u).reshape(1, ngroups, -1)
    h = jnp.exp(dt * A)[:, None] * h + (B.T[:, :, None] * written).reshape(h.shape)
    # A product of matrices, since a sum over `d_state` becomes scalar code (docs/speed.md).
    y = jnp.einsum("gn,ngx->gx", C, h.reshape(-1, *written.shape[1:]))
    return _skip(D, u, y.reshape(u.shape)).astype(x.dtype), h


def _skip(
    D: Array | None,
    u: Float[Array, "*seq nheads headdim"],
    y: Float[Array, "*seq nheads headdim"],
) -> Float[Array, "*seq nheads headdim"]:
    if D is None:
        return y
    return y + (D if D.ndim == 2 else D[:, None]).astype(u.dtype) * u


def _sequential(
    u: Float[Array, "seq nheads headdim"],
    dt: Float[Array, "seq nheads"],
    A: Float[Array, " nheads"],
    B: Float[Array, "seq ngroups d_state"],
    C: Float[Array, "seq ngroups d_state"],
    h: Float[Array, "d_state nheads headdim"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[Float[Array, "seq nheads headdim"], Float[Array, "d_state nheads headdim"]]:
    def step(h: Array, token: Any) -> tuple[Array, Array]:
        u, dt, B, C, reset = token
        if reset is not None:
            h = jnp.where(reset, jnp.zeros_like(h), h)
        y, h = ssd_step(u, dt, A, B, C, None, state=h)
        return h, y

    h, y = lax.scan(step, h, (u, dt, B, C, reset))
    return y, h


def _chunked(
    chunk_size: int,
    u: Float[Array, "seq nheads headdim"],
    dt: Float[Array, "seq nheads"],
    A: Float[Array, " nheads"],
    B: Float[Array, "seq ngroups d_state"],
    C: Float[Array, "seq ngroups d_state"],
    h: Float[Array, "d_state nheads headdim"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[Float[Array, "seq nheads headdim"], Float[Array, "d_state nheads headdim"]]:
    """Chunk after chunk, the last one filled with tokens of `dt = 0`."""
    seq, nheads, headdim = u.shape
    ngroups, d_state = B.shape[1:]

    # `prevent_cse` is for code outside of loops.
    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(h: Array, tokens: Any) -> tuple[Array, Array]:
        u, log_decay, dt, B, C, reset = tokens
        y, h = _chunk(u, log_decay, dt, B, C, reset, h)
        return h, y

    by_group = (ngroups, nheads // ngroups, headdim)
    grouped = h.reshape(d_state, *by_group).swapaxes(0, 1)
    tokens = (u.reshape(seq, *by_group), (dt * A).reshape(seq, *by_group[:2]))
    tokens = (*tokens, dt.reshape(seq, *by_group[:2]), B, C, reset)
    grouped, y = lax.scan(chunk, grouped, cut_into_chunks(chunk_size, tokens))
    y = y.reshape(-1, nheads, headdim)[:seq]
    return y, grouped.swapaxes(0, 1).reshape(d_state, nheads, headdim)


def _chunk(
    u: Float[Array, "chunk ngroups heads headdim"],
    log_decay: Float[Array, "chunk ngroups heads"],
    dt: Float[Array, "chunk ngroups heads"],
    B: Float[Array, "chunk ngroups d_state"],
    C: Float[Array, "chunk ngroups d_state"],
    reset: Bool[Array, " chunk"] | None,
    h: Float[Array, "ngroups d_state heads headdim"],
) -> tuple[
    Float[Array, "chunk ngroups heads headdim"], Float[Array, "ngroups d_state heads headdim"]
]:
    size = u.shape[0]
    visible, first = documents(reset, size)
    decay = decays(jnp.moveaxis(log_decay, 0, -1), visible)  # (ngroups, heads, l, s)
    since_start = only(expand(first, log_decay), jnp.exp(jnp.cumsum(log_decay, axis=0)))

    weight = decay * jnp.moveaxis(dt, 0, -1)[..., None, :]
    y = jnp.einsum("grls,sgrp->lgrp", jnp.einsum("lgn,sgn->gls", C, B)[:, None] * weight, u)
    seen = jnp.einsum("lgn,gnrp->lgrp", only(expand(first, C), C), h)
    y = y + only(expand(first, seen), since_start[..., None] * seen)

    to_end = jnp.moveaxis(weight[:, :, -1, :], -1, 0)[..., None] * u
    kept = only(first[-1], since_start[-1][:, None, :, None] * h)
    return y, kept + jnp.einsum("sgn,sgrp->gnrp", B, to_end)
