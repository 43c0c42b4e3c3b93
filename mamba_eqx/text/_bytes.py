"""The tokenizer of byte-level models."""

import codecs
from collections.abc import Sequence

from ._special_ids import SpecialIds
from ._unicode import check_text


class ByteTokenizer:
    """A tokenizer for text in UTF-8 whose tokens are the 256 bytes, without special tokens."""

    def __init__(self, *, ids: SpecialIds | None = None):
        """**Arguments:**

        - `ids`: the ids that the files of a checkpoint declare, for a model whose texts end with a
            certain byte. `None`, the default, declares none.
        """
        self._ids = SpecialIds() if ids is None else ids

    @property
    def ids(self) -> SpecialIds:
        """The ids of the tokens that begin, end and pad a text."""
        return self._ids

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a generated text: `ids.eos`."""
        return self._ids.eos

    @property
    def vocab_size(self) -> int:
        """The number of tokens: 256."""
        return 256

    def encode(self, text: str) -> list[int]:
        """Encodes a text as its UTF-8 bytes.

        **Arguments:**

        - `text`: the text.

        **Returns:**

        The bytes, as integers within `0..255`.

        **Raises:** `ValueError` if `text` contains a lone surrogate, which has no UTF-8 encoding.
        """
        return list(check_text(text).encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes bytes as UTF-8. Invalid sequences are replaced by U+FFFD.

        **Arguments:**

        - `ids`: integers within `0..255`. Remove the padding of a generation first:
            `tokens[:length]`.

        **Returns:**

        The text.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return _to_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self, *, prompt: Sequence[int] = ()) -> "ByteDecoder":
        """Returns a new incremental decoder, for token ids that arrive one after another.

        ```python
        prompt = tokenizer.encode("ROMEO:")
        decoder = tokenizer.decoder(prompt=prompt)
        for token in mbx.stream(model, prompt, 100):
            print(decoder.feed([token]), end="", flush=True)
        print(decoder.flush())
        ```

        **Arguments:**

        - `prompt`: the token ids that the arriving ones continue. If it ends within a character,
            the first text completes this character.

        **Returns:**

        The decoder.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        decoder = ByteDecoder()
        decoder.feed(prompt)
        return decoder

    def token_bytes(self, token: int) -> bytes:
        """Returns the byte that a token stands for.

        **Arguments:**

        - `token`: an integer within `0..255`.

        **Returns:**

        A single byte.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return _to_bytes([token])


class ByteDecoder:
    """The incremental counterpart of `ByteTokenizer.decode`.

    The strings returned by `feed` and a final `flush`, joined, equal `decode` of all the tokens.
    """

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Appends tokens to the sequence and returns the text that they complete.

        **Arguments:**

        - `ids`: integers within `0..255`.

        **Returns:**

        The new text, possibly empty. The bytes of an incomplete character are held
        back.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return self._decoder.decode(_to_bytes(ids))

    def flush(self) -> str:
        """Ends the sequence and resets the decoder for another one.

        **Returns:**

        U+FFFD if the sequence ended within a character, otherwise an empty string.
        """
        return self._decoder.decode(b"", final=True)


def _to_bytes(ids: Sequence[int]) -> bytes:
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i <= 255:
            raise ValueError(
                f"Tokens of `ByteTokenizer` must be within 0..255, but got {i}. Use the tokenizer "
                "that the model was trained with."
            )
    return bytes(ids)
