from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._chunks import only
from .._heads import check_groups
from .._masks import freeze, mask_resets, real_tokens
from ._chunked import chunked
from ._step import advance, in_one_dtype, map_state
from ._types import Parameters, State, Tokens


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
    state: State | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Int[Array, ""] | int | None = None,
    method: Literal["sequential", "chunked"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    r"""The state-space model of Mamba-3 (Lahoti et al., 2026). For every head, with channels
    $x_t \in \mathbb{R}^P$, step size $\Delta_t$ and $\lambda_t$ = `trap`, a hidden state
    $h \in \mathbb{R}^{N \times P}$ follows a trapezoidal rule, the term of the token before
    included, and its dimensions turn in pairs,

    $$\begin{aligned}
    \theta_t &= \theta_{t-1} + \Delta_t\, \texttt{angles}_t, &
      k_{t,r} &= \mathrm{Rot}(\theta_t) (B_{t,r} + b^B_r), \quad
      q_{t,r} = \mathrm{Rot}(\theta_t) (C_{t,r} + b^C_r), \quad
      v_{t,r} = x_t \odot \texttt{mimo\_x}_r, \\
    h_t &= \alpha_t h_{t-1} + \beta_t \sum_r k_{t-1,r} v_{t-1,r}^\top
      + \gamma_t \sum_r k_{t,r} v_{t,r}^\top, &
      \alpha_t &= e^{\Delta_t A_t}, \quad \beta_t = (1 - \lambda_t) \Delta_t \alpha_t, \quad
      \gamma_t = \lambda_t \Delta_t, \\
    y_{t,r} &= h_t^\top q_{t,r} + D v_{t,r}.
    \end{aligned}$$

    That is a state of complex numbers, seen from a frame that does not turn, so that it decays at
    one real rate. $\lambda = 1$ and no angles would be [`mamba_eqx.ops.ssd`][]. `rank` is that of
    the state's input and output, more than one in the MIMO form. `ngroups` divides `nheads`, and
    head $i$ uses the $B$ and $C$ of group $\lfloor i / (\texttt{nheads} / \texttt{ngroups})
    \rfloor$.

    The methods give the same result, and both have all of JAX's derivatives:

    - `"chunked"`: attention within chunks, the state carried from one to the next. The term of the
        token before is counted at that token: but for the output of its own, token $s$ weighs
        $\gamma_s + (1 - \lambda_{s+1}) \Delta_{s+1}$. The angles of all tokens are in memory at
        once, but of states and of attention only one chunk's; the reverse pass keeps the states at
        the starts of the chunks. A token that is not finite spoils its whole chunk, earlier tokens
        included.
    - `"sequential"`: a `jax.lax.scan` over [`mamba_eqx.ops.mamba3_step`][]. Slower, and in reverse
        it keeps the state of every token.

    **Arguments:**

    - `x`: the inputs.
    - `dt`: the step sizes $\Delta$, positive (softplus is the caller's). Zero leaves the hidden
        state as it is.
    - `A`: negative, one per head and token.
    - `B`, `C`: the input and output maps of every token, shared over the heads of a group.
    - `D`: the skip connection, or `None`.
    - `trap`: $\lambda$, between 0 and 1 (the sigmoid is the caller's).
    - `angles`: how far each pair turns per unit of step size (`pi * tanh` is the caller's).
    - `B_bias`, `C_bias`: $b^B$ and $b^C$, per head.
    - `mimo_x`: as above; ones if `None`.
    - `interleaved`: which dimensions are pairs: $(2i, 2i + 1)$, as in the SISO form upstream, or
        else $(i, i + \lfloor N / 2 \rfloor)$, as in the MIMO form.
    - `state`: what came before the first token: $\theta$ (within half a turn of zero), $h$, $k$ and
        $x$. All zero if `None`.
    - `reset`: where true, everything before that token is forgotten.
    - `length`: only the first `length` tokens are real. The state returned is the one after them,
        and the outputs after them mean nothing.
    - `method`: as above; `None` is `"chunked"`.
    - `chunk_size`: tokens per chunk; `None` is 32 / `rank` (docs/speed.md). On accelerators larger
        ones are usual: upstream has 64 / `rank`.

    **Returns:**

    The outputs for every rank, in the dtype of `x`, and the state after the last real token, in
    float32 (float64 if any input is).
    """
    tokens, parameters = (
        Tokens(x, dt, A, B, C, trap, angles),
        Parameters(D, B_bias, C_bias, mimo_x),
    )
    seq, rank, ngroups, d_state = B.shape
    nheads, headdim = x.shape[1:]
    check_groups(nheads, ngroups)
    if state is None:
        shapes = (nheads, angles.shape[1]), (nheads, headdim, d_state), (rank, nheads, d_state)
        angle, h, k, v = (jnp.zeros(shape) for shape in (*shapes, (nheads, headdim)))
        state = angle, h, k, v
    y_dtype, real = x.dtype, real_tokens(seq, length)
    tokens, parameters, state = in_one_dtype(tokens, parameters, state)
    tokens = jax.tree.map(lambda t: freeze(real, t, 0), tokens)
    reset = None if reset is None else mask_resets(reset, real)
    if method == "sequential" or seq == 0:
        y, state = _sequential(tokens, parameters, state, reset, real, interleaved)
    elif method in (None, "chunked"):
        chunk_size = max(1, 32 // rank) if chunk_size is None else chunk_size
        y, state = chunked(chunk_size, tokens, parameters, state, reset, real, interleaved)
    else:
        raise ValueError(f'`method` must be "chunked", "sequential" or None, but got {method!r}.')
    return y.astype(y_dtype), state


def _sequential(
    tokens: Tokens,
    parameters: Parameters,
    state: State,
    reset: Bool[Array, " seq"] | None,
    real: Bool[Array, " seq"] | None,
    interleaved: bool,
) -> tuple[Float[Array, "seq rank nheads headdim"], State]:
    def step(state: State, token: Any) -> tuple[State, Array]:
        token, reset, real = token
        if reset is not None:
            state = map_state(lambda t: only(~reset, t), state)
        y, new = advance(token, parameters, state, interleaved)
        if real is not None:  # An empty token would still replace the key and the value.
            new = jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state)
        return new, y

    state, y = lax.scan(step, state, (tokens, reset, real))
    return y, state
