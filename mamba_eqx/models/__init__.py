"""The models, and the configs that build models and are read from them."""

from ._block_config import BlockConfig as BlockConfig
from ._fingerprint import fingerprint as fingerprint
from ._language_model import LanguageModel as LanguageModel
from ._language_model_config import LanguageModelConfig as LanguageModelConfig
from ._quantize import (
    HEAD as HEAD,
    Quantization as Quantization,
    linear_maps as linear_maps,
    quantize as quantize,
    with_head as with_head,
)
from ._sequence_classifier import SequenceClassifier as SequenceClassifier
from ._sequence_classifier_config import SequenceClassifierConfig as SequenceClassifierConfig
from .mixer_configs import (
    AbstractMixerConfig as AbstractMixerConfig,
    AttentionConfig as AttentionConfig,
    GatedDeltaNetConfig as GatedDeltaNetConfig,
    Mamba1Config as Mamba1Config,
    Mamba2Config as Mamba2Config,
    Mamba3Config as Mamba3Config,
    ParallelConfig as ParallelConfig,
)
from .mlp_configs import (
    AbstractMLPConfig as AbstractMLPConfig,
    GatedMLPConfig as GatedMLPConfig,
    MixtureOfExpertsConfig as MixtureOfExpertsConfig,
    MLPConfig as MLPConfig,
)


# The public names. Other folders of the package may import the other names too.
__all__ = [
    "AbstractMLPConfig",
    "AbstractMixerConfig",
    "AttentionConfig",
    "BlockConfig",
    "GatedDeltaNetConfig",
    "GatedMLPConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "MLPConfig",
    "Mamba1Config",
    "Mamba2Config",
    "Mamba3Config",
    "MixtureOfExpertsConfig",
    "ParallelConfig",
    "Quantization",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "quantize",
]
