"""`ssm_cfg` and `attn_cfg` of the official configs: how mixers are read and written."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from ...formats import CheckpointError
from ...models import AbstractMixerConfig, AttentionConfig, Mamba1Config, Mamba2Config, Mamba3Config
from ._fields import Fields, limit_to_json


EPS = 1e-5  # The official config has no field for it.


# How to initialise, and which implementation to run.
_MAMBA1_IGNORED = frozenset(
    ["dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"]
)
_MAMBA2_IGNORED = frozenset(
    """
    A_init_range chunk_size conv_init dt_init_floor dt_max dt_min sequence_parallel use_mem_eff_path
    """.split()  # noqa: SIM905
)


# Beside these, official Mamba-3 takes fields that it has no use for, in silence; we refuse them.
_MAMBA3_IGNORED = frozenset(["chunk_size", "dropout", "dt_init_floor", "dt_max", "dt_min"])


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
    if config.select_norm is not None:
        raise inexpressible("`dt`, `B` and `C` are normed", f"select_norm={config.select_norm!r}")
    return {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": _expand(config.d_inner, config.d_model),
        "dt_rank": config.dt_rank,
        "bias": config.bias,
        "conv_bias": config.conv_bias,
    }


def _expand(d_inner: int, d_model: int) -> int | float:
    # The official width is `int(expand * d_model)`, which the last candidate is sure to hit.
    candidates = (d_inner // d_model, d_inner / d_model, (d_inner + 0.5) / d_model)
    return next(expand for expand in candidates if int(expand * d_model) == d_inner)


def _read_mamba2(d_model: int, fields: Fields) -> Mamba2Config:
    # The defaults are those of the official `Mamba2.__init__`.
    fields.size("expand", 2)  # Only an integer will do.
    d_inner = fields.multiple_of(d_model, "expand", 2)
    all_of_them = fields.get("d_ssm", None) is None
    rms_norm = fields.flag("rmsnorm", True)
    config = Mamba2Config(
        d_model=d_model,
        d_inner=d_inner,
        d_ssm=d_inner if all_of_them else fields.size("d_ssm"),
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
        norm_eps=EPS,
    )
    fields.ignore(_MAMBA2_IGNORED)
    return config


def _write_mamba2(config: Mamba2Config) -> dict[str, Any]:
    if config.d_inner % config.d_model:
        raise inexpressible(
            "`d_inner` is not a multiple of `d_model`",
            f"d_inner={config.d_inner} and d_model={config.d_model}",
        )
    if config.norm_eps != EPS:
        raise inexpressible(f"`norm_eps` is not {EPS}", f"{config.norm_eps} in the mixers")
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
    if config.d_ssm != config.d_inner:
        fields["d_ssm"] = config.d_ssm
    if config.dt_limit != (0, math.inf):
        # The official code has no spelling for infinity, other than the one outside of JSON.
        fields["dt_limit"] = limit_to_json(config.dt_limit)
    return fields


def read_attention(d_model: int, fields: Fields) -> AttentionConfig:
    """`attn_cfg`."""
    # The defaults are those of the official `MHA.__init__`, where attention is not even causal.
    fields.only("causal", [True], False)
    fields.only("mlp_dim", [0], 0)
    nheads = fields.size("num_heads")
    if "head_dim" not in fields and d_model % nheads:
        raise fields.error("num_heads", f"must divide d_model={d_model}")
    headdim = fields.optional_size("head_dim", max(1, d_model // nheads))
    scale = headdim**-0.5
    if fields.get("softmax_scale", None) is not None:
        scale = fields.number("softmax_scale", scale)
    return AttentionConfig(
        d_model,
        nheads=nheads,
        nheads_kv=fields.optional_size("num_heads_kv", nheads),
        headdim=headdim,
        d_conv=fields.natural("d_conv", 0),
        rotary_emb_dim=fields.natural("rotary_emb_dim", 0),
        rotary_emb_base=fields.number("rotary_emb_base", 10000.0),
        rotary_emb_interleaved=fields.flag("rotary_emb_interleaved", False),
        softmax_scale=scale,
        qkv_proj_bias=fields.flag("qkv_proj_bias", True),
        out_proj_bias=fields.flag("out_proj_bias", True),
    )


def write_attention(config: AttentionConfig) -> dict[str, Any]:
    """`attn_cfg`."""
    if config.window is not None:
        raise inexpressible("attention has a window", f"window={config.window}")
    fields = {
        "causal": True,
        "num_heads": config.nheads,
        "num_heads_kv": config.nheads_kv,
        "head_dim": config.headdim,
        "d_conv": config.d_conv,
        "rotary_emb_dim": config.rotary_emb_dim,
        "rotary_emb_base": config.rotary_emb_base,
        "rotary_emb_interleaved": config.rotary_emb_interleaved,
        "qkv_proj_bias": config.qkv_proj_bias,
        "out_proj_bias": config.out_proj_bias,
    }
    if config.softmax_scale != config.headdim**-0.5:
        fields["softmax_scale"] = config.softmax_scale
    return fields


def _read_mamba3(d_model: int, fields: Fields) -> Mamba3Config:
    # The defaults are those of the official `Mamba3.__init__`.
    mimo_rank = fields.size("mimo_rank", 4)  # It says nothing in the SISO form.
    config = Mamba3Config(
        d_model=d_model,
        d_inner=fields.multiple_of(d_model, "expand", 2),
        d_state=fields.size("d_state", 128),
        headdim=fields.size("headdim", 64),
        ngroups=fields.size("ngroups", 1),
        mimo_rank=mimo_rank if fields.flag("is_mimo", False) else None,
        rope_fraction=float(fields.only("rope_fraction", [0.5, 1.0, 1], 0.5)),
        # Which one official code computes depends on its version, and no field of its own says it.
        A_activation=fields.only("A_activation", ["heavy_tail", "softplus"], "heavy_tail"),
        A_floor=fields.number("A_floor", 1e-4),
        outproj_norm=fields.flag("is_outproj_norm", False),
        norm_eps=EPS,
    )
    fields.ignore(_MAMBA3_IGNORED)
    return config


def _write_mamba3(config: Mamba3Config) -> dict[str, Any]:
    if config.norm_eps != EPS:
        raise inexpressible(f"`norm_eps` is not {EPS}", f"{config.norm_eps} in the mixers")
    fields: dict[str, Any] = {
        "d_state": config.d_state,
        "expand": _expand(config.d_inner, config.d_model),
        "headdim": config.headdim,
        "ngroups": config.ngroups,
        "rope_fraction": config.rope_fraction,
        "A_floor": config.A_floor,
        "is_outproj_norm": config.outproj_norm,
        "is_mimo": config.mimo_rank is not None,
    }
    if config.mimo_rank is not None:
        # Official MIMO kernels want smaller chunks than their default of 64.
        fields |= {"mimo_rank": config.mimo_rank, "chunk_size": max(1, 64 // config.mimo_rank)}
    if config.A_activation != "heavy_tail":
        fields["A_activation"] = config.A_activation
    return fields


# One line for each mixer: its name as `ssm_cfg.layer`, and how the rest of `ssm_cfg` is read and
# written.
READERS: MappingProxyType[str, Callable[[int, Fields], AbstractMixerConfig]]
READERS = MappingProxyType({"Mamba1": _read_mamba1, "Mamba2": _read_mamba2, "Mamba3": _read_mamba3})
WRITERS: MappingProxyType[
    type[AbstractMixerConfig], tuple[str, Callable[[Any], dict[str, Any]]]
] = MappingProxyType(
    {
        Mamba1Config: ("Mamba1", _write_mamba1),
        Mamba2Config: ("Mamba2", _write_mamba2),
        Mamba3Config: ("Mamba3", _write_mamba3),
    }
)


def inexpressible(what: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The 'state-spaces' layout has no model whose {what} ({value}). "
        'Use `layout="transformers"` if that fits.'
    )
