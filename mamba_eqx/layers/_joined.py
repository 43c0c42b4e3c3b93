from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._linear import AbstractLinear, Linear


class JoinedLinear(AbstractLinear):
    r"""Several linear maps of one input, whose outputs are joined, $y = [W_0 x, W_1 x, \dots]$.

    This is the fused projection of a mixer with its parts stored as arrays of their own, so that
    each can lie on several devices in its own way; see [`mamba_eqx.tensor_parallel`][].
    """

    linears: tuple[AbstractLinear, ...]

    def __init__(self, linears: Sequence[AbstractLinear]):
        """**Arguments:**

        - `linears`: the linear maps, in the order of their outputs.
        """
        self.linears = tuple(linears)

    @classmethod
    def split(cls, linear: Linear, sizes: Sequence[int]) -> "JoinedLinear":
        """Returns a linear map in parts.

        **Arguments:**

        - `linear`: the map, whose arrays may have further leading axes.
        - `sizes`: the sizes of the parts of its output.

        **Returns:**

        The map, which computes the same function.
        """
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        weights = jnp.split(linear.weight, ends, axis=-2)
        biases = [None] * len(sizes)
        if linear.bias is not None:
            biases = jnp.split(linear.bias, ends, axis=-1)
        return cls([Linear.of(*part) for part in zip(weights, biases, strict=True)])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters."""
        return self.linears[0].dtype

    @property
    def weight(self) -> Array:
        """A copy of the joined weight."""
        return jnp.concatenate([linear.weight for linear in self.linears], axis=-2)

    @property
    def bias(self) -> Array | None:
        """A copy of the joined bias."""
        biases = [bias for linear in self.linears if (bias := linear.bias) is not None]
        return jnp.concatenate(biases, axis=-1) if biases else None

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        """See [`mamba_eqx.layers.AbstractLinear`][]."""
        return jnp.concatenate([linear(x, dtype=dtype) for linear in self.linears], axis=-1)
