"""Converting the arrays of a checkpoint to JAX arrays."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import dtypes
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from ..formats import CheckpointError


def check_dtype(name: str, dtype: DTypeLike) -> np.dtype:
    """Returns `dtype` as a NumPy dtype.

    **Arguments:**

    - `name`: how messages refer to the array or model.
    - `dtype`: the dtype.

    **Raises:** `CheckpointError` if JAX would silently replace it by a narrower dtype.
    """
    dtype = np.dtype(dtype)
    if dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{name} has dtype {dtype}, which JAX supports in its 64-bit mode only. Enable it with "
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
    """Copies arrays to JAX, joined along their first axis, and casts them in the same step.

    **Arguments:**

    - `name`: how messages refer to the arrays.
    - `parts`: one or more arrays, which may be views of files. A device that holds a part of the
        result reads only that part.
    - `dtype`: the dtype of the result.
    - `sharding`: the sharding of the result; JAX's default device if `None`.

    **Returns:**

    The JAX array.

    **Raises:** `CheckpointError` if a finite value is not finite in `dtype`, or if `dtype` needs
    JAX's 64-bit mode.
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


def _cut(parts: Sequence[np.ndarray], index: tuple[slice, ...] | None) -> list[np.ndarray]:
    """Returns the pieces of `parts` that an index into the joined array selects."""
    if index is None:
        return [*parts]
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
        # NumPy's own casts report an overflow, but the cast of bfloat16 does not. The additional
        # cast to float32 is exact.
        bfloat16 = ml_dtypes.bfloat16
        parts = [part.astype(np.float32) if part.dtype == bfloat16 else part for part in parts]
    try:
        with np.errstate(over="raise", invalid="ignore"):
            # JAX may keep the memory of its argument, which here is a mapped file, so always copy.
            if len(parts) == 1:
                return np.array(parts[0], dtype=dtype, order="C")
            return np.concatenate(parts, dtype=dtype, casting="unsafe")
    except FloatingPointError:
        raise CheckpointError(
            f"{name} has values too large for {dtype}: choose another `dtype`, such as bfloat16."
        ) from None


def common_dtype(dtypes: Mapping[str, np.dtype]) -> np.dtype:
    """Returns the dtype that the tensors of one array share.

    **Arguments:**

    - `dtypes`: the dtypes by the names of the tensors.

    **Raises:** `CheckpointError` if they differ.
    """
    if len({np.dtype(dtype) for dtype in dtypes.values()}) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise CheckpointError(
            f"{listed}, but they are parts of one array here and must have the same dtype. Convert "
            "them to one dtype (`from_pretrained(..., dtype=jnp.float32)`)."
        )
    return np.dtype(next(iter(dtypes.values())))
