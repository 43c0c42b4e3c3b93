"""The Mamba family of state-space models as Equinox modules."""

from . import ops as ops
from ._block import Block as Block
from ._config import BlockConfig as BlockConfig, LanguageModelConfig as LanguageModelConfig
from ._conv import CausalConv1d as CausalConv1d
from ._generate import Generation as Generation, generate as generate, stream as stream
from ._language_model import LanguageModel as LanguageModel
from ._linear import Linear as Linear
from ._mixer_configs import (
    AbstractMixerConfig as AbstractMixerConfig,
    Mamba1Config as Mamba1Config,
    Mamba2Config as Mamba2Config,
    Mamba3Config as Mamba3Config,
)
from ._mlp import GatedMLP as GatedMLP
from ._norm import GatedRMSNorm as GatedRMSNorm
from ._prompts import DecodingState as DecodingState
from ._protocol import (
    RECURRENCE as RECURRENCE,
    AbstractSequenceLayer as AbstractSequenceLayer,
    cast as cast,
    recurrence_mask as recurrence_mask,
)
from ._sampling import (
    greedy as greedy,
    min_p as min_p,
    sample as sample,
    temperature as temperature,
    top_k as top_k,
    top_p as top_p,
)
from ._stack import AbstractStack as AbstractStack, Stacked as Stacked, Unrolled as Unrolled
from ._text import (
    ByteDecoder as ByteDecoder,
    ByteTokenizer as ByteTokenizer,
    Decoder as Decoder,
    Tokenizer as Tokenizer,
)
from .mixers import (
    Mamba1 as Mamba1,
    Mamba1State as Mamba1State,
    Mamba2 as Mamba2,
    Mamba2State as Mamba2State,
    Mamba3 as Mamba3,
    Mamba3State as Mamba3State,
)
from .pretrained import (
    CheckpointError as CheckpointError,
    from_pretrained as from_pretrained,
    load_state_dict as load_state_dict,
    save_pretrained as save_pretrained,
    state_dict as state_dict,
)


__version__ = "0.1.0"
