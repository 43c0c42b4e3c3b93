"""The Mamba family of state-space models as Equinox modules."""

from . import ops as ops, training as training
from ._beam_search import Beams as Beams, beam_search as beam_search
from ._bidirectional import Bidirectional as Bidirectional
from ._block import Block as Block
from ._config import BlockConfig as BlockConfig, LanguageModelConfig as LanguageModelConfig
from ._conv import CausalConv1d as CausalConv1d
from ._decoding import FinishReason as FinishReason, Generation as Generation
from ._generate import generate as generate, stream as stream
from ._language_model import LanguageModel as LanguageModel
from ._linear import Linear as Linear
from ._load_tokenizer import (
    load_tokenizer as load_tokenizer,
    save_tokenizer as save_tokenizer,
)
from ._mixer_configs import (
    AbstractMixerConfig as AbstractMixerConfig,
    AttentionConfig as AttentionConfig,
    Mamba1Config as Mamba1Config,
    Mamba2Config as Mamba2Config,
    Mamba3Config as Mamba3Config,
)
from ._mlp import GatedMLP as GatedMLP
from ._norm import GatedRMSNorm as GatedRMSNorm
from ._penalties import (
    Penalties as Penalties,
    frequency_penalty as frequency_penalty,
    presence_penalty as presence_penalty,
    repetition_penalty as repetition_penalty,
)
from ._prompts import DecodingState as DecodingState
from ._protocol import (
    RECURRENCE as RECURRENCE,
    AbstractCache as AbstractCache,
    AbstractSequenceLayer as AbstractSequenceLayer,
    cast as cast,
    recurrence_mask as recurrence_mask,
    with_room as with_room,
)
from ._sampling import (
    greedy as greedy,
    min_p as min_p,
    sample as sample,
    temperature as temperature,
    top_k as top_k,
    top_p as top_p,
    typical_p as typical_p,
)
from ._score import (
    Score as Score,
    embed as embed,
    fork as fork,
    prefill as prefill,
    score as score,
)
from ._speculative import (
    PromptLookup as PromptLookup,
    Speculation as Speculation,
    speculate as speculate,
)
from ._stack import AbstractStack as AbstractStack, Stacked as Stacked, Unrolled as Unrolled
from ._state_file import load_state as load_state, save_state as save_state
from ._stream import Stream as Stream
from ._text import (
    ByteDecoder as ByteDecoder,
    ByteTokenizer as ByteTokenizer,
    Decoder as Decoder,
    Tokenizer as Tokenizer,
)
from ._tokenizers import TextDecoder as TextDecoder, TextTokenizer as TextTokenizer
from .mixers import (
    Attention as Attention,
    KVCache as KVCache,
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
    push_to_hub as push_to_hub,
    save_pretrained as save_pretrained,
    state_dict as state_dict,
)


__version__ = "0.1.0"
