from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ._linear import AbstractLinear


# The alignment in bytes of the arrays that JAX takes over from NumPy without a copy.
_ALIGNMENT = 64


class SeparateLinears(AbstractLinear):
    """The linear maps of all layers of a [`mamba_eqx.Stacked`][], one of which is chosen by its
    layer's index.

    A loop over stacked weights copies the weight of every layer before it multiplies. This map
    instead chooses between compiled products, each of which reads a weight where it is.
    """

    linears: tuple[AbstractLinear, ...]
    layer: Int[Array, ""] | None
    """The index of the chosen map; `None` outside of the loop over layers."""

    def __init__(self, linears: Sequence[AbstractLinear], layer: Int[Array, ""] | None = None):
        """**Arguments:**

        - `linears`: the linear maps, first layer first.
        - `layer`: the index of the chosen map.
        """
        self.linears = tuple(linears)
        self.layer = layer

    @property
    def dtype(self) -> jnp.dtype:
        """The floating-point dtype in which the maps compute."""
        return self.linears[0].dtype

    @property
    def weight(self) -> Array:
        """A copy of the weight of the chosen map."""
        return lax.switch(self._chosen(), [lambda w=linear.weight: w for linear in self.linears])

    @property
    def bias(self) -> Array | None:
        """A copy of the bias of the chosen map."""
        biases = [linear.bias for linear in self.linears]
        if any(bias is None for bias in biases):
            return None
        return lax.switch(self._chosen(), [lambda b=bias: b for bias in biases])

    def of(self, layer: Int[Array, ""]) -> "SeparateLinears":
        """Returns the choice of the map of a layer."""
        return SeparateLinears(self.linears, layer)

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        """See [`mamba_eqx.layers.AbstractLinear`][]."""
        maps = [partial(linear, dtype=dtype) for linear in self.linears]
        return lax.switch(self._chosen(), maps, x)

    def _chosen(self) -> Int[Array, ""]:
        if self.layer is None:
            raise ValueError(
                f"`SeparateLinears` holds the linear maps of {len(self.linears)} layers, of which "
                "only the loop of `Stacked` chooses one. Run the whole stack, or take a layer with "
                "`stacked.unstack()[i]`."
            )
        return self.layer


def is_separate(node: object) -> bool:
    """Returns whether a node of a tree is the linear maps of all layers."""
    return isinstance(node, SeparateLinears)


def separate(stacked: AbstractLinear) -> AbstractLinear:
    """Returns the maps of a stacked linear map with weights of their own, or the given map itself
    if it is separate already, or if this would copy weights."""
    if is_separate(stacked):
        return stacked
    arrays, rest = eqx.partition(stacked, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    parts = [_views(leaf) for leaf in leaves]
    # Shapes without values, as of `eqx.filter_eval_shape`, are no arrays.
    if not leaves or any(part is None for part in parts):
        return stacked
    layers = [jax.tree.unflatten(structure, part) for part in zip(*parts, strict=True)]
    return SeparateLinears([eqx.combine(layer, rest) for layer in layers])


def _views(stacked: Array) -> list[Array] | None:
    """Returns the parts of an array along its first axis, as arrays that share its memory.

    Returns `None` if there are no such arrays: on an accelerator, under a transformation, and if
    the parts are not aligned.
    """
    if isinstance(stacked, core.Tracer) or not isinstance(stacked, jax.Array):
        return None
    devices = stacked.sharding.device_set
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return None
    # The array that NumPy sees is another one than `stacked`, which would keep the NumPy array for
    # later calls, and could then no longer be donated.
    memory = np.asarray(stacked.addressable_data(0))
    size = memory.nbytes // len(memory)
    if size % _ALIGNMENT != 0:
        return None
    start = memory.__array_interface__["data"][0]
    parts = jax.device_put(list(memory), may_alias=True)
    for i, part in enumerate(parts):
        same_device = part.sharding.device_set == devices
        if not same_device or part.unsafe_buffer_pointer() != start + i * size:
            return None
    return parts
