from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._dtypes import at_least_float32
from .._heads import check_groups
from .._rotary import cos_sin, rotate, wrap
from ._types import Parameters, State, Tokens


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
    state: State,
) -> tuple[Float[Array, "rank nheads headdim"], State]:
    """One token of [`mamba_eqx.ops.mamba3`][]: the same arguments, for one token."""
    check_groups(x.shape[0], B.shape[1])
    token = Tokens(x, dt, A, B, C, trap, angles)
    parameters = Parameters(D, B_bias, C_bias, mimo_x)
    y, state = advance(*in_one_dtype(token, parameters, state), interleaved)
    return y.astype(x.dtype), state


def in_one_dtype(
    tokens: Tokens, parameters: Parameters, state: State
) -> tuple[Tokens, Parameters, State]:
    everything = (tokens, parameters, state)
    dtype = at_least_float32(*jax.tree.leaves(everything))
    return jax.tree.map(lambda t: t.astype(dtype), everything)


def advance(
    token: Tokens, parameters: Parameters, state: State, interleaved: bool
) -> tuple[Float[Array, "rank nheads headdim"], State]:
    x, dt, A, B, C, trap, angles = token
    D, B_bias, C_bias, mimo_x = parameters
    angle, h, k_before, x_before = state
    angle = wrap(angle + dt[:, None] * angles)
    k, q = turned(B, B_bias, angle, interleaved), turned(C, C_bias, angle, interleaved)
    v, v_before = expanded(x, mimo_x), expanded(x_before, mimo_x)
    alpha = jnp.exp(dt * A)
    beta, gamma = (1 - trap) * dt * alpha, trap * dt
    # One product for both terms.
    keys = jnp.concatenate([beta[:, None] * k_before, gamma[:, None] * k])
    written = jnp.einsum("rhn,rhp->hpn", keys, jnp.concatenate([v_before, v]))
    h = alpha[:, None, None] * h + written
    y = jnp.einsum("rhn,hpn->rhp", q, h)
    if D is not None:
        y = y + D[:, None] * v
    return y, (angle, h, k, x)


def map_state(f: Callable[[Array], Array], state: State) -> State:
    angle, h, k, x = state
    return f(angle), f(h), f(k), f(x)


def turned(
    B: Float[Array, "rank ngroups d_state"],
    bias: Float[Array, "nheads rank d_state"],
    angle: Float[Array, "nheads pairs"],
    interleaved: bool,
) -> Float[Array, "rank nheads d_state"]:
    """The keys of one token, from `B`; or its queries, from `C`."""
    of_heads = jnp.repeat(B, bias.shape[0] // B.shape[1], axis=1)
    return rotate(of_heads + bias.swapaxes(0, 1), *cos_sin(angle), interleaved=interleaved)


def expanded(
    x: Float[Array, "nheads headdim"], mimo_x: Float[Array, "nheads rank headdim"] | None
) -> Float[Array, "rank nheads headdim"]:
    """The values of one token."""
    return x[None] if mimo_x is None else x * mimo_x.swapaxes(0, 1)
