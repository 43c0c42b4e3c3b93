"""Special tokens under spellings that no text contains.

`tokenizers` recognises special tokens by their spelling, wherever a text contains it, and the model
of a tokenizer may find the same spelling in its vocabulary. Therefore all special tokens are given
private spellings, with a random part. What is spelled like a special token is then plain text, and
a special token is written by its private spelling.
"""

import dataclasses
import functools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ._chat_template import Tokens
from ._declared_tokens import DeclaredTokens, declared_tokens
from ._rust import checked
from ._steps import check_growth


if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast


_FAILED = "This is not the content of a tokenizer.json"
# A table of all ids is made for stop strings. Ids may have gaps, but a short file cannot ask for a
# large table.
_MAX_ID = 2**20
_MAX_IDS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class PrivateTokenizer:
    """A tokenizer whose special tokens have private spellings.

    **Arguments:**

    - `fast`: the tokenizer.
    - `private`: the private spellings, by the original ones.
    - `nonce`: the random part of the private spellings.
    - `declared`: the tokens that the config declares.
    - `decoder`: the entry `decoder` of `tokenizer.json`.
    - `kind`: the type of the tokenizer's model, such as `"BPE"`.
    """

    fast: "Fast"
    private: Mapping[str, str]
    nonce: str
    declared: DeclaredTokens
    decoder: object
    kind: str

    def stages(self) -> list[Tokens]:
        """Returns the original spellings of the added tokens, in the order in which `tokenizers`
        looks for them: in the text as it is, and then in the normalised rest."""
        added = self.fast.get_added_tokens_decoder().values()
        normalized = {token.content for token in added if token.normalized}
        return [
            Tokens(
                [text for text, name in self.private.items() if (name in normalized) == late],
                [
                    token.content
                    for token in added
                    if not token.special and token.normalized == late
                ],
            )
            for late in (False, True)
        ]


def private_tokenizer(file: str, config: Mapping[str, object]) -> PrivateTokenizer:
    """Builds a tokenizer whose special tokens have new private spellings.

    All ids are those of the original tokenizer. It neither truncates nor pads.

    **Arguments:**

    - `file`: the content of `tokenizer.json`.
    - `config`: the content of `tokenizer_config.json`.

    **Returns:**

    The tokenizer.

    **Raises:** `ValueError` if `file` is not the content of a `tokenizer.json`, or `config` has an
    entry of a wrong type; `ImportError` if the package `tokenizers` is not installed.
    """
    try:
        from tokenizers import AddedToken, Tokenizer
    except ImportError as error:
        raise ImportError(
            "Tokenizers of checkpoints require the package `tokenizers`: "
            'pip install "mamba_eqx[text]".'
        ) from error
    values, model, entries = _parse(file)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        checked(functools.partial(check_growth, name, values.get(name)), _FAILED)
    padding = values.get("padding")
    if isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
        # transformers gives the padding token of the file this role.
        config = {"pad_token": padding["pad_token"]} | dict(config)
    declared = declared_tokens(config, frozenset(str(entry["content"]) for entry in entries))
    special = [str(entry["content"]) for entry in entries if entry.get("special") is True]
    special += [token.content for token in declared.added if token.special]
    special = list(dict.fromkeys([*special, *declared.named.values()]))
    nonce = secrets.token_hex(16)
    private = {content: _spell(content, i, nonce) for i, content in enumerate(special) if content}
    for entry in entries:
        content = str(entry["content"])
        if content in private:
            entry.update(content=private[content], special=True)
    _rename(model, private)
    values["truncation"] = values["padding"] = None

    def load() -> "Fast":
        fast = Tokenizer.from_str(json.dumps(values))
        added = [
            dataclasses.replace(
                token,
                content=private.get(token.content, token.content),
                special=token.special or token.content in private,
            )
            for token in declared.added
        ]
        fast.add_tokens([AddedToken(**dataclasses.asdict(token)) for token in added])
        fast.encode("")  # Fails if a template of the post-processor names a token that it lacks.
        return fast

    fast = checked(load, _FAILED)
    kind = type(fast.model).__name__
    return PrivateTokenizer(fast, private, nonce, declared, values.get("decoder"), kind)


def _spell(content: str, index: int, nonce: str) -> str:
    """Returns a private spelling for a special token.

    The first and the last character remain, since `tokenizers` compares what stands next to them
    (for `single_word`), and normalisers may combine them with what follows. The part between is the
    same for all normalisers in use.
    """
    return f"{content[0]}{nonce}{index:08d}{content[-1]}"


def _parse(file: str) -> tuple[dict[str, object], dict[str, object], list[dict[str, object]]]:
    """Parses a `tokenizer.json`, and checks as much of its structure as this module relies on.

    **Returns:**

    The content, its model, and its added tokens.
    """
    try:
        values = json.loads(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_FAILED}: {error}.") from error
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f"{_FAILED}: it has no `model` with a `vocab`.")
    entries = values.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in entries
    ):
        raise ValueError(f"{_FAILED}: its `added_tokens` must be a list of objects with `content`.")
    vocab = model["vocab"]
    numbers = vocab.values() if isinstance(vocab, dict) else ()
    largest = max((number for number in numbers if isinstance(number, int)), default=0)
    limit = max(_MAX_ID, _MAX_IDS_PER_TOKEN * len(vocab))
    if largest >= limit:
        raise ValueError(
            f"{_FAILED}: its ids must be below {limit} for {len(vocab)} tokens, but got {largest}."
        )
    _check_merges(model)
    return values, model, entries


def _check_merges(model: Mapping[str, object]) -> None:
    """Checks that the second part of each merge can be cut after the prefix of continuing pieces.

    `tokenizers` cuts off as many bytes as the prefix has, whatever they are. Within a character,
    it would make a string that is not UTF-8, and abort the process.

    **Raises:** `ValueError` if there is such a merge.
    """
    merges, cut = model.get("merges"), _prefix_bytes(model)
    for merge in merges if isinstance(merges, list) and cut else ():
        parts = _parts(merge)
        if parts is not None and _without_prefix(parts[1], cut) is None:
            raise ValueError(
                f"{_FAILED}: the second part of a merge must begin with the "
                f"`continuing_subword_prefix`, but got {ascii(parts[1])[:100]}."
            )


def _prefix_bytes(model: Mapping[str, object]) -> int:
    prefix = model.get("continuing_subword_prefix")
    return len(prefix.encode("utf-8", "surrogatepass")) if isinstance(prefix, str) else 0


def _parts(merge: object) -> tuple[str, str] | None:
    """Returns the two parts of a merge, or `None` if it has no such parts."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)]:
            return left, right
        case _:
            return None


def _without_prefix(part: str, cut: int) -> str | None:
    """Returns a part of a merge without its first bytes, or `None` if these end in a character."""
    encoded = part.encode("utf-8", "surrogatepass")
    try:
        return encoded[cut:].decode("utf-8", "surrogatepass") if cut <= len(encoded) else None
    except UnicodeDecodeError:
        return None


def _rename(model: dict[str, object], private: Mapping[str, str]) -> None:
    """Gives the special tokens their private spellings in the model's vocabulary."""
    vocab = model["vocab"]
    merges = model.get("merges")
    if isinstance(vocab, dict):
        renamed = private.keys() & vocab.keys()
        model["vocab"] = {private.get(token, token): number for token, number in vocab.items()}
        if isinstance(merges, list) and renamed:
            makes_special = _merge_test(_prefix_bytes(model), renamed)
            model["merges"] = [merge for merge in merges if not makes_special(merge)]
    elif isinstance(vocab, list):
        model["vocab"] = [_rename_piece(piece, private) for piece in vocab]
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        model["unk_token"] = private.get(unknown, unknown)


def _rename_piece(piece: object, private: Mapping[str, str]) -> object:
    if isinstance(piece, list) and piece and isinstance(piece[0], str):
        return [private.get(piece[0], piece[0]), *piece[1:]]
    return piece


def _merge_test(cut: int, renamed: Sequence[str] | set[str]) -> Callable[[object], bool]:
    """Returns a function that tells whether a merge of the model reads or makes a special token.

    **Arguments:**

    - `cut`: the number of bytes of the prefix of continuing pieces.
    - `renamed`: the special tokens.
    """

    def makes_special(merge: object) -> bool:
        parts = _parts(merge)
        if parts is None:
            return False
        left, right = parts
        made = left + (_without_prefix(right, cut) or "")
        return left in renamed or right in renamed or made in renamed

    return makes_special
