from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decoder(Protocol):
    """Turns the tokens of a growing sequence into text as they come, whole characters only."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete, perhaps none."""
        ...

    def flush(self) -> str:
        """What is left at the end of the sequence. The decoder then starts afresh."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What turns text into tokens and back."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def decoder(self) -> Decoder:
        """A new decoder for tokens that come one after another."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8, of which it may be a part."""
        ...
