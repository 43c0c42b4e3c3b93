"""Mutations of any content, as bytes."""

import struct
from random import Random


NUMBERS = (0, 1, 2**15, 2**31 - 3, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, 3e38, 1e-45)

# What failed downloads and other programs leave behind.
OTHER_FILES = (
    b"",
    b"\0",
    bytes(4096),
    b"\n" * 100,
    b"\xef\xbb\xbf{}",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<!DOCTYPE html><html></html>",
    b"PK\3\4",
    b"PK\5\6" + bytes(18),
    b"\x80\x02}q\0.",
    b"\x93NUMPY\x01\x00v\x00",
    b"\xfd7zXZ\0",
    b"17",
    b"null",
    b"{}",
    b"[]",
    b'{"a": ' * 3000,
    b"[" * 100_000,
    b"9" * 5000,
)


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Returns a content with one mutation that knows nothing of its structure."""
    return random.choice(_MUTATIONS)(content, random)


def _flip(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _set(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    if data:
        data[random.randrange(len(data))] = random.choice(b'\0\xff\x80"{}[],:-0e\\')
    return bytes(data)


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randint(0, len(content))]


def _extend(content: bytes, random: Random) -> bytes:
    more = random.choice((bytes(8), random.randbytes(9), content, b"\n", b"}", bytes(5000)))
    return more + content if random.random() < 0.2 else content + more


def _delete(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:begin] + content[end:]


def _duplicate(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:end] + content[begin:]


def _zero(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:begin] + bytes(end - begin) + content[end:]


def _move(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    rest = content[:begin] + content[end:]
    at = random.randint(0, len(rest))
    return rest[:at] + content[begin:end] + rest[at:]


def _number(content: bytes, random: Random) -> bytes:
    """Overwrites an aligned place by an integer or a float of note."""
    if random.random() < 0.5:
        size = random.choice((1, 2, 4, 8))
        value = random.choice(NUMBERS) % 256**size
        piece = value.to_bytes(size, random.choice(("little", "little", "big")))
    else:
        piece = struct.pack(random.choice(("<f", "<d", "<e")), _as_float16(random))
    at = random.randrange(len(content) // len(piece) + 1) * len(piece)
    return content[:at] + piece + content[at + len(piece) :]


def _as_float16(random: Random) -> float:
    value = random.choice(FLOATS)
    return value if value != value or abs(value) in (0, float("inf")) else 65504.0


def _replace(content: bytes, random: Random) -> bytes:
    return random.choice(OTHER_FILES)


def _slice(content: bytes, random: Random) -> tuple[int, int]:
    begin = random.randint(0, len(content))
    return begin, min(len(content), begin + random.choice((1, 2, 4, 8, 64, 1000)))


_MUTATIONS = (
    _flip,
    _set,
    _truncate,
    _extend,
    _delete,
    _duplicate,
    _zero,
    _move,
    _number,
    _replace,
)
