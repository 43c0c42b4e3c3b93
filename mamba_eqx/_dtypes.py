import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def default_dtype() -> jnp.dtype:
    """float64 where JAX is in its 64-bit mode, otherwise float32: as in `equinox.nn`."""
    return jnp.dtype(jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32)


def at_least_float32(*values: Array | DTypeLike | None) -> jnp.dtype:
    """The dtype in which recurrences are computed and states are kept: float64 if any of `values`
    (arrays or dtypes) is float64, otherwise float32.

    A recurrence multiplies hundreds of factors near one; in bfloat16 a decay of 0.999 is 1.
    """
    wide = any(value is not None and jnp.result_type(value) == jnp.float64 for value in values)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
