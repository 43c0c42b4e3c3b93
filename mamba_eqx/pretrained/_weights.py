"""The weights of a checkpoint, in one file or in several with an index."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..formats import (
    CheckpointError,
    StoredTensor,
    is_plain_name,
    open_safetensors,
    open_torch,
    quote,
    read_json,
)
from ._source import Source
from .layouts import listing


SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"


class _Format(NamedTuple):
    single_file: str
    index_file: str
    open: Callable[[Path], dict[str, StoredTensor]]


# In transformers' order of preference.
_FORMATS = (
    _Format(SAFETENSORS, SAFETENSORS_INDEX, open_safetensors),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", open_torch),
)
_MAX_INDEX = 2**21
_MAX_SHARDS = 2**12


def open_weights(source: Source, name: str = SAFETENSORS) -> dict[str, StoredTensor]:
    """Opens the weights of a checkpoint without reading the values of the tensors.

    **Arguments:**

    - `source`: the files of the checkpoint.
    - `name`: the name of the layout's weights file, which takes precedence over the usual names.

    **Returns:**

    The tensors by name.

    **Raises:** `CheckpointError` if there are no weights, a file is damaged, or an index does not
    agree with its files.
    """
    own = None if name == SAFETENSORS else source.find(name)
    if own is not None:
        return open_safetensors(own)
    for format in _FORMATS:
        path = source.find(format.single_file)
        if path is not None:
            return format.open(path)
        path = source.find(format.index_file)
        if path is not None:
            return _open_shards(path, source, format)
    names = ", ".join(
        name for format in _FORMATS for name in (format.single_file, format.index_file)
    )
    raise CheckpointError(
        f"{source.where} has no weights: none of {names} is there. Give the folder or repository "
        "that holds the weights."
    )


def _open_shards(index: Path, source: Source, format: _Format) -> dict[str, StoredTensor]:
    def refuse(fault: str) -> NoReturn:
        raise CheckpointError(f"{index}: {fault} Download or save the checkpoint again.")

    try:
        content = read_json(index, _MAX_INDEX)
    except CheckpointError as error:
        raise CheckpointError(f"{index}: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("it has no `weight_map` from tensor names to file names.")
    for file in weight_map.values():
        if not isinstance(file, str) or not is_plain_name(file):
            refuse(f"it refers to {quote(str(file))}, which is not the plain name of a file.")
    files = sorted(set(weight_map.values()))
    if len(files) > _MAX_SHARDS:
        refuse(f"it refers to {len(files)} files, but at most {_MAX_SHARDS} are read.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        path = source.find(file)
        if path is None:
            refuse(f"the file {quote(file)} it refers to is missing.")
        shard = format.open(path)
        mapped = {name for name, its_file in weight_map.items() if its_file == file}
        if shard.keys() != mapped:
            missing, extra = sorted(mapped - shard.keys()), sorted(shard.keys() - mapped)
            faults = {"lacks": missing, "also holds": extra}
            text = " and ".join(f"{k} {listing([*map(quote, v)])}" for k, v in faults.items() if v)
            refuse(f"it disagrees with {quote(file)}, which {text}.")
        tensors |= shard
    return tensors
