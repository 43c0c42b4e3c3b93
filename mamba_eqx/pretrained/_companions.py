"""What a checkpoint holds beside the model: the files of its tokenizer, and the ids of its special
tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..formats import CheckpointError, read_bytes
from ..text import ByteTokenizer, SpecialIds, TextTokenizer
from ._source import Source
from ._token_ids import GENERATION_CONFIG, config_ids, declared_ids, ids_to_json


TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Those that are read here, and those that transformers can make a tokenizer from instead.
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
BYTES: Mapping[str, object] = {"tokenizer_class": "ByteTokenizer"}
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class Companions:
    """The files beside the config and the weights of a checkpoint, and the ids that they declare.

    - `ids`: the ids for the config of the model.
    - `files`: the content of the files by name.
    - `replaces`: the names of the files of an older checkpoint that must not stay beside these.
    """

    ids: SpecialIds = field(default_factory=SpecialIds)
    files: Mapping[str, bytes] = field(default_factory=dict)
    replaces: frozenset[str] = frozenset()

    def write(self, folder: Path) -> None:
        """Writes the files to a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def companions_of(
    tokenizer: TextTokenizer | ByteTokenizer, generation: Mapping[str, object] | None = None
) -> Companions:
    """Returns the companions of a checkpoint with a tokenizer.

    **Arguments:**

    - `tokenizer`: a tokenizer of this package.
    - `generation`: the `generation_config.json` in which the ids are replaced; an empty one by
        default.

    **Raises:** `ValueError` if `tokenizer` is not a tokenizer of this package.
    """
    match tokenizer:
        case ByteTokenizer():
            files = {TOKENIZER_CONFIG: _dump(BYTES)}
        case TextTokenizer():
            files = {
                TOKENIZER: tokenizer.to_json().encode("utf-8"),
                TOKENIZER_CONFIG: _dump(tokenizer.config),
            }
        case _:
            raise ValueError(
                "`tokenizer` must be a `TextTokenizer` or a `ByteTokenizer`, but got "
                f"{type(tokenizer).__name__}. Save another one with its own library."
            )
    files[GENERATION_CONFIG] = _dump({**(generation or {}), **ids_to_json(tokenizer.ids)})
    return Companions(tokenizer.ids, files, frozenset((*TOKENIZER_FILES, GENERATION_CONFIG)))


def read_companions(source: Source, *, ids_in_config: bool) -> Companions:
    """Reads the companions of a checkpoint, to be copied to another one.

    The content of the files is not interpreted, except for the ids.

    **Arguments:**

    - `source`: the files of the checkpoint.
    - `ids_in_config`: whether the config of the other checkpoint declares ids. If it cannot, they
        are declared in a `generation_config.json`.

    **Raises:** `CheckpointError` if a file cannot be read, or the ids are not valid.
    """
    files = {
        name: _read(path, _MAX_BYTES)
        for name in (*TOKENIZER_FILES, GENERATION_CONFIG)
        if (path := source.find(name)) is not None
    }
    declared, in_config = declared_ids(source), config_ids(source)
    ids = declared if in_config is None else in_config
    if GENERATION_CONFIG not in files and not ids_in_config and declared != SpecialIds():
        files[GENERATION_CONFIG] = _dump(ids_to_json(declared))
    replaces: set[str] = set()
    if files or ids != SpecialIds():
        replaces.add(GENERATION_CONFIG)
    if files.keys() - {GENERATION_CONFIG}:
        replaces |= set(TOKENIZER_FILES)
    return Companions(ids, files, frozenset(replaces))


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_text(path: Path, limit: int) -> str:
    """Reads a regular file of at most `limit` bytes as UTF-8.

    **Raises:** `CheckpointError` for a larger file, for what is not a regular file, and for what is
    not UTF-8.
    """
    try:
        return _read(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: it is not UTF-8 text: {error}. Download or save it again."
        ) from error


def _dump(values: Mapping[str, object]) -> bytes:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate, which UTF-8 does not have, becomes the escape that JSON has for it.
    return text.encode("utf-8", "backslashreplace")
