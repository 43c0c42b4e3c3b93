"""The share that one device has of a layer, inside `jax.shard_map`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .. import ops
from .._dtypes import at_least_float32
from .._trees import path_name, vary_together
from ..layers import AbstractLinear, GatedRMSNorm, JoinedLinear, Linear
from ._plans import Parts, Plan
from ._rules import TENSOR_AXIS


Module = TypeVar("Module", bound=eqx.Module)


class _Summed(AbstractLinear):
    """A linear map whose inputs lie on several devices, and which sums over all of them."""

    linear: AbstractLinear

    def __init__(self, linear: AbstractLinear):
        self.linear = linear

    @property
    def weight(self) -> Array:
        return self.linear.weight

    @property
    def bias(self) -> Array | None:
        return self.linear.bias

    @property
    def dtype(self) -> jnp.dtype:
        return self.linear.dtype

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        product = Linear.of(self.linear.weight)
        y = lax.psum(product(x, dtype=at_least_float32(dtype)), TENSOR_AXIS).astype(dtype)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class _Columns(AbstractLinear):
    """The linear maps of this device, some of which every device has."""

    joined: JoinedLinear
    parts: Parts = eqx.field(static=True)

    def __init__(self, joined: JoinedLinear, parts: Parts):
        self.joined = joined
        self.parts = parts

    @property
    def weight(self) -> Array:
        return self.joined.weight

    @property
    def bias(self) -> Array | None:
        return self.joined.bias

    @property
    def dtype(self) -> jnp.dtype:
        return self.joined.dtype

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out_features"]:
        # The gradient of the input is summed over the devices once for all parts that are cut. What
        # all devices compute alike is summed as output, which is smaller.
        own = _vary(x)
        linears = zip(self.joined.linears, self.parts, strict=True)
        pieces = [
            linear(own, dtype=dtype) if part.is_cut else _vary(linear(x, dtype=dtype))
            for linear, part in linears
        ]
        return jnp.concatenate(pieces, axis=-1)


class _SpreadNorm(eqx.Module):
    """A gated norm whose mean is over the channels of all devices."""

    norm: GatedRMSNorm

    def __call__(
        self, x: Float[Array, "*seq channels"], z: Float[Array, "*seq channels"]
    ) -> Float[Array, "*seq channels"]:
        return ops.gated_rms_norm(
            x,
            z,
            self.norm.weight,
            eps=self.norm.eps,
            norm_before_gate=self.norm.norm_before_gate,
            axis_name=TENSOR_AXIS,
        )


def _vary(array: Array) -> Array:
    """Makes an array that all devices have vary between them. Its gradient is summed over them in
    float32 at least: XLA's CPU backend ends the process where it sums 16-bit numbers."""
    index = lax.axis_index(TENSOR_AXIS)
    wide, _ = vary_together((array.astype(at_least_float32(array)), index))
    return wide.astype(array.dtype)


def stored(layer: Module, plan: Plan) -> Module:
    """Returns a layer whose fused linear maps are stored in parts. It computes the same."""
    parts = {
        name: JoinedLinear.split(getattr(layer, name), [part.size for part in parts])
        for name, parts in plan.outputs.items()
    }
    return _replaced(layer, parts)


def fused(layer: Module, plan: Plan) -> Module:
    """Returns the layer that `stored` was given."""
    linears = {name: getattr(layer, name) for name in plan.outputs}
    return _replaced(layer, {name: Linear.of(x.weight, x.bias) for name, x in linears.items()})


def specs(layer: PyTree, plan: Plan, *, other: str | None = None) -> PyTree:
    """Returns the partition specs of the arrays of a stored layer, and `None` for other leaves.

    **Arguments:**

    - `layer`, `plan`: the layer.
    - `other`: a mesh axis over which the other axis of each cut matrix lies.
    """

    def spec(path: jax.tree_util.KeyPath, leaf: Any) -> P | None:
        if not eqx.is_array(leaf):
            return None
        names = path_name(path).split(".")
        field, name = names[0], names[-1]
        free = (None,) * (leaf.ndim - 2)
        if field in plan.sums and name == "weight":
            return P(*free, other, TENSOR_AXIS)
        if field in plan.outputs:
            axis = TENSOR_AXIS if plan.outputs[field][int(names[2])].is_cut else None
            if name == "weight":
                return P(*free, axis, other)
            return P(*(None,) * (leaf.ndim - 1), axis)
        return P()

    return jax.tree_util.tree_map_with_path(spec, layer)


def state_specs(state: PyTree, plan: Plan) -> PyTree:
    """Returns the partition specs of a state."""
    axes = {name: axis for name, (axis, _) in plan.state.items()}

    def spec(path: jax.tree_util.KeyPath, leaf: Array | jax.ShapeDtypeStruct) -> P:
        axis = axes.get(path_name(path))
        if axis is None:
            return P()
        return P(*(None,) * (leaf.ndim + axis), TENSOR_AXIS, *(None,) * (-axis - 1))

    return jax.tree_util.tree_map_with_path(spec, state)


def empty_state(state: PyTree, plan: Plan, devices: int) -> PyTree:
    """Returns the state of zeros in which the parts that all devices have occur once for each.

    **Arguments:**

    - `state`: the initial state of the whole layer, which is zeros.
    - `plan`, `devices`: how the layer is cut.
    """

    def repeated(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        if path_name(path) not in plan.state:
            return leaf
        axis, parts = plan.state[path_name(path)]
        shape = list(leaf.shape)
        shape[axis] = sum(part.size * (1 if part.is_cut else devices) for part in parts)
        return jnp.zeros(shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(repeated, state)


def own_share(layer: Module, plan: Plan) -> Module:
    """Returns the layer of this device, given the layer with this device's matrices."""
    values: dict[str, Any] = dict(plan.sizes)
    for path, (axis, parts) in plan.arrays.items():
        owner, _, name = path.rpartition(".")
        array = getattr(getattr(layer, owner) if owner else layer, name, None)
        if array is not None:
            values[path] = _own(array, axis, parts)
    values |= {name: _Summed(getattr(layer, name)) for name in plan.sums}
    values |= {name: _Columns(getattr(layer, name), p) for name, p in plan.outputs.items()}
    owners = {path.partition(".")[0] for path in values if "." in path}
    missing = {owner for owner in owners if getattr(layer, owner) is None}
    values = {path: v for path, v in values.items() if path.partition(".")[0] not in missing}
    share = _replaced(layer, values)
    norm: GatedRMSNorm | None = vars(share).get("norm")
    if plan.spreads_norm and norm is not None:
        return _replaced(share, {"norm": _SpreadNorm(norm)})
    return share


def _own(array: Array, axis: int, parts: Parts) -> Array:
    """Returns this device's share of an array that all devices have."""
    devices, index = lax.axis_size(TENSOR_AXIS), lax.axis_index(TENSOR_AXIS)
    array = _vary(array)
    pieces, start = [], 0
    for part in parts:
        whole = lax.slice_in_dim(array, start, start + part.size, axis=axis)
        start += part.size
        if part.is_cut:
            size = part.size // devices
            whole = lax.dynamic_slice_in_dim(whole, index * size, size, axis=axis)
        pieces.append(whole)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _replaced(module: Module, values: Mapping[str, Any]) -> Module:
    """Returns a module with other values of some fields, static ones included.

    Like a copy that JAX makes of a module, it does not call the constructor.
    """
    nested: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for path, value in values.items():
        field, _, rest = path.partition(".")
        if rest:
            nested.setdefault(field, {})[rest] = value
        else:
            plain[field] = value
    for field, inner in nested.items():
        plain[field] = _replaced(getattr(module, field), inner)
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):
        value = plain[field.name] if field.name in plain else getattr(module, field.name)
        object.__setattr__(new, field.name, value)
    return new
