"""The interfaces of tokenizers and decoders, on which the rest of the package relies."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decoder(Protocol):
    """An incremental decoder, which converts token ids to text as they arrive, without splitting
    characters.

    The strings returned by `feed` and a final `flush`, joined, are the text of all the tokens.
    """

    def feed(self, ids: Sequence[int]) -> str:
        """Appends tokens to the sequence and returns the text that they complete.

        **Arguments:**

        - `ids`: the next token ids of the sequence.

        **Returns:**

        The new text, possibly empty. The bytes of an incomplete character are held
        back until a later token completes it.
        """
        ...

    def flush(self) -> str:
        """Ends the sequence and resets the decoder for another one.

        **Returns:**

        The text that `feed` has held back.
        """
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer, which converts text to token ids and back.

    Any object with these methods can be used where the package asks for a tokenizer.
    [`mamba_eqx.ByteTokenizer`][] and [`mamba_eqx.TextTokenizer`][] implement it.
    """

    @property
    def vocab_size(self) -> int:
        """The largest token id plus 1. Token ids are within `0..vocab_size - 1`."""
        ...

    def encode(self, text: str) -> list[int]:
        """Converts a text to token ids.

        **Arguments:**

        - `text`: a complete text.

        **Returns:**

        The token ids, including any that the tokenizer adds at the beginning or end of
        every text.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Converts token ids to text.

        **Arguments:**

        - `ids`: token ids within `0..vocab_size - 1`.

        **Returns:**

        The text.
        """
        ...

    def decoder(self, *, prompt: Sequence[int] = ()) -> Decoder:
        """Returns a new incremental decoder, for token ids that arrive one after another.

        **Arguments:**

        - `prompt`: the token ids that the arriving ones continue.

        **Returns:**

        The decoder. Its text joins on to that of the prompt.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes that a token contributes to a text.

        A token may contribute only a part of a character. Stop strings are matched on these bytes.

        **Arguments:**

        - `token`: a token id within `0..vocab_size - 1`.

        **Returns:**

        The bytes, empty for a special token.
        """
        ...
