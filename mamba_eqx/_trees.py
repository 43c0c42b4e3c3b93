from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """The path to a leaf or a node as users read and write it: `layers.layers.3.mixer.A_log`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def repeated(state: PyTree, rows: int) -> PyTree:
    """The state of one sequence as that of a batch: `rows` times the same past."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), state)


def named_leaves(state: PyTree) -> dict[str, Any]:
    """The leaves by the names that they have in a file: the path to each, with dots."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): leaf for path, leaf in paths}
