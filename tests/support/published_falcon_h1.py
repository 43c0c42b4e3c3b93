"""The published configs of Falcon-H1 and sizes of the models, as other projects quote them."""

# The published config of Falcon-H1-34B-Instruct.
_LARGEST = {
    "architectures": ["FalconH1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.0375,
    "attn_layer_indices": None,
    "bos_token_id": 1,
    "embedding_multiplier": 5.656854249492381,
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "key_multiplier": 0.011048543456039804,
    "lm_head_multiplier": 0.0078125,
    "mamba_chunk_size": 128,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 128,
    "mamba_d_ssm": 4096,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_n_heads": 32,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": False,
    "mamba_rms_norm": True,
    "mamba_use_mlp": True,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_expansion_factor": 8,
    "mlp_multipliers": [0.1767766952966369, 0.011160714285714284],
    "model_type": "falcon_h1",
    "num_attention_heads": 20,
    "num_hidden_layers": 72,
    "num_key_value_heads": 4,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "projectors_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000000000.0,
    "ssm_in_multiplier": 0.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738],
    "ssm_out_multiplier": 0.08838834764831845,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "use_cache": True,
    "vocab_size": 261120,
}


def _smaller(
    n_layer: int, d_model: int, d_intermediate: int, *, heads: tuple[int, int], **fields: object
) -> dict:
    """Returns the config of a smaller model, given the number of attention heads and their size.

    The multipliers, which have no influence on the size, are those of the largest model.
    """
    return _LARGEST | {
        "num_hidden_layers": n_layer,
        "hidden_size": d_model,
        "intermediate_size": d_intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": 2,
        "head_dim": heads[1],
        "mamba_n_groups": 1,
        **fields,
    }


FALCON_H1: dict[str, tuple[dict, int]] = {
    "tiiuae/Falcon-H1-Tiny-90M-Base": (
        _smaller(
            24,
            512,
            768,
            heads=(8, 64),
            mamba_d_ssm=768,
            mamba_d_head=32,
            mamba_n_heads=24,
            mamba_d_state=64,
            mamba_rms_norm=False,
            tie_word_embeddings=True,
            vocab_size=32768,
        ),
        91_131_072,
    ),
    "tiiuae/Falcon-H1-0.5B-Base": (
        _smaller(
            36,
            1024,
            2048,
            heads=(8, 64),
            mamba_d_ssm=1536,
            mamba_d_head=64,
            mamba_n_heads=24,
            mamba_d_state=128,
            mamba_rms_norm=False,
            vocab_size=32784,
        ),
        521_411_104,
    ),
    "tiiuae/Falcon-H1-1.5B-Instruct": (
        _smaller(
            24,
            2048,
            4608,
            heads=(8, 128),
            mamba_d_ssm=3072,
            mamba_d_head=64,
            mamba_n_heads=48,
            vocab_size=65537,
        ),
        1_554_863_488,
    ),
    "tiiuae/Falcon-H1-7B-Base": (
        _smaller(
            44,
            3072,
            12288,
            heads=(12, 128),
            mamba_d_ssm=3072,
            mamba_n_heads=24,
            vocab_size=130048,
        ),
        7_585_648_736,
    ),
    # The published size, 34 billion, is rounded.
    "tiiuae/Falcon-H1-34B-Instruct": (_LARGEST, 33_642_516_224),
}
