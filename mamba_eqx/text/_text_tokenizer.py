"""Tokenizers of checkpoints: files of the `tokenizers` package."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ._chat_template import render


_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST = 16  # the most tokens that can be parts of one character


class TextTokenizer:
    """The tokenizer of a checkpoint, read from its `tokenizer.json`.

    Text is text: where a special token is spelt out in it (`<|endoftext|>`), the letters are
    encoded, and not the token, so that no one who writes a prompt can end it or speak for others.

    It needs the package `tokenizers`: `pip install "mamba-eqx[text]"`.
    """

    def __init__(self, tokenizer: str, config: Mapping[str, Any] | None = None):
        """**Arguments:**

        - `tokenizer`: the content of `tokenizer.json`.
        - `config`: that of `tokenizer_config.json`, for the end of a text and the template of
            conversations.

        **Raises:** `ValueError` if that is not a tokenizer; `ImportError` if the package
        `tokenizers` is missing.
        """
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise ImportError(
                "Tokenizers of checkpoints need the package `tokenizers`: "
                'pip install "mamba-eqx[text]".'
            ) from error
        try:
            self._fast = Fast.from_str(tokenizer)
        except Exception as error:  # It has no type of its own.
            raise ValueError(f"This is not the content of a tokenizer.json: {error}.") from error
        self._fast.encode_special_tokens = True
        self._config = dict(config or {})
        added = self._fast.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._spelling = _spelling(json.loads(self._fast.to_str()))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, those added later included."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that are not text, by their spelling."""
        return dict(self._special)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the config names one."""
        return self._special.get(_content(self._config.get("eos_token")))

    @property
    def config(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json`."""
        return dict(self._config)

    @property
    def has_template(self) -> bool:
        """Whether there is a template of conversations: see `encode_chat`."""
        return self._template is not None

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._fast.to_str()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around every text (many put
        none, some one that begins it)."""
        return self._fast.encode(text).ids

    def encode_piece(self, text: str) -> list[int]:
        """The tokens of a part of a text: nothing is put around it."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special ones have none.

        **Raises:** `ValueError` for a token that there is not.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if i < 0 or self._fast.id_to_token(i) is None:
                raise ValueError(f"A token is within 0..{self.vocab_size - 1}, but got {i}.")
        return self._fast.decode(ids, skip_special_tokens=True)

    def decoder(self) -> "TextDecoder":
        """A new decoder for tokens that come one after another."""
        return TextDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8. (At the very beginning of a text, some tokenizers
        drop a space.)"""
        if token in self._added:
            content = self._added[token]
            return b"" if content in self._special else content.encode("utf-8")
        spelt = self._fast.id_to_token(token)
        return b"" if spelt is None else self._spelling.to_bytes(spelt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The tokens of a conversation, as the checkpoint's own template has it.

        The template runs in a sandbox. What it writes itself may be special tokens; what is in a
        message never is one.

        **Arguments:**

        - `messages`: each with a `role` (`"system"`, `"user"`, `"assistant"`) and its `content`.
        - `add_generation_prompt`: whether to end where the assistant is to begin.

        **Raises:** `ValueError` if there is no template, or it refuses the conversation.
        """
        template = self._template
        if template is None:
            raise ValueError(
                "This tokenizer has no template for conversations: its model was not trained for "
                "them. Use `encode` on a text that you lay out yourself."
            )
        words = {
            name: _content(value)
            for name, value in self._config.items()
            if name.endswith("_token") and _content(value) is not None
        }
        segments = render(
            template,
            messages,
            words,
            special=list(self._special),
            add_generation_prompt=add_generation_prompt,
        )
        ids: list[int] = []
        for text, is_special in segments:
            ids += [self._special[text]] if is_special else self.encode_piece(text)
        return ids

    @property
    def _template(self) -> str | None:
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        return template if isinstance(template, str) else None


class TextDecoder:
    """The incremental counterpart of `TextTokenizer.decode`."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = 0  # for how many of these there has been text

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; the beginning of a character is kept."""
        return "".join(self._decode_one(int(i)) for i in ids)

    def flush(self) -> str:
        """What is left of an unfinished character. The decoder then starts afresh."""
        rest = self._pending_text()
        self._ids, self._emitted = [], 0
        return rest

    def _decode_one(self, token: int) -> str:
        self._ids.append(token)
        new = self._pending_text()
        waiting = len(self._ids) - self._emitted
        if new.endswith(_REPLACEMENT) and waiting < _LONGEST:
            return ""
        # What came before matters, but not for ever.
        self._ids = self._ids[max(0, self._emitted - _LONGEST) :]
        self._emitted = len(self._ids)
        return new

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._emitted])
        return self._tokenizer.decode(self._ids)[len(before) :]


class _Spelling:
    """How the tokens of a vocabulary stand for bytes."""

    def __init__(self, by_letter: Mapping[str, int] | None):
        self._by_letter = by_letter

    def to_bytes(self, token: str) -> bytes:
        if self._by_letter is not None:
            return bytes(self._by_letter[letter] for letter in token if letter in self._by_letter)
        byte = _BYTE.fullmatch(token)
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return token.replace("\u2581", " ").encode("utf-8")


def _spelling(fields: Mapping[str, Any]) -> _Spelling:
    """GPT-2's alphabet if the decoder says so, else SentencePiece's."""
    decoder = fields.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return _Spelling(None)
    # Bytes that print stand for themselves, the others for letters from 256 on.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    by_letter = {chr(byte): byte for byte in prints}
    by_letter |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return _Spelling(by_letter)


def _content(token: Any) -> Any:
    """Configs have tokens as strings, or as objects with a string in them."""
    return token.get("content") if isinstance(token, dict) else token
