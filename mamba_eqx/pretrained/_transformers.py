"""The layout of Hugging Face's transformers: `config.json` with a `model_type`."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from .._config import BlockConfig, LanguageModelConfig
from .._mixer_configs import AbstractMixerConfig, Mamba1Config, Mamba2Config
from ._fields import Fields, limit_to_json
from ._layout import Entry, Layout
from ._names import language_model
from ._stored import CheckpointError


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

# How to initialise, and which implementation to run.
_MAMBA_IGNORED = frozenset(
    """
    initializer_range rescale_prenorm_residual time_step_scale time_step_min time_step_max
    time_step_init_scheme time_step_floor use_mambapy use_associative_scan
    """.split()  # noqa: SIM905
)

# What the `-hf` conversions kept of the official config. transformers reads none of it, and
# neither do we: the same things are said under transformers' own names.
_MAMBA_OFFICIAL = frozenset(
    """
    d_model d_inner n_layer ssm_cfg rms_norm fused_add_norm pad_vocab_size_multiple
    """.split()  # noqa: SIM905
)

# As above; the chunks of an implementation do not matter, and transformers computes the size
# `intermediate_size` and the rank `time_step_rank` as it likes: the former as `expand` says, the
# latter not at all. Old versions wrote the norms' options, and never read them.
_MAMBA2_IGNORED = _MAMBA_IGNORED | {
    "chunk_size",
    "intermediate_size",
    "norm_before_gate",
    "rms_norm",
    "time_step_rank",
}

# Ours: transformers has no field for it, and keeps what it does not know.
_UNPADDED = "unpadded_vocab_size"


def _read_mamba(fields: Fields) -> LanguageModelConfig:
    # The defaults are those of transformers' `MambaConfig`.
    d_model = fields.size("hidden_size", 768)
    expanded = fields.multiple_of(d_model, "expand", 2)
    fields.only("hidden_act", ["silu"], "silu")
    eps = fields.number("layer_norm_epsilon", 1e-5)
    mixer = Mamba1Config(
        d_model=d_model,
        # Where the two contradict each other, transformers goes by `intermediate_size`.
        d_inner=fields.size("intermediate_size", expanded),
        d_state=fields.size("state_size", 16),
        d_conv=fields.size("conv_kernel", 4),
        dt_rank=(
            math.ceil(d_model / 16)
            if fields.get("time_step_rank", "auto") == "auto"
            else fields.size("time_step_rank")
        ),
        bias=fields.flag("use_bias", False),
        conv_bias=fields.flag("use_conv_bias", True),
    )
    padded = fields.size("vocab_size", 50280)
    config = LanguageModelConfig(
        vocab_size=fields.size(_UNPADDED, padded),
        padded_vocab_size=padded,
        layers=(BlockConfig(mixer, norm_eps=eps),) * fields.layers("num_hidden_layers", 32),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        norm_eps=eps,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
    )
    fields.ignore(_MAMBA_IGNORED | _MAMBA_OFFICIAL)
    return config


def _read_mamba2(fields: Fields) -> LanguageModelConfig:
    # The defaults are those of transformers' `Mamba2Config`.
    d_model = fields.size("hidden_size", 4096)
    fields.size("expand", 2)  # Only an integer will do.
    nheads, headdim = fields.size("num_heads", 128), fields.size("head_dim", 64)
    d_inner = fields.multiple_of(d_model, "expand", 2)
    if nheads * headdim != d_inner:
        raise fields.error(
            "num_heads",
            f"times head_dim={headdim} must be hidden_size * expand = {d_inner}",
        )
    fields.only("hidden_act", ["silu"], "silu")
    eps = fields.number("layer_norm_epsilon", 1e-5)
    mixer = Mamba2Config(
        d_model=d_model,
        d_inner=d_inner,
        d_state=fields.size("state_size", 128),
        d_conv=fields.size("conv_kernel", 4),
        headdim=headdim,
        ngroups=fields.size("n_groups", 8),
        dt_limit=fields.limit("time_step_limit"),
        bias=fields.flag("use_bias", False),
        conv_bias=fields.flag("use_conv_bias", True),
        norm_eps=eps,
    )
    padded = fields.size("vocab_size", 32768)
    config = LanguageModelConfig(
        vocab_size=fields.size(_UNPADDED, padded),
        padded_vocab_size=padded,
        layers=(BlockConfig(mixer, norm_eps=eps),) * fields.layers("num_hidden_layers", 64),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        norm_eps=eps,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
    )
    fields.ignore(_MAMBA2_IGNORED)
    return config


def _write_mamba(config: LanguageModelConfig, mixer: Mamba1Config) -> dict[str, Any]:
    del config
    return {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": mixer.d_inner,
        # It has to be an integer. Where that is inexact, `intermediate_size` wins.
        "expand": max(1, mixer.d_inner // mixer.d_model),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "time_step_rank": mixer.dt_rank,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }


def _write_mamba2(config: LanguageModelConfig, mixer: Mamba2Config) -> dict[str, Any]:
    if mixer.d_inner % mixer.d_model:
        raise _inexpressible(
            "`d_inner` is not a multiple of `d_model`",
            f"d_inner={mixer.d_inner} and d_model={mixer.d_model}",
        )
    if mixer.D_has_hdim:
        raise _inexpressible("skip connections have a weight per channel", "D_has_hdim=True")
    if not mixer.rms_norm:
        raise _inexpressible("mixers have no norm", "rms_norm=False")
    if mixer.norm_before_gate:
        raise _inexpressible("mixers have the norm before the gate", "norm_before_gate=True")
    if mixer.norm_eps != config.norm_eps:
        raise _inexpressible(
            "norms differ in `norm_eps`",
            f"{mixer.norm_eps} in the mixers and {config.norm_eps} outside",
        )
    fields = {
        "architectures": ["Mamba2ForCausalLM"],
        "expand": mixer.d_inner // mixer.d_model,
        "num_heads": mixer.d_inner // mixer.headdim,
        "head_dim": mixer.headdim,
        "n_groups": mixer.ngroups,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }
    if mixer.dt_limit != (0, math.inf):
        fields["time_step_limit"] = limit_to_json(mixer.dt_limit)
    return fields


# One line for each model type: how its config is read, and which mixer it is of.
_READERS: MappingProxyType[str, Callable[[Fields], LanguageModelConfig]]
_READERS = MappingProxyType({"mamba": _read_mamba, "mamba2": _read_mamba2})

_Writer = Callable[[LanguageModelConfig, Any], dict[str, Any]]
_WRITERS: MappingProxyType[type[AbstractMixerConfig], tuple[str, _Writer]]
_WRITERS = MappingProxyType(
    {Mamba1Config: ("mamba", _write_mamba), Mamba2Config: ("mamba2", _write_mamba2)}
)


def _read_config(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    reader = _READERS[fields.only("model_type", list(_READERS), None)]
    fields.ignore(_COMMON)
    config = reader(fields)
    fields.finish()
    return config


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    model_type, write = _WRITERS.get(type(config.layers[0].mixer), (None, None))
    if model_type is None or write is None:
        raise _inexpressible("mixer is not one of its own", type(config.layers[0].mixer).__name__)
    for i, layer in enumerate(config.layers):
        if layer != config.layers[0]:
            raise _inexpressible("layers differ", f"layer 0 is {config.layers[0]}, {i} is {layer}")
    block = config.layers[0]
    if block.d_intermediate is not None:
        raise _inexpressible("layers have an MLP", f"d_intermediate={block.d_intermediate}")
    if not (block.rms_norm and config.rms_norm):
        raise _inexpressible("norms are not RMSNorm", "rms_norm=False")
    if block.norm_eps != config.norm_eps:
        raise _inexpressible(
            "norms differ in `norm_eps`",
            f"{block.norm_eps} in the layers and {config.norm_eps} at the end",
        )
    fields = {"model_type": model_type} | write(config, block.mixer)
    fields |= {
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
        fields[_UNPADDED] = config.vocab_size
    return fields


def _entries(config: LanguageModelConfig) -> list[Entry]:
    _write_config(config, np.dtype(np.float32))  # It refuses what has no names there.
    return language_model(config, embedding=_EMBEDDING)


def _inexpressible(what: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The 'transformers' layout has no model whose {what} ({value}). "
        'Use `layout="state-spaces"` if that fits.'
    )


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
