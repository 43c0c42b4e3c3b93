"""The layout of Hugging Face transformers: a `config.json` with a `model_type`."""

from types import MappingProxyType

import numpy as np

from ....models import AttentionConfig, LanguageModelConfig, Mamba1Config, Mamba2Config
from .._fields import Fields
from .._layout import Layout, Slot, Unstorable
from .._mixers import layer_kind
from .._tables import JSON
from ._bamba import BAMBA
from ._family import Family
from ._jamba import JAMBA
from ._mamba import EMBEDDING, FALCON_MAMBA, MAMBA
from ._mamba2 import MAMBA2


# Fields of every transformers config, including old versions, that concern training, generation,
# other heads or the file, but not the logits.
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


# One line for each model type.
_FAMILIES = MappingProxyType(
    {family.model_type: family for family in (MAMBA, MAMBA2, FALCON_MAMBA, BAMBA, JAMBA)}
)


def _family(config: LanguageModelConfig) -> Family:
    """Returns the family that may store a model, judging by the kinds of its layers.

    **Raises:** `Unstorable` if no family has layers of these kinds.
    """
    mixers = [layer.mixer for layer in config.layers]
    kinds = {type(mixer) for mixer in mixers}
    has_mlp = any(layer.d_intermediate is not None for layer in config.layers)
    if AttentionConfig not in kinds and not has_mlp:
        match mixers[0]:
            case Mamba1Config(select_norm="weightless"):
                return FALCON_MAMBA
            case Mamba1Config():
                return MAMBA
            case Mamba2Config():
                return MAMBA2
    elif kinds <= {Mamba2Config, AttentionConfig}:
        return BAMBA
    elif kinds <= {Mamba1Config, AttentionConfig}:
        return JAMBA
    names = " and ".join(sorted({layer_kind(mixer) for mixer in mixers}))
    raise Unstorable(f"{names} layers" + (" in one model" if len(kinds) > 1 else ""))


def _read_transformers(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    family = _FAMILIES[fields.only("model_type", list(_FAMILIES), None)]
    fields.ignore(_COMMON)
    config = family.read(fields)
    fields.finish()
    return config


def _validate_transformers(config: LanguageModelConfig) -> None:
    _family(config).validate(config)


def _write_transformers(config: LanguageModelConfig, dtype: np.dtype) -> JSON:
    return _family(config).write(config) | {"dtype": dtype.name}


def _name_transformers(config: LanguageModelConfig) -> list[Slot]:
    return _family(config).slots(config)


TRANSFORMERS = Layout(
    name="transformers",
    read_config=_read_transformers,
    validate=_validate_transformers,
    write_config=_write_transformers,
    table=_name_transformers,
    embedding=lambda config: _family(config).embedding,
    keeps_tied_head=False,
    # As `MambaModel.load_hook` of transformers does.
    renames=MappingProxyType({"backbone.embedding.weight": EMBEDDING}),
    declares_ids=True,
)
