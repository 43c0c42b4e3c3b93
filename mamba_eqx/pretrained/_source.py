"""The files of a checkpoint: the config, and the weights in one file or in several."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from ..formats import CheckpointError, StoredTensor, open_safetensors, open_torch, quote, read_json
from .layouts import listing


CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_Open = Callable[[Path], dict[str, StoredTensor]]


# In transformers' order of preference: one file or an index of several, and how to open them.
_WEIGHTS: tuple[tuple[str, str, _Open], ...] = (
    (SAFETENSORS, SAFETENSORS_INDEX, open_safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", open_torch),
)
_MAX_INDEX = 2**21
_MAX_SHARDS = 2**12
Find = Callable[[str], Path | None]
"""Where the file of that name is, or `None` if the checkpoint has none."""


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
        content = read_json(index, _MAX_INDEX)
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
