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


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], *, bound: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Draws from the uniform distribution over `[-bound, bound)`."""
    return jr.uniform(key, shape, dtype, -bound, bound)
