"""The layout of the official repository (`state-spaces/mamba`), whose configs have no type."""

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


_EMBEDDING = "backbone.embedding.weight"
_EPS = 1e-5  # The official config has no field for it.
_MLP_MULTIPLE = 128  # To which the official `GatedMLP` rounds its width up.

# How to initialise, and which implementation to run.
_MAMBA1_IGNORED = frozenset(
    ["dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"]
)

_MAMBA2_IGNORED = frozenset(
    """
    A_init_range chunk_size conv_init dt_init_floor dt_max dt_min sequence_parallel use_mem_eff_path
    """.split()  # noqa: SIM905
)


def _read_mamba1(d_model: int, fields: Fields) -> Mamba1Config:
    # The defaults are those of the official `Mamba.__init__`.
    config = Mamba1Config(
        d_model=d_model,
        d_inner=fields.multiple_of(d_model, "expand", 2),
        d_state=fields.size("d_state", 16),
        d_conv=fields.size("d_conv", 4),
        dt_rank=(
            math.ceil(d_model / 16)
            if fields.get("dt_rank", "auto") == "auto"
            else fields.size("dt_rank")
        ),
        bias=fields.flag("bias", False),
        conv_bias=fields.flag("conv_bias", True),
    )
    fields.ignore(_MAMBA1_IGNORED)
    return config


def _write_mamba1(config: Mamba1Config) -> dict[str, Any]:
    # The official width is `int(expand * d_model)`, which the last candidate is sure to hit.
    candidates = (
        config.d_inner // config.d_model,
        config.d_inner / config.d_model,
        (config.d_inner + 0.5) / config.d_model,
    )
    return {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": next(e for e in candidates if int(e * config.d_model) == config.d_inner),
        "dt_rank": config.dt_rank,
        "bias": config.bias,
        "conv_bias": config.conv_bias,
    }


def _read_mamba2(d_model: int, fields: Fields) -> Mamba2Config:
    # The defaults are those of the official `Mamba2.__init__`.
    fields.size("expand", 2)  # Only an integer will do.
    d_inner = fields.multiple_of(d_model, "expand", 2)
    if fields.get("d_ssm", None) is not None and fields.size("d_ssm") != d_inner:
        raise fields.error("d_ssm", f"is supported only as expand * d_model = {d_inner}")
    rms_norm = fields.flag("rmsnorm", True)
    config = Mamba2Config(
        d_model=d_model,
        d_inner=d_inner,
        d_state=fields.size("d_state", 128),
        d_conv=fields.size("d_conv", 4),
        headdim=fields.size("headdim", 64),
        ngroups=fields.size("ngroups", 1),
        D_has_hdim=fields.flag("D_has_hdim", False),
        dt_limit=fields.limit("dt_limit"),
        bias=fields.flag("bias", False),
        conv_bias=fields.flag("conv_bias", True),
        rms_norm=rms_norm,
        # It says nothing where there is no norm.
        norm_before_gate=fields.flag("norm_before_gate", False) and rms_norm,
        norm_eps=_EPS,
    )
    fields.ignore(_MAMBA2_IGNORED)
    return config


def _write_mamba2(config: Mamba2Config) -> dict[str, Any]:
    if config.d_inner % config.d_model:
        raise _inexpressible(
            "`d_inner` is not a multiple of `d_model`",
            f"d_inner={config.d_inner} and d_model={config.d_model}",
        )
    if config.norm_eps != _EPS:
        raise _inexpressible(f"`norm_eps` is not {_EPS}", f"{config.norm_eps} in the mixers")
    fields = {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.d_inner // config.d_model,
        "headdim": config.headdim,
        "ngroups": config.ngroups,
        "D_has_hdim": config.D_has_hdim,
        "rmsnorm": config.rms_norm,
        "norm_before_gate": config.norm_before_gate,
        "bias": config.bias,
        "conv_bias": config.conv_bias,
    }
    if config.dt_limit != (0, math.inf):
        # The official code has no spelling for infinity, other than the one outside of JSON.
        fields["dt_limit"] = limit_to_json(config.dt_limit)
    return fields


# One line for each mixer: its name as `ssm_cfg.layer`, and how the rest of `ssm_cfg` is read and
# written.
_READERS: MappingProxyType[str, Callable[[int, Fields], AbstractMixerConfig]]
_READERS = MappingProxyType({"Mamba1": _read_mamba1, "Mamba2": _read_mamba2})

_WRITERS: MappingProxyType[
    type[AbstractMixerConfig], tuple[str, Callable[[Any], dict[str, Any]]]
] = MappingProxyType(
    {Mamba1Config: ("Mamba1", _write_mamba1), Mamba2Config: ("Mamba2", _write_mamba2)}
)


def _read_config(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    d_model = fields.size("d_model")
    n_layer = fields.layers("n_layer")
    vocab_size = fields.size("vocab_size")
    multiple = fields.size("pad_vocab_size_multiple", 8)
    rms_norm = fields.flag("rms_norm", True)
    ssm_cfg = Fields(fields.get("ssm_cfg", {}), "`ssm_cfg`")
    reader = _READERS[ssm_cfg.only("layer", list(_READERS), "Mamba1")]
    mixer = reader(d_model, ssm_cfg)
    ssm_cfg.finish()
    fields.only("attn_layer_idx", [[]], [])
    width = _round_up(fields.natural("d_intermediate", 0), _MLP_MULTIPLE)
    block = BlockConfig(mixer, d_intermediate=width or None, rms_norm=rms_norm, norm_eps=_EPS)
    config = LanguageModelConfig(
        vocab_size=vocab_size,
        padded_vocab_size=_round_up(vocab_size, multiple),
        layers=(block,) * n_layer,
        tie_embeddings=fields.flag("tie_embeddings", True),
        rms_norm=rms_norm,
        norm_eps=_EPS,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
    )
    # Attention has no layers, as checked above; the other is an implementation.
    fields.ignore(["attn_cfg", "fused_add_norm"])
    fields.finish()
    return config


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    del dtype  # The official config does not say it.
    block = config.layers[0]
    for i, layer in enumerate(config.layers):
        if layer != block:
            raise _inexpressible("layers differ", f"layer 0 is {block}, {i} is {layer}")
    layer, write = _WRITERS.get(type(block.mixer), (None, None))
    if layer is None or write is None:
        raise _inexpressible("mixer is not one of its own", type(block.mixer).__name__)
    if block.rms_norm != config.rms_norm:
        raise _inexpressible("layers and end have norms of different kinds", "rms_norm")
    if {block.norm_eps, config.norm_eps} != {_EPS}:
        raise _inexpressible(
            f"`norm_eps` is not {_EPS}",
            f"{block.norm_eps} in the layers and {config.norm_eps} at the end",
        )
    width = block.d_intermediate or 0
    if width % _MLP_MULTIPLE:
        raise _inexpressible(
            f"MLP is not a multiple of {_MLP_MULTIPLE} wide", f"d_intermediate={width}"
        )
    return {
        "d_model": config.d_model,
        "d_intermediate": width,
        "n_layer": len(config.layers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer} | write(block.mixer),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.rms_norm,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _multiple(config.vocab_size, config.padded_vocab_size),
        "tie_embeddings": config.tie_embeddings,
    }


def _entries(config: LanguageModelConfig) -> list[Entry]:
    _write_config(config, np.dtype(np.float32))  # It refuses what has no names there.
    return language_model(config, embedding=_EMBEDDING)


def _multiple(vocab_size: int, padded: int) -> int:
    # The last candidate always fits.
    candidates = [1, 8, 16, *(2**n for n in range(5, 12)), padded]
    return next(multiple for multiple in candidates if _round_up(vocab_size, multiple) == padded)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _inexpressible(what: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The 'state-spaces' layout has no model whose {what} ({value}). "
        'Use `layout="transformers"` if that fits.'
    )


STATE_SPACES = Layout(
    name="state-spaces",
    read_config=_read_config,
    write_config=_write_config,
    entries=_entries,
    embedding=_EMBEDDING,
    # The official loader insists on it.
    keeps_tied_head=True,
    renames=MappingProxyType({}),
)
