"""Types and checks shared by the readers of all formats."""

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


DAMAGED = "The file is incomplete or damaged: download or save it again."
_MAX_DIMENSIONS = 32
_MAX_BYTES = 2**62


class CheckpointError(ValueError):
    """An error in a checkpoint, or in the use of one.

    The cause is a file that is damaged, has another format, contains something other than plain
    tensors, or does not fit the model. The message names the file, the fault and the remedy. A file
    that is missing or unreadable raises the usual `OSError` instead.
    """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint file, whose values are read on demand.

    - `name`, `shape`, `dtype`: the description of the tensor.
    - `read`: reads the values, and returns a C-contiguous array in native byte order. The array may
        be a read-only view of the mapped file. The file stays mapped while the tensor or the array
        is alive, and must not be changed during that time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def quote(text: str | tuple[int, ...]) -> str:
    """Formats text or a shape for a message: escaped, and truncated to 100 characters."""
    quoted = ascii(text[:100])
    return quoted if len(quoted) <= 100 else quoted[:97] + "..."


def check_shape(shape: Sequence[object], itemsize: int) -> tuple[int, ...]:
    """Returns a shape as a tuple of integers.

    **Arguments:**

    - `shape`: the sizes as they are in the file.
    - `itemsize`: the size of an element in bytes.

    **Raises:** `CheckpointError` if the sizes are not integers of at least 0, are more than 32, or
    overflow.
    """
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"it has {len(shape)} dimensions, but at most {_MAX_DIMENSIONS} are read."
        )
    sizes = check_naturals(shape, "shape")
    # NumPy, too, ignores zeros when it decides whether the size of an array overflows.
    if math.prod(size for size in sizes if size) * itemsize >= _MAX_BYTES:
        raise CheckpointError(f"the shape {quote(sizes)} overflows.")
    return sizes


def check_naturals(values: Sequence[object], what: str) -> tuple[int, ...]:
    """Returns values as a tuple of integers.

    **Raises:** `CheckpointError`, which refers to the values as `what`, if any of them is a bool,
    negative, or not an integer.
    """
    naturals = tuple(value for value in values if type(value) is int and value >= 0)
    if len(naturals) != len(values):
        raise CheckpointError(f"the {what} must be integers >= 0.")
    return naturals


def read_array(
    buffer: mmap.mmap,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    strides: tuple[int, ...] | None = None,
    swap: bool = False,
) -> np.ndarray:
    """Reads an array whose bounds have been checked, without a copy if possible.

    **Arguments:**

    - `buffer`: the mapped file.
    - `offset`: the position of the first element, in bytes.
    - `shape`, `dtype`: the shape and the dtype of the array.
    - `strides`: the strides in bytes, as in NumPy; C order if `None`.
    - `swap`: whether the byte order of the file differs from that of this machine.

    **Returns:**

    A C-contiguous array in native byte order.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    # Read as integers, because the extension type bfloat16 has no byte order.
    bits = np.ndarray(shape, np.dtype(f"u{dtype.itemsize}"), buffer, offset, strides)
    if not (bits.flags.c_contiguous and bits.flags.aligned):
        bits = bits.copy(order="C")
    if swap:
        bits = bits.byteswap()
    if dtype == np.bool_:
        # Bytes other than 0 and 1 would not be valid NumPy bools.
        return np.not_equal(bits, 0, out=np.empty(shape, np.bool_))
    return bits.view(dtype)
