"""Loading and saving the tokenizer of a checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .._atomic import replaced_files
from ..formats import CheckpointError, read_config, read_object
from ..text import ByteTokenizer, SpecialIds, TextTokenizer
from ._companions import (
    ADDED_TOKENS,
    BYTES,
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    companions_of,
    read_text,
)
from ._hub import Hub
from ._source import CONFIG, CONFIGS, Source, open_source
from ._token_ids import read_generation_config, usable_ids


_NEOX = "EleutherAI/gpt-neox-20b"
_NEOX_VOCABULARY = 50277
_MAX_TOKENIZER = 2**28
_MAX_TEMPLATE = 2**22
_MAX_CONFIG = 2**22  # Some configs list a thousand added tokens.


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> TextTokenizer | ByteTokenizer:
    """Loads the tokenizer of a checkpoint.

    - A checkpoint with a `tokenizer.json` has a [`mamba_eqx.TextTokenizer`][]. Its
      `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
      `chat_template.jinja` are read if present.
    - A checkpoint whose `tokenizer_config.json` contains `{"tokenizer_class": "ByteTokenizer"}` has
      a [`mamba_eqx.ByteTokenizer`][]. [`mamba_eqx.save_tokenizer`][] writes this file, and the
      bundled model has one.
    - The original `state-spaces` repositories contain no tokenizer, because their models were
      trained with the tokenizer of `EleutherAI/gpt-neox-20b`. It is loaded for checkpoints in the
      `state-spaces` layout with their vocabulary size, 50277.

    The ids of the tokens that begin, end and pad a text are those that `generation_config.json`
    declares, or else `config.json`. Nothing is guessed from the vocabulary size alone, and no code
    from a checkpoint is run.

    **Arguments:**

    - `name_or_path`, `revision`, `token`, `cache_dir`, `local_files_only`, `endpoint`: as for
        [`mamba_eqx.from_pretrained`][]. The `revision` applies to the named repository only: the
        tokenizer of `EleutherAI/gpt-neox-20b` is loaded from its main branch.

    **Returns:**

    The tokenizer.

    **Raises:** [`mamba_eqx.CheckpointError`][] if there is no tokenizer, or it is damaged or cannot
    be downloaded; `FileNotFoundError` for a path at which there is no folder; `ImportError` if the
    package `tokenizers` is required and not installed.
    """
    hub = Hub(revision, token, cache_dir, local_files_only, endpoint=endpoint)
    return _load(name_or_path, hub)


def _load(name_or_path: str | os.PathLike[str], hub: Hub) -> TextTokenizer | ByteTokenizer:
    source = open_source(name_or_path, hub, entry_files=(*CONFIGS, TOKENIZER))
    return read_tokenizer(source, hub)


def read_tokenizer(source: Source, hub: Hub) -> TextTokenizer | ByteTokenizer:
    """Reads the tokenizer from the files of a checkpoint.

    **Arguments:**

    - `source`: the files of the checkpoint.
    - `hub`: the options for access to the Hub, for a tokenizer in another repository.

    **Returns:**

    The tokenizer.

    **Raises:** the same errors as `load_tokenizer`.
    """
    config = _read_object(source, TOKENIZER_CONFIG) or {}
    path = source.find(TOKENIZER)
    if path is not None:
        text = read_text(path, _MAX_TOKENIZER)
        config = _with_companions(source, config, text)
        return _text_tokenizer(path, text, config, usable_ids(source))
    if config.get("tokenizer_class") == BYTES["tokenizer_class"]:
        return ByteTokenizer(ids=usable_ids(source))
    if _is_original(source):
        other = Hub(None, hub.token, hub.cache_dir, hub.local_files_only, endpoint=hub.endpoint)
        try:
            return _load(_NEOX, other)
        except CheckpointError as error:
            raise CheckpointError(
                f"{source.where} has no {TOKENIZER}: its model was trained with the tokenizer of "
                f"{_NEOX}, which could not be loaded: {error}"
            ) from error
    raise CheckpointError(
        f"{source.where} has no {TOKENIZER}: use the tokenizer of the repository that the model "
        f"was trained with. If its tokens are bytes, add a {TOKENIZER_CONFIG} that contains "
        f"{json.dumps(BYTES)}, as `mamba_eqx.save_tokenizer` writes it."
    )


def save_tokenizer(tokenizer: TextTokenizer | ByteTokenizer, path: str | os.PathLike[str]) -> None:
    """Saves a tokenizer into the folder of a checkpoint, where `load_tokenizer` finds it.

    All files appear together, and a tokenizer in the folder is replaced as a whole, whatever its
    files are. It is untouched if anything goes wrong. The ids of special tokens are written to
    `generation_config.json`, whose other fields are kept.

    To save a model and its tokenizer at once, give [`mamba_eqx.save_pretrained`][] the tokenizer.

    **Arguments:**

    - `tokenizer`: a tokenizer of this package. A `ByteTokenizer` is saved as a
        `tokenizer_config.json` that names it.
    - `path`: the folder, created if it does not exist. A tokenizer in it is replaced.

    **Raises:** `ValueError` if `tokenizer` is not a tokenizer of this package; `FileExistsError` if
    `path` is a file.
    """
    folder = Path(path)
    try:
        generation = read_generation_config(open_source(folder, Hub())) if folder.is_dir() else {}
    except CheckpointError:
        generation = {}  # A damaged file has no fields to keep, and is replaced.
    companions = companions_of(tokenizer, generation)
    with replaced_files(folder, stale=companions.replaces.__contains__) as new:
        companions.write(new)


def _with_companions(
    source: Source, config: Mapping[str, object], tokenizer: str
) -> dict[str, object]:
    """Returns `tokenizer_config.json` with what the other files of a tokenizer declare.

    As in transformers, the two older files are read only if the config does not list the added
    tokens itself.
    """
    merged = dict(config)
    if "added_tokens_decoder" not in merged:
        for key, value in (_read_object(source, SPECIAL_TOKENS) or {}).items():
            if key == "extra_special_tokens" and isinstance(value, list):
                before = merged.get(key)
                before = before if isinstance(before, list) else []
                value = [*before, *(t for t in map(_declared, value) if t not in before)]
            merged[key] = _declared(value)
        added = _added_tokens(source, merged, tokenizer)
        if added:
            merged["added_tokens_decoder"] = added
    template = source.find(CHAT_TEMPLATE)
    if template is not None:
        # transformers now writes templates here; one in the config is from an older version.
        merged["chat_template"] = read_text(template, _MAX_TEMPLATE)
    return merged


def _declared(token: object) -> object:
    """Returns a token of `special_tokens_map.json` as transformers reads it in the config."""
    if isinstance(token, dict) and "content" in token:
        return {"__type": "AddedToken", **token, "special": True}
    return token


def _added_tokens(
    source: Source, config: Mapping[str, object], tokenizer: str
) -> dict[str, dict[str, object]]:
    """Returns the tokens of `added_tokens.json` that `tokenizer.json` lacks, in the format of
    `added_tokens_decoder`."""
    listed = _read_object(source, ADDED_TOKENS)
    if not listed:
        return {}
    try:
        known = {token["content"] for token in json.loads(tokenizer).get("added_tokens") or ()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}  # The tokenizer is damaged, which is reported when it is built.
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        named += more if isinstance(more, list) else []
    special = [token.get("content") if isinstance(token, dict) else token for token in named]
    return {
        str(number): {"content": token, "special": token in special}
        for token, number in listed.items()
        if token not in known
    }


def _read_object(source: Source, name: str) -> dict[str, object] | None:
    """Reads a JSON object, or returns `None` if there is no such file."""
    path = source.find(name)
    return None if path is None else read_object(path, _MAX_CONFIG)


def _text_tokenizer(
    path: Path, text: str, config: Mapping[str, object], ids: SpecialIds
) -> TextTokenizer:
    try:
        return TextTokenizer(text, config, ids=ids)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error} Download or save it again.") from error


def _is_original(source: Source) -> bool:
    """Returns whether a checkpoint looks like an original `state-spaces` repository."""
    path = source.find(CONFIG)
    values = None if path is None else read_config(path)
    return (
        isinstance(values, dict)
        and "model_type" not in values
        and values.get("vocab_size") == _NEOX_VOCABULARY
    )
