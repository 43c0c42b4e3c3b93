"""Strings that end a generation, found within the compiled loop: wherever they begin and end
within tokens."""

import functools
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int

from ._protocols import Tokenizer


def stop_table(tokenizer: Tokenizer, strings: Sequence[str]) -> Int[np.ndarray, "states vocab"]:
    """A table with which a loop notices that it has generated one of the strings.

    Begin with `state = 0`, go on with `state = table[state, token]`. From the moment that the text
    of the tokens contains one of the strings, the state is the last one, `len(table) - 1`.

    The states are the beginnings of the strings, and each stands for the longest of them that the
    text ends with, in bytes: an automaton whose letters are tokens.

    Reference: Aho and Corasick, *Efficient String Matching* (1975).

    **Arguments:**

    - `tokenizer`: whose tokens they are. The table is kept for the next call with the same one and
        the same strings: it takes a large vocabulary as long as several tokens to make.
    - `strings`: not empty.

    **Raises:** `ValueError` for an empty string.
    """
    if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"`stop_strings` must be strings that are not empty, in a list, but got {strings!r}."
        )
    make = _table if isinstance(tokenizer, Hashable) else _table.__wrapped__
    return make(tokenizer, tuple(strings))


@functools.lru_cache(maxsize=16)
def _table(tokenizer: Tokenizer, strings: tuple[str, ...]) -> Int[np.ndarray, "states vocab"]:
    words = [s.encode("utf-8") for s in strings]
    prefixes = sorted({word[:n] for word in words for n in range(len(word))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    end = len(prefixes)
    by_byte = np.zeros((end + 1, 256), np.int32)
    by_byte[end] = end
    for prefix, i in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(text.endswith(word) for word in words):
                by_byte[i, byte] = end
            else:
                by_byte[i, byte] = next(
                    number[text[at:]] for at in range(len(text) + 1) if text[at:] in number
                )
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    lengths = np.array([len(piece) for piece in pieces])
    padded = np.zeros((len(pieces), max(1, lengths.max(initial=0))), np.uint8)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    table = np.broadcast_to(np.arange(end + 1)[:, None], (end + 1, len(pieces)))
    for at in range(padded.shape[1]):
        table = np.where(at < lengths, by_byte[table, padded[:, at]], table)
    table = table.astype(np.int32)
    table.flags.writeable = False  # one and the same for all who ask
    return table
