"""The names of the files that a checkpoint consists of."""

import re

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


def is_replaced(name: str, layout: Layout) -> bool:
    """Returns whether saving a model in a layout replaces a file of this name."""
    return bool(_OURS.fullmatch(name)) or name in (layout.config_file, layout.weights_file)
