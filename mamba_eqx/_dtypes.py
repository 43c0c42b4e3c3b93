"""The dtypes that parameters and recurrences have by default."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def default_dtype() -> jnp.dtype:
    """Returns float64 in JAX's 64-bit mode and float32 otherwise, as `equinox.nn` does."""
    return jnp.dtype(jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32)


def at_least_float32(*values: Array | DTypeLike | None) -> jnp.dtype:
    """Returns the dtype in which recurrences are computed and hidden states are stored.

    A recurrence multiplies hundreds of factors near one, and in bfloat16 a factor of 0.999 is 1.

    **Arguments:**

    - `values`: arrays or dtypes; `None` is ignored.

    **Returns:**

    float64 if any of `values` is float64, otherwise float32.
    """
    wide = any(value is not None and jnp.result_type(value) == jnp.float64 for value in values)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
