from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from ..._trees import batched_like, vary_together
from .._arguments import check_groups, size_or_default
from .._chunks import keep_where
from .._masks import fill_padding, mask_resets, real_tokens
from .._pieces import is_piece
from ._chunked import chunked, last_angle
from ._pieces import scan_pieces
from ._step import advance
from ._types import Parameters, State, StateTuple, Tokens, cast_together


@partial(jax.jit, static_argnames=("interleaved", "method", "chunk_size"))
@jax.named_scope("mamba_eqx.ops.mamba3")
def mamba3(
    x: Float[Array, "seq nheads headdim"],
    dt: Float[Array, "seq nheads"],
    A: Float[Array, "seq nheads"],
    B: Float[Array, "seq rank ngroups d_state"],
    C: Float[Array, "seq rank ngroups d_state"],
    D: Float[Array, " nheads"] | None,
    *,
    trap: Float[Array, "seq nheads"],
    angles: Float[Array, "seq pairs"],
    B_bias: Float[Array, "nheads rank d_state"],
    C_bias: Float[Array, "nheads rank d_state"],
    mimo_x: Float[Array, "nheads rank headdim"] | None = None,
    interleaved: bool,
    state: StateTuple | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
    method: Literal["sequential", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq rank nheads headdim"], StateTuple]:
    r"""Computes the state-space model of Mamba-3 (Lahoti et al., 2026). Every head, with channels
    $x_t \in \mathbb{R}^P$, step size $\Delta_t$ and $\lambda_t$ = `trap`, has a hidden state
    $h \in \mathbb{R}^{N \times P}$. The state follows a trapezoidal rule, which includes the term
    of the previous token, and its dimensions rotate in pairs,

    $$\begin{aligned}
    \theta_t &= \theta_{t-1} + \Delta_t\, \texttt{angles}_t, \\
    k_{t,r} &= \mathrm{Rot}(\theta_t) (B_{t,r} + b^B_r), \quad
      q_{t,r} = \mathrm{Rot}(\theta_t) (C_{t,r} + b^C_r), \quad
      v_{t,r} = x_t \odot \texttt{mimo\_x}_r, \\
    \alpha_t &= e^{\Delta_t A_t}, \quad \beta_t = (1 - \lambda_t) \Delta_t \alpha_t, \quad
      \gamma_t = \lambda_t \Delta_t, \\
    h_t &= \alpha_t h_{t-1} + \beta_t \sum_r k_{t-1,r} v_{t-1,r}^\top
      + \gamma_t \sum_r k_{t,r} v_{t,r}^\top, \\
    y_{t,r} &= h_t^\top q_{t,r} + D v_{t,r}.
    \end{aligned}$$

    This is a complex state, seen from a frame that does not rotate, so that it decays at one real
    rate. With $\lambda = 1$ and without angles it is [`mamba_eqx.ops.ssd`][]. `rank` is the rank of
    the state's input and output, more than one in the MIMO form. `ngroups` divides `nheads`, and
    head $i$ uses the $B$ and $C$ of group $\lfloor i / (\texttt{nheads} / \texttt{ngroups})
    \rfloor$.

    Both methods give the same result and support all of JAX's derivatives:

    - `"chunked"`: attention within chunks, with the state carried from one to the next. Each token
        adds its term for the next token ahead of time: except in its own output, token $s$ has the
        weight $\gamma_s + (1 - \lambda_{s+1}) \Delta_{s+1}$. The angles of all tokens are in memory
        at once, but the states and the attention of one chunk only. The reverse pass keeps the
        states at the starts of the chunks. A non-finite token makes its whole chunk and the
        state after it non-finite, even if a reset follows in the same chunk.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.mamba3_step`][]. It is slower, and its
        reverse pass keeps the state of every token.

    **Arguments:**

    - `x`: the inputs, shape `(seq, nheads, headdim)`.
    - `dt`: the step sizes $\Delta$, shape `(seq, nheads)`. They must be positive (apply softplus
        before), or zero, which leaves the hidden state unchanged.
    - `A`: the negated rate of decay of every head and token, which is negative, shape
        `(seq, nheads)`.
    - `B`, `C`: the input and output maps of every token, shared by the heads of a group, shape
        `(seq, rank, ngroups, d_state)`.
    - `D`: the skip connection, shape `(nheads,)`, or `None`.
    - `trap`: $\lambda$, between 0 and 1 (apply the sigmoid before), shape `(seq, nheads)`.
    - `angles`: the rotation of each pair per unit of step size, in radians (apply `pi * tanh`
        before), shape `(seq, pairs)`. At most `d_state // 2` pairs rotate; other dimensions do not.
    - `B_bias`, `C_bias`: $b^B$ and $b^C$, shape `(nheads, rank, d_state)`.
    - `mimo_x`: the factors of the inputs of every rank, shape `(nheads, rank, headdim)`; ones if
        `None`.
    - `interleaved`: which dimensions form pair $i$. True selects $(2i, 2i + 1)$, as in the
        official SISO form; false selects $(i, i + \lfloor N / 2 \rfloor)$, as in the official MIMO
        form.
    - `state`: the state before the first token, as returned; all zero if `None`. It consists of
        $\theta$ between $-\pi$ and $\pi$, shape `(nheads, pairs)`; $h$, shape `(nheads, headdim,
        d_state)`; the last token's $k$, shape `(rank, nheads, d_state)`; and its $x$, shape
        `(nheads, headdim)`.
    - `reset`: true where a token forgets everything before it, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.
    - `method`: one of the above; `None` selects `"chunked"`.
    - `chunk_size`: tokens per chunk, at least 1; `None` selects 32 / `rank` (docs/speed.md). Larger
        chunks are usual on accelerators: the official code uses 64 / `rank`. `"sequential"` ignores
        it.

    **Returns:**

    The outputs of every rank, shape `(seq, rank, nheads, headdim)`, in the dtype of `x`, and the
    state after the last real token, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`, `angles` has more than `d_state
    // 2` pairs, `method` is unknown, or `chunk_size` is less than 1.
    """
    tokens = Tokens(x, dt, A, B, C, trap, angles)
    parameters = Parameters(D, B_bias, C_bias, mimo_x)
    check_groups(x.shape[1], B.shape[2])
    before = _empty_state(tokens) if state is None else State(*state)
    seq, y_dtype, real = x.shape[0], x.dtype, real_tokens(x.shape[0], length)
    tokens, parameters, before = cast_together(tokens, parameters, before)
    tokens = jax.tree.map(lambda t: fill_padding(real, t, 0), tokens)
    reset = None if reset is None else mask_resets(reset, real)
    if method not in (None, "chunked", "sequential"):
        raise ValueError(f'`method` must be "chunked", "sequential" or None, but got {method!r}.')
    size = None
    if method != "sequential":
        size = size_or_default("chunk_size", chunk_size, max(1, 32 // B.shape[1]))

    def run(before: State) -> tuple[Array, State]:
        batched = batched_like(parameters, tokens.dt)
        inputs = vary_together((tokens, batched, before, reset, real))
        if size is None or seq == 0:
            return _sequential(*inputs, interleaved)
        return chunked(size, *inputs, interleaved)

    if is_piece(x):
        zero = jnp.zeros_like(before.angle)
        turn = last_angle(size or 32, *vary_together((tokens.dt, tokens.angles, zero, reset)))
        y, after = scan_pieces(run, turn, tokens, parameters, before, reset, real)
    else:
        y, after = run(before)
    return y.astype(y_dtype), after.as_tuple()


def _empty_state(tokens: Tokens) -> State:
    _, nheads, headdim = tokens.x.shape
    _, rank, _, d_state = tokens.B.shape
    return State(
        angle=jnp.zeros((nheads, tokens.angles.shape[1])),
        h=jnp.zeros((nheads, headdim, d_state)),
        k=jnp.zeros((rank, nheads, d_state)),
        x=jnp.zeros((nheads, headdim)),
    )


def _sequential(
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    reset: Bool[Array, " seq"] | None,
    real: Bool[Array, " seq"] | None,
    interleaved: bool,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    def step(
        state: State, inputs: tuple[Tokens, Bool[Array, ""] | None, Bool[Array, ""] | None]
    ) -> tuple[State, Array]:
        token, reset, real = inputs
        if reset is not None:
            state = jax.tree.map(lambda t: keep_where(~reset, t), state)
        y, after = advance(token, parameters, state, interleaved)
        if real is not None:  # A padding token would otherwise replace the key and the input.
            after = jax.tree.map(lambda a, b: jnp.where(real, a, b), after, state)
        return after, y

    state, y = lax.scan(step, state, (tokens, reset, real))
    return y, state
