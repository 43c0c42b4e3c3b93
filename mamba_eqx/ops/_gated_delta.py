from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from .._explicit_axes import with_derived_shardings
from .._trees import cut_into_chunks, vary_together
from ._arguments import check_groups, size_or_default
from ._chunks import decays_between, keep_where, visibility
from ._masks import append_axes, fill_padding, mask_resets, real_tokens
from ._pieces import refuse_piece


# Subscripts: l, s tokens (of output and input), g groups, r heads of a group, n key dimensions,
# p value dimensions. Because the heads of a group are neighbours, no query or key is repeated.


class _Tokens(NamedTuple):
    """One token, or a sequence of tokens."""

    q: Float[Array, "*seq ngroups d_state"]
    k: Float[Array, "*seq ngroups d_state"]
    v: Float[Array, "*seq nheads headdim"]
    log_decay: Float[Array, "*seq nheads"]
    beta: Float[Array, "*seq nheads"]
    reset: Bool[Array, "*seq"] | None


class _ChunkTokens(NamedTuple):
    """The tokens of one chunk, or of all chunks, with the heads in groups."""

    q: Float[Array, "*chunk ngroups d_state"]
    k: Float[Array, "*chunk ngroups d_state"]
    v: Float[Array, "*chunk ngroups heads headdim"]
    log_decay: Float[Array, "*chunk ngroups heads"]
    beta: Float[Array, "*chunk ngroups heads"]
    reset: Bool[Array, "*chunk"] | None


_State = Float[Array, "nheads d_state headdim"]


# Without this `jax.jit`, every call outside a compiled function would compile the loops again.
@partial(jax.jit, static_argnames=("method", "chunk_size"))
@jax.named_scope("mamba_eqx.ops.gated_delta")
def gated_delta(
    q: Float[Array, "seq ngroups d_state"],
    k: Float[Array, "seq ngroups d_state"],
    v: Float[Array, "seq nheads headdim"],
    log_decay: Float[Array, "seq nheads"],
    beta: Float[Array, "seq nheads"],
    *,
    state: Float[Array, "nheads d_state headdim"] | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    method: Literal["sequential", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq nheads headdim"], Float[Array, "nheads d_state headdim"]]:
    r"""Computes the gated delta rule (Yang, Kautz and Hatamizadeh, 2025). Every head has a hidden
    state $S \in \mathbb{R}^{N \times P}$, a linear map from keys to values, which decays and is
    then corrected towards the value of the current key,

    $$\begin{aligned}
    \tilde S_t &= e^{g_t} S_{t-1}, \\
    S_t &= \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top, \\
    y_t &= S_t^\top q_t.
    \end{aligned}$$

    With keys of length 1, $\beta_t = 1$ replaces what the state returns for $k_t$ by $v_t$, and
    $\beta_t = 0$ leaves it as it is. `ngroups` divides `nheads`, and head $i$ uses the queries and
    keys of group $\lfloor i / (\texttt{nheads} / \texttt{ngroups}) \rfloor$.

    Both methods give the same result and support all of JAX's derivatives:

    - `"chunked"`: the corrections of a chunk are the solution of a triangular system of equations
        (the WY representation of section 3.2 of the paper), and the rest of the chunk consists of
        matrix products. Its reverse pass keeps only the states at the starts of the chunks. A
        non-finite token makes its whole chunk and the state after it non-finite, even if a reset
        follows in the same chunk.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.gated_delta_step`][]. Its reverse pass
        keeps the state of every token.

    Reference: Yang, Kautz and Hatamizadeh, *Gated Delta Networks: Improving Mamba2 with Delta Rule*
    (2025); official `chunk_gated_delta_rule` of flash-linear-attention, which also divides the
    queries by $\sqrt{N}$.

    **Arguments:**

    - `q`, `k`: the queries and keys of every token, shape `(seq, ngroups, d_state)`. Keys should be
        at most of length 1, or the state can grow without limit.
    - `v`: the values, shape `(seq, nheads, headdim)`.
    - `log_decay`: the logarithms $g$ of the decays, at most 0, shape `(seq, nheads)`.
    - `beta`: the sizes $\beta$ of the corrections, within `0..1`, shape `(seq, nheads)`.
    - `state`: the hidden state before the first token, shape `(nheads, d_state, headdim)`; zero if
        `None`.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.
    - `method`: one of the above; `None` selects `"chunked"`.
    - `chunk_size`: tokens per chunk, at least 1; `None` selects 32. `"sequential"` ignores it.

    **Returns:**

    The outputs, shape `(seq, nheads, headdim)`, in the dtype of `v`, and the state after the last
    real token, shape `(nheads, d_state, headdim)`, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`, `method` is unknown, or
    `chunk_size` is less than 1.
    """
    nheads, ngroups = v.shape[1], k.shape[1]
    check_groups(nheads, ngroups)
    refuse_piece("gated_delta", v)
    dtype = at_least_float32(q, k, v, log_decay, beta, state)
    shape = (nheads, k.shape[2], v.shape[2])
    S = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    real = real_tokens(v.shape[0], length)
    arrays = (fill_padding(real, t.astype(dtype), 0) for t in (q, k, v, log_decay, beta))
    tokens = _Tokens(*arrays, reset=None if reset is None else mask_resets(reset, real))
    tokens, S = vary_together((tokens, S))

    if method in (None, "chunked"):
        y, S = _chunked(size_or_default("chunk_size", chunk_size, 32), tokens, S)
    elif method == "sequential":
        y, S = _sequential(tokens, S)
    else:
        raise ValueError(f'`method` must be "chunked", "sequential" or None, but got {method!r}.')
    return y.astype(v.dtype), S


@jax.named_scope("mamba_eqx.ops.gated_delta_step")
def gated_delta_step(
    q: Float[Array, "ngroups d_state"],
    k: Float[Array, "ngroups d_state"],
    v: Float[Array, "nheads headdim"],
    log_decay: Float[Array, " nheads"],
    beta: Float[Array, " nheads"],
    *,
    state: Float[Array, "nheads d_state headdim"],
) -> tuple[Float[Array, "nheads headdim"], Float[Array, "nheads d_state headdim"]]:
    """Computes one token of [`mamba_eqx.ops.gated_delta`][].

    **Arguments:**

    - `q`, `k`: the queries and keys, shape `(ngroups, d_state)`.
    - `v`: the values, shape `(nheads, headdim)`.
    - `log_decay`: the logarithms of the decays, shape `(nheads,)`.
    - `beta`: the sizes of the corrections, shape `(nheads,)`.
    - `state`: the hidden state before the token, shape `(nheads, d_state, headdim)`.

    **Returns:**

    The output, shape `(nheads, headdim)`, in the dtype of `v`, and the state after the token, shape
    `(nheads, d_state, headdim)`, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`.
    """
    nheads, ngroups = v.shape[0], k.shape[0]
    check_groups(nheads, ngroups)
    y_dtype, dtype = v.dtype, at_least_float32(q, k, v, log_decay, beta, state)
    q, k, v, log_decay, beta, S = (t.astype(dtype) for t in (q, k, v, log_decay, beta, state))
    by_group = (ngroups, nheads // ngroups)
    S = (jnp.exp(log_decay)[:, None, None] * S).reshape(*by_group, *S.shape[1:])
    read = jnp.einsum("gn,grnp->grp", k, S)
    correction = beta.reshape(*by_group, 1) * (v.reshape(read.shape) - read)
    S = S + k[:, None, :, None] * correction[:, :, None, :]
    y = jnp.einsum("gn,grnp->grp", q, S)
    return y.reshape(v.shape).astype(y_dtype), S.reshape(state.shape)


def _sequential(tokens: _Tokens, S: _State) -> tuple[Float[Array, "seq nheads headdim"], _State]:
    def step(S: Array, token: _Tokens) -> tuple[Array, Array]:
        if token.reset is not None:
            S = jnp.where(token.reset, jnp.zeros_like(S), S)
        y, S = gated_delta_step(*token[:-1], state=S)
        return S, y

    S, y = lax.scan(step, S, tokens)
    return y, S


def _chunked(
    chunk_size: int, tokens: _Tokens, S: _State
) -> tuple[Float[Array, "seq nheads headdim"], _State]:
    """Runs one chunk after another. Tokens of zeros, which change nothing, fill up the last one."""
    seq, nheads, headdim = tokens.v.shape
    ngroups = tokens.k.shape[1]
    by_group = (ngroups, nheads // ngroups)

    # `prevent_cse=True` is needed outside loops only.
    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(S: Array, tokens: _ChunkTokens) -> tuple[Array, Array]:
        y, S = _chunk(tokens, S)
        return S, y

    grouped = _ChunkTokens(
        q=tokens.q,
        k=tokens.k,
        v=tokens.v.reshape(seq, *by_group, headdim),
        log_decay=tokens.log_decay.reshape(seq, *by_group),
        beta=tokens.beta.reshape(seq, *by_group),
        reset=tokens.reset,
    )
    end, y = lax.scan(
        chunk, S.reshape(*by_group, *S.shape[1:]), cut_into_chunks(chunk_size, grouped)
    )
    # Explicit sharding allows a reshape to join axes in one place only.
    y = y.reshape(-1, *by_group, headdim)[:seq].reshape(seq, nheads, headdim)
    return y, end.reshape(S.shape)


def _chunk(
    tokens: _ChunkTokens, S: Float[Array, "ngroups heads d_state headdim"]
) -> tuple[
    Float[Array, "chunk ngroups heads headdim"], Float[Array, "ngroups heads d_state headdim"]
]:
    r"""Runs one chunk from the state `S`, and returns its outputs and the state after it.

    The correction $u_l$ of a token is $\beta_l$ times its value less what the state before it
    returns for its key. This state consists of `S` and of the earlier corrections of the chunk, so
    that the corrections solve a system of equations whose matrix is triangular.
    """
    q, k, v, log_decay, beta, reset = tokens
    if reset is None:
        lost = None
    else:
        # The system mixes the corrections of all tokens, and its solution would spread NaN to those
        # that do not see `S`. A column of `S` influences no other column.
        lost = ~jnp.all(jnp.isfinite(S), axis=-2, keepdims=True)
        S = keep_where(~lost, S)
    visible, sees_start = visibility(reset, v.shape[0])
    decay = decays_between(jnp.moveaxis(log_decay, 0, -1), visible)  # (ngroups, heads, l, s)
    since_start = keep_where(
        append_axes(sees_start, log_decay), jnp.exp(jnp.cumsum(log_decay, axis=0))
    )

    def from_start(t: Float[Array, "chunk ngroups d_state"]) -> Array:
        """Returns what `S`, decayed to every token, returns for the token's query or key."""
        read = jnp.einsum("lgn,grnp->lgrp", keep_where(append_axes(sees_start, t), t), S)
        return keep_where(append_axes(sees_start, read), since_start[..., None] * read)

    def between(t: Float[Array, "chunk ngroups d_state"]) -> Array:
        """Returns the products of queries or keys with earlier keys, decayed."""
        return jnp.einsum("lgn,sgn->gls", t, k)[:, None] * decay

    steps = jnp.moveaxis(beta, 0, -1)[..., None]
    # The diagonal, which the solver takes to be 1, is not read.
    right = steps * jnp.moveaxis(v - from_start(k), 0, -2)
    solve = partial(solve_triangular, lower=True, unit_diagonal=True)
    u = with_derived_shardings(solve, steps * between(k), right)
    y = from_start(q) + jnp.einsum("grls,grsp->lgrp", between(q), u)

    kept = keep_where(sees_start[-1], since_start[-1][..., None, None] * S)
    end = kept + jnp.einsum("sgn,grs,grsp->grnp", k, decay[:, :, -1], u)
    if lost is not None:
        y = jnp.where(append_axes(sees_start, y) & lost[..., 0, :], jnp.nan, y)
        end = jnp.where(sees_start[-1] & lost, jnp.nan, end)
    return y, end
