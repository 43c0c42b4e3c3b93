"""The Mamba family of state-space models as Equinox modules."""

from . import ops as ops
from ._block import Block as Block
from ._config import (
    AbstractMixerConfig as AbstractMixerConfig,
    BlockConfig as BlockConfig,
    LanguageModelConfig as LanguageModelConfig,
    Mamba1Config as Mamba1Config,
)
from ._conv import CausalConv1d as CausalConv1d
from ._language_model import LanguageModel as LanguageModel
from ._mlp import GatedMLP as GatedMLP
from ._protocol import (
    RECURRENCE as RECURRENCE,
    AbstractSequenceLayer as AbstractSequenceLayer,
    cast as cast,
    recurrence_mask as recurrence_mask,
)
from ._stack import AbstractStack as AbstractStack, Stacked as Stacked, Unrolled as Unrolled
from .mixers import Mamba1 as Mamba1, Mamba1State as Mamba1State


__version__ = "0.1.0"
