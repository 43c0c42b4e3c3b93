"""The Mamba family of state-space models as Equinox modules."""

from . import (
    generation as generation,
    layers as layers,
    models as models,
    ops as ops,
    text as text,
    training as training,
)
from ._version import VERSION as __version__  # noqa: F401 (public)
from .generation import (
    DecodingState as DecodingState,
    Generation as Generation,
    Sampling as Sampling,
    beam_search as beam_search,
    decoding_state as decoding_state,
    embed as embed,
    fork as fork,
    generate as generate,
    load_state as load_state,
    prefill as prefill,
    sampling as sampling,
    save_state as save_state,
    score as score,
    speculate as speculate,
    stream as stream,
)
from .layers import (
    MLP as MLP,
    AbstractSequenceLayer as AbstractSequenceLayer,
    Attention as Attention,
    Bidirectional as Bidirectional,
    Block as Block,
    CausalConv1d as CausalConv1d,
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaNetState as GatedDeltaNetState,
    GatedMLP as GatedMLP,
    KVCache as KVCache,
    Mamba1 as Mamba1,
    Mamba1State as Mamba1State,
    Mamba2 as Mamba2,
    Mamba2State as Mamba2State,
    Mamba3 as Mamba3,
    Mamba3State as Mamba3State,
    MixtureOfExperts as MixtureOfExperts,
    Parallel as Parallel,
    Stacked as Stacked,
    Unrolled as Unrolled,
    cast as cast,
    recurrence_mask as recurrence_mask,
)
from .models import (
    AttentionConfig as AttentionConfig,
    BlockConfig as BlockConfig,
    GatedDeltaNetConfig as GatedDeltaNetConfig,
    GatedMLPConfig as GatedMLPConfig,
    LanguageModel as LanguageModel,
    LanguageModelConfig as LanguageModelConfig,
    Mamba1Config as Mamba1Config,
    Mamba2Config as Mamba2Config,
    Mamba3Config as Mamba3Config,
    MixtureOfExpertsConfig as MixtureOfExpertsConfig,
    MLPConfig as MLPConfig,
    ParallelConfig as ParallelConfig,
)
from .pretrained import (
    CheckpointError as CheckpointError,
    from_pretrained as from_pretrained,
    load_state_dict as load_state_dict,
    load_tokenizer as load_tokenizer,
    push_to_hub as push_to_hub,
    save_pretrained as save_pretrained,
    save_tokenizer as save_tokenizer,
    state_dict as state_dict,
)
from .shipped import SHIPPED as SHIPPED
from .text import ByteTokenizer as ByteTokenizer, TextTokenizer as TextTokenizer
