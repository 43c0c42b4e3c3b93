"""The layout of Hugging Face's transformers: `config.json` with a `model_type`."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from .._config import LanguageModelConfig
from .._mixer_configs import AbstractMixerConfig, Mamba1Config, Mamba2Config
from ._fields import Fields
from ._layout import Entry, Layout
from ._names import language_model
from ._transformers_common import UNPADDED, inexpressible
from ._transformers_mamba import read_falcon_mamba, read_mamba, write_mamba
from ._transformers_mamba2 import read_mamba2, write_mamba2


_EMBEDDING = "backbone.embeddings.weight"

# Fields of every transformers config, old versions included, that matter to training, generation,
# other heads or the file, but not to logits.
_COMMON = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


# One line for each model type: how its config is read.
_READERS: MappingProxyType[str, Callable[[Fields], LanguageModelConfig]]
_READERS = MappingProxyType(
    {"mamba": read_mamba, "mamba2": read_mamba2, "falcon_mamba": read_falcon_mamba}
)

_Writer = Callable[[LanguageModelConfig, Any], dict[str, Any]]
# One line for each mixer: how the config is written, `model_type` included.
_WRITERS: MappingProxyType[type[AbstractMixerConfig], _Writer]
_WRITERS = MappingProxyType({Mamba1Config: write_mamba, Mamba2Config: write_mamba2})


def _read_config(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    reader = _READERS[fields.only("model_type", list(_READERS), None)]
    fields.ignore(_COMMON)
    config = reader(fields)
    fields.finish()
    return config


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    write = _WRITERS.get(type(config.layers[0].mixer))
    if write is None:
        raise inexpressible("mixer is not one of its own", type(config.layers[0].mixer).__name__)
    for i, layer in enumerate(config.layers):
        if layer != config.layers[0]:
            raise inexpressible("layers differ", f"layer 0 is {config.layers[0]}, {i} is {layer}")
    block = config.layers[0]
    if block.d_intermediate is not None:
        raise inexpressible("layers have an MLP", f"d_intermediate={block.d_intermediate}")
    if not (block.rms_norm and config.rms_norm):
        raise inexpressible("norms are not RMSNorm", "rms_norm=False")
    if block.norm_eps != config.norm_eps:
        raise inexpressible(
            "norms differ in `norm_eps`",
            f"{block.norm_eps} in the layers and {config.norm_eps} at the end",
        )
    fields = write(config, block.mixer) | {
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        # Spelt out, since the defaults would make token 0 end every text.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype.name,
    }
    if config.vocab_size != config.padded_vocab_size:
        fields[UNPADDED] = config.vocab_size
    return fields


def _entries(config: LanguageModelConfig) -> list[Entry]:
    _write_config(config, np.dtype(np.float32))  # It refuses what has no names there.
    return language_model(config, embedding=_EMBEDDING)


TRANSFORMERS = Layout(
    name="transformers",
    read_config=_read_config,
    write_config=_write_config,
    entries=_entries,
    embedding=_EMBEDDING,
    keeps_tied_head=False,
    # As its `MambaModel.load_hook` does.
    renames=MappingProxyType({"backbone.embedding.weight": _EMBEDDING}),
)
