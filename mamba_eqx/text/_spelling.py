"""The text of tokens, as the decoder of a tokenizer spells it."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from ._rust import checked
from ._steps import steps_of


if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast


_FAILED = "These tokens cannot be decoded"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class Spelling:
    """The text of tokens.

    `text` equals the decoder of `tokenizers` with one exception. Where the decoder spells bytes as
    tokens (`ByteFallback`), it replaces a whole run of byte tokens by U+FFFD if one of its
    characters is incomplete. `text` replaces that character only, so that the text of the tokens
    does not change when more of them arrive.
    """

    def __init__(self, fast: "Fast", decoder: object, special: Set[int]):
        """**Arguments:**

        - `fast`: the tokenizer.
        - `decoder`: the entry `decoder` of `tokenizer.json`.
        - `special`: the ids of the special tokens, which have no text.
        """
        vocab = fast.get_vocab(with_added_tokens=True)
        steps = [step.get("type") for step in steps_of(decoder)]
        self._fast = fast
        self._ids = frozenset(vocab.values())
        self._shown = self._ids - special
        self._alphabet = _gpt2_alphabet() if "ByteLevel" in steps else None
        self._bytes: dict[int, bytes] = {}
        if "ByteFallback" in steps:
            self._bytes = {
                number: bytes([int(token[3:5], 16)])
                for token, number in vocab.items()
                if token.startswith("<0x") and _BYTE.fullmatch(token) and number in self._shown
            }
        self._fallback = frozenset(self._bytes)
        self._decoder = fast.decoder

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all tokens."""
        return self._ids

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens. Special tokens and ids of no token are left out.

        **Raises:** `ValueError` if the decoder fails.
        """
        shown = [i for i in ids if i in self._shown]
        runs = [
            b"".join(self._bytes[i] for i in run)
            for is_byte, run in itertools.groupby(shown, self._fallback.__contains__)
            if is_byte
        ]
        if all(map(_is_text, runs)):
            return checked(lambda: self._fast.decode(shown, skip_special_tokens=False), _FAILED)
        return self._join(list(self._repaired(shown)))

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token contributes to a text that it continues."""
        if token not in self._bytes:
            self._bytes[token] = self._contribution(token) if token in self._shown else b""
        return self._bytes[token]

    def _contribution(self, token: int) -> bytes:
        spelled = self._fast.id_to_token(token)
        if spelled is None:
            return b""
        if self._alphabet is not None:
            if all(char in self._alphabet for char in spelled):
                return bytes(self._alphabet[char] for char in spelled)
            return spelled.encode("utf-8")
        # Decoders treat the first and the last token of a text in their own ways, so the token is
        # decoded between two others.
        start, after = self._neighbours
        return self._join(["a", spelled, "b"])[start:].removesuffix(after).encode("utf-8")

    @functools.cached_property
    def _neighbours(self) -> tuple[int, str]:
        """The length of the text of "a", and the text of "b" behind it."""
        start = len(self._join(["a"]))
        return start, self._join(["a", "b"])[start:]

    def _repaired(self, shown: Sequence[int]) -> Iterator[str]:
        """Yields the spellings of tokens. Bytes that form no character are spelled as U+FFFD."""
        for is_byte, run in itertools.groupby(shown, self._fallback.__contains__):
            if not is_byte:
                yield from (self._fast.id_to_token(i) or "" for i in run)
                continue
            for char in b"".join(self._bytes[i] for i in run).decode("utf-8", errors="replace"):
                if char == _REPLACEMENT:
                    yield char
                else:
                    yield from (f"<0x{byte:02X}>" for byte in char.encode("utf-8"))

    def _join(self, spelled: list[str]) -> str:
        if self._decoder is None:
            return " ".join(spelled)
        return checked(functools.partial(self._decoder.decode, spelled), _FAILED)


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _gpt2_alphabet() -> dict[str, int]:
    """Returns the byte that each character stands for: printable bytes stand for themselves, the
    others are represented by the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
