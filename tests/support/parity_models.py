"""The models that are compared with transformers as installed."""

import math
from typing import Any

import mamba_eqx as mbx
from tests.support.checkpoints import BIASED, HYBRIDS, ODD, config
from tests.support.parity_falcon_h1 import FALCON_H1


# Models that we save and transformers loads, by model type and name.
OURS: dict[str, dict[str, mbx.LanguageModelConfig]] = {
    "mamba": {
        "odd": config(ODD, norm_eps=3e-4, padded_vocab_size=16),
        "biased_untied": config(BIASED, tie_embeddings=False, residual_in_fp32=False),
        "wide_taps": config(
            mbx.Mamba1Config(d_model=11, d_inner=37, d_state=5, d_conv=2, dt_rank=9, bias=True),
            n_layer=3,
            norm_eps=1e-3,
        ),
    },
    "falcon_mamba": {
        "eps": config(
            mbx.Mamba1Config(
                d_model=6,
                d_inner=9,
                d_state=3,
                d_conv=5,
                dt_rank=2,
                select_norm="weightless",
                select_norm_eps=0.03,
            ),
            tie_embeddings=False,
        ),
        "biased": config(
            mbx.Mamba1Config(
                d_model=9, d_state=5, bias=True, conv_bias=False, select_norm="weightless"
            ),
            tie_embeddings=False,
        ),
    },
    "mamba2": {
        "groups": config(
            mbx.Mamba2Config(
                d_model=7, d_inner=21, d_state=5, d_conv=3, headdim=3, ngroups=1, norm_eps=3e-4
            ),
            norm_eps=3e-4,
            padded_vocab_size=16,
        ),
        "biased_untied": config(
            mbx.Mamba2Config(
                d_model=9, d_state=6, headdim=3, ngroups=3, bias=True, conv_bias=False
            ),
            tie_embeddings=False,
            residual_in_fp32=False,
        ),
        "limits": config(
            mbx.Mamba2Config(
                d_model=5, d_inner=20, d_state=3, headdim=5, ngroups=2, dt_limit=(0.4, 1.0)
            ),
            n_layer=3,
        ),
        "lower_limit": config(
            mbx.Mamba2Config(
                d_model=4, d_inner=24, d_state=3, headdim=3, ngroups=4, dt_limit=(0.7, math.inf)
            )
        ),
    },
    "bamba": {name: HYBRIDS["transformers"][name] for name in ("bamba", "bamba_bias")},
    "jamba": {
        name: HYBRIDS["transformers"][name] for name in ("jamba", "jamba_untied", "jamba_experts")
    },
    "nemotron_h": {
        name: model
        for name, model in HYBRIDS["transformers"].items()
        if name.startswith("nemotron_h")
    },
    # transformers cannot run a model of this type without attention.
    "granitemoehybrid": {
        name: HYBRIDS["transformers"][name]
        for name in ("granite", "granite_rope", "granite_attention", "granite_experts")
    },
    "falcon_h1": {name: HYBRIDS["transformers"][name] for name in ("falcon_h1", "falcon_h1_norm")},
}

NEMOTRON_3 = {
    "vocab_size": 31,
    "hidden_size": 12,
    "hybrid_override_pattern": "ME*EM",
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "ssm_state_size": 5,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 3,
    "time_step_limit": [0.005, 0.1],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 7,
    "moe_shared_expert_intermediate_size": 11,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": False,
}

# Configs of models that transformers saves and we load, by model type and name.
THEIRS: dict[str, dict[str, dict[str, Any]]] = {
    "mamba": {
        "odd": {
            "vocab_size": 31,
            "hidden_size": 17,
            "state_size": 5,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 2e-3,
            "expand": 3,
            "intermediate_size": 29,
            "conv_kernel": 6,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
            "time_step_rank": 7,
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "time_step_floor": 1e-3,
        },
        "default": {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2},
        "expand": {"vocab_size": 30, "hidden_size": 9, "num_hidden_layers": 1, "expand": 3},
    },
    "falcon_mamba": {
        # As published: `intermediate_size` is not `expand` times `hidden_size`.
        "published": {
            "vocab_size": 31,
            "hidden_size": 16,
            "expand": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "layer_norm_epsilon": 1e-5,
            "time_step_rank": 5,
            "tie_word_embeddings": False,
        },
        "every_field": {
            "vocab_size": 30,
            "hidden_size": 9,
            "expand": 3,
            "state_size": 5,
            "num_hidden_layers": 1,
            "layer_norm_epsilon": 2e-3,
            "mixer_rms_eps": 0.1,
            "conv_kernel": 6,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
        },
    },
    "mamba2": {
        "odd": {
            "vocab_size": 31,
            "hidden_size": 15,
            "expand": 3,
            "num_heads": 9,
            "head_dim": 5,
            "n_groups": 3,
            "state_size": 7,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 2e-3,
            "conv_kernel": 6,
            "chunk_size": 11,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "time_step_limit": [0.3, 1.1],
        },
        "default_groups": {
            "vocab_size": 30,
            "hidden_size": 16,
            "num_heads": 16,
            "head_dim": 2,
            "num_hidden_layers": 2,
            "chunk_size": 8,
        },
        "tied": {
            "vocab_size": 30,
            "hidden_size": 9,
            "num_heads": 6,
            "head_dim": 3,
            "n_groups": 1,
            "num_hidden_layers": 1,
            "tie_word_embeddings": True,
        },
    },
    "bamba": {
        "bamba": {
            "vocab_size": 30,
            "hidden_size": 32,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_layer_indices": [0, 2],
            "mamba_n_heads": 8,
            "mamba_d_state": 3,
        }
    },
    "jamba": {
        "jamba": {
            "vocab_size": 30,
            "hidden_size": 12,
            "intermediate_size": 7,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "num_experts": 1,
            "tie_word_embeddings": True,
        },
        "experts": {
            "vocab_size": 30,
            "hidden_size": 12,
            "intermediate_size": 7,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
        },
    },
    "nemotron_h": {
        "dense": {
            "vocab_size": 31,
            "hidden_size": 12,
            "hybrid_override_pattern": "MM-*M-*-",
            "intermediate_size": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 4,
            "ssm_state_size": 5,
            "mamba_num_heads": 6,
            "mamba_head_dim": 5,
            "n_groups": 3,
            "conv_kernel": 3,
            "chunk_size": 11,
            "use_bias": True,
            "use_conv_bias": False,
            "mlp_bias": True,
            "layer_norm_epsilon": 2e-3,
            "residual_in_fp32": True,
            "time_step_limit": [0.005, 0.1],
        },
        "experts": NEMOTRON_3 | {"n_group": 4, "topk_group": 3, "norm_topk_prob": True},
        "latent": NEMOTRON_3
        | {
            "layers_block_type": ["full_attention", "moe", "linear_attention", "mlp"],
            "intermediate_size": 7,
            "moe_latent_size": 9,
        },
    },
    "granitemoehybrid": {
        "every_field": {
            "vocab_size": 30,
            "hidden_size": 24,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "attention_multiplier": 0.3,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "logits_scaling": 3,
            "mamba_expand": 3,
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": [0.4, 1.0],
            "rms_norm_eps": 1e-3,
            "num_local_experts": 0,
            "tie_word_embeddings": True,
        },
        # Without any multiplier, we would save it as a Bamba model.
        "default": {
            "vocab_size": 30,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "num_attention_heads": 4,
            "num_local_experts": 0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "position_embedding_type": "rope",
        },
        "attention_alone": {
            "vocab_size": 30,
            "hidden_size": 32,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "num_attention_heads": 4,
            "mamba_n_heads": 1,
            "num_local_experts": 0,
            "attention_multiplier": 0.2,
            "position_embedding_type": "nope",
        },
        "experts": {
            "vocab_size": 30,
            "hidden_size": 24,
            "intermediate_size": 5,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 2,
            "layer_types": ["attention", "mamba"],
            "num_attention_heads": 4,
            "position_embedding_type": "nope",
            "residual_multiplier": 0.22,
            "mamba_n_heads": 8,
            "mamba_d_state": 5,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
        },
    },
    "falcon_h1": FALCON_H1,
}
