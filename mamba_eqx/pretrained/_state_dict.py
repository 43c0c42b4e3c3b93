"""The arrays of a model under the names and in the shapes of a checkpoint layout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._trees import named_leaves
from ..formats import CheckpointError
from ..models import LanguageModel
from ._arrays import common_dtype, to_jax
from ._assign import Assignment, assign
from .layouts import (
    LAYOUTS as LAYOUTS,
    Layout,
    check_storable,
    check_tied_head,
    config_from,
    renamed,
    restacked,
    slots,
    unrolled,
)


def get_layout(name: str) -> Layout:
    """Returns the layout with a name.

    **Raises:** `CheckpointError` if there is none.
    """
    if name not in LAYOUTS:
        raise CheckpointError(
            f"`layout` must be one of {', '.join(map(repr, LAYOUTS))}, but got {name!r}."
        )
    return LAYOUTS[name]


def layouts_for(tree: LanguageModel) -> tuple[str, ...]:
    """Returns the names of the layouts that can store a model, for the argument `layout` of
    [`mamba_eqx.save_pretrained`][] and others.

    ```python
    layout = mbx.layouts_for(model)[0]
    ```

    **Arguments:**

    - `tree`: the model, or any tree of its structure, including the result of
        `eqx.filter_eval_shape`. No array is read or copied.

    **Returns:**

    The names, in the order in which the layouts are documented; an empty tuple if there are none,
    as for a model with a mixer of your own.

    **Raises:** [`mamba_eqx.CheckpointError`][] if `tree` is not of a model's structure.
    """
    try:
        config = config_from(tree)
    except CheckpointError:
        raise
    except ValueError:  # There is no config for a layer that the library does not define.
        return ()
    shapes = jax.eval_shape(unrolled, tree)

    def stores(layout: Layout) -> bool:
        try:
            slots(layout, config, shapes)
        except CheckpointError:
            return False
        return True

    return tuple(name for name, layout in LAYOUTS.items() if stores(layout))


def state_dict(tree: LanguageModel, *, layout: str = "transformers") -> dict[str, Array]:
    """Returns the arrays of a model under the names and in the shapes of a checkpoint layout.

    ```python
    grads = eqx.filter_grad(loss)(model, tokens)
    mbx.state_dict(grads)["backbone.layers.0.mixer.A_log"]
    ```

    **Arguments:**

    - `tree`: the model, or any tree of its structure: gradients, the moments of an optimiser, or a
        part of a model with `None` in place of the rest. Its layers may be `Unrolled` or `Stacked`.
    - `layout`: `"transformers"`, `"state-spaces"` or `"mistral"`.

    **Returns:**

    The arrays by name, in their own dtypes. A tied head is not included a second time.

    **Raises:** [`mamba_eqx.CheckpointError`][] if `tree` is not of a model's structure, or the
    layout cannot store the model.
    """
    chosen = get_layout(layout)
    config = config_from(tree)
    check_storable(chosen, config)
    tree = unrolled(tree)
    leaves = named_leaves(tree)
    return {
        slot.name: slot.to_file(_to_jax_array(slot.name, leaves[slot.path]))
        for slot in slots(chosen, config, tree)
    }


def load_state_dict(
    like: LanguageModel,
    tensors: Mapping[str, Array | np.ndarray],
    *,
    layout: str = "transformers",
) -> LanguageModel:
    """Returns a tree with the given arrays: the inverse of [`mamba_eqx.state_dict`][].

    **Arguments:**

    - `like`: a model, or any tree of its structure, including the result of
        `eqx.filter_eval_shape`. Only the shapes of its leaves are used.
    - `tensors`: the arrays by name. They keep their dtypes.
    - `layout`: `"transformers"`, `"state-spaces"` or `"mistral"`.

    **Returns:**

    A tree of the structure of `like`, with its layers `Unrolled` or `Stacked` as in `like`.

    **Raises:** one [`mamba_eqx.CheckpointError`][] that lists all missing, unexpected and
    mis-shaped tensors.
    """
    chosen = get_layout(layout)
    config = config_from(like)
    check_storable(chosen, config)
    arrays = {name: _check_array(name, value) for name, value in tensors.items()}
    tensors = renamed(chosen, config, arrays)
    tree = jax.eval_shape(unrolled, like)
    assignments = assign(chosen, config, tree, tensors, floating=False)
    check_tied_head(chosen, config, tensors, np.asarray)
    filled = jax.tree.unflatten(jax.tree.structure(tree), map(_join, assignments))
    return restacked(filled, like)


def _join(assignment: Assignment[Array | np.ndarray]) -> Array:
    common_dtype({slot.name: tensor.dtype for slot, tensor in assignment.parts})
    arrays = [_to_jax_array(slot.name, slot.from_file(tensor)) for slot, tensor in assignment.parts]
    joined = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
    return joined.reshape(assignment.leaf.shape)


def _to_jax_array(name: str, value: object) -> Array:
    array = _check_array(name, value)
    return (
        array if isinstance(array, jax.Array) else to_jax(name, [array], array.shape, array.dtype)
    )


def _check_array(name: str, value: object) -> Array | np.ndarray:
    if not isinstance(value, jax.Array | np.ndarray):
        raise CheckpointError(f"{name} must be an array, but is of type {type(value).__name__}.")
    return value
