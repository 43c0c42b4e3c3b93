"""The files of a checkpoint: the config, and the weights in one file or in several."""

import json
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from ._fields import decode_numbers
from ._layout import listing
from ._safetensors import open_safetensors
from ._stored import CheckpointError, StoredTensor, quote
from ._torch_pickle import open_torch


CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

_Open = Callable[[Path], dict[str, StoredTensor]]

# In transformers' order of preference: one file or an index of several, and how to open them.
_WEIGHTS: tuple[tuple[str, str, _Open], ...] = (
    (SAFETENSORS, SAFETENSORS_INDEX, open_safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", open_torch),
)

# Parsed JSON can take thirty times the memory of its text. There is room for 20,000 tensors.
_MAX_CONFIG = 2**18
_MAX_INDEX = 2**21
_MAX_SHARDS = 2**12

Find = Callable[[str], Path | None]
"""Where the file of that name is, or `None` if the checkpoint has none."""


def read_config(path: Path, max_size: int = _MAX_CONFIG) -> Any:
    """Parses a config, infinity in either spelling included.

    **Arguments:**

    - `max_size`: the most bytes that it may have.

    **Raises:** `CheckpointError` for NaN, a key that occurs twice, and all that is not JSON.
    """
    try:
        return decode_numbers(_read_json(path, max_size))
    except RecursionError:
        raise CheckpointError(f"{path}: it is nested too deeply: download it again.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_json(path: Path, max_size: int) -> Any:
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        # Reading a named pipe, say, waits for someone to write.
        raise CheckpointError("it is not a regular file: put the file itself there.")
    if status.st_size > max_size:
        raise CheckpointError(
            f"it has {status.st_size} bytes, but at most {max_size} are read: it is not the file "
            "that it should be. Download it again."
        )
    try:
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except CheckpointError:
        raise
    # Deep nesting ends in a `RecursionError`; all else that may be wrong is a `ValueError`.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"it is not valid JSON ({quote(str(error))}): download or save it again."
        ) from None


def open_weights(find: Find, where: str, name: str = SAFETENSORS) -> dict[str, StoredTensor]:
    """Opens the weights of a checkpoint; the values stay on disk until they are read.

    **Arguments:**

    - `find`: finds the checkpoint's files by name.
    - `where`: what to call the checkpoint in messages.
    - `name`: the file of weights that the layout has, where that is not the usual one.

    **Raises:** `CheckpointError` if there are none, or an index and its files disagree.
    """
    own = None if name == SAFETENSORS else find(name)
    if own is not None:
        return open_safetensors(own)
    for single, index, open_file in _WEIGHTS:
        path = find(single)
        if path is not None:
            return open_file(path)
        path = find(index)
        if path is not None:
            return _open_shards(path, find, open_file)
    names = ", ".join(name for single, index, _ in _WEIGHTS for name in (single, index))
    raise CheckpointError(f"{where} has no weights: none of {names} is there.")


def _open_shards(index: Path, find: Find, open_file: _Open) -> dict[str, StoredTensor]:
    def refuse(fault: str) -> NoReturn:
        raise CheckpointError(f"{index}: {fault} Download or save the checkpoint again.")

    try:
        content = _read_json(index, _MAX_INDEX)
    except CheckpointError as error:
        raise CheckpointError(f"{index}: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("it has no `weight_map` from the names of tensors to files.")
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_plain(file):
            refuse(f"it refers to {quote(str(file))}, which is not the plain name of a file.")
    files = sorted(set(weight_map.values()))
    if len(files) > _MAX_SHARDS:
        refuse(f"it refers to {len(files)} files, but at most {_MAX_SHARDS} are read.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        path = find(file)
        if path is None:
            refuse(f"the file {quote(file)} it refers to is missing.")
        shard = open_file(path)
        mapped = {name for name, its_file in weight_map.items() if its_file == file}
        if shard.keys() != mapped:
            missing, extra = sorted(mapped - shard.keys()), sorted(shard.keys() - mapped)
            faults = {"lacks": missing, "has, unmentioned,": extra}
            text = " and ".join(f"{k} {listing([*map(quote, v)])}" for k, v in faults.items() if v)
            refuse(f"it disagrees with {quote(file)}, which {text}.")
        tensors |= shard
    return tensors


def _is_plain(name: str) -> bool:
    # On every system the rules of both, so that a checkpoint is good everywhere or nowhere.
    return (
        name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
        and "\0" not in name
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise CheckpointError(f"the key {quote(name)} occurs twice: remove one.")
        unique[name] = value
    return unique
