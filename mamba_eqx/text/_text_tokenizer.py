"""Tokenizers of checkpoints, in the format of the `tokenizers` package."""

import json
import re
from collections.abc import Mapping, Sequence

from ._chat_template import chosen_template, named_templates, render


_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_CHARACTER_TOKENS = 16  # tokens that may together form one character


class TextTokenizer:
    """The tokenizer of a checkpoint, read from its `tokenizer.json`.

    Special tokens spelled out in text (`<|endoftext|>`) are encoded as plain characters, so that
    a prompt can neither end the text nor impersonate another speaker.

    Requires the package `tokenizers`: `pip install "mamba_eqx[text]"`.
    """

    def __init__(self, tokenizer: str, config: Mapping[str, object] | None = None):
        """**Arguments:**

        - `tokenizer`: the content of `tokenizer.json`.
        - `config`: the parsed content of `tokenizer_config.json`, which names the end-of-text token
            and holds the chat template. `None`, the default, is an empty config.

        **Raises:** `ValueError` if `tokenizer` is not the content of a `tokenizer.json`, or the
        `chat_template` of `config` is malformed; `ImportError` if the package `tokenizers` is not
        installed.
        """
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise ImportError(
                "Tokenizers of checkpoints require the package `tokenizers`: "
                'pip install "mamba_eqx[text]".'
            ) from error
        try:
            self._fast = Fast.from_str(tokenizer)
        except Exception as error:  # `tokenizers` raises a bare `Exception`.
            raise ValueError(f"This is not the content of a tokenizer.json: {error}.") from error
        self._fast.encode_special_tokens = True
        self._config = dict(config or {})
        self._templates = named_templates(self._config.get("chat_template"))
        added = self._fast.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._spelling = _Spelling(json.loads(self._fast.to_str()).get("decoder"))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including tokens added after training."""
        return self._fast.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by their spelling."""
        return dict(self._special)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token, or `None` if the config does not name a special token as
        such."""
        content = _content(self._config.get("eos_token"))
        return self._special.get(content) if isinstance(content, str) else None

    @property
    def config(self) -> dict[str, object]:
        """The parsed content of `tokenizer_config.json`."""
        return dict(self._config)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template; see `encode_chat`."""
        return chosen_template(self._templates, with_tools=False) is not None

    def to_json(self) -> str:
        """Returns the content of `tokenizer.json`."""
        return self._fast.to_str()

    def encode(self, text: str) -> list[int]:
        """Encodes a complete text.

        **Arguments:**

        - `text`: the text.

        **Returns:**

        The token ids, including those that the tokenizer adds to every text. Many
        tokenizers add none, some add one at the beginning.
        """
        return self._fast.encode(text).ids

    def encode_piece(self, text: str) -> list[int]:
        """Encodes a part of a text.

        **Arguments:**

        - `text`: the part.

        **Returns:**

        The token ids of the characters alone; nothing is added at either end.
        """
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids. Special tokens are skipped.

        **Arguments:**

        - `ids`: token ids within `0..vocab_size - 1`.

        **Returns:**

        The text.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if i < 0 or self._fast.id_to_token(i) is None:
                raise ValueError(
                    f"Token ids must be within 0..{self.vocab_size - 1}, but got {i}. Use the "
                    "tokenizer that the model was trained with."
                )
        return self._fast.decode(ids, skip_special_tokens=True)

    def decoder(self) -> "TextDecoder":
        """Returns a new incremental decoder, for token ids that arrive one after another."""
        return TextDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes that a token contributes to a text.

        Some tokenizers drop a leading space at the very beginning of a text; the bytes include it.

        **Arguments:**

        - `token`: a token id.

        **Returns:**

        The bytes, which may be a part of a character; empty for special tokens and for
        ids outside the vocabulary.
        """
        if token in self._added:
            content = self._added[token]
            return b"" if content in self._special else content.encode("utf-8")
        spelled = self._fast.id_to_token(token)
        return b"" if spelled is None else self._spelling.to_bytes(spelled)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Encodes a conversation with the checkpoint's own chat template.

        Only the template can produce special tokens; what stands in a message, in a tool or in a
        document never becomes one. Templates cannot access anything but the arguments, and their
        work and output are limited: a rendering takes at most a million steps and 2000 more for
        each message (published templates take 20 to 200 for a message), and makes no text of more
        than 10 million characters.

        **Arguments:**

        - `messages`: the conversation. Each message has a `role` (`"system"`, `"user"`,
            `"assistant"`, `"tool"`) and a `content`: a text, or a list of parts such as
            `{"type": "text", "text": ...}`. Messages with other fields, such as `tool_calls`, can
            be without content. Fields that are `None` are ignored.
        - `add_generation_prompt`: whether to append the beginning of an assistant's message, which
            the model then continues.
        - `tools`: JSON schemas of the functions that the model can call. If the tokenizer has
            several templates, the one named `tool_use` is used.
        - `documents`: documents that the model can cite.
        - `options`: variables of the template, such as `{"enable_thinking": False}`.

        **Returns:**

        The token ids of the whole conversation.

        **Raises:** `ValueError` if the tokenizer has no template, an argument is malformed, or the
        template rejects the conversation, fails, or reaches a limit; `ImportError` if `jinja2` is
        not installed.
        """
        template = chosen_template(self._templates, with_tools=tools is not None)
        if template is None:
            raise ValueError(
                "This tokenizer has no chat template. Its model was probably not trained on "
                "conversations. Lay out the text yourself and use `encode`."
            )
        variables = {
            name: _content(value)
            for name, value in self._config.items()
            if name.endswith("_token") and isinstance(_content(value), str)
        }
        pieces = render(
            template,
            messages,
            variables,
            special=list(self._special),
            ordinary=list(self._added.values()),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            options=options,
        )
        ids: list[int] = []
        for text, is_special in pieces:
            ids += [self._special[text]] if is_special else self.encode_piece(text)
        return ids


class TextDecoder:
    """The incremental counterpart of `TextTokenizer.decode`.

    The strings returned by `feed` and a final `flush`, joined, equal `decode` of all the tokens.
    """

    def __init__(self, tokenizer: TextTokenizer):
        """**Arguments:**

        - `tokenizer`: the tokenizer of the token ids.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = 0  # number of leading `_ids` whose text has been returned

    def feed(self, ids: Sequence[int]) -> str:
        """Appends tokens to the sequence and returns the text that they complete.

        **Arguments:**

        - `ids`: the next token ids of the sequence.

        **Returns:**

        The new text, possibly empty. The bytes of an incomplete character are held
        back.

        **Raises:** `ValueError` for an id outside the vocabulary.
        """
        return "".join(self._decode_one(int(i)) for i in ids)

    def flush(self) -> str:
        """Ends the sequence and resets the decoder for another one.

        **Returns:**

        The text that was held back, in which an incomplete character is U+FFFD.
        """
        rest = self._pending_text()
        self._ids, self._emitted = [], 0
        return rest

    def _decode_one(self, token: int) -> str:
        self._ids.append(token)
        text = self._pending_text()
        pending = len(self._ids) - self._emitted
        if text.endswith(_REPLACEMENT) and pending < _MAX_CHARACTER_TOKENS:
            return ""
        # The text of a token depends on the last few tokens before it at most, so older ones are
        # dropped.
        self._ids = self._ids[max(0, self._emitted - _MAX_CHARACTER_TOKENS) :]
        self._emitted = len(self._ids)
        return text

    def _pending_text(self) -> str:
        emitted = self._tokenizer.decode(self._ids[: self._emitted])
        return self._tokenizer.decode(self._ids)[len(emitted) :]


class _Spelling:
    """The way in which a vocabulary spells bytes: in GPT-2's byte alphabet if the `decoder` of
    `tokenizer.json` is byte-level, otherwise as SentencePiece does."""

    def __init__(self, decoder: object):
        self._alphabet = _gpt2_alphabet() if _is_byte_level(decoder) else None

    def to_bytes(self, token: str) -> bytes:
        """Converts the spelling of a token to UTF-8 bytes."""
        if self._alphabet is not None:
            return bytes(self._alphabet[char] for char in token if char in self._alphabet)
        byte = _BYTE.fullmatch(token)
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return token.replace("\u2581", " ").encode("utf-8")


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _gpt2_alphabet() -> dict[str, int]:
    """Returns the byte that each character stands for: printable bytes stand for themselves, the
    others are represented by the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def _content(token: object) -> object:
    """Returns the spelling of a token from its entry in a config: a string, or an object with the
    string as `content`."""
    return token.get("content") if isinstance(token, dict) else token
