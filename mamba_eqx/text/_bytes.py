"""The tokenizer of byte-level models."""

import codecs
from collections.abc import Sequence, Set

from ._special_ids import SpecialIds
from ._unicode import check_text


class ByteTokenizer:
    """A tokenizer for text in UTF-8 whose tokens are the 256 bytes.

    It has no special tokens, except for those above 255 that `ids` declares. They have no text.
    """

    def __init__(self, *, ids: SpecialIds | None = None):
        """**Arguments:**

        - `ids`: the ids that the files of a checkpoint declare, for a model whose texts end with a
            certain byte, or with a token of its own such as 256. `None`, the default, declares
            none.
        """
        self._ids = SpecialIds() if ids is None else ids
        declared = (self._ids.bos, *self._ids.eos, self._ids.pad)
        self._special = frozenset(i for i in declared if i is not None and i > 255)
        self._token_ids = self._special.union(range(256))
        self._vocab_size = max(self._token_ids) + 1

    def __repr__(self) -> str:
        return f"<ByteTokenizer: {len(self.token_ids)} tokens>"

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
        """The largest token id plus 1: 256, unless `ids` declares a larger one."""
        return self._vocab_size

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids of all tokens: 0 to 255, and those that `ids` declares."""
        return self._token_ids

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
        """Decodes bytes as UTF-8. Invalid sequences are replaced by U+FFFD, and special tokens are
        skipped.

        **Arguments:**

        - `ids`: token ids. Remove the padding of a generation first: `tokens[:length]`.

        **Returns:**

        The text.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return _to_bytes(ids, self._special).decode("utf-8", errors="replace")

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
        decoder = ByteDecoder(special=self._special)
        decoder.feed(prompt)
        return decoder

    def token_bytes(self, token: int) -> bytes:
        """Returns the byte that a token stands for.

        **Arguments:**

        - `token`: a token id.

        **Returns:**

        A single byte; nothing for a special token.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return _to_bytes([token], self._special)


class ByteDecoder:
    """The incremental counterpart of `ByteTokenizer.decode`.

    The strings returned by `feed` and a final `flush`, joined, equal `decode` of all the tokens.
    """

    def __init__(self, *, special: Set[int] = frozenset()):
        """**Arguments:**

        - `special`: the ids of tokens without text. By default, there are none.
        """
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Appends tokens to the sequence and returns the text that they complete.

        **Arguments:**

        - `ids`: the next token ids.

        **Returns:**

        The new text, possibly empty. The bytes of an incomplete character are held
        back.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return self._decoder.decode(_to_bytes(ids, self._special))

    def flush(self) -> str:
        """Ends the sequence and resets the decoder for another one.

        **Returns:**

        U+FFFD if the sequence ended within a character, otherwise an empty string.
        """
        return self._decoder.decode(b"", final=True)


def _to_bytes(ids: Sequence[int], special: Set[int]) -> bytes:
    ids = [i for i in map(int, ids) if i not in special]
    for i in ids:
        if not 0 <= i <= 255:
            raise ValueError(
                f"Tokens of `ByteTokenizer` must be within 0..255, but got {i}. Use the tokenizer "
                "that the model was trained with."
            )
    return bytes(ids)
