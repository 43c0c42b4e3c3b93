"""Helpers for pytrees of any kind."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import Array, PyTree


Tokens = TypeVar("Tokens")


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


def cut_into_chunks(chunk_size: int, tokens: Tokens) -> Tokens:
    """Splits the first axis of every array, usually the time, into chunks.

    **Arguments:**

    - `chunk_size`: tokens per chunk, at least 1. A shorter sequence becomes one shorter chunk.
    - `tokens`: a pytree of arrays of shape `(seq, ...)`.

    **Returns:**

    The same pytree, with arrays of shape `(chunks, chunk, ...)`. Zeros fill up the last chunk.
    """

    def cut(t: Array) -> Array:
        size = max(1, min(chunk_size, t.shape[0]))
        t = jnp.pad(t, ((0, -t.shape[0] % size),) + ((0, 0),) * (t.ndim - 1))
        return t.reshape((-1, size, *t.shape[1:]))

    return jax.tree.map(cut, tokens)
