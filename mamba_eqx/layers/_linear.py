import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .. import ops
from .._dtypes import default_dtype
from ._initialisers import uniform


class AbstractLinear(eqx.Module):
    r"""A linear map over the last axis of its input, $y = W x + b$.

    The layers of this library hold linear maps of this type, so that the weights may be stored in
    another form than that of [`mamba_eqx.layers.Linear`][].
    """

    weight: eqx.AbstractVar[Array]
    bias: eqx.AbstractVar[Float[Array, " out_features"] | None]

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The floating-point dtype in which the map computes."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the map.

        **Arguments:**

        - `x`: an array of shape `(..., in_features)`, which is cast to the dtype of the map.
        - `dtype`: the dtype of the result; that of the map by default.

        **Returns:**

        An array of shape `(..., out_features)`.
        """


class Linear(AbstractLinear):
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

    @classmethod
    def of(
        cls,
        weight: Float[Array, "*stack out_features in_features"],
        bias: Float[Array, "*stack out_features"] | None = None,
    ) -> "Linear":
        """Returns the map with a given weight.

        **Arguments:**

        - `weight`: the weight, of shape `(out_features, in_features)`, or several, stacked.
        - `bias`: the bias, if there is one.

        **Returns:**

        The map.
        """
        small = cls(1, 1, use_bias=False, key=jr.key(0))
        parts = lambda linear: (linear.weight, linear.bias)
        return eqx.tree_at(parts, small, (weight, bias), is_leaf=lambda leaf: leaf is None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters."""
        return self.weight.dtype

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        """See [`mamba_eqx.layers.AbstractLinear`][]."""
        y = product(self.weight, x.astype(self.dtype), dtype=dtype)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


def product(
    weight: Float[Array, "out_features in_features"],
    x: Float[Array, "*batch in_features"],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out_features"]:
    """Multiplies the last axis of `x` by `weight`, with a result of `dtype` (by default that of the
    arguments)."""
    if weight.dtype.itemsize == 2:
        dtype = weight.dtype if dtype is None else jnp.dtype(dtype)
        sums = dtype if dtype == weight.dtype else jnp.float32
        return ops.narrow_product(x, weight, dtype=sums).astype(dtype)
    if x.ndim == 1:
        # XLA's CPU backend would otherwise fuse the product with the code after it and no longer
        # call its fast routine: decoding would take half as long again (docs/speed.md).
        return lax.optimization_barrier(jnp.matmul(weight, x, preferred_element_type=dtype))
    return jnp.matmul(x, weight.T, preferred_element_type=dtype)
