"""What a checkpoint layout is, and strict matching of a model with it, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from ...formats import CheckpointError, quote
from ...layers import GatedMLP, Stacked, Unrolled
from ...models import LanguageModel, LanguageModelConfig


_LISTED = 8


@runtime_checkable
class Described(Protocol):
    """Anything with a shape and a dtype: an array, or a tensor that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


_Described = TypeVar("_Described", bound=Described)


@dataclass(frozen=True)
class Transform:
    """How an array here becomes the array in the file, and back: views, of arrays of any kind."""

    to_file: Callable[[Any], Any]
    from_file: Callable[[Any], Any]


IDENTITY = Transform(lambda array: array, lambda array: array)


@dataclass(frozen=True)
class Entry:
    """A line of a name table: the name in the file, and where the array is in the model.

    `where` is written for a model whose layers are `Unrolled`. An array here may be several in the
    file: then there is a line for each, with the rows from `rows[0]` to `rows[1]` that it is.
    """

    name: str
    where: Callable[[Any], Any]
    transform: Transform = IDENTITY
    rows: tuple[int, int] | None = None

    def within(self, name: str, where: Callable[[Any], Any]) -> "Entry":
        """The same line in the table of a module that has this one under `name`."""
        inner = self.where
        return replace(self, name=f"{name}.{self.name}", where=lambda tree: inner(where(tree)))


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: how it writes a config, and what it calls the parameters.

    - `name`: what the user calls it.
    - `read_config`: converts the content of the config file into a config.
    - `check`: raises `CheckpointError` for a config that the layout cannot store.
    - `write_config`: converts a config that `check` accepts into the content of the config file.
        The dtype is that of the weights.
    - `entries`: returns the name table for a config that `check` accepts.
    - `embedding`: the name of the embedding's weight, for a config.
    - `keeps_tied_head`: whether files of a tied model hold the head's weight as well.
    - `renames`: older names that files may have, to the ones in the table.
    - `head`: the name of the head's weight.
    - `config_file`, `weights_file`: the names of the files.
    """

    name: str
    read_config: Callable[[object], LanguageModelConfig]
    check: Callable[[LanguageModelConfig], None]
    write_config: Callable[[LanguageModelConfig, np.dtype], dict[str, Any]]
    entries: Callable[[LanguageModelConfig], list[Entry]]
    embedding: Callable[[LanguageModelConfig], str]
    keeps_tied_head: bool
    renames: Mapping[str, str]
    head: str = "lm_head.weight"
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"

    def tied_head(self, config: LanguageModelConfig) -> str | None:
        """The name under which a file may hold the embedding once more."""
        return self.head if config.tie_embeddings else None


def unrolled(tree: LanguageModel) -> LanguageModel:
    """The tree with its layers `Unrolled`, whatever its leaves are."""
    stack = tree.layers
    if not isinstance(stack, Stacked):
        return tree
    layers = [jax.tree.map(lambda leaf: leaf[i], stack.layers) for i in range(stack.n_layer)]  # noqa: B023
    return eqx.tree_at(lambda tree: tree.layers, tree, Unrolled(layers, remat=stack.remat))


def restacked(tree: LanguageModel, like: LanguageModel) -> LanguageModel:
    """The inverse of `unrolled`: the layers stacked again if those of `like` are."""
    if not isinstance(like.layers, Stacked):
        return tree
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree.layers.unstack())
    stack = eqx.tree_at(lambda stack: stack.layers, like.layers, layers)
    return eqx.tree_at(lambda tree: tree.layers, tree, stack)


def config_of(tree: LanguageModel) -> LanguageModelConfig:
    """The config of a tree of a model's structure, whatever its leaves are."""
    if not isinstance(tree, LanguageModel):
        raise CheckpointError(
            f"Expected a `LanguageModel`, or a tree of its structure, but got "
            f"{type(tree).__name__}. Of an optimiser's state give one tree of moments, "
            "`state[0].mu` for instance."
        )
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"`{jax.tree_util.keystr(path)}` must be an array, but is of type "
                f"{type(leaf).__name__}."
            )
    # Most sizes are static, but that of an MLP is the shape of a weight, here perhaps left out.
    for mlp in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, GatedMLP)):
        if isinstance(mlp, GatedMLP) and mlp.fc2.weight is None:
            raise CheckpointError(
                "A part of a model with MLPs must hold the weights of their `fc2`, from which "
                "the config is read."
            )
    found: list[LanguageModelConfig] = []
    jax.eval_shape(lambda tree: found.append(LanguageModelConfig.of(tree)), tree)
    return found[0]


def skeleton_of(config: LanguageModelConfig) -> LanguageModel:
    """A model of that config, of shapes in place of arrays."""
    # Layers that are alike are made once: tracing takes milliseconds for each.
    distinct = tuple(dict.fromkeys(config.layers))
    few = replace(config, layers=distinct)
    model = eqx.filter_eval_shape(lambda: few.build(key=jr.key(0)))
    made = dict(zip(distinct, model.layers.unstack(), strict=True))
    layers = Unrolled([made[layer] for layer in config.layers])
    return eqx.tree_at(lambda model: model.layers, model, layers)


@dataclass(frozen=True)
class Slot:
    """An entry, and the place of its array among the leaves of a tree (with `Unrolled` layers)."""

    entry: Entry
    index: int

    def to_file(self, leaf: Any) -> Any:
        """What the file has of a leaf."""
        rows = self.entry.rows
        return self.entry.transform.to_file(leaf if rows is None else leaf[slice(*rows)])

    def file_shape(self, leaf: Described) -> tuple[int, ...]:
        """The shape in the file of a leaf."""
        # A view of a single number, which takes no memory, be the shape absurd.
        return self.to_file(np.broadcast_to(np.float32(0), leaf.shape)).shape


def by_leaf(
    found: list[tuple[Slot, _Described]],
) -> dict[int, list[tuple[Slot, _Described]]]:
    """The tensors of each leaf, those of one leaf in the order in which they are joined."""
    leaves: dict[int, list[tuple[Slot, _Described]]] = {}
    for slot, tensor in found:
        leaves.setdefault(slot.index, []).append((slot, tensor))
    for parts in leaves.values():
        parts.sort(key=lambda part: part[0].entry.rows or (0, 0))
    return leaves


def slots(layout: Layout, config: LanguageModelConfig, tree: PyTree) -> list[Slot]:
    """Where each name of the layout is in `tree`, each leaf (or row of it) having one name.

    Names whose place in the tree is `None` are left out, so that a part of a model (as
    `eqx.partition` makes) has a part of the names.

    **Raises:** `CheckpointError` for a config that the layout cannot store, and for leaves without
    a name.
    """
    layout.check(config)
    leaves, structure = jax.tree.flatten(tree)
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    places = [(entry, entry.where(numbered)) for entry in layout.entries(config)]
    found = [Slot(entry, index) for entry, index in places if index is not None]
    nameless = set(range(len(leaves))) - {slot.index for slot in found}
    if nameless:
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
        names = listing([f"`{paths[index]}`" for index in sorted(nameless)])
        raise CheckpointError(
            f"The {layout.name!r} layout has no name for {names}: it cannot hold this model."
        )
    return found


def renamed(layout: Layout, tensors: Mapping[str, _Described]) -> dict[str, _Described]:
    """The tensors with the older names among theirs replaced by the names in the table."""
    current: dict[str, _Described] = {}
    for name, tensor in tensors.items():
        new_name = layout.renames.get(name)
        # If both are there, the older name is one too many, and is reported as unexpected.
        current[name if new_name is None or new_name in tensors else new_name] = tensor
    return current


def match(
    layout: Layout,
    config: LanguageModelConfig,
    like: PyTree,
    tensors: Mapping[str, _Described],
    *,
    floating: bool,
) -> list[tuple[Slot, _Described]]:
    """Finds the tensor of every leaf, and compares what is there with what should be.

    **Arguments:**

    - `like`: the tree to be filled (with `Unrolled` layers): arrays, or their shapes.
    - `tensors`: by their names in the table; see `renamed`.
    - `floating`: whether tensors must be of a floating-point dtype.

    **Returns:**

    The slots, each with its tensor.

    **Raises:** one `CheckpointError` that lists everything missing, unexpected, misshapen and of
    another kind of dtype.
    """
    leaves = jax.tree.leaves(like)
    found: list[tuple[Slot, _Described]] = []
    missing: list[str] = []
    misshapen: list[str] = []
    expected = slots(layout, config, like)
    for slot in expected:
        tensor = tensors.get(slot.entry.name)
        if tensor is None:
            missing.append(slot.entry.name)
            continue
        found.append((slot, tensor))
        shape = slot.file_shape(leaves[slot.index])
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{slot.entry.name} is {tuple(tensor.shape)} and should be {shape}")
    names = {slot.entry.name for slot in expected}
    tied_head, embedding_name = layout.tied_head(config), layout.embedding(config)
    unexpected = [quote(name) for name in tensors if name not in names and name != tied_head]
    if tied_head is not None and tied_head in tensors and embedding_name in tensors:
        head, embedding = tensors[tied_head], tensors[embedding_name]
        if tuple(head.shape) != tuple(embedding.shape):
            misshapen.append(
                f"{tied_head} is {tuple(head.shape)} and, being tied to {embedding_name}, "
                f"should be {tuple(embedding.shape)}"
            )
    mistyped = [
        f"{quote(name)} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if floating and not jnp.issubdtype(tensor.dtype, np.floating)
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "not of a floating-point dtype": mistyped,
    }
    if any(faults.values()):
        lines = [f"{len(n)} {what}: {listing(n)}" for what, n in faults.items() if n]
        raise CheckpointError(
            f"The tensors do not fit the config, read as the {layout.name!r} layout has it. "
            + "; ".join(lines)
            + ". Take the config and the weights of one and the same model."
        )
    return found


def listing(names: list[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
