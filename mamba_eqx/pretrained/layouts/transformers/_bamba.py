"""transformers' model type `bamba`: Mamba-2, attention, and an MLP in every block."""

import math
from typing import Any

from ....models import AttentionConfig, BlockConfig, LanguageModelConfig, Mamba2Config
from .._fields import Fields, limit_to_json
from ._common import inexpressible, read_model
from ._hybrid import HYBRID_IGNORED, RESIDUAL, alike, read_heads, write_blocks, write_heads
from ._mamba2 import check_mamba2


_PARTIAL = 0.5  # The share of a head that is rotated, where nothing else is said.


def read_bamba(fields: Fields) -> LanguageModelConfig:
    # The defaults are those of transformers' `BambaConfig`.
    d_model = fields.size("hidden_size", 4096)
    eps = fields.number("rms_norm_eps", 1e-5)
    fields.only("hidden_act", ["silu"], "silu")
    fields.only("mlp_bias", [False], False)
    n_layer = fields.layers("num_hidden_layers", 32)
    attention = _read_attention(fields, d_model)
    mamba = _read_mamba(fields, d_model, eps)
    chosen = fields.indices("attn_layer_indices", n_layer)
    width = fields.size("intermediate_size", 14336)
    blocks = {
        kind: BlockConfig(kind, d_intermediate=width, norm_eps=eps) for kind in (attention, mamba)
    }
    config = read_model(
        fields,
        (blocks[attention if i in chosen else mamba] for i in range(n_layer)),
        vocab_size=128000,
        norm_eps=eps,
        tie_embeddings=False,
        residual_in_fp32=False,
    )
    # How large the chunks of an implementation are, and a term of a loss.
    fields.ignore(HYBRID_IGNORED | {"mamba_chunk_size", "z_loss_coefficient"})
    return config


def _read_attention(fields: Fields, d_model: int) -> AttentionConfig:
    bias = fields.flag("attention_bias", False)
    heads = read_heads(fields, d_model, nheads=32, nheads_kv=8)
    # Older configs say the base at the top, and a share there that transformers never reads.
    base = fields.number("rope_theta", 10000.0)
    fields.only("partial_rotary_factor", [_PARTIAL], _PARTIAL)
    fields.only("rope_scaling", [None], None)
    partial = _PARTIAL
    if fields.get("rope_parameters", None) is not None:
        rope = Fields(fields.get("rope_parameters", None), "`rope_parameters`")
        rope.only("rope_type", ["default"], "default")
        base = rope.number("rope_theta", base)
        partial = rope.number("partial_rotary_factor", partial)
        rope.finish()
    dim = int(heads["headdim"] * partial)
    if "attn_rotary_emb" in fields and fields.size("attn_rotary_emb") != dim:
        raise fields.error(
            "attn_rotary_emb", f"must be {partial} of the {heads['headdim']} features of a head"
        )
    return AttentionConfig(
        d_model,
        **heads,
        rotary_emb_dim=dim,
        rotary_emb_base=base,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
    )


def _read_mamba(fields: Fields, d_model: int, eps: float) -> Mamba2Config:
    fields.size("mamba_expand", 2)  # Only an integer will do.
    d_inner = fields.multiple_of(d_model, "mamba_expand", 2)
    nheads = fields.size("mamba_n_heads", 128)
    if fields.get("mamba_d_head", "auto") == "auto":
        headdim = max(1, d_inner // nheads)
    else:
        headdim = fields.size("mamba_d_head")
    if nheads * headdim != d_inner:
        raise fields.error(
            "mamba_n_heads",
            f"times {headdim} per head must be hidden_size * mamba_expand = {d_inner}",
        )
    return Mamba2Config(
        d_model,
        d_inner=d_inner,
        d_state=fields.size("mamba_d_state", 256),
        d_conv=fields.size("mamba_d_conv", 4),
        headdim=headdim,
        ngroups=fields.size("mamba_n_groups", 1),
        dt_limit=fields.limit("time_step_limit"),
        bias=fields.flag("mamba_proj_bias", False),
        conv_bias=fields.flag("mamba_conv_bias", True),
        norm_eps=eps,
    )


def write_bamba(config: LanguageModelConfig) -> dict[str, Any]:
    fields = {"model_type": "bamba", "architectures": ["BambaForCausalLM"], "mlp_bias": False}
    fields |= write_blocks(config) | {RESIDUAL: config.residual_in_fp32}
    mamba, attention = alike(config, Mamba2Config), alike(config, AttentionConfig)
    if mamba is None:
        raise inexpressible("layers are all attention", f"{len(config.layers)} layers")
    check_mamba2(config, mamba)
    fields |= {
        "mamba_expand": mamba.d_inner // mamba.d_model,
        "mamba_n_heads": mamba.d_inner // mamba.headdim,
        "mamba_d_head": mamba.headdim,
        "mamba_n_groups": mamba.ngroups,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_proj_bias": mamba.bias,
        "mamba_conv_bias": mamba.conv_bias,
        "attn_layer_indices": [
            i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, AttentionConfig)
        ],
    }
    if mamba.dt_limit != (0, math.inf):
        fields["time_step_limit"] = limit_to_json(mamba.dt_limit)
    if attention is None:
        # transformers makes a rotary embedding in any case.
        return fields | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    return fields | write_heads(attention) | _write_rotary(attention)


def _write_rotary(config: AttentionConfig) -> dict[str, Any]:
    if config.qkv_proj_bias != config.out_proj_bias:
        raise inexpressible(
            "projections of attention differ in having a bias",
            f"qkv_proj_bias={config.qkv_proj_bias}, out_proj_bias={config.out_proj_bias}",
        )
    if config.rotary_emb_dim == 0 or config.rotary_emb_interleaved:
        raise inexpressible(
            "rotary embedding is none, or of neighbours",
            f"rotary_emb_dim={config.rotary_emb_dim}, "
            f"rotary_emb_interleaved={config.rotary_emb_interleaved}",
        )
    # The last candidate is sure to be rounded down to the right number.
    dim, headdim = config.rotary_emb_dim, config.headdim
    shares = (dim / headdim, (dim + 0.5) / headdim)
    return {
        "attention_bias": config.qkv_proj_bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "partial_rotary_factor": next(s for s in shares if int(headdim * s) == dim),
        },
    }
