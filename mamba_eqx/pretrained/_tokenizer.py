"""Loading and saving the tokenizer of a checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..formats import CheckpointError, read_config
from ..text import ByteTokenizer, TextTokenizer
from ._hub import Hub
from ._source import CONFIG, CONFIGS, Source, open_source


TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
_BYTES = {"tokenizer_class": "ByteTokenizer"}
_NEOX = "EleutherAI/gpt-neox-20b"
_NEOX_VOCABULARY = 50277
_MAX_BYTES = 2**28
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
      `tokenizer_config.json` and `chat_template.jinja` are read if present.
    - A checkpoint whose `tokenizer_config.json` contains `{"tokenizer_class": "ByteTokenizer"}` has
      a [`mamba_eqx.ByteTokenizer`][]. [`mamba_eqx.save_tokenizer`][] writes this file, and the
      bundled model has one.
    - The original `state-spaces` repositories contain no tokenizer, because their models were
      trained with the tokenizer of `EleutherAI/gpt-neox-20b`. It is loaded for checkpoints in the
      `state-spaces` layout with their vocabulary size, 50277.

    Nothing is guessed from the vocabulary size alone, and no code from a checkpoint is run.

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
    config_path = source.find(TOKENIZER_CONFIG)
    config = {} if config_path is None else read_config(config_path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: it must be a JSON object.")
    path = source.find(TOKENIZER)
    if path is not None:
        template = source.find(CHAT_TEMPLATE)
        if template is not None:
            # transformers now writes templates here; one in the config is from an older version.
            config = config | {"chat_template": _read_text(template)}
        return _text_tokenizer(path, config)
    if config.get("tokenizer_class") == _BYTES["tokenizer_class"]:
        return ByteTokenizer()
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
        f"{json.dumps(_BYTES)}, as `mamba_eqx.save_tokenizer` writes it."
    )


def save_tokenizer(tokenizer: TextTokenizer | ByteTokenizer, path: str | os.PathLike[str]) -> None:
    """Saves a tokenizer into the folder of a checkpoint, where `load_tokenizer` finds it.

    **Arguments:**

    - `tokenizer`: a tokenizer of this package. A `ByteTokenizer` is saved as a
        `tokenizer_config.json` that names it.
    - `path`: the folder, created if it does not exist. A tokenizer in it is replaced.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, ByteTokenizer):
        files = {TOKENIZER_CONFIG: _dump(_BYTES)}
    else:
        files = {TOKENIZER: tokenizer.to_json(), TOKENIZER_CONFIG: _dump(tokenizer.config)}
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")


def _dump(config: Mapping[str, object]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _text_tokenizer(path: Path, config: Mapping[str, object]) -> TextTokenizer:
    try:
        return TextTokenizer(_read_text(path), config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error} Download or save it again.") from error


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: it must have at most {_MAX_BYTES} bytes, but has {size}. Download it again."
        )
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: it is not UTF-8 text: {error}. Download or save it again."
        ) from error


def _is_original(source: Source) -> bool:
    """Returns whether a checkpoint looks like an original `state-spaces` repository."""
    path = source.find(CONFIG)
    values = None if path is None else read_config(path)
    return (
        isinstance(values, dict)
        and "model_type" not in values
        and values.get("vocab_size") == _NEOX_VOCABULARY
    )
