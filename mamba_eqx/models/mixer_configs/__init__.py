"""The configs of the mixers, one per file."""

from ._attention import AttentionConfig as AttentionConfig
from ._base import AbstractMixerConfig as AbstractMixerConfig
from ._gated_delta_net import GatedDeltaNetConfig as GatedDeltaNetConfig
from ._mamba1 import Mamba1Config as Mamba1Config
from ._mamba2 import Mamba2Config as Mamba2Config
from ._mamba3 import Mamba3Config as Mamba3Config
from ._parallel import MIXER_CONFIGS as MIXER_CONFIGS, ParallelConfig as ParallelConfig
