"""Reading the files of `torch.save` without torch and without running code from them.

Such a file is a zip archive of one pickle, `data.pkl`, which describes the tensors, and of their
storages, `data/0` and so on. The pickle is run by `PickleMachine`, which never resolves the
functions that the pickle names.
"""

import functools
import math
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from .._files import map_file
from .._tensors import (
    DAMAGED,
    CheckpointError,
    StoredTensor,
    check_naturals,
    check_shape,
    quote,
    read_array,
)
from ._archive import ADVICE, Entry, find_root, read_byte_order, read_pickle, read_zip
from ._pickle import PickledDict, PickledGlobal, PickleMachine


_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    # Newer dtypes have no storage class. Their storage is untyped, and the tensor names the dtype.
    "torch.uint16": np.dtype(np.uint16),
    "torch.uint32": np.dtype(np.uint32),
    "torch.uint64": np.dtype(np.uint64),
}
_UNTYPED = "torch.storage.UntypedStorage"
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETERS = {
    "torch._utils._rebuild_parameter": 3,
    # With attributes of the parameter, such as Mamba's `_no_weight_decay`.
    "torch._utils._rebuild_parameter_with_state": 4,
}
_SUPPORTED = ", ".join(str(dtype) for dtype in _DTYPES.values())
_GLOBALS = {_ORDERED_DICT, _TENSOR, _TENSOR_WITH_DTYPE, _UNTYPED, *_PARAMETERS, *_DTYPES}
_STATE_DICT_NAMES = ("state_dict", "model_state_dict", "model", "module", "model_state", "ema")


@dataclass(frozen=True, slots=True)
class _Storage:
    """The position of a storage in the file, and its dtype unless it is untyped."""

    start: int
    size: int
    dtype: np.dtype | None


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The position of a tensor in the file, and its description; `strides` are in bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def open_torch(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Opens a state dict saved by `torch.save` without reading the values of its tensors.

    The file is treated as hostile: its whole description is checked before any tensor is read, and
    no code from it is run. Checksums of tensor values are not verified.

    **Arguments:**

    - `path`: the file, conventionally `pytorch_model.bin`.

    **Returns:**

    The tensors by name, in the order of the file. Tensors that share a storage in the file ("tied"
    tensors) share memory.

    **Raises:**

    `CheckpointError` unless the content is a flat dict from names to dense tensors of a float,
    bfloat16, integer or bool dtype.
    """
    try:
        buffer = map_file(path)
        entries = read_zip(buffer)
        root = find_root(entries)
        pickle = read_pickle(buffer, entries[f"{root}/data.pkl"])
        folder = f"{root}/data/"
        storages = {n.removeprefix(folder): e for n, e in entries.items() if n.startswith(folder)}
        machine = _StateDictMachine(pickle, storages=storages)
        tensors = _state_dict(machine.run())
        swap = read_byte_order(buffer, entries.get(f"{root}/byteorder")) != sys.byteorder
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    return {
        name: StoredTensor(
            name,
            tensor.shape,
            tensor.dtype,
            functools.partial(
                read_array,
                buffer,
                tensor.start,
                tensor.shape,
                tensor.dtype,
                strides=tensor.strides,
                swap=swap,
            ),
        )
        for name, tensor in tensors.items()
    }


@dataclass
class _StateDictMachine(PickleMachine):
    """A pickle machine that interprets the names in the pickle of a state dict.

    - `storages`: the entries of the storages, by their keys in the pickle.
    """

    storages: Mapping[str, Entry] = field(kw_only=True)

    def find(self, name: str) -> PickledGlobal:
        if name in _GLOBALS:
            return PickledGlobal(name)
        shown = quote(name)[1:-1]
        if name.startswith(("torch.float8", "torch.float4")):
            raise CheckpointError(
                f"it holds tensors of the format `{shown}` of 8 bits or less (float8), which is "
                "not supported: use a checkpoint that is not quantised, or convert it to bfloat16."
            )
        if name.startswith("torch.") and name.endswith("Storage"):
            raise CheckpointError(
                f"it holds tensors of `{shown}`, but only {_SUPPORTED} are read: convert them."
            )
        if not self.stack and not self.outer:
            raise CheckpointError(
                f"it is the pickle of a whole object, made by `{shown}`, not a state dict. Such a "
                f"file can be read only by running code that it names. {ADVICE}"
            )
        raise CheckpointError(
            f"it uses `{shown}`{self._place()}, but only plain tensors are supported, because "
            f"anything else can run code. {self._hint()}"
        )

    def _place(self) -> str:
        """Returns `" for "` and the name of the entry whose value is being read, or an empty text.

        The name is the last key of the outermost dict.
        """
        levels = [*self.outer, self.stack]
        items = levels[0][1:] or (levels[1] if len(levels) > 1 else [])
        name = items[(len(items) - 1) // 2 * 2] if items else None
        return f" for {quote(name)}" if isinstance(name, str) else ""

    def _hint(self) -> str:
        """Returns a remedy, which names the state dict inside a trainer's checkpoint, if any."""
        for name in _STATE_DICT_NAMES:
            if struct.pack("<cI", b"X", len(name)) + name.encode() in self.pickle:
                return _extraction_advice(name)
        return ADVICE

    def load(self, identifier: object) -> _Storage:
        match identifier:
            case ("storage", PickledGlobal(kind), str(key), str(), int(count)):
                pass
            case _:
                raise self.malformed("it refers to something other than a storage")
        dtype = _DTYPES.get(kind)
        if kind != _UNTYPED and (dtype is None or not kind.endswith("Storage")):
            raise self.malformed(f"it uses {kind} as a storage")
        entry = self.storages.get(key)
        if entry is None:
            raise CheckpointError(f"its storage {quote(key)} is missing. {DAMAGED}")
        itemsize = 1 if dtype is None else dtype.itemsize
        if type(count) is not int or count * itemsize != entry.size:
            raise CheckpointError(
                f"its storage {quote(key)} has {entry.size} bytes, but should have {count} "
                f"elements of {itemsize} bytes. {DAMAGED}"
            )
        return _Storage(entry.start, entry.size, dtype)

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, PickledGlobal) or not isinstance(arguments, tuple):
            raise self.malformed("it calls a value that is not a function")
        name = function.name
        if name == _ORDERED_DICT and arguments == ():
            return PickledDict(ordered=True)
        if name in (_TENSOR, _TENSOR_WITH_DTYPE):
            return self._tensor(arguments, has_dtype=name == _TENSOR_WITH_DTYPE)
        if (
            len(arguments) == _PARAMETERS.get(name)
            and isinstance(arguments[0], _Tensor)
            and isinstance(arguments[1], bool)
        ):
            return arguments[0]
        raise self.malformed(f"it calls `{name}` with arguments that torch does not write")

    def _tensor(self, arguments: tuple[object, ...], *, has_dtype: bool) -> _Tensor:
        dtype = None
        match arguments[: 7 if has_dtype else 6], has_dtype:
            case (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), _), False:
                dtype = storage.dtype
            case (
                (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), _, kind),
                True,
            ):
                if isinstance(kind, PickledGlobal) and not kind.name.endswith("Storage"):
                    dtype = _DTYPES.get(kind.name)
            case _:
                raise self.malformed("it makes a tensor with arguments that torch does not write")
        if dtype is None:
            raise self.malformed("it makes a tensor without a known dtype")
        match arguments[7 if has_dtype else 6 :]:
            case () | (None,) | (PickledDict(pairs=[]),):
                pass
            case _:
                raise CheckpointError(
                    f"it holds a tensor{self._place()} that is conjugated or negated by a flag "
                    "only. In torch: `tensor.resolve_conj().resolve_neg()` before saving."
                )
        try:
            return _view(storage, dtype, offset, size, stride)
        except CheckpointError as error:
            raise CheckpointError(
                f"it holds a tensor{self._place()} that cannot be read: {error}"
            ) from None


def _view(
    storage: _Storage,
    dtype: np.dtype,
    offset: int,
    size: tuple[object, ...],
    stride: tuple[object, ...],
) -> _Tensor:
    """Returns the tensor with a given offset, shape and strides (in elements) in a storage.

    **Raises:** `CheckpointError` if the tensor is not within the storage.
    """
    shape = check_shape(size, dtype.itemsize)
    (begin,) = check_naturals((offset,), "offset")
    steps = check_naturals(stride, "strides")
    if len(steps) != len(shape):
        raise CheckpointError(
            f"the shape {quote(shape)} and the strides {quote(steps)} differ in length. {DAMAGED}"
        )
    count, available = math.prod(shape), storage.size // dtype.itemsize
    last = begin + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if count and last >= available:
        raise CheckpointError(
            f"the shape {quote(shape)} with strides {quote(steps)} from offset {begin} runs past "
            f"its storage of {available} elements. {DAMAGED}"
        )
    # With a stride of 0, a single element can become a tensor of any size.
    if count > available:
        raise CheckpointError(
            f"the shape {quote(shape)} has {count} elements, but its storage has {available}. Call "
            "`tensor.contiguous()` in torch on expanded tensors before saving."
        )
    # The stride of a dimension of size 1 is not used, and may be too large for NumPy.
    strides = tuple(
        step * dtype.itemsize if n > 1 else 0 for n, step in zip(shape, steps, strict=True)
    )
    return _Tensor(storage.start + begin * dtype.itemsize, shape, strides, dtype)


def _state_dict(result: object) -> dict[str, _Tensor]:
    """Returns the value of the pickle as tensors by name.

    **Raises:** `CheckpointError` if the value is not a flat dict of tensors.
    """
    if not isinstance(result, PickledDict):
        raise CheckpointError(f"it holds {_kind(result)}, not a state dict. {ADVICE}")
    tensors: dict[str, _Tensor] = {}
    for name, value in result.pairs:
        if not isinstance(name, str):
            raise CheckpointError(f"its dict has {_kind(name)} for a name. {ADVICE}")
        if name in tensors:
            raise CheckpointError(f"it names {quote(name)} twice. {DAMAGED}")
        if not isinstance(value, _Tensor):
            # Checked once for each object, because a pickle can refer to one large dict very often.
            distinct = {id(v): (n, v) for n, v in result.pairs}.values()
            nested = next(
                (n for n, v in distinct if isinstance(n, str) and _is_state_dict(v)), None
            )
            raise CheckpointError(
                f"it holds {_kind(value)} under {quote(name)}, where a state dict has a tensor. "
                + (ADVICE if nested is None else _extraction_advice(nested))
            )
        tensors[name] = value
    return tensors


def _is_state_dict(value: object) -> bool:
    """Returns whether a value is a flat dict of tensors that is not empty."""
    return (
        isinstance(value, PickledDict)
        and bool(value.pairs)
        and all(isinstance(n, str) and isinstance(v, _Tensor) for n, v in value.pairs)
    )


def _extraction_advice(name: str) -> str:
    """Returns the advice to extract the state dict from a trainer's checkpoint."""
    return (
        f"It seems to be a trainer's checkpoint with the state dict under {quote(name)}. In "
        f"torch, if you trust the file: `torch.save(torch.load(path)[{quote(name)}], new_path)`."
    )


def _kind(value: object) -> str:
    """Describes the type of a value for a message."""
    match value:
        case None:
            return "None"
        case _Tensor():
            return "a tensor"
        case PickledDict():
            return "a dict"
        case PickledGlobal() | _Storage():
            return "a class or a storage"
        case _:
            return f"a value of type {type(value).__name__}"
