import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._dtypes import default_dtype
from ._initialisers import uniform


class Linear(eqx.Module):
    r"""A linear map over the last axis of its input, $y = W x + b$.

    The parameters are those of `equinox.nn.Linear`, but the input may have any number of leading
    axes. Under `jax.vmap`, `equinox.nn.Linear` has the weight as the left factor of a matrix
    product, whose result XLA's CPU backend may write twice, the second time transposed
    (docs/speed.md).
    """

    weight: Float[Array, "out_features in_features"]
    bias: Float[Array, " out_features"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The initialisation is the official one (`_init_weights`).

        **Arguments:**

        - `in_features`: the size of the input's last axis.
        - `out_features`: the size of the output's last axis.
        - `use_bias`: whether to add a bias, which starts at zero.
        - `scale`: the initial weight is uniform within `±scale / sqrt(in_features)`.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the weight.
        """
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        bound = scale * in_features**-0.5
        self.weight = uniform(key, (out_features, in_features), bound=bound, dtype=dtype)
        self.bias = jnp.zeros(out_features, dtype) if use_bias else None

    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Applies the map.

        **Arguments:**

        - `x`: an array of shape `(..., in_features)`, in the dtype of the parameters.

        **Returns:**

        An array of shape `(..., out_features)`.
        """
        y = product(self.weight, x)
        return y if self.bias is None else y + self.bias


def product(
    weight: Float[Array, "out_features in_features"],
    x: Float[Array, "*batch in_features"],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out_features"]:
    """Multiplies the last axis of `x` by `weight`, with a result of `dtype` (by default that of the
    arguments)."""
    if x.ndim == 1:
        # XLA's CPU backend would otherwise fuse the product with the code after it and no longer
        # call its fast routine: decoding would take half as long again (docs/speed.md).
        return lax.optimization_barrier(jnp.matmul(weight, x, preferred_element_type=dtype))
    return jnp.matmul(x, weight.T, preferred_element_type=dtype)
