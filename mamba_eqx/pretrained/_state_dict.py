"""Trees under the names and shapes of a checkpoint layout, in memory."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._trees import named_leaves
from ..formats import CheckpointError
from ..models import LanguageModel
from ._arrays import check_tied_head, one_dtype, to_jax
from .layouts import (
    LAYOUTS as LAYOUTS,
    Layout,
    check_storable,
    config_from,
    group_by_leaf,
    match,
    renamed,
    restacked,
    slots,
    unrolled,
)


def layout_named(name: str) -> Layout:
    """**Raises:** `CheckpointError` if there is no layout of that name."""
    if name not in LAYOUTS:
        raise CheckpointError(
            f"`layout` must be one of {', '.join(map(repr, LAYOUTS))}, but got {name!r}."
        )
    return LAYOUTS[name]


def state_dict(tree: LanguageModel, *, layout: str = "transformers") -> dict[str, Array]:
    """The arrays of a model under the names and in the shapes that a checkpoint layout has.

    ```python
    grads = eqx.filter_grad(loss)(model, tokens)
    mbx.state_dict(grads)["backbone.layers.0.mixer.A_log"]
    ```

    **Arguments:**

    - `tree`: the model, or any tree of its structure: gradients, moments of an optimiser, a part
        of a model with `None` for the rest. Its layers may be `Unrolled` or `Stacked`.
    - `layout`: `"transformers"`, `"state-spaces"` or `"mistral"`.

    **Returns:**

    The arrays by name, in their own dtypes. A tied head is not in it a second time.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot hold the model.
    """
    chosen = layout_named(layout)
    config = config_from(tree)
    check_storable(chosen, config)
    tree = unrolled(tree)
    leaves = named_leaves(tree)
    return {
        slot.name: slot.to_file(_jax(slot.name, leaves[slot.path]))
        for slot in slots(chosen, config, tree)
    }


def load_state_dict(
    like: LanguageModel,
    tensors: Mapping[str, Array | np.ndarray],
    *,
    layout: str = "transformers",
) -> LanguageModel:
    """The inverse of [`mamba_eqx.state_dict`][]: a tree of the structure of `like`.

    **Arguments:**

    - `like`: a model, or any tree of its structure; `eqx.filter_eval_shape` of one will do. Of
        its leaves only the shapes matter.
    - `tensors`: the arrays by name. They keep their dtypes.
    - `layout`: `"transformers"`, `"state-spaces"` or `"mistral"`.

    **Raises:** one [`mamba_eqx.CheckpointError`][] that lists all names which are missing, which
    are unexpected, and which have another shape.
    """
    chosen = layout_named(layout)
    config = config_from(like)
    check_storable(chosen, config)
    tensors = renamed(chosen, {name: _array(name, tensor) for name, tensor in tensors.items()})
    flat = jax.eval_shape(unrolled, like)
    leaves = named_leaves(flat)
    found = match(chosen, config, flat, tensors, floating=False)
    check_tied_head(chosen, config, tensors, np.asarray)
    for path, parts in group_by_leaf(found).items():
        one_dtype({slot.name: tensor.dtype for slot, tensor in parts})
        arrays = [_jax(slot.name, slot.from_file(tensor)) for slot, tensor in parts]
        leaves[path] = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
    return restacked(jax.tree.unflatten(jax.tree.structure(flat), leaves.values()), like)


def _jax(name: str, leaf: Any) -> Array:
    array = _array(name, leaf)
    return array if isinstance(array, jax.Array) else to_jax(name, [array], array.dtype)


def _array(name: str, leaf: Any) -> Array | np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise CheckpointError(f"{name} must be an array, but is of type {type(leaf).__name__}.")
    return leaf
