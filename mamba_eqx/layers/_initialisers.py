import math

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


def init_dt_bias(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    dt_min: float,
    dt_max: float,
    dt_init_floor: float,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    r"""Draws biases of the step sizes (official `Mamba.__init__`).

    The initial step sizes $\mathrm{softplus}(\text{bias})$ are log-uniform in `[dt_min, dt_max]`
    and at least `dt_init_floor`.
    """
    low, high = math.log(dt_min), math.log(dt_max)
    dt = jnp.exp(jr.uniform(key, shape, dtype, low, high))
    dt = jnp.maximum(dt, dt_init_floor)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


def init_heads(
    dt_key: PRNGKeyArray,
    A_key: PRNGKeyArray,
    nheads: int,
    *,
    dt_min: float,
    dt_max: float,
    dt_init_floor: float,
    A_init_range: tuple[float, float],
    dtype: jnp.dtype,
) -> tuple[Float[Array, " nheads"], Float[Array, " nheads"]]:
    """Draws the step size and the rate of decay of each head (official `Mamba2.__init__`).

    **Returns:**

    `dt_bias`, as `init_dt_bias` draws it; and `A_log`, the logarithms of rates that are uniform in
    `A_init_range`.
    """
    bias = init_dt_bias(
        dt_key,
        (nheads,),
        dt_min=dt_min,
        dt_max=dt_max,
        dt_init_floor=dt_init_floor,
        dtype=dtype,
    )
    return bias, jnp.log(jr.uniform(A_key, (nheads,), dtype, *A_init_range))


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], *, bound: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Draws from the uniform distribution over `[-bound, bound)`."""
    return jr.uniform(key, shape, dtype, -bound, bound)
