"""The tables of `ssm_cfg` and `attn_cfg` in configs of the official repository.

The defaults are those of the official classes `Mamba`, `Mamba2`, `Mamba3` and `MHA`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...models import AbstractMixerConfig, AttentionConfig, Mamba1Config, Mamba2Config, Mamba3Config
from ._mixers import D_MODEL, UNSCALED_MAMBA2, dt_rank, expand, whole_expand
from ._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Table,
    constant,
    fixed,
    flag,
    limit,
    natural,
    number,
    shared_eps,
    size,
)


_MAMBA1 = Table(
    Mamba1Config,
    (
        D_MODEL,
        size("d_state", "d_state", 16),
        size("d_conv", "d_conv", 4),
        expand("expand"),
        dt_rank("dt_rank"),
        flag("bias", "bias", False),
        flag("conv_bias", "conv_bias", True),
        fixed("select_norm", None, "Mamba-1 layers that normalise `dt`, `B` and `C`"),
    ),
    # Initialisation, and the choice of an implementation.
    ignored=("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"),
)


def _read_norm(given: RowInput) -> Arguments:
    rms_norm = given.fields.flag("rmsnorm", True)
    # Without a norm the official code ignores the order, but our config does not allow one.
    before = given.fields.flag("norm_before_gate", False)
    return {"rms_norm": rms_norm, "norm_before_gate": before and rms_norm}


def _write_norm(config: Mamba2Config) -> JSON:
    return {"rmsnorm": config.rms_norm, "norm_before_gate": config.norm_before_gate}


def _read_d_ssm(given: RowInput) -> Arguments:
    return {"d_ssm": given.fields.optional_size("d_ssm", given.known["d_inner"])}


def _write_d_ssm(config: Mamba2Config) -> JSON:
    return {} if config.d_ssm == config.d_inner else {"d_ssm": config.d_ssm}


_MAMBA2 = Table(
    Mamba2Config,
    (
        D_MODEL,
        size("d_state", "d_state", 128),
        size("d_conv", "d_conv", 4),
        whole_expand("expand"),
        size("headdim", "headdim", 64),
        size("ngroups", "ngroups", 1),
        flag("D_has_hdim", "D_has_hdim", False),
        Row(_read_norm, _write_norm),
        flag("bias", "bias", False),
        flag("conv_bias", "conv_bias", True),
        Row(_read_d_ssm, _write_d_ssm),
        # The official code writes infinity in a way that is not valid JSON.
        limit("dt_limit", "dt_limit"),
        *UNSCALED_MAMBA2,
        shared_eps(),
    ),
    ignored=(
        "A_init_range",
        "chunk_size",
        "conv_init",
        "dt_init_floor",
        "dt_max",
        "dt_min",
        "sequence_parallel",
        "use_mem_eff_path",
    ),
)


def _read_rope_fraction(given: RowInput) -> Arguments:
    return {"rope_fraction": float(given.fields.only("rope_fraction", [0.5, 1.0, 1], 0.5))}


def _write_rope_fraction(config: Mamba3Config) -> JSON:
    return {"rope_fraction": config.rope_fraction}


def _read_mimo(given: RowInput) -> Arguments:
    # SISO models ignore the rank, but their configs may have it nonetheless.
    rank = given.fields.size("mimo_rank", 4)
    return {"mimo_rank": rank if given.fields.flag("is_mimo", False) else None}


def _write_mimo(config: Mamba3Config) -> JSON:
    rank = config.mimo_rank
    if rank is None:
        return {"is_mimo": False}
    # The official MIMO kernels need smaller chunks than their default of 64.
    return {"is_mimo": True, "mimo_rank": rank, "chunk_size": max(1, 64 // rank)}


def _read_A(given: RowInput) -> Arguments:
    # Our own field. The official configs have none: the activation depends on the code's version.
    activations = ["heavy_tail", "softplus"]
    return {"A_activation": given.fields.only("A_activation", activations, "heavy_tail")}


def _write_A(config: Mamba3Config) -> JSON:
    is_default = config.A_activation == "heavy_tail"
    return {} if is_default else {"A_activation": config.A_activation}


_MAMBA3 = Table(
    Mamba3Config,
    (
        D_MODEL,
        size("d_state", "d_state", 128),
        expand("expand"),
        size("headdim", "headdim", 64),
        size("ngroups", "ngroups", 1),
        Row(_read_rope_fraction, _write_rope_fraction),
        number("A_floor", "A_floor", 1e-4),
        flag("is_outproj_norm", "outproj_norm", False),
        Row(_read_mimo, _write_mimo),
        Row(_read_A, _write_A),
        shared_eps(),
    ),
    # The official class silently accepts other unused fields. They are refused here.
    ignored=("chunk_size", "dropout", "dt_init_floor", "dt_max", "dt_min"),
)


def _read_heads(given: RowInput) -> Arguments:
    fields, d_model = given.fields, given.shared.d_model
    nheads = fields.size("num_heads")
    if "head_dim" not in fields and d_model % nheads:
        raise fields.error("num_heads", f"must divide d_model={d_model}")
    return {
        "nheads": nheads,
        "nheads_kv": fields.optional_size("num_heads_kv", nheads),
        "headdim": fields.optional_size("head_dim", max(1, d_model // nheads)),
    }


def _write_heads(config: AttentionConfig) -> JSON:
    return {
        "num_heads": config.nheads,
        "num_heads_kv": config.nheads_kv,
        "head_dim": config.headdim,
    }


def _read_scale(given: RowInput) -> Arguments:
    scale = given.known["headdim"] ** -0.5
    if given.fields.get("softmax_scale", None) is not None:
        scale = given.fields.number("softmax_scale", scale)
    return {"softmax_scale": scale}


def _write_scale(config: AttentionConfig) -> JSON:
    is_default = config.softmax_scale == config.headdim**-0.5
    return {} if is_default else {"softmax_scale": config.softmax_scale}


ATTENTION = Table(
    AttentionConfig,
    (
        D_MODEL,
        # The official attention is not causal by default.
        constant("causal", True, default=False, written=True),
        constant("mlp_dim", 0),
        Row(_read_heads, _write_heads),
        natural("d_conv", "d_conv", 0),
        natural("rotary_emb_dim", "rotary_emb_dim", 0),
        number("rotary_emb_base", "rotary_emb_base", 10000.0),
        flag("rotary_emb_interleaved", "rotary_emb_interleaved", False),
        flag("qkv_proj_bias", "qkv_proj_bias", True),
        flag("out_proj_bias", "out_proj_bias", True),
        Row(_read_scale, _write_scale),
        fixed("window", None, "attention with a window"),
    ),
)


# The tables of `ssm_cfg` by the name of the mixer, which `ssm_cfg` contains as `layer`.
MIXERS: Mapping[str, Table[Any]] = MappingProxyType(
    {"Mamba1": _MAMBA1, "Mamba2": _MAMBA2, "Mamba3": _MAMBA3}
)
MIXER_NAMES: Mapping[type[AbstractMixerConfig[Any]], str] = MappingProxyType(
    {Mamba1Config: "Mamba1", Mamba2Config: "Mamba2", Mamba3Config: "Mamba3"}
)
