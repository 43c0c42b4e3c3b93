"""Configs of mixers: what each is made of."""

from ...layers import Attention, Mamba1, Mamba2, Mamba3
from ._attention import AttentionConfig as AttentionConfig
from ._base import (
    AbstractMixerConfig as AbstractMixerConfig,
    check_eps as check_eps,
    check_flag as check_flag,
    check_size as check_size,
)
from ._mamba1 import Mamba1Config as Mamba1Config
from ._mamba2 import Mamba2Config as Mamba2Config
from ._mamba3 import Mamba3Config as Mamba3Config


# One line for each mixer.
CONFIG_OF: dict[type, type[AbstractMixerConfig]] = {
    Mamba1: Mamba1Config,
    Mamba2: Mamba2Config,
    Mamba3: Mamba3Config,
    Attention: AttentionConfig,
}
CONFIG_NAMED = {config.kind: config for config in CONFIG_OF.values()}
