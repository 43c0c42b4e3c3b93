"""The language model, and the configs that build models and are read off them."""

from ._config import BlockConfig as BlockConfig, LanguageModelConfig as LanguageModelConfig
from ._fingerprint import fingerprint as fingerprint
from ._language_model import LanguageModel as LanguageModel
from .mixer_configs import (
    AbstractMixerConfig as AbstractMixerConfig,
    AttentionConfig as AttentionConfig,
    Mamba1Config as Mamba1Config,
    Mamba2Config as Mamba2Config,
    Mamba3Config as Mamba3Config,
)


# The public names. The others are for the other folders of the package.
__all__ = [
    "AbstractMixerConfig",
    "AttentionConfig",
    "BlockConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba1Config",
    "Mamba2Config",
    "Mamba3Config",
]
