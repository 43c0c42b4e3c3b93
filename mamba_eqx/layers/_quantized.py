from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from ..ops import dequantize_weight, quantize_weight, quantized_product
from ._linear import AbstractLinear, Linear


class QuantizedLinear(AbstractLinear):
    r"""A linear map whose weight has 8 or 4 bits, $y = W x + b$ with $W_{oi} = s_{o,g(i)} q_{oi}$.

    Every group $g$ of consecutive inputs shares a scale $s$. The map computes in the dtype of the
    scales, so [`mamba_eqx.cast`][] works as it does on a [`mamba_eqx.layers.Linear`][]; sums are at
    least float32. Gradients flow to the input, the scales and the bias, but not to the integers.

    Several maps may be stacked along leading axes, as in a [`mamba_eqx.Stacked`][].
    """

    weight: Int8[Array, "*stack out_features in_features"] | UInt8[Array, "*stack out_features _"]
    """The integers $q$, as [`mamba_eqx.ops.quantized_product`][] stores them: int8 for 8 bits, and
    two in every uint8 for 4 bits."""

    scale: Float[Array, "*stack out_features groups"]
    """The scales $s$."""

    bias: Float[Array, "*stack out_features"] | None

    def __init__(
        self,
        weight: Array,
        scale: Float[Array, "*stack out_features groups"],
        bias: Float[Array, "*stack out_features"] | None = None,
    ):
        """**Arguments:**

        - `weight`, `scale`: the results of [`mamba_eqx.ops.quantize_weight`][].
        - `bias`: the bias, if there is one.
        """
        self.weight = weight
        self.scale = scale
        self.bias = bias

    @classmethod
    def of(
        cls,
        linear: Linear,
        *,
        bits: Literal[8, 4],
        group: int,
    ) -> "QuantizedLinear":
        """Rounds the weight of a linear map.

        **Arguments:**

        - `linear`: the map, or several maps with stacked weights.
        - `bits`: 8 or 4.
        - `group`: the number of consecutive inputs that share a scale: a multiple of 32 that
            divides the number of inputs.

        **Returns:**

        The map, which computes in the dtype of `linear`.

        **Raises:** `ValueError` if `linear` is not a `Linear`, or `bits` or `group` does not fit.
        """
        if not isinstance(linear, Linear):
            raise ValueError(
                f"`linear` must be a `mamba_eqx.layers.Linear`, but got {type(linear).__name__}. A "
                "map can be quantised only once: start from the original one."
            )
        weight, scale = quantize_weight(linear.weight, bits=bits, group=group)
        return cls(weight, scale, linear.bias)

    @property
    def bits(self) -> int:
        """The number of bits of an integer, 8 or 4."""
        return 8 if self.weight.dtype == jnp.int8 else 4

    @property
    def in_features(self) -> int:
        """The size of the input's last axis."""
        return self.weight.shape[-1] * 8 // self.bits

    @property
    def group(self) -> int:
        """The number of consecutive inputs that share a scale."""
        return self.in_features // self.scale.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the scales and of the bias, in which the map computes."""
        return self.scale.dtype

    def dequantized(self) -> Linear:
        """Returns the map with a weight in the dtype of the scales, which has the same values."""
        return Linear.of(dequantize_weight(self.weight, self.scale), self.bias)

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        """See [`mamba_eqx.layers.AbstractLinear`][]."""
        y = quantized_product(x.astype(self.dtype), self.weight, self.scale, dtype=dtype)
        return y if self.bias is None else y + self.bias.astype(y.dtype)
