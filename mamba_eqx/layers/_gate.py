"""The gates of mixers and MLPs."""

import jax
from jaxtyping import Array, Float

from .._dtypes import at_least_float32


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes SiLU in float32 or better, and rounds it and its derivative once.

    `jax.nn.silu` of a bfloat16 array rounds the sigmoid too, and every term of the derivative.
    """
    return jax.nn.silu(x.astype(at_least_float32(x))).astype(x.dtype)


def gated(x: Float[Array, "*shape"], z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Multiplies `x` by the SiLU of `z`, in float32 or better. The result keeps that dtype: the
    linear map behind the gate rounds it, once."""
    dtype = at_least_float32(x, z)
    return x.astype(dtype) * jax.nn.silu(z.astype(dtype))
