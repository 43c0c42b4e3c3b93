"""The config and the shapes of a model, and conversion between stacked and unrolled layers."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ...formats import CheckpointError
from ...layers import Stacked, Unrolled
from ...models import LanguageModel, LanguageModelConfig


def unrolled(tree: LanguageModel) -> LanguageModel:
    """Returns a model, or a tree of its structure, with its layers `Unrolled`."""
    stack = tree.layers
    if not isinstance(stack, Stacked):
        return tree
    layers = [jax.tree.map(lambda leaf: leaf[i], stack.layers) for i in range(stack.n_layer)]  # noqa: B023
    return eqx.tree_at(lambda tree: tree.layers, tree, Unrolled(layers, remat=stack.remat))


def restacked(tree: LanguageModel, like: LanguageModel) -> LanguageModel:
    """Returns a tree with its layers `Stacked` if the layers of `like` are: undoes `unrolled`."""
    if not isinstance(like.layers, Stacked):
        return tree
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree.layers.unstack())
    stack = eqx.tree_at(lambda stack: stack.layers, like.layers, layers)
    return eqx.tree_at(lambda tree: tree.layers, tree, stack)


def config_from(tree: LanguageModel) -> LanguageModelConfig:
    """Returns the config of a model, or of any tree of its structure, such as its gradients.

    **Raises:** `CheckpointError` if `tree` is not of a model's structure, or has leaves that are
    not arrays.
    """
    if not isinstance(tree, LanguageModel):
        raise CheckpointError(
            f"`tree` must be a `LanguageModel`, or a tree of its structure, but got "
            f"{type(tree).__name__}. Pass one tree of moments of an optimiser's state, such as "
            "`state[0].mu`."
        )
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"`{jax.tree_util.keystr(path)}` must be an array, but is of type "
                f"{type(leaf).__name__}."
            )
    found: list[LanguageModelConfig] = []
    jax.eval_shape(lambda tree: found.append(LanguageModelConfig.of(tree)), tree)
    return found[0]


def skeleton(config: LanguageModelConfig) -> LanguageModel:
    """Returns a model with shapes in place of arrays, and its layers `Unrolled`."""
    # Tracing takes milliseconds for each layer, so equal layers are traced once.
    distinct = tuple(dict.fromkeys(config.layers))
    few = replace(config, layers=distinct)
    model = eqx.filter_eval_shape(lambda: few.build(key=jr.key(0)))
    made = dict(zip(distinct, model.layers.unstack(), strict=True))
    layers = Unrolled([made[layer] for layer in config.layers])
    return eqx.tree_at(lambda model: model.layers, model, layers)
