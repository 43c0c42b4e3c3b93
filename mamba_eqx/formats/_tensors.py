"""What the checkpoint readers share: the error they raise, and the tensors they return."""

import math
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


DAMAGED = "The file is incomplete or damaged: download or save it again."
_MAX_DIMENSIONS = 32
_MAX_BYTES = 2**62


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be.

    The file is damaged, of another format, holds something other than plain tensors, or does not
    fit the model asked of it. The message names the file, the offending thing, and the remedy.
    A file that is missing or may not be opened raises the usual `OSError` instead.
    """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint file: its description, and a function that reads its values.

    `read` returns a C-contiguous array in native byte order. It may be a read-only view of the
    mapped file, which stays mapped for as long as the tensor or the array is alive and must not
    be written to meanwhile.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Maps a file read-only, refusing what a failed download leaves in place of a checkpoint."""
    # Before opening, because opening a named pipe waits for its writer. A folder is left to `open`.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError("it is not a regular file: give the path of a checkpoint file.")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError("the file is empty: download or save it again.")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head = buffer[:64]
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "the file is a git-LFS pointer, not the weights it points to: "
            "run `git lfs pull`, or download the file itself."
        )
    # Whole words: "<" alone also starts a safetensors file whose header is 60 bytes long.
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            "the file is a web page, not weights: the download was answered with an error or a "
            "login page. Check the address and your access to it, and download the file again."
        )
    return buffer


def quote(text: str | tuple[int, ...]) -> str:
    """Text from a file for use in a message: escaped, and cut to a readable length."""
    quoted = ascii(text[:100])
    return quoted if len(quoted) <= 100 else quoted[:97] + "..."


def check_shape(shape: Sequence[object], itemsize: int) -> tuple[int, ...]:
    """Returns `shape` as a tuple of integers if an array of that shape can exist at all."""
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"it has {len(shape)} dimensions, but at most {_MAX_DIMENSIONS} are read."
        )
    sizes = check_naturals(shape, "shape")
    # NumPy leaves zeros out too when it decides whether the size of an array overflows.
    if math.prod(size for size in sizes if size) * itemsize >= _MAX_BYTES:
        raise CheckpointError(f"the shape {quote(sizes)} overflows.")
    return sizes


def check_naturals(values: Sequence[object], what: str) -> tuple[int, ...]:
    """Returns `values` as a tuple if each is a nonnegative integer (and none a bool)."""
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
    """Reads an array whose bounds have been checked, without a copy where that is possible.

    **Arguments:**

    - `strides`: in bytes, as NumPy has them; C order if not given.
    - `swap`: whether the file's byte order is not that of this machine.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    # Read as bits, because byte order means nothing to the extension type bfloat16.
    bits = np.ndarray(shape, np.dtype(f"u{dtype.itemsize}"), buffer, offset, strides)
    if not (bits.flags.c_contiguous and bits.flags.aligned):
        bits = bits.copy(order="C")
    if swap:
        bits = bits.byteswap()
    if dtype == np.bool_:
        # A byte other than 0 and 1 is not a valid NumPy bool.
        return np.not_equal(bits, 0, out=np.empty(shape, np.bool_))
    return bits.view(dtype)
