"""Tokens on disk: reading them, making them from text, and holding some out."""

import io
import lzma
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int, Integer

from ...text import Tokenizer


# What is looked at at a time, so that memory does not grow with a file that is mapped.
_PIECE = 2**22


def read_tokens(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.uint8,
    vocab_size: int | None = None,
) -> Integer[np.ndarray, " token"]:
    """Opens a file of tokens: any file as bytes, a `.npy` as [`mamba_eqx.training.write_tokens`][]
    writes it, or a raw array. It is mapped into memory and read from where it is used; only what
    is compressed (`.xz`) is unpacked into memory.

    **Arguments:**

    - `path`: the file. `.npy` says its own dtype.
    - `dtype`: of the tokens in any other file: bytes by default, else `np.uint16` and so on.
    - `vocab_size`: if given, all tokens are compared with it.

    **Returns:** the tokens, an array that cannot be written to.

    **Raises:** `ValueError` if there are none, if the file holds no whole number of them, or if one
    is not within `0..vocab_size - 1`. `OSError` if the file cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if path.suffix == ".npy" and size > 0:
        tokens = np.load(path, mmap_mode="r")
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}, but tokens are integers in "
                "one row: make it with `write_tokens`."
            )
    else:
        kind = np.dtype(dtype)
        if kind.kind not in "ui":
            raise ValueError(f"`dtype` must be one of integers, but got {kind}.")
        if path.suffix == ".xz":
            data = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
        else:
            data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        if len(data) % kind.itemsize:
            raise ValueError(
                f"{path} has {len(data)} bytes, which is no whole number of {kind} tokens: it has "
                "another dtype, or is incomplete."
            )
        tokens = data.view(kind)
    if len(tokens) == 0:
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    # Not the subclass, whose indexing is slower; the array is still the mapped one.
    tokens = np.asarray(tokens)
    possible = int(np.iinfo(tokens.dtype.name).max)
    highest = possible if vocab_size is None else vocab_size - 1
    if tokens.dtype.kind == "i" or highest < possible:
        _check_vocabulary(path, tokens, highest)
    return tokens


def _check_vocabulary(path: Path, tokens: np.ndarray, highest: int) -> None:
    for start in range(0, len(tokens), _PIECE):
        piece = tokens[start : start + _PIECE]
        wrong = np.flatnonzero((piece > highest) | (piece < 0))
        if wrong.size:
            raise ValueError(
                f"Token {start + wrong[0]} of {path} is {piece[wrong[0]]}, but the tokens of the "
                f"vocabulary are 0..{highest}: the file was made by another tokenizer."
            )


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    separator: int,
) -> int:
    """Turns documents into a file of tokens, one at a time. It appears when it is complete.

    ```python
    texts = (path.read_text() for path in sorted(Path("books").glob("*.txt")))
    training.write_tokens("books.npy", texts, tokenizer, separator=tokenizer.eos_token_id)
    ```

    **Arguments:**

    - `path`: of the file, a `.npy`.
    - `documents`: their texts.
    - `tokenizer`: any of the package, or one of your own.
    - `separator`: the token that is written before each document.

    **Returns:** how many tokens were written.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"`path` must end in .npy, but got {path}.")
    highest = max(tokenizer.vocab_size - 1, separator)
    dtype = np.min_scalar_type(highest)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    count = 0
    try:
        with open(temporary, "xb") as file:
            file.write(_header(dtype, 0))
            for document in documents:
                tokens = np.asarray([separator, *tokenizer.encode(document)], dtype)
                file.write(tokens.tobytes())
                count += len(tokens)
            # NumPy leaves room in a header for a length that grows.
            file.seek(0)
            file.write(_header(dtype, count))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _header(dtype: np.dtype, count: int) -> bytes:
    header = io.BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def document_starts(
    tokens: Integer[np.ndarray, " token"], separator: int
) -> Int[np.ndarray, " document"]:
    """Where the documents begin: at the first token, and at each separator.

    A separator belongs to the document that it begins. The model reads it first, and learns to say
    it at the end of the one before.
    """
    found = [
        start + np.flatnonzero(tokens[start : start + _PIECE] == separator)
        for start in range(0, len(tokens), _PIECE)
    ]
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


def hold_out_end(
    tokens: Integer[np.ndarray, " token"], fraction: float
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " held_out"]]:
    """The tokens to train on, and the last ones, to evaluate on: views, nothing is copied.

    **Arguments:**

    - `tokens`: all of them.
    - `fraction`: which part to hold out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, but got {fraction}.")
    cut = len(tokens) - int(len(tokens) * fraction)
    if cut == len(tokens):
        raise ValueError(f"{fraction} of {len(tokens)} tokens is none: give a larger `fraction`.")
    return tokens[:cut], tokens[cut:]


def hold_out_documents(
    tokens: Integer[np.ndarray, " token"],
    names: Sequence[Sequence[int]],
    *,
    separator: int,
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " held_out"]]:
    """The documents to train on, and those with the names given, to evaluate on. Both are copies,
    each document with a separator before it.

    **Arguments:**

    - `tokens`: all of them.
    - `names`: with which tokens the documents begin that are held out, `[b"TWELFTH NIGHT"]`.
    - `separator`: what stands between documents.

    **Raises:** `ValueError` for a name with which no document begins, and if none is left.
    """
    if tokens[0] != separator:
        tokens = np.concatenate([np.array([separator], tokens.dtype), tokens])
    starts = document_starts(tokens, separator)
    held_out = np.zeros(len(starts), np.bool_)
    for name in names:
        wanted = np.array(list(name))
        named = [np.array_equal(tokens[s + 1 : s + 1 + len(wanted)], wanted) for s in starts]
        if not any(named):
            raise ValueError(
                f"No document of {len(starts)} begins with {name!r}: nothing to hold out."
            )
        held_out |= named
    if held_out.all():
        raise ValueError(f"All of {len(starts)} documents are held out: none is left to train on.")
    sizes = np.diff(starts, append=len(tokens))
    chosen = np.repeat(held_out, sizes)
    return tokens[~chosen], tokens[chosen]
