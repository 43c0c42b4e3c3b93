"""Reads and writes safetensors files."""

import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .._atomic import atomic_file
from ._tensors import (
    DAMAGED,
    CheckpointError,
    StoredTensor,
    check_naturals,
    check_shape,
    map_file,
    quote,
    read_array,
)


# Parsed JSON can take thirty times the memory of its text. This is room for 25,000 tensors.
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


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Opens a safetensors file; the values of its tensors stay on disk until they are read.

    The whole header is checked first. This is as strict as the `safetensors` package, and
    stricter on two points: a name that occurs twice and an unknown field are errors.

    **Arguments:**

    - `path`: the file.

    **Returns:**

    The tensors by name, in the order of the header.

    **Raises:**

    `CheckpointError` for any content that is not a well-formed file of float, bfloat16, integer
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
    """Writes a safetensors file. It appears under its name complete or not at all.

    **Arguments:**

    - `path`: the file, replaced if it exists.
    - `tensors`: the arrays by name, in any memory layout and byte order.
    - `metadata`: free text by name, kept in the header.
    """
    arrays = {name: _native(name, tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata=dict(metadata))


def _native(name: str, tensor: np.ndarray) -> np.ndarray:
    if name == "__metadata__":
        raise ValueError("A tensor may not be named '__metadata__': safetensors reserves the name.")
    dtype = tensor.dtype.newbyteorder("=")
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"Tensor {quote(name)} has dtype {tensor.dtype}, but only {_SUPPORTED} are written: "
            "convert it first."
        )
    # The package takes the memory as it lies and so writes other values for, say, a transpose.
    # Not `np.ascontiguousarray`, which turns a scalar into a vector.
    return np.asarray(tensor, dtype=dtype, order="C")


def _open(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    buffer = map_file(path)
    if buffer[:4] == b"PK\3\4":
        raise CheckpointError(
            "the file is a zip archive, as `torch.save` writes, not safetensors: check its name."
        )
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > len(buffer) - 8:
        raise CheckpointError(
            f"its header should be {length} bytes long, but the file has {len(buffer)} bytes. It "
            "is not a safetensors file, or it is incomplete: download or save it again."
        )
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"its header is {length} bytes long, but at most {_MAX_HEADER} are read: "
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
            dtype, shape, begin, end = _describe(fields)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {quote(name)} is malformed: {error} {DAMAGED}") from None
        read = functools.partial(read_array, buffer, start + begin, shape, dtype)
        tensors[name] = StoredTensor(name, shape, dtype, read)
        spans.append((begin, end, name))
    _check_tiling(spans, size)
    return tensors


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_parse_int,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except CheckpointError:
        raise
    # Deep nesting ends in a `RecursionError`; all else that may be wrong is a `ValueError`.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"its header is not valid JSON ({quote(str(error))}). It is not a safetensors file, "
            "or it is damaged: download or save it again."
        ) from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError("its header is not a JSON object: not a safetensors file.")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise CheckpointError(
                f"its header has the name {quote(name)} more than once, so which is meant cannot "
                "be known: save the file again."
            )
        name.encode()  # A lone surrogate fails here, not later when someone prints it.
        unique[name] = value
    return unique


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) <= 20 else _refuse_number(digits)


def _refuse_number(text: str) -> int:
    raise CheckpointError(
        f"its header has the number {quote(text)}, but only 64-bit integers belong there. {DAMAGED}"
    )


def _describe(fields: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("the fields must be exactly `dtype`, `shape` and `data_offsets`.")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str):
        raise CheckpointError("the dtype must be a string.")
    if code not in _DTYPES:
        if code.startswith(("F8", "F6", "F4")):
            raise CheckpointError(
                f"its dtype {quote(code)} is a float8 or smaller format, which is not read: take "
                "a checkpoint that is not quantised, or convert it to bfloat16."
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
    return dtype, sizes, begin, end


def _check_tiling(spans: list[tuple[int, int, str]], size: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise CheckpointError(
                f"tensor {quote(name)} begins at byte {begin} of the data, but should at "
                f"{position}: it {fault}. {DAMAGED}"
            )
        position = end
    if position != size:
        raise CheckpointError(
            f"its tensors take {position} bytes, but {size} bytes of data are there. {DAMAGED}"
        )
