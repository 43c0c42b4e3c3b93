"""From the arrays of a checkpoint to JAX's."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import dtypes
from jax.sharding import Sharding
from jaxtyping import Array

from .._config import LanguageModelConfig
from ._layout import Layout
from ._stored import CheckpointError


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
    name: str, array: np.ndarray, dtype: np.dtype, sharding: Sharding | None = None
) -> Array:
    """A copy of `array` in JAX, in one step from its own dtype to the one wanted.

    **Arguments:**

    - `array`: may be a view of a file: no more of it is touched than there is room for here.
    - `sharding`: where it goes, each device reading its own part; JAX's default device if `None`.

    **Raises:** `CheckpointError` if a finite value has no finite counterpart in `dtype`.
    """
    check_dtype(name, dtype)
    if sharding is None:
        return jnp.asarray(_copy(name, array, dtype))
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: _copy(name, array[part], dtype)
    )


def _copy(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float16:
        array = array.astype(np.float32)  # Exact, and NumPy's own casts report an overflow.
    try:
        with np.errstate(over="raise", invalid="ignore"):
            # A copy in any case: JAX may keep the memory it is given, which here is a file's.
            return np.array(array, dtype=dtype, order="C")
    except FloatingPointError:
        raise CheckpointError(
            f"{name} has values too large for {dtype}: choose another `dtype`, such as bfloat16."
        ) from None


def check_tied_head(
    layout: Layout,
    config: LanguageModelConfig,
    tensors: Mapping[str, _T],
    read: Callable[[_T], np.ndarray],
) -> None:
    """**Raises:** `CheckpointError` if the head is there and is not the embedding it is tied to."""
    head = layout.tied_head(config)
    if head is None or head not in tensors or layout.embedding not in tensors:
        return
    one, other = read(tensors[head]), read(tensors[layout.embedding])
    # As bits, because NaN is not equal to itself.
    if one.dtype != other.dtype or not np.array_equal(_bits(one), _bits(other)):
        raise CheckpointError(
            f"{head} differs from {layout.embedding}, although the config says that they are tied. "
            "If the head is meant, set `tie_word_embeddings` (in official configs "
            "`tie_embeddings`) to false."
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
