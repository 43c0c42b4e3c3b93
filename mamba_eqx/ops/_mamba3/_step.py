import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._arguments import check_groups
from .._rotary import cos_sin, rotate, wrap
from ._types import Parameters, State, StateTuple, Tokens, cast_together


# Subscripts: h heads, r ranks, p channels of a head, n state dimensions.


@jax.named_scope("mamba_eqx.ops.mamba3_step")
def mamba3_step(
    x: Float[Array, "nheads headdim"],
    dt: Float[Array, " nheads"],
    A: Float[Array, " nheads"],
    B: Float[Array, "rank ngroups d_state"],
    C: Float[Array, "rank ngroups d_state"],
    D: Float[Array, " nheads"] | None,
    *,
    trap: Float[Array, " nheads"],
    angles: Float[Array, " pairs"],
    B_bias: Float[Array, "nheads rank d_state"],
    C_bias: Float[Array, "nheads rank d_state"],
    mimo_x: Float[Array, "nheads rank headdim"] | None = None,
    interleaved: bool,
    state: StateTuple,
) -> tuple[Float[Array, "rank nheads headdim"], StateTuple]:
    """Computes one token of [`mamba_eqx.ops.mamba3`][].

    **Arguments:**

    - `x`: the input, shape `(nheads, headdim)`.
    - `dt`: the positive step sizes, shape `(nheads,)`.
    - `A`: the negated rates of decay, shape `(nheads,)`.
    - `B`, `C`: the input and output maps, shape `(rank, ngroups, d_state)`.
    - `D`: the skip connection, shape `(nheads,)`, or `None`.
    - `trap`: the weights of the trapezoidal rule, between 0 and 1, shape `(nheads,)`.
    - `angles`: the rotation of each pair per unit of step size, in radians, shape `(pairs,)`.
    - `B_bias`, `C_bias`: the biases of the keys and queries, shape `(nheads, rank, d_state)`.
    - `mimo_x`: the factors of the inputs of every rank, shape `(nheads, rank, headdim)`; ones if
        `None`.
    - `interleaved`: whether neighbouring dimensions form the pairs.
    - `state`: the state before the token, as for [`mamba_eqx.ops.mamba3`][].

    **Returns:**

    The outputs of every rank, shape `(rank, nheads, headdim)`, in the dtype of `x`, and the state
    after the token, in float32 (float64 if any input is).

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`, or `angles` has more than
    `d_state // 2` pairs.
    """
    check_groups(x.shape[0], B.shape[1])
    token = Tokens(x, dt, A, B, C, trap, angles)
    parameters = Parameters(D, B_bias, C_bias, mimo_x)
    y, after = advance(*cast_together(token, parameters, State(*state)), interleaved)
    return y.astype(x.dtype), after.as_tuple()


def advance(
    token: Tokens, parameters: Parameters, before: State, interleaved: bool
) -> tuple[Float[Array, "rank nheads headdim"], State]:
    """Returns the outputs of one token, and the state after it."""
    x, dt, A, B, C, trap, angles = token
    D, B_bias, C_bias, mimo_x = parameters
    angle = wrap(before.angle + dt[:, None] * angles)
    k = rotate_per_head(B, B_bias, angle, interleaved)
    q = rotate_per_head(C, C_bias, angle, interleaved)
    v, v_before = per_rank(x, mimo_x), per_rank(before.x, mimo_x)
    alpha = jnp.exp(dt * A)
    beta, gamma = (1 - trap) * dt * alpha, trap * dt
    # One product computes the terms of both tokens.
    keys = jnp.concatenate([beta[:, None] * before.k, gamma[:, None] * k])
    written = jnp.einsum("rhn,rhp->hpn", keys, jnp.concatenate([v_before, v]))
    h = alpha[:, None, None] * before.h + written
    y = jnp.einsum("rhn,hpn->rhp", q, h)
    if D is not None:
        y = y + D[:, None] * v
    return y, State(angle, h, k, x)


def rotate_per_head(
    B: Float[Array, "rank ngroups d_state"],
    bias: Float[Array, "nheads rank d_state"],
    angle: Float[Array, "nheads pairs"],
    interleaved: bool,
) -> Float[Array, "rank nheads d_state"]:
    """Returns the keys of one token from its `B`, or its queries from its `C`."""
    per_head = jnp.repeat(B, bias.shape[0] // B.shape[1], axis=1)
    return rotate(per_head + bias.swapaxes(0, 1), *cos_sin(angle), interleaved=interleaved)


def per_rank(
    x: Float[Array, "nheads headdim"], mimo_x: Float[Array, "nheads rank headdim"] | None
) -> Float[Array, "rank nheads headdim"]:
    """Returns the values $v$ of one token for every rank."""
    return x[None] if mimo_x is None else x * mimo_x.swapaxes(0, 1)
