"""The incremental decoder of text tokens."""

import codecs
import itertools
from collections.abc import Iterator, Sequence

from ._protocols import Tokenizer


# The text of a token depends on few tokens before it. The window of tokens that are decoded
# together is cut to `_KEPT` bytes whenever it has `_MAX_TOKENS` tokens.
_MAX_TOKENS = 32
_KEPT = 16
_LONGEST_CHARACTER = 4  # bytes
_REPLACEMENT = "\ufffd"


class TextDecoder:
    """The incremental counterpart of `TextTokenizer.decode`.

    The strings returned by `feed` and a final `flush`, joined, equal `decode` of all the tokens. If
    the tokens continue a prompt, `decode(prompt)` and these strings, joined, equal `decode` of the
    prompt and the tokens, unless the prompt ends within a character.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int] = ()):
        """**Arguments:**

        - `tokenizer`: the tokenizer of the token ids.
        - `prompt`: the token ids that come before those to be decoded. By default, the tokens begin
            a text, and many tokenizers drop a space there.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._bytes: list[bytes] = []  # of each of `_ids`
        self._returned = 0  # characters of the text of `_ids`
        self._start(prompt)

    def feed(self, ids: Sequence[int]) -> str:
        """Appends tokens to the sequence and returns the text that they complete.

        **Arguments:**

        - `ids`: the next token ids of the sequence.

        **Returns:**

        The new text, possibly empty. The bytes of an incomplete character are held
        back.

        **Raises:** the errors of the tokenizer's `decode`.
        """
        return "".join(self._feed_one(int(i)) for i in ids)

    def flush(self) -> str:
        """Ends the sequence and resets the decoder for another one, which begins a text.

        **Returns:**

        The text that was held back, in which an incomplete character is U+FFFD.
        """
        rest = self._tokenizer.decode(self._ids)[self._returned :]
        self._ids, self._bytes, self._returned = [], [], 0
        return rest

    def _start(self, prompt: Sequence[int]) -> None:
        """Makes the end of the prompt the beginning of the window."""
        contributing = (
            (i, data) for i in map(int, reversed(prompt)) if (data := self._contribution(i))
        )
        window: list[tuple[int, bytes]] = []
        text = ""
        while not text.strip(_REPLACEMENT):
            more = list(itertools.islice(contributing, _MAX_TOKENS + len(window)))
            window += more
            text = self._tokenizer.decode([i for i, _ in reversed(window)])
            if not more:
                break
        self._ids = [i for i, _ in reversed(window)]
        self._bytes = [data for _, data in reversed(window)]
        self._returned = self._complete(text)

    def _feed_one(self, token: int) -> str:
        data = self._contribution(token)
        if not data:
            return ""  # Special tokens have no text, and no influence on that of others.
        self._ids.append(token)
        self._bytes.append(data)
        text = self._tokenizer.decode(self._ids)
        new = text[self._returned : self._complete(text)]
        self._returned = max(self._returned, self._complete(text))
        if len(self._ids) >= _MAX_TOKENS:
            self._cut(text[self._returned :])
        return new

    def _contribution(self, token: int) -> bytes:
        data = self._tokenizer.token_bytes(token)
        if not data:
            self._tokenizer.decode([token])  # An impossible id is an error.
        return data

    def _complete(self, text: str) -> int:
        """Returns the length of the text of the window without an incomplete last character."""
        held = text.endswith(_REPLACEMENT) and _ends_within_character(self._bytes)
        return len(text) - held

    def _cut(self, held: str) -> None:
        """Drops the tokens at the beginning of the window on which the next text cannot depend.

        A decoder may treat the first tokens of a text in its own way. This must not reach the text
        that is still to be returned, so the rest of the window has text that has been returned.
        """
        for kept in _suffixes(self._bytes):
            text = self._tokenizer.decode(self._ids[-kept:])
            if text.endswith(held) and len(text) > len(held):
                self._ids, self._bytes = self._ids[-kept:], self._bytes[-kept:]
                self._returned = len(text) - len(held)
                return


def _suffixes(data: Sequence[bytes]) -> Iterator[int]:
    """Yields numbers of last tokens that have enough bytes, each time twice as many tokens."""
    total = 0
    wanted = _KEPT
    for n, piece in enumerate(reversed(data), 1):
        total += len(piece)
        if total >= wanted and n >= _LONGEST_CHARACTER:
            yield n
            wanted *= 2


def _ends_within_character(data: Sequence[bytes]) -> bool:
    """Returns whether bytes end with the beginning of a character of UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(b"".join(data[-_LONGEST_CHARACTER:]))
    pending, _ = decoder.getstate()
    return bool(pending)
