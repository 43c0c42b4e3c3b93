"""What transformers' model types of state-space layers alone share: `mamba` and its siblings."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from ....models import AbstractMixerConfig, LanguageModelConfig, Mamba1Config, Mamba2Config
from ._common import inexpressible
from ._mamba import write_mamba
from ._mamba2 import write_mamba2


EMBEDDING = "backbone.embeddings.weight"


# One line for each mixer: how the config is written, `model_type` included.
_WRITERS: MappingProxyType[
    type[AbstractMixerConfig], Callable[[LanguageModelConfig, Any], dict[str, Any]]
] = MappingProxyType({Mamba1Config: write_mamba, Mamba2Config: write_mamba2})


def write_plain(config: LanguageModelConfig) -> dict[str, Any]:
    """The config of a model whose layers are alike, and have no MLP."""
    block = config.layers[0]
    write = _WRITERS.get(type(block.mixer))
    if write is None:
        raise inexpressible("mixer is not one of its own", type(block.mixer).__name__)
    for i, layer in enumerate(config.layers):
        if layer != block:
            raise inexpressible("layers differ", f"layer 0 is {block}, {i} is {layer}")
    return write(config, block.mixer) | {
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
    }
