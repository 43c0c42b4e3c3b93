"""The Mamba family of state-space models as Equinox modules."""

import importlib as _importlib
import typing as _typing

from . import layers as layers, models as models, ops as ops
from ._compilation_cache import use_compilation_cache as use_compilation_cache
from ._version import VERSION as __version__  # noqa: F401 (public)
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
    Quantization as Quantization,
    SequenceClassifier as SequenceClassifier,
    SequenceClassifierConfig as SequenceClassifierConfig,
    quantize as quantize,
)
from .shipped import SHIPPED as SHIPPED


# The other half of the package, and optax with it, would take half of the time of the import, so
# it is imported at its first use. Type checkers see what they would see otherwise.
if _typing.TYPE_CHECKING:
    from . import (
        generation as generation,
        inspection as inspection,
        sharding as sharding,
        testing as testing,
        text as text,
        training as training,
    )
    from .generation import (
        DecodingState as DecodingState,
        Engine as Engine,
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
    from .inspection import summary as summary
    from .pretrained import (
        CheckpointError as CheckpointError,
        from_pretrained as from_pretrained,
        layouts_for as layouts_for,
        load_classifier as load_classifier,
        load_state_dict as load_state_dict,
        load_tokenizer as load_tokenizer,
        push_to_hub as push_to_hub,
        save_classifier as save_classifier,
        save_pretrained as save_pretrained,
        save_tokenizer as save_tokenizer,
        state_dict as state_dict,
    )
    from .sharding import (
        context_scan as context_scan,
        shard as shard,
        shard_rows as shard_rows,
        tensor_parallel as tensor_parallel,
    )
    from .text import ByteTokenizer as ByteTokenizer, TextTokenizer as TextTokenizer

_LAZY = {
    "generation": "DecodingState Engine Generation Sampling beam_search decoding_state embed fork "
    "generate load_state prefill sampling save_state score speculate stream",
    "inspection": "summary",
    "pretrained": "CheckpointError from_pretrained layouts_for load_classifier "
    "load_state_dict load_tokenizer push_to_hub save_classifier save_pretrained save_tokenizer "
    "state_dict",
    "sharding": "context_scan shard shard_rows tensor_parallel",
    "testing": "",
    "text": "ByteTokenizer TextTokenizer",
    "training": "",
}
_PART_OF = {name: part for part, names in _LAZY.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return _importlib.import_module(f".{name}", __name__)
    if name not in _PART_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = _importlib.import_module(f".{_PART_OF[name]}", __name__)
    value = globals()[name] = getattr(part, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_PART_OF})


if not _typing.TYPE_CHECKING:  # For `from mamba_eqx import *`.
    __all__ = [name for name in __dir__() if not name.startswith("_")]
