"""The tokenizer that belongs to a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

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
_MAX_CONFIG = 2**22  # Some list a thousand added tokens.


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

    - From `tokenizer.json`, with `tokenizer_config.json` and `chat_template.jinja` where they are
      there, a [`mamba_eqx.TextTokenizer`][].
    - Where `tokenizer_config.json` says `{"tokenizer_class": "ByteTokenizer"}`, as the one of the
      model that ships does and [`mamba_eqx.save_tokenizer`][] writes it, a
      [`mamba_eqx.ByteTokenizer`][].
    - The original `state-spaces` repositories have none: their models were trained with that of
      `EleutherAI/gpt-neox-20b`, and it is loaded for a checkpoint in their layout whose vocabulary
      has their size, 50277.

    Nothing is guessed from the size of the vocabulary alone, and no code of a checkpoint is run.

    **Arguments:** as for [`mamba_eqx.from_pretrained`][]. A `revision` is that of the repository
    named; the tokenizer of `EleutherAI/gpt-neox-20b` is that of its main branch.

    **Returns:** the tokenizer.

    **Raises:** [`mamba_eqx.CheckpointError`][] if there is none, or it is damaged, or not to be had
    from the Hub; `FileNotFoundError` for a path at which there is no folder; `ImportError` if the
    package `tokenizers` is needed and missing.
    """
    hub = Hub(revision, token, cache_dir, local_files_only, endpoint=endpoint)
    return _load(name_or_path, hub)


def _load(name_or_path: str | os.PathLike[str], hub: Hub) -> TextTokenizer | ByteTokenizer:
    source = open_source(name_or_path, hub, entry_files=(*CONFIGS, TOKENIZER))
    return read_tokenizer(source, hub)


def read_tokenizer(source: Source, hub: Hub) -> TextTokenizer | ByteTokenizer:
    """Reads the tokenizer of a checkpoint; `hub` says how to access that of another repository."""
    config_path = source.find(TOKENIZER_CONFIG)
    config = {} if config_path is None else read_config(config_path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: it must be a JSON object.")
    path = source.find(TOKENIZER)
    if path is not None:
        template = source.find(CHAT_TEMPLATE)
        if template is not None:
            # Where transformers puts it now; one in the config is from before.
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
                f"{source.where} has no {TOKENIZER}; its model was trained with that of {_NEOX}, "
                f"which could not be loaded: {error}"
            ) from error
    raise CheckpointError(
        f"{source.where} has no {TOKENIZER}: take the tokenizer of the repository that the model "
        f"was trained with. If its tokens are bytes, put a {TOKENIZER_CONFIG} there that says "
        f"{json.dumps(_BYTES)}, as `mamba_eqx.save_tokenizer` does."
    )


def save_tokenizer(tokenizer: TextTokenizer | ByteTokenizer, path: str | os.PathLike[str]) -> None:
    """Saves a tokenizer into the folder of a checkpoint, from which `load_tokenizer` loads it.

    **Arguments:**

    - `tokenizer`: of text, or that of bytes, for which a `tokenizer_config.json` says so.
    - `path`: the folder, which is made if need be.
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


def _dump(config: Any) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _text_tokenizer(path: Path, config: dict[str, Any]) -> TextTokenizer:
    try:
        return TextTokenizer(_read_text(path), config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error} Download or save it again.") from error


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(f"{path}: it has {size} bytes, but at most {_MAX_BYTES} are read.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: it is not UTF-8 text: {error}.") from error


def _is_original(source: Source) -> bool:
    path = source.find(CONFIG)
    values = None if path is None else read_config(path)
    return (
        isinstance(values, dict)
        and "model_type" not in values
        and values.get("vocab_size") == _NEOX_VOCABULARY
    )
