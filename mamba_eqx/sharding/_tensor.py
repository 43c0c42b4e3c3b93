"""Tensor parallelism: layers whose heads and channels lie on different devices."""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._trees import path_name
from ..layers import (
    AbstractMLP,
    AbstractSequenceLayer,
    KVCache,
    Length,
    Linear,
    Reset,
    checked_state,
)
from ._plans import PLANS, Plan, plan
from ._rules import FSDP, TENSOR_AXIS, Rules, checked_sharding, put, shardings
from ._share import empty_state, fused, own_share, specs, state_specs, stored


Tree = TypeVar("Tree")


class TensorParallel(AbstractSequenceLayer[PyTree]):
    """A layer whose heads or channels lie on the devices of the mesh axis `tensor`.

    It computes what the layer computes. The state has the structure of the layer's, cut over the
    devices; what all heads share, such as the inputs of the convolution for `B` and `C`, is in it
    once for every device. [`mamba_eqx.tensor_parallel`][] makes these layers.
    """

    layer: AbstractSequenceLayer[PyTree]
    mesh: Mesh = eqx.field(static=True)

    def __init__(self, layer: AbstractSequenceLayer[PyTree], mesh: Mesh):
        """**Arguments:**

        - `layer`: the layer, with each fused linear map in parts.
        - `mesh`: a mesh with an axis `tensor`.
        """
        self.layer = layer
        self.mesh = mesh

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.layer.d_model

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """Returns zeros; see the layer's method."""
        how = self._plan
        return empty_state(
            self.layer.init_state(max_len=max_len), how, self.mesh.shape[TENSOR_AXIS]
        )

    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""

        def run(
            layer: AbstractSequenceLayer[PyTree],
            x: Array,
            state: PyTree,
            reset: Reset,
            length: Length,
        ) -> tuple[Array, PyTree]:
            return layer.scan(x, state, reset=reset, length=length)

        state = state if state is None else self._checked(state)
        return self._on_devices(run, x, state, reset, length)

    def step(
        self, x: Float[Array, " {self.d_model}"], state: PyTree
    ) -> tuple[Float[Array, " {self.d_model}"], PyTree]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        run = lambda layer, x, state: layer.step(x, state)
        return self._on_devices(run, x, self._checked(state))

    def _checked(self, state: PyTree) -> PyTree:
        # A cache may have any capacity, so the state is compared with one of its own capacity.
        room = state.k.shape[-2] if isinstance(state, KVCache) and state.k.ndim > 1 else 1
        return checked_state(self, state, max_len=room)

    @property
    def _plan(self) -> Plan:
        return plan(self.layer, self.mesh.shape[TENSOR_AXIS])

    def _on_devices(
        self, run: Callable[..., tuple[Array, PyTree]], x: Array, state: PyTree, *rest: PyTree
    ) -> tuple[Array, PyTree]:
        """Runs the share of every device."""
        shapes = jax.eval_shape(lambda: self.init_state(max_len=1))
        of_state = state_specs(shapes, self._plan)
        given = P() if state is None else of_state
        inputs = (P(), given, *(P() for _ in rest))
        return _on_devices(self.layer, self.mesh, run, inputs, (P(), of_state))(x, state, *rest)


class TensorParallelMLP(AbstractMLP):
    """An MLP whose hidden features lie on the devices of the mesh axis `tensor`."""

    layer: AbstractMLP
    mesh: Mesh = eqx.field(static=True)

    def __init__(self, layer: AbstractMLP, mesh: Mesh):
        """**Arguments:**

        - `layer`: the MLP, with each fused linear map in parts.
        - `mesh`: a mesh with an axis `tensor`.
        """
        self.layer = layer
        self.mesh = mesh

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.layer.d_model

    def __call__(
        self, x: Float[Array, "*seq {self.d_model}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractMLP`][]."""
        return _on_devices(self.layer, self.mesh, lambda layer, x: layer(x), (P(),), P())(x)


def _on_devices(
    layer: AbstractSequenceLayer[PyTree] | AbstractMLP,
    mesh: Mesh,
    run: Callable[..., PyTree],
    inputs: PyTree,
    outputs: PyTree,
) -> Callable[..., PyTree]:
    """Returns a function that calls `run` on every device, with the device's share of a layer.

    **Arguments:**

    - `layer`, `mesh`: the stored layer, and its devices.
    - `run`: a function of the share and of the arguments of the returned function.
    - `inputs`, `outputs`: the partition specs of the arguments and of the results.
    """
    how = plan(layer, mesh.shape[TENSOR_AXIS])
    for name in how.outputs:
        _check_linears(layer, {f"{name}.linears": x for x in getattr(layer, name).linears})
    arrays, static = eqx.partition(layer, eqx.is_array)

    def share(arrays: PyTree, *arguments: PyTree) -> PyTree:
        return run(own_share(eqx.combine(arrays, static), how), *arguments)

    of_arrays = specs(arrays, how)
    mapped = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(of_arrays, *inputs),
        out_specs=outputs,
        axis_names={TENSOR_AXIS},
    )
    return lambda *arguments: mapped(arrays, *arguments)


def tensor_parallel(model: Tree, mesh: Mesh, rules: Rules = FSDP) -> Tree:
    """Cuts the layers of a model over the devices of the mesh axis `tensor`.

    Each device computes some of the heads or channels of every layer, and has only their part of
    the weight matrices. The model computes what it computed. For every mixer and every MLP, the
    devices add up one array of the size of the residual stream, in the forward and in the reverse
    pass; [`mamba_eqx.Mamba1`][] also adds up what its step sizes, `B` and `C` come from, and
    [`mamba_eqx.Mamba2`][] with one group the mean square of its norm. Nothing is exchanged in the
    loops over tokens or chunks.

    The layers [`mamba_eqx.Mamba1`][], [`mamba_eqx.Mamba2`][], [`mamba_eqx.Mamba3`][],
    [`mamba_eqx.Attention`][], [`mamba_eqx.GatedMLP`][] and [`mamba_eqx.layers.MLP`][] are cut.
    Every device has all of the others, of the embedding and of the head. Groups of heads are
    distributed too, but a single group, or a single head of keys and values, is on every device.

    Further axes of the mesh are free: rows of a batch may lie along `data` and `fsdp`, and matrices
    along `fsdp` by the rules. [`mamba_eqx.sharding.gathered`][] is the inverse.

    **Arguments:**

    - `model`: a model or a layer, or any pytree with such layers.
    - `mesh`: a mesh with an axis `tensor`.
    - `rules`: see [`mamba_eqx.sharding.shardings`][]; they hold for arrays that are not cut. The
        other axis of a matrix that is cut lies along `fsdp` if the mesh has it.

    **Returns:**

    The model, with its arrays placed on the devices. Its states are not those of the original
    model: start from its own `init_state`.

    **Raises:** `ValueError`, before anything is placed, if the mesh has no axis `tensor`, a mesh
    axis does not divide a size, a linear map is no [`mamba_eqx.layers.Linear`][] (such as a
    quantised one), or the model has none of the layers above.
    """
    if TENSOR_AXIS not in mesh.shape:
        raise ValueError(
            f"`mesh` must have an axis {TENSOR_AXIS!r}, but got the axes {tuple(mesh.shape)}. Name "
            "the axis over which layers are cut so."
        )
    found = [node for node in jax.tree.leaves(model, is_leaf=_can_be_cut) if _can_be_cut(node)]
    if not found:
        raise ValueError(
            "The model must have a layer that can be cut over devices, but has none of "
            f"{', '.join(f'`{kind.__name__}`' for kind in PLANS)}."
        )
    place = shardings(mesh, rules)
    fsdp = "fsdp" if "fsdp" in mesh.shape else None

    def cut(node: PyTree) -> PyTree:
        if not _can_be_cut(node):
            return node
        how = plan(node, mesh.shape[TENSOR_AXIS])
        _check_linears(node, {name: getattr(node, name) for name in (*how.outputs, *how.sums)})
        parts = stored(node, how)
        if isinstance(parts, AbstractMLP):
            return TensorParallelMLP(parts, mesh)
        return TensorParallel(parts, mesh)

    def where(path: jax.tree_util.KeyPath, node: PyTree) -> PyTree:
        if _is_cut(node):
            how = plan(node.layer, mesh.shape[TENSOR_AXIS])
            of_arrays = specs(node.layer, how, other=fsdp)
            named = functools.partial(_sharding, mesh, path_name(path))
            placed = jax.tree_util.tree_map_with_path(named, node.layer, of_arrays)
            return type(node)(placed, mesh)
        if not eqx.is_array(node):
            return None
        return place(path_name(path), jax.ShapeDtypeStruct(node.shape, node.dtype))

    model = jax.tree.map(cut, model, is_leaf=_can_be_cut)
    chosen = jax.tree_util.tree_map_with_path(where, model, is_leaf=_is_cut)
    return put(model, chosen)


def gathered(model: Tree) -> Tree:
    """Returns the model that [`mamba_eqx.tensor_parallel`][] was given, to save it or to read its
    config. Its arrays stay where they are.

    **Arguments:**

    - `model`: a model or any pytree with layers that are cut over devices.

    **Returns:**

    The model with the original layers.
    """

    def whole(node: PyTree) -> PyTree:
        if not _is_cut(node):
            return node
        return fused(node.layer, plan(node.layer, node.mesh.shape[TENSOR_AXIS]))

    return jax.tree.map(whole, model, is_leaf=_is_cut)


def _sharding(
    mesh: Mesh, layer: str, path: jax.tree_util.KeyPath, leaf: PyTree, spec: P | None
) -> NamedSharding | None:
    """Returns where an array of a layer lies, or `None` for what is no array."""
    if spec is None:
        return None
    name = f"{layer}.{path_name(path)}".removeprefix(".")
    return checked_sharding(mesh, name, leaf.shape, tuple(spec))


def _can_be_cut(node: object) -> bool:
    return type(node) in PLANS


def _is_cut(node: object) -> bool:
    return isinstance(node, TensorParallel | TensorParallelMLP)


def _check_linears(layer: PyTree, linears: Mapping[str, object]) -> None:
    for name, linear in linears.items():
        if not isinstance(linear, Linear):
            raise ValueError(
                f"`{name}` of `{type(layer).__name__}` must be a `Linear` to be cut over devices, "
                f"but is a `{type(linear).__name__}`. Cut the model before its maps are quantised "
                "or replaced, and neither quantise nor replace them while it is cut."
            )
