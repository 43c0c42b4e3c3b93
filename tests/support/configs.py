"""Configs of models. Each class of config has one with every field off its default."""

from typing import Any

import mamba_eqx as mbx
from tests.support.registry import VOCAB_SIZE


def config(
    mixer: mbx.models.AbstractMixerConfig[Any],
    block: dict[str, Any] | None = None,
    **model: Any,
) -> mbx.LanguageModelConfig:
    """Makes the config of a model with two equal layers."""
    layer = mbx.BlockConfig(mixer, **(block or {}))
    return mbx.LanguageModelConfig(vocab_size=VOCAB_SIZE, layers=(layer, layer), **model)


CONFIGS: dict[str, mbx.LanguageModelConfig] = {
    "mamba1": config(mbx.Mamba1Config(d_model=5)),
    "mamba1_weightless": config(mbx.Mamba1Config(d_model=5, select_norm="weightless")),
    "mamba1_every_field": config(
        mbx.Mamba1Config(
            d_model=5,
            d_inner=7,
            d_state=3,
            d_conv=2,
            dt_rank=4,
            bias=True,
            conv_bias=False,
            select_norm="weighted",
            select_norm_eps=1e-2,
        ),
        block={
            "mlp": mbx.GatedMLPConfig(9, bias=True, gate_multiplier=0.7, out_multiplier=1.3),
            "residual_multiplier": 0.6,
            "rms_norm": False,
            "norm_eps": 1e-3,
        },
        padded_vocab_size=16,
        tie_embeddings=False,
        rms_norm=False,
        norm_eps=2e-3,
        residual_in_fp32=False,
        embedding_multiplier=3.0,
        logits_multiplier=0.4,
    ),
    "mamba2": config(mbx.Mamba2Config(d_model=5, headdim=2)),
    "mamba2_every_field": config(
        mbx.Mamba2Config(
            d_model=5,
            d_inner=15,
            d_ssm=12,
            d_state=3,
            d_conv=2,
            headdim=2,
            ngroups=3,
            D_has_hdim=True,
            dt_limit=(0.01, 0.2),
            bias=True,
            conv_bias=False,
            norm_before_gate=True,
            norm_eps=1e-3,
            ssm_multipliers=(0.5, 2.0, 0.25, 3.0, 0.75),
        )
    ),
    "mamba2_without_norm": config(mbx.Mamba2Config(d_model=4, headdim=2, rms_norm=False)),
    "mamba3": config(mbx.Mamba3Config(d_model=5, headdim=2)),
    "mamba3_every_field": config(
        mbx.Mamba3Config(
            d_model=5,
            d_inner=12,
            d_state=3,
            headdim=2,
            ngroups=3,
            mimo_rank=2,
            rope_fraction=1.0,
            A_activation="softplus",
            A_floor=0.01,
            outproj_norm=True,
            norm_eps=1e-3,
        )
    ),
    "mixture": config(
        mbx.Mamba1Config(d_model=5), block={"mlp": mbx.MixtureOfExpertsConfig(3, 4, 2)}
    ),
    "mixture_every_field": config(
        mbx.Mamba1Config(d_model=5),
        block={
            "mlp": mbx.MixtureOfExpertsConfig(
                3,
                n_experts=6,
                top_k=2,
                routing="sigmoid",
                n_group=3,
                topk_group=2,
                renormalise=False,
                scaling=2.5,
                gated=False,
                d_shared=7,
                d_latent=4,
            )
        },
    ),
    "gated_delta_net": config(mbx.GatedDeltaNetConfig(d_model=4, headdim=2)),
    "gated_delta_net_every_field": config(
        mbx.GatedDeltaNetConfig(
            d_model=5, d_inner=12, d_state=3, d_conv=2, headdim=2, ngroups=3, norm_eps=1e-3
        )
    ),
    "attention": config(mbx.AttentionConfig(d_model=6, nheads=3)),
    "attention_every_field": config(
        mbx.AttentionConfig(
            d_model=5,
            nheads=4,
            nheads_kv=2,
            headdim=6,
            d_conv=3,
            rotary_emb_dim=4,
            rotary_emb_base=500.0,
            rotary_emb_interleaved=True,
            softmax_scale=0.3,
            window=7,
            qkv_proj_bias=True,
            out_proj_bias=True,
        ),
        block={"mlp": mbx.MLPConfig(9, bias=True)},
    ),
    "parallel_every_field": config(
        mbx.ParallelConfig(
            (mbx.Mamba2Config(5, headdim=2), mbx.ParallelConfig((mbx.AttentionConfig(5, 1),))),
            scales=(0.25, 2.0),
        )
    ),
}
