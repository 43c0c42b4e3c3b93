"""Rules that place the arrays of models, of training states and of batches on several devices."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from .._trees import path_name


Rules = Sequence[tuple[str, tuple[str | None, ...]]]
Tree = TypeVar("Tree")

ROW_AXES = ("data", "fsdp")
TENSOR_AXIS = "tensor"
"""The mesh axis over which layers are cut."""
_INPUT, _OUTPUT = (None, "fsdp"), ("fsdp", None)

FSDP: Rules = (
    ("embedding.weight", _INPUT),
    ("lm_head.weight", _INPUT),
    ("in_proj.weight", _INPUT),
    ("out_proj.weight", _OUTPUT),
    ("x_proj.weight", _INPUT),
    ("dt_proj.weight", _OUTPUT),
    ("fc1.weight", _INPUT),
    ("fc2.weight", _OUTPUT),
    ("mlp.fc1", _INPUT),
    ("mlp.fc2", _OUTPUT),
    ("fc1_latent.weight", _INPUT),
    ("fc2_latent.weight", _OUTPUT),
)
"""The default rules: each weight matrix is sharded over the mesh axis `fsdp`, along the axis of the
residual stream (`d_model`) or of the channels (`d_inner`); everything else is on every device."""


def shardings(
    mesh: Mesh | AbstractMesh, rules: Rules = FSDP
) -> Callable[[str, jax.ShapeDtypeStruct], NamedSharding]:
    """Returns the function from the path and the shape of a parameter to its sharding, for
    `sharding` of [`mamba_eqx.from_pretrained`][], with which each device reads its own part only.

    **Arguments:**

    - `mesh`: the mesh. Axes that a rule names and the mesh lacks are ignored, so that the same
        rules serve a mesh with `data` alone.
    - `rules`: pairs of the end of a path, such as `"in_proj.weight"`, and the mesh axes of the last
        axes of the array, `None` for an axis that is not cut. The first rule whose end fits holds.
        Arrays without a rule, and arrays of integers, are on every device.

    **Returns:**

    The function.

    **Raises:** `ValueError`, when the function is called, if a mesh axis does not divide the size
    that it cuts.
    """

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return NamedSharding(mesh, P())
        for end, axes in rules:
            if f".{path}".endswith(f".{end}") and leaf.ndim >= len(axes):
                return checked_sharding(mesh, path, leaf.shape, axes)
        return NamedSharding(mesh, P())

    return place


def shard(tree: Tree, mesh: Mesh, rules: Rules = FSDP) -> Tree:
    """Places a model, or any tree with the paths of its parameters, on the devices of a mesh.

    The state of an optimiser, an average and a whole [`mamba_eqx.training.TrainState`][] are such
    trees. The rows of a state's `carry` are sharded as [`mamba_eqx.shard_rows`][] does. Arrays that
    [`mamba_eqx.tensor_parallel`][] has cut, and those of an optimiser for them, stay where they
    are.

    **Arguments:**

    - `tree`: the tree. Leaves that are no arrays stay as they are.
    - `mesh`, `rules`: see [`mamba_eqx.sharding.shardings`][].

    **Returns:**

    The tree, with every array placed.

    **Raises:** `ValueError`, before anything is placed, if a mesh axis does not divide the size
    that it cuts.
    """
    place = shardings(mesh, rules)
    model = {
        path_name(path).removeprefix("model."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if eqx.is_array(leaf) and path_name(path).startswith("model.")
    }

    def chosen(path: jax.tree_util.KeyPath, leaf: PyTree) -> NamedSharding | None:
        if not eqx.is_array(leaf) or _is_cut(leaf):
            return None
        name = path_name(path)
        if name.startswith("carry."):
            return _row_sharding(mesh, name, leaf.shape)
        if _is_reduced(name, leaf.shape, model):
            return NamedSharding(mesh, P())
        return place(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    return put(tree, jax.tree_util.tree_map_with_path(chosen, tree))


def shard_rows(batch: Tree, mesh: Mesh) -> Tree:
    """Distributes the rows of a batch over the mesh axes `data` and `fsdp`.

    **Arguments:**

    - `batch`: a pytree of arrays whose first axis is the rows, such as a
        [`mamba_eqx.training.Batch`][] or the states of several sequences.
    - `mesh`: a mesh with `data`, `fsdp`, or both.

    **Returns:**

    The batch, with every array placed.

    **Raises:** `ValueError`, before anything is placed, if the devices of these axes do not divide
    the rows.
    """

    def chosen(path: jax.tree_util.KeyPath, leaf: PyTree) -> NamedSharding:
        return _row_sharding(mesh, path_name(path) or "batch", leaf.shape)

    return put(batch, jax.tree_util.tree_map_with_path(chosen, batch))


def _is_reduced(name: str, shape: tuple[int, ...], model: dict[str, tuple[int, ...]]) -> bool:
    """Returns whether an array has the path of a parameter, but another shape, such as the sums
    over an axis that Adafactor keeps."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((model[end] != shape for end in ends if end in model), False)


def _is_cut(leaf: PyTree) -> bool:
    """Returns whether an array lies along the axis of tensor parallelism."""
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and TENSOR_AXIS in sharding.spec


def put(tree: Tree, chosen: PyTree) -> Tree:
    """Places the arrays of a tree by a tree of shardings, with `None` for what stays as it is."""
    place = lambda leaf, sharding: leaf if sharding is None else jax.device_put(leaf, sharding)
    return jax.tree.map(place, tree, chosen)


def _row_sharding(mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
    if not axes:
        raise ValueError(
            f"`mesh` must have an axis 'data' or 'fsdp' for the rows, but got the axes "
            f"{mesh.axis_names}. Name one of the axes so."
        )
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if not shape or shape[0] % devices:
        raise ValueError(
            f"The devices of the mesh axes {axes} must divide the rows of `{path}`, but got "
            f"{devices} devices and an array of shape {shape}. Choose another number of rows."
        )
    return NamedSharding(mesh, P(axes))


def checked_sharding(
    mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> NamedSharding:
    """Returns the sharding of an array whose last axes are cut over the given mesh axes.

    **Raises:** `ValueError` if a mesh axis does not divide the size that it cuts.
    """
    first = len(shape) - len(axes)
    known = tuple(axis if axis in mesh.shape else None for axis in axes)
    for i, axis in enumerate(known, first):
        if axis is not None and shape[i] % mesh.shape[axis]:
            raise ValueError(
                f"The mesh axis {axis!r} must divide axis {i} of `{path}`, but got "
                f"{mesh.shape[axis]} devices and the size {shape[i]}. Use a mesh whose axis "
                f"{axis!r} divides it, or rules without this parameter."
            )
    return NamedSharding(mesh, P(*(None,) * first, *known))
