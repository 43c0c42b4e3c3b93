"""Helpers for pytrees of any kind."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import PyTree


def path_name(path: KeyPath) -> str:
    """Returns the path of a leaf or node as users write it: `layers.layers.3.mixer.A_log`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, which serve as their names in a file."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def repeated(state: PyTree, rows: int) -> PyTree:
    """Repeats the state of one sequence for a batch of `rows` sequences."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), state)
