"""Reading the zip archives that `torch.save` writes.

The standard library's `zipfile` is lenient and also opens malformed archives. torch writes archives
in one plain form only, so anything else is damage or an attack, and is refused here.
"""

import mmap
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from .._tensors import DAMAGED, CheckpointError, quote


_MAX_ENTRIES = 2**16
_MAX_EXTRA = 1024  # torch writes at most 28 bytes, and the time of `_widen` is quadratic.
_MAX_PICKLE = 2**22
ADVICE = (
    "In torch, if you trust the file, load it and save its tensors only: "
    "`torch.save(model.state_dict(), path)`."
)
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_ZIP64 = 0xFFFFFFFF  # A 32-bit field whose value is in the zip64 extra field.


@dataclass(frozen=True, slots=True)
class Entry:
    """The position, size and checksum of the data of a zip entry."""

    start: int
    size: int
    crc: int


def read_zip(buffer: mmap.mmap) -> dict[str, Entry]:
    """Returns the entries of an archive by name.

    **Raises:** `CheckpointError` for a file that is not a zip archive, and unless all entries are
    uncompressed, within the file, and without overlaps.
    """
    _check_magic(buffer)
    directory, end, count = _find_directory(buffer)
    position = directory
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for _ in range(count):
        if position + _CENTRAL.size > end:
            raise CheckpointError(f"its zip directory ends early. {DAMAGED}")
        signature, *fields = _CENTRAL.unpack_from(buffer, position)
        _, _, flags, method, _, _, crc, packed, size = fields[:9]
        name_length, extra_length, comment_length, _, _, _, offset = fields[9:]
        extra_start = position + _CENTRAL.size + name_length
        raw_name = buffer[position + _CENTRAL.size : extra_start]
        extra = buffer[extra_start : extra_start + extra_length]
        position = extra_start + extra_length + comment_length
        if signature != b"PK\1\2" or position > end or extra_length > _MAX_EXTRA:
            raise CheckpointError(f"its zip directory is malformed. {DAMAGED}")
        size, packed, offset = _widen([size, packed, offset], extra)
        name = _check_name(raw_name)
        if name in entries:
            raise CheckpointError(f"its zip entry {quote(name)} occurs twice. {DAMAGED}")
        if method != 0 or packed != size or flags & 1:
            raise CheckpointError(
                f"its zip entry {quote(name)} is compressed or encrypted, unlike those of "
                "`torch.save`: unpack the archive and pack it without compression (`zip -0`)."
            )
        start = _data_start(buffer, offset, raw_name, directory)
        entries[name] = Entry(start, size, crc)
        spans.append((offset, start + size))
    if position != end:
        raise CheckpointError(f"its zip directory is longer than its entries. {DAMAGED}")
    previous = 0
    for begin, finish in [*sorted(spans), (directory, directory)]:
        if begin < previous:
            raise CheckpointError(
                f"its zip entries overlap, or run into the directory, at byte {begin}. {DAMAGED}"
            )
        previous = finish
    return entries


def _check_magic(buffer: mmap.mmap) -> None:
    head = buffer[:16]
    if head.startswith(b"PK\3\4"):
        return
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19") or (
        buffer[257:262] == b"ustar"
    ):
        raise CheckpointError(
            "the file is in the legacy format of torch before 1.6, which is not supported. "
            "In torch: `torch.save(torch.load(path, weights_only=True), path)`."
        )
    if head[:1] == b"\x80":
        raise CheckpointError(
            "the file is a bare pickle, which could run any code, not an archive of `torch.save`. "
            f"{ADVICE}"
        )
    if head[8:9] == b"{":
        raise CheckpointError(
            "the file looks like safetensors: rename it to end in `.safetensors`."
        )
    raise CheckpointError(
        f"the file begins with {head!a}: it is neither an archive of `torch.save` nor any "
        "other known format. Check that it is the right file, and download it again."
    )


def _find_directory(buffer: mmap.mmap) -> tuple[int, int, int]:
    """Returns the start and the end of the central directory, and its number of entries."""
    end = len(buffer) - _END.size
    if end < 0 or buffer[end : end + 4] != b"PK\5\6":
        raise CheckpointError(f"it does not end as a zip archive does. {DAMAGED}")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(buffer, end)
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and buffer[locator : locator + 4] == b"PK\6\7":
        end = locator - _END64.size
        if end < 0 or buffer[end : end + 4] != b"PK\6\6":
            raise CheckpointError(f"its zip64 end record is missing. {DAMAGED}")
        _, _, _, _, disk, first_disk, here, count, size, start = _END64.unpack_from(buffer, end)
    if disk or first_disk or comment or here != count or start + size != end:
        raise CheckpointError(f"its zip end record does not fit the file. {DAMAGED}")
    if count > _MAX_ENTRIES:
        raise CheckpointError(
            f"it has {count} zip entries, but at most {_MAX_ENTRIES} are read: "
            "split the checkpoint into several files."
        )
    return start, end, count


def _widen(values: list[int], extra: bytes) -> list[int]:
    """Replaces 32-bit values that refer to the zip64 extra field by the values there."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8])]
        extra = extra[4 + length :]
    missing = values.count(_IN_ZIP64)
    if missing > len(wide):
        raise CheckpointError(f"its zip64 sizes are missing. {DAMAGED}")
    return [wide.pop(0) if value == _IN_ZIP64 else value for value in values]


def _check_name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"it has a zip entry whose name is not UTF-8. {DAMAGED}") from None
    parts = name.split("/")
    # Checked here because torch compresses code, and the check for compression would hide this.
    if parts[1:2] == ["code"] or parts[1:] == ["constants.pkl"]:
        raise CheckpointError(
            "the file is a TorchScript archive, a program rather than a state dict. In torch: "
            "`torch.save(torch.jit.load(path).state_dict(), new_path)`."
        )
    if "\\" in name or "\0" in name or {"", ".", ".."} & set(parts):
        raise CheckpointError(
            f"its zip entry {quote(name)} has a path that `torch.save` does not write: do not "
            "trust this file."
        )
    return name


def _data_start(buffer: mmap.mmap, offset: int, name: bytes, directory: int) -> int:
    """Returns the start of the data of an entry, which only its local header contains."""
    if offset + _LOCAL.size <= directory:
        signature, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(buffer, offset)
        name_start = offset + _LOCAL.size
        name_end = name_start + name_length
        if signature == b"PK\3\4" and method == 0 and buffer[name_start:name_end] == name:
            return name_end + extra_length
    raise CheckpointError(
        f"its zip entry {quote(name.decode())} has no matching header at byte {offset}. {DAMAGED}"
    )


def find_root(entries: Mapping[str, Entry]) -> str:
    """Returns the name of the folder that holds all entries.

    **Raises:** `CheckpointError` if there is no such folder, or it has no `data.pkl`.
    """
    roots = {name.split("/")[0] for name in entries}
    root = next(iter(roots), "")
    if len(roots) != 1 or f"{root}/data.pkl" not in entries:
        raise CheckpointError(
            "the file is a zip archive, but not one of `torch.save`: it should hold one folder "
            "with a `data.pkl`. Check that it is the right file."
        )
    return root


def read_pickle(buffer: mmap.mmap, entry: Entry) -> bytes:
    """Returns the pickle that describes the tensors.

    **Raises:** `CheckpointError` if the pickle is too large, or does not match its checksum.
    """
    if entry.size > _MAX_PICKLE:
        raise CheckpointError(
            f"its data.pkl has {entry.size} bytes, but at most {_MAX_PICKLE} are read: a state "
            f"dict takes far less, so the file holds more than tensors. {ADVICE}"
        )
    pickle = buffer[entry.start : entry.start + entry.size]
    # torch writes 0 if checksums are switched off (`set_crc32_options(False)`).
    if entry.crc not in (0, zlib.crc32(pickle)):
        raise CheckpointError(f"its data.pkl does not match its checksum. {DAMAGED}")
    return pickle


def read_byte_order(buffer: mmap.mmap, entry: Entry | None) -> str:
    """Returns the byte order of the storages, `"little"` or `"big"`.

    **Raises:** `CheckpointError` for any other value.
    """
    if entry is None:
        return "little"  # Written by torch before 2.1.
    order = buffer[entry.start : entry.start + min(entry.size, 16)]
    if order not in (b"little", b"big"):
        raise CheckpointError(f"its byteorder is {order!a}, not 'little' or 'big'. {DAMAGED}")
    return order.decode()
