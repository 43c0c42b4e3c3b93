"""Reading and writing safetensors files."""

import functools
import json
import math
import os
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .._atomic import atomic_file
from ._files import map_file
from ._json import unique_keys
from ._tensors import (
    DAMAGED,
    CheckpointError,
    StoredTensor,
    check_naturals,
    check_shape,
    quote,
    read_array,
)


# Parsed JSON can take thirty times the memory of its text. This allows for 25,000 tensors.
_MAX_HEADER = 2**22
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SUPPORTED = ", ".join(_DTYPES)


class _Tensor(NamedTuple):
    """The description of a tensor; `begin` and `end` are bytes from the start of the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Opens a safetensors file without reading the values of its tensors.

    The whole header is checked. The checks are those of the `safetensors` package and two more:
    duplicate names and unknown fields are errors.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    The tensors by name, in the order of the header.

    **Raises:**

    `CheckpointError` unless the file is a well-formed safetensors file of float, bfloat16, integer
    or bool tensors.
    """
    try:
        return _open(path)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, which appears under its name complete or not at all.

    **Arguments:**

    - `path`: the file, which is replaced if it exists.
    - `tensors`: the arrays by name, in any memory layout and byte order.
    - `metadata`: arbitrary strings by name, stored in the header.

    **Raises:** `ValueError` for a dtype or a name that safetensors does not support.
    """
    arrays = {name: _writable(name, tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata=dict(metadata))


def _writable(name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor as a C-contiguous array in native byte order."""
    if name == "__metadata__":
        raise ValueError(
            "A tensor must not be named '__metadata__', which safetensors reserves: rename it."
        )
    dtype = tensor.dtype.newbyteorder("=")
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"Tensor {quote(name)} has dtype {tensor.dtype}, but only {_SUPPORTED} are written: "
            "convert it first."
        )
    # The package writes the memory of an array in order, and so wrong values for a transpose.
    # `np.ascontiguousarray` would turn a scalar into a vector.
    return np.asarray(tensor, dtype=dtype, order="C")


def _open(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    buffer = map_file(path)
    if buffer[:4] == b"PK\3\4":
        raise CheckpointError(
            "the file is a zip archive, as written by `torch.save`, not safetensors: check its "
            "name."
        )
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > len(buffer) - 8:
        raise CheckpointError(
            f"its header should have {length} bytes, but the file has {len(buffer)} bytes. It is "
            "not a safetensors file, or it is incomplete: download or save it again."
        )
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"its header has {length} bytes, but at most {_MAX_HEADER} are read: "
            "split the checkpoint into several files."
        )
    header = _parse(buffer[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("its `__metadata__` must map names to strings: save the file again.")

    start, size = 8 + length, len(buffer) - 8 - length
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        try:
            tensor = _parse_tensor(fields)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {quote(name)} is malformed: {error} {DAMAGED}") from None
        offset = start + tensor.begin
        read = functools.partial(read_array, buffer, offset, tensor.shape, tensor.dtype)
        tensors[name] = StoredTensor(name, tensor.shape, tensor.dtype, read)
        spans.append((tensor.begin, tensor.end, name))
    _check_tiling(spans, size)
    return tensors


def _parse(text: bytes) -> dict[str, object]:
    """Returns the header, a JSON object, as a dict."""
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_header_object,
            parse_int=_parse_int,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except CheckpointError:
        raise
    # Deep nesting raises a `RecursionError`, any other fault a `ValueError`.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its header is not valid JSON ({quote(str(error))}). The file is damaged or not a "
            "safetensors file: download or save it again."
        ) from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(
            "its header is not a JSON object, so it is not a safetensors file: check its name."
        )
    return header


def _header_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    try:
        fields = unique_keys(pairs)
    except CheckpointError as error:
        raise CheckpointError(f"in its header {error}") from None
    for name in fields:
        name.encode()  # A lone surrogate would otherwise raise later, when the name is printed.
    return fields


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) <= 20 else _refuse_number(digits)


def _refuse_number(text: str) -> NoReturn:
    raise CheckpointError(
        f"its header has the number {quote(text)}, but only 64-bit integers belong there. {DAMAGED}"
    )


def _parse_tensor(fields: object) -> _Tensor:
    """Returns the description of a tensor in the header."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("the fields must be exactly `dtype`, `shape` and `data_offsets`.")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str):
        raise CheckpointError("the dtype must be a string.")
    if code not in _DTYPES:
        if code.startswith(("F8", "F6", "F4")):
            raise CheckpointError(
                f"its dtype {quote(code)} is a format of 8 bits or less (float8), which is not "
                "supported: use a checkpoint that is not quantised, or convert it to bfloat16."
            )
        raise CheckpointError(f"the dtype {quote(code)} is not one of {_SUPPORTED}.")
    dtype = _DTYPES[code]
    if not isinstance(shape, list):
        raise CheckpointError("the shape must be a list.")
    sizes = check_shape(shape, dtype.itemsize)
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise CheckpointError("the data_offsets must be two numbers.")
    begin, end = check_naturals(offsets, "data_offsets")
    nbytes = math.prod(sizes) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"the shape {quote(sizes)} of {code} takes {nbytes} bytes, but the data_offsets "
            f"[{begin}, {end}] hold {end - begin}."
        )
    return _Tensor(dtype, sizes, begin, end)


def _check_tiling(spans: list[tuple[int, int, str]], size: int) -> None:
    """Checks that the tensors cover the data without gaps and overlaps."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise CheckpointError(
                f"tensor {quote(name)} begins at byte {begin} of the data, but should begin at "
                f"byte {position}: it {fault}. {DAMAGED}"
            )
        position = end
    if position != size:
        raise CheckpointError(
            f"its tensors take {position} bytes, but it has {size} bytes of data. {DAMAGED}"
        )
