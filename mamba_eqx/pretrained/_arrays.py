"""From the arrays of a checkpoint to JAX's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import dtypes
from jax.sharding import Sharding
from jaxtyping import Array

from ..formats import CheckpointError
from ..models import LanguageModelConfig
from .layouts import Layout


_T = TypeVar("_T")


def check_dtype(name: str, dtype: Any) -> np.dtype:
    """`dtype` as JAX has it.

    **Raises:** `CheckpointError` if JAX would have another one in its place.
    """
    dtype = np.dtype(dtype)
    if dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{name} is to be {dtype}, which JAX has in its 64-bit mode only. Enter it with "
            '`jax.config.update("jax_enable_x64", True)`, or convert to a narrower dtype '
            "(`from_pretrained(..., dtype=jnp.float32)`)."
        )
    return dtype


def to_jax(
    name: str,
    parts: Sequence[np.ndarray],
    dtype: np.dtype,
    sharding: Sharding | None = None,
) -> Array:
    """A copy of `parts` in JAX, joined along their first axis if there are several, in one step
    from their own dtype to the one wanted.

    **Arguments:**

    - `parts`: may be views of files: no more of it is touched than there is room for here.
    - `sharding`: where it goes, each device reading its own part; JAX's default device if `None`.

    **Raises:** `CheckpointError` if a finite value has no finite counterpart in `dtype`.
    """
    check_dtype(name, dtype)
    if sharding is None:
        return jnp.asarray(_copy(name, parts, dtype))
    shape = parts[0].shape
    if len(parts) > 1:
        shape = (sum(map(len, parts)), *shape[1:])
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda index: _copy(name, _cut(parts, index), dtype),
    )


def _cut(parts: Sequence[np.ndarray], index: Any) -> list[np.ndarray]:
    """The parts of what is at `index` in all of them joined."""
    if len(parts) == 1:
        return [parts[0][index]]
    rows, *others = index
    start, stop, _ = rows.indices(sum(map(len, parts)))
    cut, at = [], 0
    for part in parts:
        within = slice(max(start - at, 0), max(stop - at, 0))
        cut.append(part[(within, *others)])
        at += len(part)
    return cut


def _copy(name: str, parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    if dtype == np.float16:
        # Exact, and NumPy's own casts report an overflow.
        bfloat16 = ml_dtypes.bfloat16
        parts = [part.astype(np.float32) if part.dtype == bfloat16 else part for part in parts]
    try:
        with np.errstate(over="raise", invalid="ignore"):
            # A copy in any case: JAX may keep the memory it is given, which here is a file's.
            if len(parts) == 1:
                return np.array(parts[0], dtype=dtype, order="C")
            return np.concatenate(parts, dtype=dtype, casting="unsafe")
    except FloatingPointError:
        raise CheckpointError(
            f"{name} has values too large for {dtype}: choose another `dtype`, such as bfloat16."
        ) from None


def one_dtype(dtypes: Mapping[str, Any]) -> np.dtype:
    """The dtype of the parts of one array, by their names.

    **Raises:** `CheckpointError` if they differ.
    """
    if len({np.dtype(dtype) for dtype in dtypes.values()}) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise CheckpointError(
            f"{listed}, but they are parts of one array here, and must be of one dtype: convert "
            "them (`from_pretrained(..., dtype=jnp.float32)`)."
        )
    return np.dtype(next(iter(dtypes.values())))


def check_tied_head(
    layout: Layout,
    config: LanguageModelConfig,
    tensors: Mapping[str, _T],
    read: Callable[[_T], np.ndarray],
) -> None:
    """**Raises:** `CheckpointError` if the head is there and is not the embedding it is tied to."""
    head, embedding = layout.tied_head(config), layout.embedding(config)
    if head is None or head not in tensors or embedding not in tensors:
        return
    one, other = read(tensors[head]), read(tensors[embedding])
    # As bits, because NaN is not equal to itself.
    if one.dtype != other.dtype or not np.array_equal(_bits(one), _bits(other)):
        raise CheckpointError(
            f"{head} differs from {embedding}, although the config says that they are tied. "
            "If the head is meant, set `tie_word_embeddings` (in official configs "
            "`tie_embeddings`) to false."
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
