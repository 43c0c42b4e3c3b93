"""Tokenizers of checkpoints, in the format of the `tokenizers` package."""

from collections.abc import Mapping, Sequence

from ._chat_template import Piece, chosen_template, named_templates, render
from ._encoding import encode_pieces
from ._private_spelling import private_tokenizer
from ._protocols import Tokenizer
from ._special_ids import SpecialIds
from ._spelling import Spelling
from ._text_decoder import TextDecoder
from ._unicode import check_text


_ROLES = ("bos", "eos", "pad")
_MAX_ID = 2**32 - 1  # the largest id that `tokenizers` can represent


class TextTokenizer:
    """The tokenizer of a checkpoint, read from its `tokenizer.json`.

    Text has the token ids that transformers gives it, with one exception: special tokens spelled
    out in text (`<|endoftext|>`) are encoded as plain characters, so that a prompt can neither end
    the text nor impersonate another speaker. If the vocabulary has no other tokens for these
    characters, they are encoded as characters that the tokenizer does not know.

    The entries `truncation` and `padding` of `tokenizer.json` have no effect: all of a text is
    encoded, and nothing else.

    Requires the package `tokenizers`: `pip install "mamba_eqx[text]"`.
    """

    def __init__(
        self,
        tokenizer: str,
        config: Mapping[str, object] | None = None,
        *,
        ids: SpecialIds | None = None,
    ):
        """**Arguments:**

        - `tokenizer`: the content of `tokenizer.json`.
        - `config`: the parsed content of `tokenizer_config.json`, which names the special tokens
            and holds the chat template. `None`, the default, is an empty config.
        - `ids`: the ids that other files of the checkpoint declare. `None`, the default, declares
            none.

        **Raises:** `ValueError` if `tokenizer` is not the content of a `tokenizer.json`, or an
        entry of `config` has a wrong type; `ImportError` if the package `tokenizers` is not
        installed.
        """
        self._file = tokenizer
        self._config = dict(config or {})
        self._templates = named_templates(self._config.get("chat_template"))
        self._private = private_tokenizer(tokenizer, self._config)
        fast = self._private.fast
        numbers = {name: fast.token_to_id(name) for name in self._private.private.values()}
        self._special = {
            content: number
            for content, name in self._private.private.items()
            if (number := numbers[name]) is not None
        }
        special_ids = frozenset(self._special.values())
        self._spelling = Spelling(fast, self._private.decoder, special_ids)
        self._vocab_size = max(self._spelling.ids, default=-1) + 1
        named = self._private.declared.named
        bos, eos, pad = (self._special.get(named.get(f"{role}_token", "")) for role in _ROLES)
        self._eos = eos
        given = SpecialIds() if ids is None else ids
        self._ids = given.completed(bos, () if eos is None else (eos,), pad)

    def __repr__(self) -> str:
        template = ", with a chat template" if self.has_template else ""
        return (
            f"<TextTokenizer: {self._private.kind}, {len(self.token_ids)} tokens, "
            f"{len(self._special)} of them special{template}>"
        )

    @property
    def vocab_size(self) -> int:
        """The largest token id plus 1, including tokens added after training. Not every id below
        needs to have a token; see `token_ids`."""
        return self._vocab_size

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids of all tokens."""
        return self._spelling.ids

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by their spelling."""
        return dict(self._special)

    @property
    def ids(self) -> SpecialIds:
        """The ids of the tokens that begin, end and pad a text: those given, completed by those
        that the config names."""
        return self._ids

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a generated text: `ids.eos`."""
        return self._ids.eos

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token that the config names, or else the first of
        `stop_tokens`. `None` if there is none."""
        return self._eos if self._eos is not None else next(iter(self._ids.eos), None)

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
        return self._file

    def encode(self, text: str) -> list[int]:
        """Encodes a complete text.

        **Arguments:**

        - `text`: the text.

        **Returns:**

        The token ids, including those that the tokenizer adds to every text. Many
        tokenizers add none, some add one at the beginning.

        **Raises:** `ValueError` if `text` contains a lone surrogate, or the tokenizer has no token
        for one of its characters.
        """
        return self._encode([Piece(text, False)], add_special_tokens=True)

    def encode_piece(self, text: str) -> list[int]:
        """Encodes a part of a text.

        **Arguments:**

        - `text`: the part.

        **Returns:**

        The token ids of the characters alone; nothing is added at either end.

        **Raises:** the same errors as `encode`.
        """
        return self._encode([Piece(text, False)], add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids. Special tokens are skipped, and so are ids that no token has, such as
        those of a padded vocabulary.

        **Arguments:**

        - `ids`: token ids.

        **Returns:**

        The text.

        **Raises:** `ValueError` for an id that is negative or does not fit into 32 bits.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i <= _MAX_ID:
                raise ValueError(
                    f"Token ids must be within 0..{_MAX_ID}, but got {i}. Use the tokenizer that "
                    "the model was trained with."
                )
        return self._spelling.text(ids)

    def decoder(self, *, prompt: Sequence[int] = ()) -> TextDecoder:
        """Returns a new incremental decoder, for token ids that arrive one after another.

        **Arguments:**

        - `prompt`: the token ids that the arriving ones continue. The text joins on to that of the
            prompt, often with a space. By default, the tokens begin a text.

        **Returns:**

        The decoder.
        """
        return TextDecoder(self, prompt=prompt)

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes that a token contributes to a text that it continues.

        Some tokenizers drop a leading space at the very beginning of a text; the bytes include it.

        **Arguments:**

        - `token`: a token id.

        **Returns:**

        The bytes, which may be a part of a character; empty for special tokens and for
        ids of no token.
        """
        return self._spelling.bytes_of(token)

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
        pieces = render(
            template,
            messages,
            self._private.declared.variables,
            tokens=self._private.stages(),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            options=options,
        )
        return self._encode(pieces, add_special_tokens=False)

    def _encode(self, pieces: Sequence[Piece], *, add_special_tokens: bool) -> list[int]:
        for piece in pieces:
            check_text(piece.text)
        private = self._private
        while any(private.nonce in piece.text for piece in pieces):
            private = private_tokenizer(self._file, self._config)
        return encode_pieces(private, pieces, add_special_tokens=add_special_tokens)


def chat_tokenizer(tokenizer: Tokenizer) -> TextTokenizer | None:
    """Returns a tokenizer that can encode conversations, or `None` if this one cannot."""
    if isinstance(tokenizer, TextTokenizer) and tokenizer.has_template:
        return tokenizer
    return None
