"""The published configs of Nemotron-H, Granite 4 and Jamba, and the sizes of the models."""

import math


# The fields of the published configs, as other projects quote them. Those without influence are a
# selection.
NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,  # Ignored: the width is `mamba_num_heads * mamba_head_dim`.
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 8,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}


def nemotron_h(pattern: str, d_model: int, d_intermediate: int, nheads: int, headdim: int) -> dict:
    return NEMOTRON_H | {
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "num_attention_heads": 40,
        "hidden_size": d_model,
        "intermediate_size": d_intermediate,
        "mamba_num_heads": nheads,
        "mamba_head_dim": headdim,
    }


# As other projects quote the published configs, without fields that nobody reads.
GRANITE = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "vocab_size": 100352,
    "num_hidden_layers": 40,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "logits_scaling": 8,
    "position_embedding_type": "nope",
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def granite(
    d_model: int,
    nheads: int,
    d_intermediate: int,
    attention: tuple[int, ...] = (5, 15, 25, 35),
    n_layer: int = 40,
    **fields: object,
) -> dict:
    types = ["attention" if i in attention else "mamba" for i in range(n_layer)]
    sizes = {"hidden_size": d_model, "num_attention_heads": nheads, "num_hidden_layers": n_layer}
    widths = {"shared_intermediate_size": d_intermediate, "intermediate_size": d_intermediate}
    return GRANITE | sizes | widths | {"layer_types": types} | fields


def experts(d_intermediate: int, n_experts: int, top_k: int) -> dict:
    sizes = {"num_local_experts": n_experts, "num_experts_per_tok": top_k}
    return sizes | {"intermediate_size": d_intermediate}


NEMOTRON_3 = NEMOTRON_H | {
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "mamba_head_dim": 64,
    "mamba_num_heads": 64,
    "mamba_ssm_cache_dtype": "float32",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}


# By repository, the config and the number of parameters.
HYBRIDS: dict[str, tuple[dict, int]] = {
    "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16": (
        nemotron_h("M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", 3136, 12544, 96, 80),
        3_973_556_832,
    ),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": (
        nemotron_h(
            "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 15680, 128, 80
        ),
        8_888_227_328,
    ),
    # The published size leaves out the correction biases of the routers.
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (NEMOTRON_3, 31_577_937_344 + 23 * 128),
    # The published size, 12.31 billion, is rounded.
    "nvidia/NVIDIA-Nemotron-Nano-12B-v2": (
        nemotron_h(f"{'M-M-M-M*-' * 6}M-M-M-M-", 5120, 20480, 128, 80),
        12_310_001_152,
    ),
    "ibm-granite/granite-4.0-h-350m": (
        granite(768, 12, 2048, (10, 13, 17, 27), 32, mamba_n_heads=48, mamba_d_head=32)
        | {"residual_multiplier": 0.246, "logits_scaling": 3},
        340_332_224,
    ),
    "ibm-granite/granite-4.0-h-1b": (
        granite(1536, 12, 4096, mamba_n_heads=48, mamba_d_head=64),
        1_461_538_368,
    ),
    "ibm-granite/granite-4.0-h-micro": (
        granite(2048, 32, 8192, num_key_value_heads=8, mamba_n_heads=64, mamba_d_head=64),
        3_191_396_096,
    ),
    "ibm-granite/granite-4.0-h-tiny": (
        granite(1536, 12, 1024, mamba_n_heads=48, mamba_d_head=64) | experts(512, 64, 6),
        6_939_037_248,
    ),
    "ibm-granite/granite-4.0-h-small": (
        granite(4096, 32, 1536, num_key_value_heads=8, mamba_n_heads=128, mamba_d_head=64)
        | experts(768, 72, 10),
        32_207_337_984,
    ),
    # Without Mamba-2.
    "ibm-granite/granite-4.0-micro": (
        granite(2560, 40, 8192, (*range(40),), num_key_value_heads=8)
        | {"position_embedding_type": "rope", "rope_theta": 10000000, "logits_scaling": 10},
        3_402_836_480,
    ),
    # The config has the defaults of transformers. The published size, 52 billion, is rounded.
    "ai21labs/Jamba-v0.1": ({"model_type": "jamba"}, 51_570_323_328),
}
