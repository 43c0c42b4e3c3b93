"""The special tokens that `tokenizer_config.json` declares in addition to `tokenizer.json`."""

import dataclasses
from collections.abc import Mapping


# The order is that of transformers, which gives the ids of new tokens in this order.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before the model of the tokenizer reads the rest. The
    fields are those of `tokenizers.AddedToken`."""

    content: str
    special: bool
    normalized: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class DeclaredTokens:
    """What a config says about special tokens.

    **Arguments:**

    - `named`: the spellings of the tokens that have a role in every tokenizer, such as `eos_token`.
    - `variables`: the spellings of all tokens that have a name, for chat templates.
    - `added`: the tokens to be added to those of `tokenizer.json`, in this order.
    """

    named: Mapping[str, str]
    variables: Mapping[str, str]
    added: tuple[AddedToken, ...]


def declared_tokens(config: Mapping[str, object], known: frozenset[str]) -> DeclaredTokens:
    """Reads the tokens that a config declares, as transformers does.

    **Arguments:**

    - `config`: the content of `tokenizer_config.json`.
    - `known`: the spellings of the added tokens of `tokenizer.json`.

    **Returns:**

    The tokens.

    **Raises:** `ValueError` for an entry of a wrong type.
    """
    numbered = _numbered(config.get("added_tokens_decoder"))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = {
        name: _token(name, config[name], special=True)
        for name in _NAMED
        if config.get(name) is not None
    }
    entries |= {
        name: _token(name, value, special=True)
        for name, value in config.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str | Mapping)
    }
    unnamed: list[AddedToken] = []
    if isinstance(extra, Mapping):
        entries |= {str(name): _token(str(name), value, special=True) for name, value in extra.items()}
    elif isinstance(extra, list | tuple):
        unnamed = [
            _token(f"extra_special_tokens[{i}]", value, special=isinstance(value, str))
            for i, value in enumerate(extra)
        ]
    else:
        raise ValueError(
            "`extra_special_tokens` must be a list of tokens or an object, but got "
            f"{extra!r:.100}. Correct tokenizer_config.json."
        )
    entries = {name: token for name, token in entries.items() if token.content}
    added = list(numbered)
    spelled = known | {token.content for token in numbered}
    for token in (*entries.values(), *unnamed):
        if token.content not in spelled:
            spelled |= {token.content}
            added.append(token)
    variables = {name: token.content for name, token in entries.items()}
    named = {name: content for name, content in variables.items() if name in _NAMED}
    return DeclaredTokens(named, variables, tuple(token for token in added if token.content))


def _numbered(entries: object) -> list[AddedToken]:
    """Returns the tokens of `added_tokens_decoder` in the order of their ids."""
    if entries is None:
        return []
    if not isinstance(entries, Mapping) or not all(
        isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 20
        for number in entries
    ):
        raise ValueError(
            "`added_tokens_decoder` must be an object with a token for every id, but got "
            f"{entries!r:.100}. Correct tokenizer_config.json."
        )
    return [
        _token(f"added_tokens_decoder[{number!r}]", entries[number], special=False)
        for number in sorted(entries, key=int)
    ]


def _token(name: str, value: object, *, special: bool) -> AddedToken:
    """Returns a token from its entry in a config: its spelling, or an object with the spelling as
    `content`. `special` tokens are so whatever their object says."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    given = value if isinstance(value, Mapping) else {}
    fields = {key: field for key, field in given.items() if field is not None}
    content = fields.get("content")
    flags = {key: fields.get(key, False) for key in ("single_word", "lstrip", "rstrip", "special")}
    flags["special"] = special or flags["special"]
    flags["normalized"] = fields.get("normalized", not flags["special"])
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(
            f"`{name}` must be the text of a token, or an object with the text as `content`, but "
            f"got {value!r:.100}. Correct tokenizer_config.json."
        )
    return AddedToken(content, **flags)
