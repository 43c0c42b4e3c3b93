import math

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


def dt_bias(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    dt_min: float,
    dt_max: float,
    dt_init_floor: float,
    dtype: jnp.dtype,
) -> Float[Array, "..."]:
    r"""The bias that makes $\mathrm{softplus}(\text{bias})$ log-uniform in `[dt_min, dt_max]`, and
    at least `dt_init_floor` (official `Mamba.__init__`)."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = jnp.exp(jr.uniform(key, shape, dtype, low, high))
    dt = jnp.maximum(dt, dt_init_floor)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


def check_dt(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min <= dt_max, but got dt_min={dt_min} and "
            f"dt_max={dt_max}."
        )
    if not 0 < dt_init_floor < math.inf:
        raise ValueError(f"`dt_init_floor` must be positive, but got {dt_init_floor}.")


def check_dt_limit(dt_limit: tuple[float, float]) -> None:
    low, high = dt_limit
    if not (0 <= low <= high and high > 0 and low < math.inf):
        raise ValueError(
            "`dt_limit` must be the smallest and the largest step size, with 0 <= smallest <= "
            f"largest, but got {dt_limit}. `(0.0, math.inf)` is no limit."
        )


def check_heads(d_inner: int, headdim: int, ngroups: int) -> None:
    check_positive("headdim", headdim)
    check_positive("ngroups", ngroups)
    if d_inner % headdim:
        raise ValueError(
            "`headdim` must divide `d_inner` (2 * d_model by default), but got "
            f"headdim={headdim} and d_inner={d_inner}."
        )
    nheads = d_inner // headdim
    if nheads % ngroups:
        raise ValueError(
            "`ngroups` must divide the number of heads, `d_inner / headdim`, but got "
            f"ngroups={ngroups} and {nheads} heads (d_inner={d_inner}, headdim={headdim})."
        )


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], *, bound: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    return jr.uniform(key, shape, dtype, -bound, bound)


def default_dtype() -> jnp.dtype:
    """float64 where JAX is in its 64-bit mode, otherwise float32: as in `equinox.nn`."""
    return jnp.dtype(jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32)


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, but got {name}={value!r}.")


def check_rope_fraction(rope_fraction: float, d_state: int) -> None:
    if rope_fraction not in (0.5, 1):
        raise ValueError(
            "`rope_fraction` must be 0.5 or 1, the fraction of the state that is turned, but got "
            f"rope_fraction={rope_fraction!r}."
        )
    if int(d_state * rope_fraction) < 2:
        raise ValueError(
            "`d_state * rope_fraction` must be at least 2, a pair that is turned, but got "
            f"d_state={d_state} and rope_fraction={rope_fraction}."
        )


def check_A(A_activation: str, A_floor: float) -> None:
    if A_activation not in ("heavy_tail", "softplus"):
        raise ValueError(
            '`A_activation` must be "heavy_tail" or "softplus", but got '
            f"A_activation={A_activation!r}."
        )
    if not 0 < A_floor < math.inf:
        raise ValueError(
            f"`A_floor`, the smallest rate of decay, must be positive, but got A_floor={A_floor}."
        )
