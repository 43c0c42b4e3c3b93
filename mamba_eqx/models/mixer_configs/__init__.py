"""The configs of the mixers, one per file."""

from typing import Any

from ...layers import Attention, GatedDeltaNet, Mamba1, Mamba2, Mamba3
from ._attention import AttentionConfig as AttentionConfig
from ._base import AbstractMixerConfig as AbstractMixerConfig
from ._gated_delta_net import GatedDeltaNetConfig as GatedDeltaNetConfig
from ._mamba1 import Mamba1Config as Mamba1Config
from ._mamba2 import Mamba2Config as Mamba2Config
from ._mamba3 import Mamba3Config as Mamba3Config


# One entry for each mixer.
MIXER_CONFIGS: dict[type, type[AbstractMixerConfig[Any]]] = {
    Mamba1: Mamba1Config,
    Mamba2: Mamba2Config,
    Mamba3: Mamba3Config,
    GatedDeltaNet: GatedDeltaNetConfig,
    Attention: AttentionConfig,
}
