"""transformers' model type `jamba` without experts: Mamba-1 with norms of `dt`, `B` and `C`,
attention without positions, and an MLP in every block."""

import math
from typing import Any

from ....models import AttentionConfig, BlockConfig, LanguageModelConfig, Mamba1Config
from .._fields import Fields
from ._common import inexpressible, read_model
from ._hybrid import HYBRID_IGNORED, RESIDUAL, alike, read_heads, write_blocks, write_heads


# What experts there would be, and how they were trained; which implementation to run; what older
# versions wrote.
_IGNORED = HYBRID_IGNORED | set(
    """
    expert_layer_offset expert_layer_period num_experts_per_tok output_router_logits
    router_aux_loss_coef use_associative_scan use_mambapy calc_logits_for_entire_prompt n_ctx
    """.split()  # noqa: SIM905
)


def read_jamba(fields: Fields) -> LanguageModelConfig:
    # The defaults are those of transformers' `JambaConfig`.
    d_model = fields.size("hidden_size", 4096)
    eps = fields.number("rms_norm_eps", 1e-6)
    fields.only("hidden_act", ["silu"], "silu")
    fields.only("num_experts", [1], 16)
    fields.only("sliding_window", [None], None)
    fields.only("mamba_inner_layernorms", [True], True)
    attention = AttentionConfig(d_model, **read_heads(fields, d_model, nheads=32, nheads_kv=8))
    rank = fields.get("mamba_dt_rank", "auto")
    mamba = Mamba1Config(
        d_model,
        d_inner=d_model * fields.size("mamba_expand", 2),
        d_state=fields.size("mamba_d_state", 16),
        d_conv=fields.size("mamba_d_conv", 4),
        dt_rank=math.ceil(d_model / 16) if rank == "auto" else fields.size("mamba_dt_rank"),
        bias=fields.flag("mamba_proj_bias", False),
        conv_bias=fields.flag("mamba_conv_bias", True),
        select_norm="weighted",
        select_norm_eps=eps,
    )
    period = fields.size("attn_layer_period", 8)
    offset = fields.natural("attn_layer_offset", 4)
    if offset >= period:
        raise fields.error("attn_layer_offset", f"must be below attn_layer_period={period}")
    width = fields.size("intermediate_size", 14336)
    blocks = {
        kind: BlockConfig(kind, d_intermediate=width, norm_eps=eps) for kind in (attention, mamba)
    }
    config = read_model(
        fields,
        (
            blocks[attention if i % period == offset else mamba]
            for i in range(fields.layers("num_hidden_layers", 32))
        ),
        vocab_size=65536,
        norm_eps=eps,
        tie_embeddings=False,
        residual_in_fp32=False,
    )
    fields.ignore(_IGNORED)
    return config


def write_jamba(config: LanguageModelConfig) -> dict[str, Any]:
    fields = {"model_type": "jamba", "architectures": ["JambaForCausalLM"], "num_experts": 1}
    fields |= write_blocks(config) | {RESIDUAL: config.residual_in_fp32}
    fields |= _write_pattern(config)
    mamba, attention = alike(config, Mamba1Config), alike(config, AttentionConfig)
    if mamba is None:
        raise inexpressible("layers are all attention", f"{len(config.layers)} layers")
    if mamba.select_norm != "weighted" or mamba.select_norm_eps != config.norm_eps:
        raise inexpressible(
            "layers have an MLP, but whose `dt`, `B` and `C` are not normed as its residual stream",
            f"select_norm={mamba.select_norm!r}, select_norm_eps={mamba.select_norm_eps}",
        )
    if mamba.d_inner % mamba.d_model:
        raise inexpressible(
            "`d_inner` is not a multiple of `d_model`",
            f"d_inner={mamba.d_inner} and d_model={mamba.d_model}",
        )
    fields |= {
        "mamba_expand": mamba.d_inner // mamba.d_model,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_proj_bias": mamba.bias,
        "mamba_conv_bias": mamba.conv_bias,
    }
    if attention is None:
        return fields | {"num_attention_heads": 1, "num_key_value_heads": 1}
    if attention.rotary_emb_dim > 0:
        raise inexpressible(
            "attention has a rotary embedding", f"rotary_emb_dim={attention.rotary_emb_dim}"
        )
    if attention.qkv_proj_bias or attention.out_proj_bias:
        raise inexpressible("attention has biases", "qkv_proj_bias or out_proj_bias")
    return fields | write_heads(attention)


def _write_pattern(config: LanguageModelConfig) -> dict[str, int]:
    places = [isinstance(layer.mixer, AttentionConfig) for layer in config.layers]
    # The last period is longer than the model, so that there may be no attention at all.
    for period in range(1, len(places) + 2):
        for offset in range(period):
            if all((i % period == offset) == here for i, here in enumerate(places)):
                return {"attn_layer_period": period, "attn_layer_offset": offset}
    indices = [i for i, here in enumerate(places) if here]
    raise inexpressible("attention is not in every so many layers", f"it is in {indices}")
