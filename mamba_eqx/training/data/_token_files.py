"""Token files: reading them, and writing them from text."""

import io
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Integer

from ..._atomic import atomic_file
from ...formats import CheckpointError, open_regular, quote
from ...text import Tokenizer


# The number of tokens checked at a time, so that memory does not grow with the size of a mapped
# file.
_PIECE = 2**22

# The bounds of unpacking. Text packs to a third or a tenth of its size, zeros to a 7000th.
_MAX_SMALL = 2**28
_MAX_RATIO = 256
_MAX_DICTIONARY = 2**31


def read_tokens(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.uint8,
    vocab_size: int | None = None,
) -> Integer[np.ndarray, " token"]:
    """Opens a token file.

    The file is mapped into memory, and only the used parts are read. A compressed file (`.xz`) is
    unpacked into memory as a whole. At most 256 times its own size is unpacked (and 256 MiB of
    small files), because a damaged or malicious file can unpack to any size.

    **Arguments:**

    - `path`: a `.npy` file, as [`mamba_eqx.training.write_tokens`][] writes it, or any other file,
        which is read as a raw array.
    - `dtype`: the integer dtype of a raw array. By default the tokens are the bytes of the file. A
        `.npy` file contains its own dtype.
    - `vocab_size`: if given, every token must be below it.

    **Returns:**

    The tokens, as a read-only array.

    **Raises:** `ValueError` if the file is empty or damaged, if it is not a regular file, if a raw
    array is not a whole number of tokens, if the dtype is not an integer dtype, or if a token is
    not within `0..vocab_size - 1`; `OSError` if the file cannot be read.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except CheckpointError as error:
        raise ValueError(f"{path}: {error}") from None
    if path.suffix == ".npy" and size > 0:
        tokens = _map_npy(path)
    else:
        kind = np.dtype(dtype)
        if kind.kind not in "ui":
            raise ValueError(f"`dtype` must be an integer dtype, but got {kind}.")
        if path.suffix == ".xz":
            data = np.frombuffer(_unpack(path, path.read_bytes()), np.uint8)
        else:
            data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        if len(data) % kind.itemsize:
            raise ValueError(
                f"{path} has {len(data)} bytes, which is not a whole number of {kind} tokens. Give "
                "the `dtype` of its tokens, or copy the file again if it is incomplete."
            )
        tokens = data.view(kind)
    if len(tokens) == 0:
        raise ValueError(f"{path} is empty. Give a file with tokens to train on.")
    # Indexing a `memmap` is slower than indexing an array. The array still uses the mapped memory.
    tokens = np.asarray(tokens)
    possible = int(np.iinfo(tokens.dtype.name).max)
    highest = possible if vocab_size is None else vocab_size - 1
    if tokens.dtype.kind == "i" or highest < possible:
        _check_vocabulary(path, tokens, highest)
    return tokens


def _map_npy(path: Path) -> np.ndarray:
    """Maps a `.npy` file of tokens into memory."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    # NumPy evaluates the header as Python, which raises errors of a dozen classes.
    except Exception as error:
        raise ValueError(
            f"{path} is not a valid .npy file ({quote(str(error))}). Create it with "
            "`write_tokens`, or copy it again if it is damaged."
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(
            f"{path} must contain a one-dimensional array of integers, but contains "
            f"{tokens.dtype} of shape {tokens.shape}. Create it with `write_tokens`."
        )
    return tokens


def _unpack(path: Path, packed: bytes) -> bytes:
    """Returns the content of an `.xz` file of one or several streams.

    Unlike `lzma.decompress`, which ignores everything behind a damaged stream, this function
    accepts nothing but streams, and the zeros that may pad them.
    """
    limit = max(_MAX_SMALL, _MAX_RATIO * len(packed))
    pieces: list[bytes] = []
    while packed := packed.lstrip(b"\0"):
        stream = lzma.LZMADecompressor(memlimit=_MAX_DICTIONARY)
        try:
            pieces.append(stream.decompress(packed, limit + 1))
        except (lzma.LZMAError, EOFError, MemoryError) as error:
            raise ValueError(
                f"{path} is not a valid .xz file ({error}). Copy it again, or unpack it first."
            ) from None
        limit -= len(pieces[-1])
        if limit < 0:
            raise ValueError(
                f"{path} must unpack to at most {_MAX_RATIO} times its own size, but unpacks to "
                "more. Unpack it first, if you trust it."
            )
        if not stream.eof:
            raise ValueError(f"{path} is incomplete. Copy it again.")
        packed = stream.unused_data
    return b"".join(pieces)


def _check_vocabulary(path: Path, tokens: np.ndarray, highest: int) -> None:
    """Checks that all tokens are within `0..highest`."""
    for start in range(0, len(tokens), _PIECE):
        piece = tokens[start : start + _PIECE]
        wrong = np.flatnonzero((piece > highest) | (piece < 0))
        if wrong.size:
            raise ValueError(
                f"Every token of {path} must be within 0..{highest}, but token "
                f"{start + wrong[0]} is {piece[wrong[0]]}. Use the tokenizer that the file was "
                "written with."
            )


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    separator: int,
) -> int:
    """Tokenizes documents one at a time and writes them to a token file.

    The file appears under its name only when it is complete.

    ```python
    import mamba_eqx as mbx
    from mamba_eqx import training

    texts = ["To be, or not to be", "Once more unto the breach"]
    training.write_tokens("plays.npy", texts, mbx.ByteTokenizer(), separator=0)
    tokens = training.read_tokens("plays.npy", vocab_size=256)
    ```

    **Arguments:**

    - `path`: the file, whose name must end in `.npy`.
    - `documents`: the texts.
    - `tokenizer`: any [`mamba_eqx.text.Tokenizer`][].
    - `separator`: the token id written before each document. For a
        [`mamba_eqx.TextTokenizer`][], use its `eos_token_id`; for bytes, use a byte that no
        text contains, such as 0.

    **Returns:**

    The number of tokens written.

    **Raises:** `ValueError` if `path` does not end in `.npy`; `OSError` if the file cannot be
    written.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"`path` must end in .npy, but got {path}.")
    highest = max(tokenizer.vocab_size - 1, separator)
    dtype = np.min_scalar_type(highest)
    count = 0
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(dtype, 0))
        for document in documents:
            tokens = np.asarray([separator, *tokenizer.encode(document)], dtype)
            file.write(tokens.tobytes())
            count += len(tokens)
        # NumPy pads a header so that a larger length fits into the same space.
        file.seek(0)
        file.write(_header(dtype, count))
    return count


def _header(dtype: np.dtype, count: int) -> bytes:
    header = io.BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
