"""Strict matching of the tensors of a checkpoint with the leaves of a model, by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._trees import named_leaves
from ...formats import CheckpointError, quote
from ...models import LanguageModelConfig
from ._layout import Described, Layout, Slot


_LISTED = 8
_WEIGHT = "weight"
_SCALE = "_scale"

Tensor = TypeVar("Tensor", bound=Described)
Stored = TypeVar("Stored")


def slots(layout: Layout, config: LanguageModelConfig, tree: PyTree) -> list[Slot]:
    """Returns the slots of the leaves of a tree.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tree`: a model with `Unrolled` layers, or any tree of its structure. Leaves that are `None`,
        as in a part returned by `eqx.partition`, have no slots.

    **Raises:** `CheckpointError` for a config that the layout cannot store, and for leaves without
    a name.
    """
    layout.check(config)
    paths = named_leaves(tree).keys()
    table = [one for slot in layout.table(config) for one in (slot, _slot_of_scales(slot))]
    found = [slot for slot in table if slot.path in paths]
    with_name = {slot.path for slot in found}
    nameless = [f"`{path}`" for path in paths if path not in with_name]
    if nameless:
        raise CheckpointError(
            f"The {layout.name!r} layout has no name for {listing(nameless)}, and so cannot store "
            "this model."
        )
    return found


def _slot_of_scales(slot: Slot) -> Slot:
    """Returns the slot of the scales that a quantised weight has.

    The scales have the rows of the weight, and so its rearrangements, which concern rows only.
    """
    path = f"{slot.path.removesuffix(_WEIGHT)}scale"
    return replace(slot, name=f"{slot.name}{_SCALE}", path=path)


def quantized_paths(
    layout: Layout, config: LanguageModelConfig, tree: PyTree, tensors: Mapping[str, object]
) -> set[str]:
    """Returns the paths of the modules whose weights have scales among the tensors of a file.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tree`: the model, in which no weight is quantised.
    - `tensors`: the tensors by their current names, as returned by `renamed`.
    """
    return {
        slot.path.removesuffix(f".{_WEIGHT}")
        for slot in slots(layout, config, tree)
        if slot.path.endswith(f".{_WEIGHT}") and f"{slot.name}{_SCALE}" in tensors
    }


def renamed(
    layout: Layout, config: LanguageModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of the model under the names in the layout's table.

    Files may have names of other versions, and tensors that are not a part of the model. They may
    also hold the model without its head, as transformers' `MambaModel` saves it: every name then
    lacks the first part, `backbone.`.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tensors`: the tensors by name.
    """
    ignored, renames = layout.ignored(config), layout.renames(config)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ignored)}
    prefix = layout.embedding(config).split(".")[0] + "."
    if not any(name.startswith(prefix) or name == layout.head for name in tensors):
        whole = rename_tensors(renames, {prefix + name: tensor for name, tensor in tensors.items()})
        if layout.embedding(config) in whole:
            return whole
    return rename_tensors(renames, tensors)


def rename_tensors(renames: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by their new names.

    **Arguments:**

    - `renames`: the beginnings and endings of names that are replaced, and what replaces them.
    - `tensors`: the tensors by name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = rename(renames, name)
        # If both names are present, the other one is kept, to be reported as unexpected.
        found[name if new_name in tensors else new_name] = tensor
    return found


def rename(renames: Mapping[str, str], name: str) -> str:
    """Returns the new name of one tensor. For the arguments see `rename_tensors`."""
    for old, new in renames.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def match(
    layout: Layout,
    config: LanguageModelConfig,
    tree: PyTree,
    tensors: Mapping[str, Tensor],
    *,
    floating: bool,
) -> list[tuple[Slot, Tensor]]:
    """Finds the tensors of every leaf, and checks their names, shapes and dtypes.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tree`: the tree to be filled, with `Unrolled` layers. Its leaves are arrays or their shapes.
    - `tensors`: the tensors by their current names, as returned by `renamed`.
    - `floating`: whether tensors must have a floating-point dtype. Those of integer leaves must
        have the dtype of the leaf in any case.

    **Returns:**

    The slots with their tensors.

    **Raises:** one `CheckpointError` that lists all missing, unexpected, mis-shaped and
    non-floating-point tensors; `CheckpointError` for a config that the layout cannot store.
    """
    leaves = named_leaves(tree)
    found: list[tuple[Slot, Tensor]] = []
    missing: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    expected = slots(layout, config, tree)
    for slot in expected:
        tensor = tensors.get(slot.name)
        if tensor is None:
            missing.append(slot.name)
            continue
        found.append((slot, tensor))
        shape = slot.file_shape(leaves[slot.path])
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{slot.name} is {tuple(tensor.shape)} and should be {shape}")
        dtype = leaves[slot.path].dtype
        if jnp.issubdtype(dtype, np.integer) and tensor.dtype != dtype:
            mistyped.append(f"{slot.name} is {tensor.dtype} and should be {dtype}")
    integers = {
        slot.name for slot in expected if jnp.issubdtype(leaves[slot.path].dtype, np.integer)
    }
    names = {slot.name for slot in expected}
    tied_head, embedding_name = layout.tied_head(config), layout.embedding(config)
    unexpected = [quote(name) for name in tensors if name not in names and name != tied_head]
    if tied_head is not None and tied_head in tensors and embedding_name in tensors:
        head, embedding = tensors[tied_head], tensors[embedding_name]
        if tuple(head.shape) != tuple(embedding.shape):
            misshapen.append(
                f"{tied_head} is {tuple(head.shape)} and, being tied to {embedding_name}, "
                f"should be {tuple(embedding.shape)}"
            )
    nonfloating = [
        f"{quote(name)} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if floating and name not in integers and not jnp.issubdtype(tensor.dtype, np.floating)
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "of another dtype": mistyped,
        "not of a floating-point dtype": nonfloating,
    }
    if any(faults.values()):
        lines = [f"{len(n)} {what}: {listing(n)}" for what, n in faults.items() if n]
        raise CheckpointError(
            f"The tensors do not fit the config in the {layout.name!r} layout. "
            + "; ".join(lines)
            + ". Use the config and the weights of the same model."
        )
    return found


def group_by_leaf(found: list[tuple[Slot, Tensor]]) -> dict[str, list[tuple[Slot, Tensor]]]:
    """Groups the result of `match` by the path of the leaf.

    **Returns:**

    The slots and tensors of each leaf, in the order in which they are joined.
    """
    leaves: dict[str, list[tuple[Slot, Tensor]]] = {}
    for slot, tensor in found:
        leaves.setdefault(slot.path, []).append((slot, tensor))
    for parts in leaves.values():
        parts.sort(key=lambda part: (part[0].expert or 0, part[0].rows or (0, 0)))
    return leaves


def check_tied_head(
    layout: Layout,
    config: LanguageModelConfig,
    tensors: Mapping[str, Stored],
    read: Callable[[Stored], np.ndarray],
) -> None:
    """Checks that a stored head equals the embedding if the two are tied.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tensors`: the tensors by name.
    - `read`: returns the values of a tensor.

    **Raises:** `CheckpointError` if the two differ.
    """
    head, embedding = layout.tied_head(config), layout.embedding(config)
    if head is None or head not in tensors or embedding not in tensors:
        return
    one, other = read(tensors[head]), read(tensors[embedding])
    # Compared as bits, because NaN is not equal to itself.
    if one.dtype != other.dtype or not np.array_equal(_bits(one), _bits(other)):
        raise CheckpointError(
            f"{head} differs from {embedding}, although the config says that they are tied. "
            "To use the head, set `tie_word_embeddings` (in official configs `tie_embeddings`) to "
            "false."
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def listing(names: list[str]) -> str:
    """Joins names with commas, and abbreviates lists of more than eight."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
