import codecs
from collections.abc import Sequence


class ByteTokenizer:
    """The bytes of a text in UTF-8 as its tokens: a vocabulary of 256, and nothing to train."""

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        **Raises:** `ValueError` if `text` has a lone surrogate, for which UTF-8 has no bytes.
        """
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD.

        **Arguments:**

        - `ids`: within `0..255`. Cut the padding off a generation first: `tokens[:length]`.

        **Raises:** `ValueError` for a token that is not a byte.
        """
        return _bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> "ByteDecoder":
        """A new decoder for tokens that come one after another.

        ```python
        decoder = tokenizer.decoder()
        for token in mbx.stream(model, tokenizer.encode("ROMEO:"), 100):
            print(decoder.feed([token]), end="", flush=True)
        print(decoder.flush())
        ```
        """
        return ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        """The byte itself.

        **Raises:** `ValueError` for a token that is not a byte.
        """
        return _bytes([token])


class ByteDecoder:
    """The incremental counterpart of `ByteTokenizer.decode`: the pieces that `feed` and `flush`
    return, joined, are what `decode` returns for all the tokens at once."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; the bytes of an unfinished character are kept.

        **Raises:** `ValueError` for a token that is not a byte.
        """
        return self._decoder.decode(_bytes(ids))

    def flush(self) -> str:
        """U+FFFD if the tokens ended within a character, else nothing. The decoder then starts
        afresh."""
        return self._decoder.decode(b"", final=True)


def _bytes(ids: Sequence[int]) -> bytes:
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i <= 255:
            raise ValueError(f"A token of `ByteTokenizer` is within 0..255, but got {i}.")
    return bytes(ids)
