"""Converting the arrays of a checkpoint to JAX arrays."""

import bisect
import itertools
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
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None = None,
) -> Array:
    """Copies arrays to JAX, joined along their first axis, and casts them in the same step.

    **Arguments:**

    - `name`: how messages refer to the arrays.
    - `parts`: one or more arrays, which may be views of files. A device that holds a part of the
        result reads only that part.
    - `shape`: the shape of the result. The first axis of the joined arrays may be divided into
        several axes.
    - `dtype`: the dtype of the result.
    - `sharding`: the sharding of the result; JAX's default device if `None`.

    **Returns:**

    The JAX array.

    **Raises:** `CheckpointError` if a finite value is not finite in `dtype`, or if `dtype` needs
    JAX's 64-bit mode.
    """
    check_dtype(name, dtype)
    if sharding is None:
        return jnp.asarray(_copy(name, parts, shape, dtype))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        slices = [slice(None)] * len(shape) if index is None else index
        ranges = [range(*one.indices(size)) for one, size in zip(slices, shape, strict=True)]
        return _copy(name, _cut(parts, shape, ranges), tuple(map(len, ranges)), dtype)

    return jax.make_array_from_callback(shape, sharding, read)


def _cut(
    parts: Sequence[np.ndarray], shape: tuple[int, ...], ranges: Sequence[range]
) -> list[np.ndarray]:
    """Returns the pieces of `parts` that a range along each axis of the result selects, in order.

    `ranges` have no steps. `shape` is that of the result, as in `to_jax`.
    """
    slices = [slice(one.start, one.stop) for one in ranges]
    if parts[0].shape == shape:
        return [parts[0][tuple(slices)]]
    # The axes that the first axis of the parts is divided into.
    n_axes = len(shape) - parts[0].ndim + 1
    others = slices[n_axes:]
    *outer, rows = ranges[:n_axes]
    starts = [0, *itertools.accumulate(map(len, parts))]
    pieces: list[np.ndarray] = []
    for indices in itertools.product(*outer):
        first = int(np.ravel_multi_index((*indices, 0), shape[:n_axes]))
        start, stop = first + rows.start, first + rows.stop
        i = bisect.bisect_right(starts, start) - 1
        while i < len(parts) and starts[i] < stop:
            within = slice(max(start - starts[i], 0), stop - starts[i])
            pieces.append(parts[i][(within, *others)])
            i += 1
    return pieces


def _copy(
    name: str, parts: Sequence[np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    if dtype == np.float16:
        # NumPy's own casts report an overflow, but the cast of bfloat16 does not. The additional
        # cast to float32 is exact.
        bfloat16 = ml_dtypes.bfloat16
        parts = [part.astype(np.float32) if part.dtype == bfloat16 else part for part in parts]
    try:
        with np.errstate(over="raise", invalid="ignore"):
            # JAX may keep the memory of its argument, which here is a mapped file, so always copy.
            if len(parts) == 1:
                return np.array(parts[0], dtype=dtype, order="C").reshape(shape)
            return np.concatenate(parts, dtype=dtype, casting="unsafe").reshape(shape)
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
    (first, common), *others = dtypes.items()
    for name, dtype in others:
        if np.dtype(dtype) != np.dtype(common):
            raise CheckpointError(
                f"{first} is {common} and {name} is {dtype}, but they are parts of one array here "
                "and must have the same dtype. Convert them to one dtype "
                "(`from_pretrained(..., dtype=jnp.float32)`)."
            )
    return np.dtype(common)
