"""Assigning the tensors of a checkpoint to the leaves of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
from jaxtyping import PyTree

from .._trees import named_leaves
from ..layers import float32_mask
from ..models import LanguageModelConfig
from .layouts import Described, Layout, Slot, group_by_leaf, match


Tensor = TypeVar("Tensor", bound=Described)


@dataclass(frozen=True)
class Assignment(Generic[Tensor]):
    """One leaf of a model, and the tensors that it consists of.

    - `path`: the path of the leaf, such as `"layers.layers.0.mixer.A_log"`.
    - `leaf`: the leaf. Only its shape and its dtype are used.
    - `stays_wide`: whether the leaf stays at least float32, as in `float32_mask`.
    - `parts`: the tensors with their slots, in the order in which they are joined.
    """

    path: str
    leaf: Described
    stays_wide: bool
    parts: list[tuple[Slot, Tensor]]


def assign(
    layout: Layout,
    config: LanguageModelConfig,
    tree: PyTree,
    tensors: Mapping[str, Tensor],
    *,
    floating: bool,
) -> list[Assignment[Tensor]]:
    """Assigns each tensor to a leaf of a model, by its name in a layout.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tree`: the model with `Unrolled` layers, or any tree of its structure. Its leaves are arrays
        or their shapes.
    - `tensors`: the tensors by name.
    - `floating`: whether tensors must have a floating-point dtype.

    **Returns:**

    One assignment for each leaf, in the order of `jax.tree.leaves(tree)`.

    **Raises:** one `CheckpointError` that lists all missing, unexpected, mis-shaped and
    non-floating-point tensors.
    """
    found = group_by_leaf(match(layout, config, tree, tensors, floating=floating))
    stay_wide = jax.tree.leaves(float32_mask(tree))
    return [
        Assignment(path, leaf, mask, found[path])
        for (path, leaf), mask in zip(named_leaves(tree).items(), stay_wide, strict=True)
    ]
