"""The layout of Hugging Face's transformers: `config.json` with a `model_type`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from ....models import AttentionConfig, LanguageModelConfig, Mamba1Config, Mamba2Config
from .._fields import Fields
from .._layout import Entry, Layout
from .._names import language_model
from ._bamba import read_bamba, write_bamba
from ._common import UNPADDED, inexpressible
from ._hybrid_names import EMBEDDING as HYBRID_EMBEDDING, hybrid_model
from ._jamba import read_jamba, write_jamba
from ._mamba import read_falcon_mamba, read_mamba
from ._mamba2 import read_mamba2
from ._plain import EMBEDDING as PLAIN_EMBEDDING, write_plain


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
    {
        "mamba": read_mamba,
        "mamba2": read_mamba2,
        "falcon_mamba": read_falcon_mamba,
        "bamba": read_bamba,
        "jamba": read_jamba,
    }
)


@dataclass(frozen=True)
class _Family:
    """How a model is written: its config, `model_type` included, and its names."""

    write: Callable[[LanguageModelConfig], dict[str, Any]]
    entries: Callable[[LanguageModelConfig], list[Entry]]
    embedding: str


_PLAIN = _Family(
    write=write_plain,
    entries=lambda config: language_model(config, embedding=PLAIN_EMBEDDING),
    embedding=PLAIN_EMBEDDING,
)
_BAMBA = _Family(write=write_bamba, entries=hybrid_model, embedding=HYBRID_EMBEDDING)
_JAMBA = _Family(write=write_jamba, entries=hybrid_model, embedding=HYBRID_EMBEDDING)


def _family(config: LanguageModelConfig) -> _Family:
    """The one that may hold a model, by what its layers are; whether it does, `write` finds out."""
    has_mlp = any(layer.d_intermediate is not None for layer in config.layers)
    kinds = {type(layer.mixer) for layer in config.layers}
    if AttentionConfig not in kinds and not has_mlp:
        return _PLAIN
    if kinds <= {Mamba2Config, AttentionConfig}:
        return _BAMBA
    if kinds <= {Mamba1Config, AttentionConfig}:
        return _JAMBA
    raise inexpressible(
        "mixers are of these kinds", ", ".join(sorted(kind.__name__ for kind in kinds))
    )


def _read_config(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    reader = _READERS[fields.only("model_type", list(_READERS), None)]
    fields.ignore(_COMMON)
    config = reader(fields)
    fields.finish()
    return config


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    for layer in config.layers:
        if not (layer.rms_norm and config.rms_norm):
            raise inexpressible("norms are not RMSNorm", "rms_norm=False")
        if layer.norm_eps != config.norm_eps:
            raise inexpressible(
                "norms differ in `norm_eps`",
                f"{layer.norm_eps} in the layers and {config.norm_eps} at the end",
            )
    fields = _family(config).write(config) | {
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
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


def _check(config: LanguageModelConfig) -> None:
    _write_config(config, np.dtype(np.float32))


def _entries(config: LanguageModelConfig) -> list[Entry]:
    return _family(config).entries(config)


TRANSFORMERS = Layout(
    name="transformers",
    read_config=_read_config,
    check=_check,
    write_config=_write_config,
    entries=_entries,
    embedding=lambda config: _family(config).embedding,
    keeps_tied_head=False,
    # As its `MambaModel.load_hook` does.
    renames=MappingProxyType({"backbone.embedding.weight": PLAIN_EMBEDDING}),
)
