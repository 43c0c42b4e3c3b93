"""Helpers for pytrees of any kind."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.tree_util import KeyPath
from jaxtyping import Array, PyTree


Tokens = TypeVar("Tokens")
Tree = TypeVar("Tree")


def path_name(path: KeyPath) -> str:
    """Returns the path of a leaf or node as users write it: `layers.layers.3.mixer.A_log`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, which serve as their names in a file."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def paths_with_ends(
    option: str, ends: Iterable[str], paths: Iterable[str], *, what: str
) -> set[str]:
    """Selects paths by their ends, which are whole names: `mixer.A_log` for the path above.

    **Arguments:**

    - `option`: the option that the user gave, for messages.
    - `ends`: the value of the option.
    - `paths`: the paths to select from.
    - `what`: what has these paths, in the plural, for messages.

    **Raises:** `ValueError` if `ends` is a string, or one of them is not the end of any path.
    """
    if isinstance(ends, str):
        raise ValueError(
            f"`{option}` must be a list of names, but got {ends!r}. Put it into a list."
        )
    found: set[str] = set()
    for end in ends:
        matching = {path for path in paths if f".{path}".endswith(f".{end}")}
        if not matching:
            raise ValueError(
                f"Each of `{option}` must be the end of a path, but got {end!r}. The model has "
                f"{', '.join(paths) or f'no {what}'}."
            )
        found |= matching
    return found


def repeated(state: PyTree, rows: int) -> PyTree:
    """Repeats the state of one sequence for a batch of `rows` sequences."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), state)


def vary_together(tree: Tree) -> Tree:
    """Inside `jax.shard_map`, makes all arrays vary over the mesh axes that any of them does.

    There, the carry of a loop must vary over these axes from the start, even if it begins as zeros,
    and so must all operands of a primitive. The transpose of the mark sums the gradient of weights
    over the devices that share them. Elsewhere the arrays are returned as they are.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))

    def vary(array: Array) -> Array:
        missing = tuple(axes - varying_axes(array))
        if not missing:
            return array
        pcast = getattr(lax, "pcast", None)
        if pcast is not None:
            return pcast(array, missing, to="varying")
        return lax.pvary(array, missing)  # pyright: ignore[reportAttributeAccessIssue] # older JAX

    return jax.tree.map(vary, tree)


def batched_like(tree: Tree, array: Array) -> Tree:
    """Under `jax.vmap`, gives all arrays of a tree the batch of another array, and leaves their
    values as they are.

    In a loop, the reverse pass then adds up the gradient of a parameter for each example by itself,
    and sums over the examples once, after the loop. Where examples are sharded over devices, each
    pass of the loop would otherwise sum over the devices.
    """
    batched = jnp.any(array[:1] > 0)

    def give(leaf: Array) -> Array:
        return leaf + jnp.where(batched, jnp.zeros((), leaf.dtype), jnp.zeros((), leaf.dtype))

    return jax.tree.map(give, tree)


def varying_axes(array: Array) -> frozenset[str]:
    """Returns the mesh axes that an array varies over inside `jax.shard_map`."""
    aval = jax.typeof(array)
    manual = getattr(aval, "manual_axis_type", None)  # Older versions of JAX have `vma` only.
    return getattr(aval, "vma", frozenset()) if manual is None else manual.varying


def cut_into_chunks(chunk_size: int, tokens: Tokens) -> Tokens:
    """Splits the first axis of every array, usually the time, into chunks.

    **Arguments:**

    - `chunk_size`: tokens per chunk, at least 1. A shorter sequence becomes one shorter chunk,
        unless its length is symbolic (`jax.export`).
    - `tokens`: a pytree of arrays of shape `(seq, ...)`.

    **Returns:**

    The same pytree, with arrays of shape `(chunks, chunk, ...)`. Zeros fill up the last chunk.
    """

    def cut(t: Array) -> Array:
        symbolic = export.is_symbolic_dim(t.shape[0])
        seq, *shape = t.shape
        size = chunk_size if symbolic else max(1, min(chunk_size, seq))
        chunks = (seq + size - 1) // size
        t = jnp.pad(t, ((0, chunks * size - seq),) + ((0, 0),) * len(shape))
        return t.reshape((chunks, size, *shape))

    return jax.tree.map(cut, tokens)
