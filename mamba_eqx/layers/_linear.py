import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


class Linear(eqx.Module):
    r"""$y = W x + b$ over the last axis of `x`.

    The parameters are those of `equinox.nn.Linear`, `weight` of shape `(out_features,
    in_features)`. It differs in taking any number of leading axes: `equinox.nn.Linear` under
    `jax.vmap` multiplies with the weight on the left, and XLA's CPU backend may then write every
    result twice, the second time transposed (docs/speed.md).
    """

    weight: Float[Array, "out_features in_features"]
    bias: Float[Array, " out_features"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        scale: float = 1.0,
        dtype: jnp.dtype,
        key: PRNGKeyArray,
    ):
        """The initialisation is that of the official models (`_init_weights`).

        **Arguments:**

        - `in_features`, `out_features`: the sizes.
        - `use_bias`: whether there is a bias; it starts at zero.
        - `scale`: the weight is uniform within `±scale / sqrt(in_features)`.
        - `dtype`: of the parameters.
        - `key`: for the weight.
        """
        bound = scale * in_features**-0.5
        self.weight = jr.uniform(key, (out_features, in_features), dtype, -bound, bound)
        self.bias = jnp.zeros(out_features, dtype) if use_bias else None

    def __call__(
        self, x: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """**Arguments:**

        - `x`: in the dtype of the parameters.
        """
        y = product(self.weight, x)
        return y if self.bias is None else y + self.bias


def product(
    weight: Float[Array, "out_features in_features"],
    x: Float[Array, "*batch in_features"],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out_features"]:
    """`weight` on the last axis of `x`, with the result in `dtype` (by default that of both)."""
    if x.ndim == 1:
        # The barrier keeps XLA's CPU backend from fusing the product with what follows it, for
        # which it leaves its fast routine: decoding would take half as long again (docs/speed.md).
        return lax.optimization_barrier(jnp.matmul(weight, x, preferred_element_type=dtype))
    return jnp.matmul(x, weight.T, preferred_element_type=dtype)
