"""The names of a checkpoint's files, and replacing the checkpoint in a folder."""

import os
import re
from pathlib import Path

from .._atomic import rename_all
from ._source import CONFIG
from ._weights import SAFETENSORS, SAFETENSORS_INDEX
from .layouts import Layout


_TORCH = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")
# The files that `save_pretrained` writes and therefore replaces, except those that a layout names.
_OURS = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(SAFETENSORS)}|{re.escape(SAFETENSORS_INDEX)}"
    r"|model-\d{5}-of-\d{5}\.safetensors"
)


def shard_name(index: int, count: int) -> str:
    """Returns the name of the weights file `index` of `count`, counted from 1."""
    return f"model-{index:05}-of-{count:05}.safetensors"


def is_torch_weights(name: str) -> bool:
    """Returns whether a file name is that of PyTorch weights, or of an index to them."""
    return bool(_TORCH.fullmatch(name))


def is_weights(name: str) -> bool:
    """Returns whether some reader would take a file of this name for weights or their index."""
    return name != CONFIG and (bool(_OURS.fullmatch(name)) or is_torch_weights(name))


def replace_checkpoint(target: Path, new: Path, old: Path, layout: Layout) -> None:
    """Moves the checkpoint in `target` to `old`, and the files in `new` to `target`.

    If one move fails, all moves are undone. The old config is moved first and the new config last,
    so that after a power failure an incomplete folder has no config and is refused, not misread.
    """
    configs, names = (CONFIG, layout.config_file), (layout.config_file, layout.weights_file)
    ours = [name for name in os.listdir(target) if _OURS.fullmatch(name) or name in names]
    departures = [(target / name, old / name) for name in ours]
    departures.sort(key=lambda move: move[0].name not in configs)
    arrivals = [(new / name, target / name) for name in os.listdir(new)]
    arrivals.sort(key=lambda move: move[0].name in configs)
    rename_all(departures + arrivals)
