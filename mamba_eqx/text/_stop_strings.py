"""Stop strings: a table that detects them in the compiled loop, and a filter for streamed text.

Stop strings may begin and end anywhere within tokens.
"""

import functools
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from ._protocols import Tokenizer


def stop_table(tokenizer: Tokenizer, strings: Sequence[str]) -> Int[np.ndarray, "states vocab"]:
    """Builds the transition table of an automaton that detects stop strings in generated tokens.

    Start with `state = 0` and apply `state = table[state, token]` for every token. As soon as the
    text of the tokens contains one of the strings, the state is the last one, `len(table) - 1`, and
    remains there.

    Every other state stands for a proper prefix of a string, in bytes: the longest one that the
    text ends with. The entry of a token composes the transitions of its bytes.

    Reference: Aho and Corasick, *Efficient String Matching* (1975).

    **Arguments:**

    - `tokenizer`: the tokenizer of the generated tokens. The table is cached for the same tokenizer
        and strings, since building it for a large vocabulary takes as long as generating several
        tokens.
    - `strings`: the stop strings, none of them empty (`Sampling` checks this).

    **Returns:**

    The table, an `int32` array of shape `(states, vocab_size)`. It is shared between
    callers and read-only.
    """
    build = _build_table if isinstance(tokenizer, Hashable) else _build_table.__wrapped__
    return build(tokenizer, tuple(strings))


@functools.lru_cache(maxsize=16)
def _build_table(tokenizer: Tokenizer, strings: tuple[str, ...]) -> Int[np.ndarray, "states vocab"]:
    words = [s.encode("utf-8") for s in strings]
    prefixes = sorted({word[:n] for word in words for n in range(len(word))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    found = len(prefixes)
    by_byte = np.zeros((found + 1, 256), np.int32)
    by_byte[found] = found
    for prefix, i in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(text.endswith(word) for word in words):
                by_byte[i, byte] = found
            else:
                by_byte[i, byte] = next(
                    number[text[start:]] for start in range(len(text) + 1) if text[start:] in number
                )
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    lengths = np.array([len(piece) for piece in pieces])
    padded = np.zeros((len(pieces), max(1, lengths.max(initial=0))), np.uint8)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    table = np.broadcast_to(np.arange(found + 1)[:, None], (found + 1, len(pieces)))
    for i in range(padded.shape[1]):
        table = np.where(i < lengths, by_byte[table, padded[:, i]], table)
    table = table.astype(np.int32)
    table.flags.writeable = False  # The cache returns the same array to every caller.
    return table


def text_until(stops: Sequence[str], pieces: Iterator[str]) -> Iterator[str]:
    """Yields streamed text up to the stop string that is completed first, excluding that string.

    **Arguments:**

    - `stops`: the stop strings, none of them empty. There may be none.
    - `pieces`: the text, in pieces of any lengths. No piece is consumed after a stop string.

    **Returns:**

    An iterator over the text in pieces, some of them possibly empty. A suffix that may
    be the beginning of a stop string is held back until the following text decides.
    """
    until = StopFilter(stops)
    for piece in pieces:
        yield until.feed(piece)
        if until.stopped:
            return
    rest = until.flush()
    if rest:
        yield rest


class StopFilter:
    """A filter that ends a text before the stop string that is completed first.

    - `stopped`: whether a stop string was completed.
    """

    def __init__(self, stops: Sequence[str]):
        """**Arguments:**

        - `stops`: the stop strings, none of them empty. There may be none.
        """
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Returns the text that is certain after another piece. A suffix that may be the beginning
        of a stop string is held back."""
        if self.stopped:
            return ""
        held = self._held + piece
        found = [
            (start + len(stop), start) for stop in self._stops if (start := held.find(stop)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        end = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[end:]
        return held[:end]

    def flush(self) -> str:
        """Returns the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
