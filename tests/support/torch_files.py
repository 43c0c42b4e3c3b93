"""Writing archives of `torch.save` without torch, well formed or not."""

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np


STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
UNTYPED = ("uint16", "uint32", "uint64")
DTYPES = {name: np.dtype(name) for name in (*STORAGES, *UNTYPED) if name != "bfloat16"}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)

START, STOP = b"\x80\x02", b"."


# Pickle instructions. Each function returns the bytes that push one value.


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def function(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def sequence(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def integers(values: Iterable[int]) -> bytes:
    return sequence(*map(integer, values))


def call(callee: bytes, *arguments: bytes) -> bytes:
    return callee + sequence(*arguments) + b"R"


def ordered_dict() -> bytes:
    return function("collections", "OrderedDict") + b")R"


def storage(kind: str, key: str, count: int, place: str = "cpu") -> bytes:
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    identifier = (text("storage"), function(module, kind), text(key), text(place), integer(count))
    return sequence(*identifier) + b"Q"


def tensor(
    source: bytes,
    size: Iterable[int],
    stride: Iterable[int],
    *,
    offset: int = 0,
    dtype: str | None = None,
) -> bytes:
    kind = () if dtype is None else (function("torch", dtype),)
    return call(
        function("torch._utils", "_rebuild_tensor_v2" if dtype is None else "_rebuild_tensor_v3"),
        source,
        integer(offset),
        integers(size),
        integers(stride),
        b"\x89",
        ordered_dict(),
        *kind,
    )


def parameter(data: bytes) -> bytes:
    callee = function("torch._utils", "_rebuild_parameter")
    return call(callee, data, b"\x88", ordered_dict())


def state_dict(items: Mapping[str, bytes], *, ordered: bool = True) -> bytes:
    pairs = b"".join(text(name) + value for name, value in items.items())
    return (ordered_dict() if ordered else b"}") + b"(" + pairs + b"u"


def program(value: bytes) -> bytes:
    return START + value + STOP


# Archives.


@dataclass(frozen=True)
class Entry:
    """A zip entry. Fields that are `None` are computed from `data`; others are written as given."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x808
    crc: int | None = None
    size: int | None = None
    offset: int | None = None
    local_name: str | None = None


def zip_bytes(entries: Iterable[Entry], *, zip64: bool = False, alignment: int = 64) -> bytes:
    """Returns an archive in torch's form: padding, sizes in the directory, data descriptors."""
    body, directory, count = b"", b"", 0
    for entry in entries:
        name, count = entry.name.encode(), count + 1
        local_name = name if entry.local_name is None else entry.local_name.encode()
        offset = len(body) if entry.offset is None else entry.offset
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        padding = -(len(body) + 34 + len(local_name)) % alignment
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        local = (b"PK\3\4", 0, entry.flags, entry.method, 0, 0, 0, 0, 0, len(name), len(extra))
        body += struct.pack("<4s5H3L2H", *local) + local_name + extra + entry.data
        body += b"PK\7\x08" + struct.pack("<3L", crc, size & 0xFFFFFFFF, size & 0xFFFFFFFF)
        shown, wide = (size, size, offset), b""
        if zip64 or max(shown) >= 2**32 - 1:
            wide = struct.pack("<2H3Q", 1, 24, *shown)
            shown = (0xFFFFFFFF,) * 3
        fields = (0, 0, entry.flags, entry.method, 0, 0, crc, *shown[:2], len(name), len(wide))
        directory += b"PK\1\2" + struct.pack("<6H3L5H2L", *fields, 0, 0, 0, 0, shown[2])
        directory += name + wide
    start, length, end = len(body), len(directory), b""
    if zip64:
        end = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 0, 45, 0, 0, count, count, length, start)
        end += b"PK\6\7" + struct.pack("<LQL", 0, start + length, 1)
    end += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, length, start, 0)
    return body + directory + end


def archive_entries(
    pickle: bytes,
    storages: Mapping[str, bytes],
    *,
    byteorder: str = "little",
    crc: int | None = None,
) -> list[Entry]:
    return [
        Entry("archive/data.pkl", pickle, crc=crc),
        Entry("archive/byteorder", byteorder.encode()),
        *(Entry(f"archive/data/{key}", data) for key, data in storages.items()),
        Entry("archive/version", b"3\n"),
    ]


def torch_bytes(arrays: Mapping[str, np.ndarray], *, byteorder: str = "little") -> bytes:
    """Returns the file that `torch.save` would write for a state dict of these arrays."""
    items: dict[str, bytes] = {}
    storages: dict[str, bytes] = {}
    for number, (name, array) in enumerate(arrays.items()):
        kind, key = array.dtype.name, str(number)
        bits = np.array(array, order="C").view(f"u{array.itemsize}")
        order = ">" if byteorder == "big" else "<"
        storages[key] = bits.astype(f"{order}u{array.itemsize}").tobytes()
        stride = [step // array.itemsize for step in np.empty(array.shape, array.dtype).strides]
        if kind in STORAGES:
            source = storage(STORAGES[kind], key, array.size)
            items[name] = tensor(source, array.shape, stride)
        else:
            source = storage("UntypedStorage", key, array.nbytes)
            items[name] = tensor(source, array.shape, stride, dtype=kind)
    pickle = program(state_dict(items))
    return zip_bytes(archive_entries(pickle, storages, byteorder=byteorder))
