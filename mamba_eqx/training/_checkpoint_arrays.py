"""The leaves of a training state, as a checkpoint stores them."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._trees import named_leaves
from ..formats import CheckpointError, StoredTensor
from ._checkpoint_record import Record, is_prng


State = TypeVar("State")
_Array = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


class Parts(NamedTuple):
    """The leaves of a state by name, as a checkpoint stores them."""

    tensors: dict[str, np.ndarray]
    keys: dict[str, str]
    constants: dict[str, str]


def split(state: PyTree) -> Parts:
    """Divides the leaves of a state by kind, and copies the arrays to the host.

    **Raises:** `ValueError` if two leaves have the same name.
    """
    leaves = named_leaves(state)
    if len(leaves) != len(jax.tree.leaves(state)):
        raise ValueError(
            "The leaves of the state must have different names, but two have the same. Rename a "
            "key that contains a dot."
        )
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _Array)}
    prng_keys = {
        name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array) and _is_key(leaf)
    }
    data = arrays | {name: jr.key_data(key) for name, key in prng_keys.items()}
    # `device_get` of the whole dictionary starts every transfer before it waits for the first.
    tensors = {name: np.asarray(leaf) for name, leaf in jax.device_get(data).items()}
    constants = {
        name: repr(leaf)
        for name, leaf in leaves.items()
        if name not in arrays and isinstance(leaf, bool | int | float | str)
    }
    keys = {name: str(jr.key_impl(key)) for name, key in prng_keys.items()}
    return Parts(tensors, keys, constants)


def fill(path: Path, like: State, stored: Mapping[str, StoredTensor], record: Record) -> State:
    """Returns `like` with the stored arrays in place of its own.

    **Raises:** `CheckpointError` if the stored state has another structure.
    """
    leaves = named_leaves(like)
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _Array)}
    missing, extra = sorted(arrays.keys() - stored.keys()), sorted(stored.keys() - arrays.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} contains a state of another structure: missing are {_abbreviated(missing)}, "
            f"unexpected are {_abbreviated(extra)}. Resume with the model and the optimiser that "
            "the checkpoint was written with."
        )
    for name, constant in record.constants.items():
        if constant != repr(leaves.get(name)):
            raise CheckpointError(
                f"{name} is {constant} in {path}, but {leaves.get(name)!r} in this state. Only "
                "arrays are restored, so give a state with the same numbers."
            )
    new = {
        name: _restored(path, name, leaf, stored[name], record.keys.get(name))
        if name in arrays
        else leaf
        for name, leaf in leaves.items()
    }
    return jax.tree.unflatten(jax.tree.structure(like), new.values())


def _restored(
    path: Path, name: str, like: _Array, stored: StoredTensor, impl: str | None
) -> jax.Array | np.ndarray | np.generic:
    """Reads a stored array.

    **Arguments:**

    - `path`, `name`: the checkpoint and the leaf, for messages.
    - `like`: an array of the same shape, dtype and kind (JAX, NumPy, PRNG key), and placement.
    - `stored`: the stored array.
    - `impl`: the implementation of a PRNG key; `None` for other arrays.

    **Raises:** `CheckpointError` if `stored` does not match `like`.
    """
    if (impl is not None) != _is_key(like):
        raise CheckpointError(f"{name} is a PRNG key in only one of {path} and this state.")
    want = like
    if impl is not None:
        if not is_prng(impl):
            raise CheckpointError(
                f"{name} is a key of the PRNG implementation {impl!r} in {path}, which is unknown "
                "to this process. Import the module that defines it."
            )
        dtype = jr.key(0, impl=impl).dtype
        if dtype != like.dtype:
            raise CheckpointError(
                f"{name} is a {dtype} in {path}, but a {like.dtype} in this state. Use the same "
                "PRNG implementation."
            )
        want = jax.eval_shape(jr.key_data, like)
    if stored.shape != want.shape or stored.dtype != want.dtype:
        raise CheckpointError(
            f"{name} is {stored.dtype} of shape {stored.shape} in {path}, but {want.dtype} of "
            f"shape {want.shape} in this state. Resume with the model that the checkpoint was "
            "written with."
        )
    # The array is copied, because it must outlive the file.
    value = np.array(stored.read())
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    array = jnp.asarray(value)
    if impl is not None:
        array = jr.wrap_key_data(array, impl=impl)
    if isinstance(like, jax.Array) and like.committed:
        return jax.device_put(array, like.sharding)
    return array


def _is_key(leaf: _Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abbreviated(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
