"""Mutations of files of tensors and tokens that keep their framing right."""

import io
import json
import lzma
import pickletools
import struct
import warnings
import zipfile
import zlib
from dataclasses import replace
from random import Random

from tests.support import torch_files

from ._bytes import NUMBERS, mutate_bytes
from ._json import Pairs, dump, mutate_tree


def mutate_safetensors(content: bytes, random: Random) -> bytes:
    """Returns a safetensors file with a change of the header or of a value.

    The length of the header is right.
    """
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if random.random() < 0.35:
        data = mutate_bytes(data, random) if random.random() < 0.4 else _values(data, random)
    else:
        try:
            tree = json.loads(header, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
            for _ in range(random.choice((1, 1, 2))):
                tree = mutate_tree(tree, random)
            header = dump(tree).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            header = mutate_bytes(header, random)
    return len(header).to_bytes(8, "little") + header + data


def _values(data: bytes, random: Random) -> bytes:
    """Overwrites aligned numbers of the data, which may be integers or floats."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4)) if len(data) >= 8 else 0):
        at = random.randrange(len(data) // 4) * 4
        small = random.randrange(-2, 70).to_bytes(4, "little", signed=True)
        note = (random.choice(NUMBERS) % 2**32).to_bytes(4, "little")
        changed[at : at + 4] = random.choice((small, note, b"\0\0\xc0\x7f", b"\0\0\x80\xff"))
    return bytes(changed)


# Instructions of pickles, whole or not.
_PIECES = (
    b"N",
    b"0",
    b"2",
    b"(",
    b")",
    b"}",
    b"]",
    b"t",
    b"u",
    b"s",
    b"R",
    b"Q",
    b"b",
    b".",
    b"q\0",
    b"h\0",
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\x7f",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 8,
    b"\x8a\xff" + b"\xff" * 255,
    b"\x8b\xff\xff\xff\x7f",
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"X\xff\xff\xff\x7fx",
    b"X\x01\0\0\0\xff",
    b"U\x03abc",
    b"I10\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch\nload\n",
    b"cos\nsystem\nX\x04\0\0\0truetR",
    b"\x93",
    b"\x81",
    b"(" * 100,
    b"N" * 20_000,
    b"]q\0h\0a",
    b"\x80\x05",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"Pabc\n",
    b"\x82\x01",
    b"\x97",
    b"itest\nx\n",
)

_NAMES = ("", "archive/data/9", "../x", "/etc/passwd", "archive/code/x", "a\0b", "x" * 300)

_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
)


def mutate_torch(content: bytes, random: Random) -> bytes:
    """Returns an archive of `torch.save` with a change of its pickle or of an entry.

    The rest of the archive, such as its checksums, fits the change, unless it is the change.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [torch_files.Entry(name, archive.read(name)) for name in archive.namelist()]
    except _UNREADABLE:  # because of an earlier mutation
        return content
    if not entries:
        return content
    at = next((i for i, entry in enumerate(entries) if entry.name.endswith("data.pkl")), 0)
    if random.random() < 0.6:
        entries[at] = replace(entries[at], data=_pickle(entries[at].data, random))
    else:
        at = random.randrange(len(entries))
        entry = entries[at]
        action = random.choice(("data", "name", "field", "delete", "duplicate", "local"))
        if action == "data":
            entries[at] = replace(entry, data=mutate_bytes(entry.data, random))
        elif action == "name":
            names = (
                "",
                "archive/data/9",
                "../x",
                "/etc/passwd",
                "archive/code/x",
                "a\0b",
                "x" * 300,
            )
            entries[at] = replace(entry, name=random.choice((*names, entries[0].name)))
        elif action == "field":
            field = random.choice(("method", "flags", "crc", "size", "offset"))
            value = random.choice((*NUMBERS[:-3], 8, 14))
            value %= 2**16 if field in ("method", "flags") else 2**32
            entries[at] = replace(entry, **{field: value})
        elif action == "delete":
            del entries[at]
        elif action == "duplicate":
            entries.insert(random.randint(0, len(entries)), entry)
        else:
            entries[at] = replace(entry, local_name=entry.name + "x")
    return torch_files.zip_bytes(entries, zip64=random.random() < 0.2)


def _pickle(program: bytes, random: Random) -> bytes:
    """Returns a pickle with an instruction removed, repeated, moved, replaced or added."""
    try:
        # The module warns of invalid escapes in the text of a program that is already damaged.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            starts = [position or 0 for _, _, position in pickletools.genops(program)]
    except ValueError:
        return mutate_bytes(program, random)
    spans = [*zip(starts, [*starts[1:], len(program)], strict=True)]
    begin, end = random.choice(spans)
    other = random.choice(starts)
    action = random.choice(("remove", "repeat", "copy", "replace", "insert", "insert", "bytes"))
    if action == "remove":
        return program[:begin] + program[end:]
    if action == "repeat":
        return program[:end] + program[begin:end] * random.choice((1, 100)) + program[end:]
    if action == "copy":
        return program[:other] + program[begin:end] + program[other:]
    if action == "replace":
        return program[:begin] + random.choice(_PIECES) + program[end:]
    if action == "insert":
        return program[:begin] + random.choice(_PIECES) + program[begin:]
    return program[:begin] + mutate_bytes(program[begin:end], random) + program[end:]


_NPY_HEADERS = (
    "{}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (5,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (10**30,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': ()}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': 5}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (5L,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<u2,<u2', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<u99', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': None, 'fortran_order': False, 'shape': (2,)}",
    "{'descr': 'a5', 'fortran_order': 1, 'shape': (2,)}",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': " + "(" * 5000,
    "[" * 9000,
    "__import__('os').getpid()",
    "{'a': 'b'",
    "'''",
    "\\",
    "1e999j",
)


def mutate_npy(content: bytes, random: Random) -> bytes:
    """Returns a `.npy` file with another header of the right length, or with other tokens."""
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length], content[10 + length :]
    action = random.choice(("header", "bytes", "version", "data"))
    version = b"\1\0"
    if action == "header":
        header = random.choice(_NPY_HEADERS).ljust(64).encode()
    elif action == "bytes":
        header = mutate_bytes(header, random)[:60_000]
    elif action == "version":
        version = random.choice((b"\2\0", b"\3\0", b"\4\0", b"\0\0", b"\xff\xff"))
    else:
        data = mutate_bytes(data, random)
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def mutate_xz(content: bytes, random: Random) -> bytes:
    """Returns an `.xz` file of another content, of several streams, or of another kind."""
    try:
        unpacked = lzma.decompress(content)
    except (lzma.LZMAError, EOFError):
        return mutate_bytes(content, random)
    action = random.choice(("content", "streams", "padding", "alone", "check", "bytes"))
    if action == "content":
        return lzma.compress(mutate_bytes(unpacked, random))
    if action == "streams":
        return content + mutate_bytes(content, random)
    if action == "padding":
        return content + bytes(random.randrange(9))
    if action == "alone":
        return mutate_bytes(lzma.compress(unpacked, format=lzma.FORMAT_ALONE), random)
    if action == "check":
        return lzma.compress(unpacked, check=lzma.CHECK_NONE)[: -random.randrange(1, 30)]
    return mutate_bytes(content, random)


def mutate_lines(content: bytes, random: Random) -> bytes:
    """Returns JSON lines with one changed, removed, repeated, moved or replaced."""
    lines = content.splitlines(keepends=True) or [b"\n"]
    at = random.randrange(len(lines))
    action = random.choice(("json", "json", "remove", "repeat", "swap", "replace", "newline"))
    if action == "json":
        lines[at] = _mutate_line(lines[at], random)
    elif action == "remove":
        del lines[at]
    elif action == "repeat":
        lines.insert(random.randint(0, len(lines)), lines[at])
    elif action == "swap":
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif action == "replace":
        odd = (b"17\n", b"{}\n", b"[" * 3000 + b"\n", b"\n", b"\0\n", b"null\n", b"\xff\n")
        lines[at] = random.choice(odd)
    else:
        lines[at] = lines[at].rstrip(b"\n") + random.choice((b"", b"\r\n", b"\r", b"\n\n"))
    return b"".join(lines)


def _mutate_line(line: bytes, random: Random) -> bytes:
    try:
        tree = json.loads(line, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))
        return dump(mutate_tree(tree, random)).encode("utf-8", "surrogatepass") + b"\n"
    except (ValueError, RecursionError):
        return line
