"""Cases whose witness is transformers."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from tests.golden._transformers_models import (
    BAMBA,
    FALCON,
    FALCON_H1,
    GRANITE,
    JAMBA,
    MAMBA,
    MAMBA2,
    Kind,
)
from tests.golden._witness import (
    WEIGHTS,
    check,
    check_size_of_values,
    loop_answers,
    publish,
    save,
)


class TransformersCase(NamedTuple):
    """A model with random weights, and the length of the sequence that it runs."""

    kind: Kind
    seed: int
    length: int
    config: dict[str, Any]


# Options that do not change the result differ from their defaults, since a reader must accept them.
# `rescale_prenorm_residual` is not among them: transformers 5.24 rescales `out_proj` with it
# whenever it loads.
UNUSED = {
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "time_step_scale": 1.5,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 2e-4,
    "time_step_init_scheme": "constant",
    "use_associative_scan": False,
    "use_cache": False,
}
UNUSED_IN_HYBRIDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "use_cache": False,
}

# All sizes differ from one another, so that no axis can be mistaken for another.
TRANSFORMERS_CASES = {
    # `intermediate_size` contradicts `expand`, and wins.
    "mamba_tiny": TransformersCase(
        kind=MAMBA,
        seed=2,
        length=13,
        config={
            **UNUSED,
            "vocab_size": 37,
            "hidden_size": 19,
            "intermediate_size": 45,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": True,
            "layer_norm_epsilon": 3e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    ),
    # The rank "auto" is ceil(17 / 16) = 2; transformers resolves it before it writes the config.
    "mamba_tied": TransformersCase(
        kind=MAMBA,
        seed=7,
        length=11,
        config={
            **UNUSED,
            "vocab_size": 41,
            "hidden_size": 17,
            "expand": 3,
            "intermediate_size": 23,
            "state_size": 7,
            "conv_kernel": 5,
            "time_step_rank": "auto",
            "num_hidden_layers": 3,
            "use_bias": False,
            "use_conv_bias": False,
            "layer_norm_epsilon": 2e-3,
            "residual_in_fp32": False,
            "tie_word_embeddings": True,
        },
    ),
    # The exact gelu (erf) applies to the convolution only; the gate stays a silu.
    "mamba_act": TransformersCase(
        kind=MAMBA,
        seed=1,
        length=17,
        config={
            **UNUSED,
            "vocab_size": 29,
            "hidden_size": 11,
            "expand": 3,
            "state_size": 3,
            "conv_kernel": 5,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 7e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    ),
    # `expand` is far from `intermediate_size`, as in the published config.
    "falcon_tiny": TransformersCase(
        kind=FALCON,
        seed=4,
        length=13,
        config={
            **UNUSED,
            "vocab_size": 31,
            "hidden_size": 15,
            "expand": 16,
            "intermediate_size": 29,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 3e-4,
            "mixer_rms_eps": 0.2,
            "residual_in_fp32": False,
            "tie_word_embeddings": False,
        },
    ),
    # Half of the step sizes exceed the limits, and 17 tokens are several chunks of transformers.
    "mamba2_tiny": TransformersCase(
        kind=MAMBA2,
        seed=3,
        length=17,
        config={
            "vocab_size": 37,
            "hidden_size": 18,
            "expand": 3,
            "num_heads": 6,
            "head_dim": 9,
            "n_groups": 3,
            "state_size": 5,
            "conv_kernel": 3,
            "chunk_size": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": True,
            "layer_norm_epsilon": 3e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
            "time_step_limit": [0.2, 0.9],
            # Options that do not change the result differ from their defaults too.
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.07,
            "time_step_min": 0.002,
            "time_step_max": 0.2,
            "time_step_floor": 2e-4,
            "time_step_rank": 5,
            "use_cache": False,
        },
    ),
    "bamba_tiny": TransformersCase(
        kind=BAMBA,
        seed=6,
        length=15,
        config={
            "vocab_size": 23,
            "hidden_size": 10,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 5,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.9,
            },
            "mamba_n_heads": 4,
            "mamba_d_head": 5,
            "mamba_n_groups": 2,
            "mamba_d_state": 3,
            "mamba_d_conv": 3,
            "mamba_chunk_size": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": (0.2, 0.9),
            "rms_norm_eps": 3e-4,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "num_logits_to_keep": 3,
            "z_loss_coefficient": 0.1,
            **UNUSED_IN_HYBRIDS,
        },
    ),
    "jamba_tiny": TransformersCase(
        kind=JAMBA,
        seed=1,
        length=13,
        config={
            "vocab_size": 23,
            "hidden_size": 9,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "mamba_expand": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 3,
            "mamba_dt_rank": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "rms_norm_eps": 3e-4,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "expert_layer_offset": 0,
            "expert_layer_period": 3,
            "num_experts_per_tok": 1,
            "router_aux_loss_coef": 0.1,
            **UNUSED_IN_HYBRIDS,
        },
    ),
    "granite_tiny": TransformersCase(
        kind=GRANITE,
        seed=3,
        length=13,
        config={
            "vocab_size": 23,
            "hidden_size": 10,
            "shared_intermediate_size": 7,
            "intermediate_size": 9,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            # Without positions, the bias of the keys has no effect, and its gradient is rounding.
            "attention_bias": False,
            "attention_multiplier": 0.4,
            "embedding_multiplier": 0.6,
            "residual_multiplier": 1.3,
            "logits_scaling": 1.5,
            "position_embedding_type": "nope",
            "mamba_n_heads": 4,
            "mamba_d_head": 5,
            "mamba_n_groups": 2,
            "mamba_d_state": 3,
            "mamba_d_conv": 3,
            "mamba_chunk_size": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": (0.2, 0.9),
            "rms_norm_eps": 3e-4,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "router_aux_loss_coef": 0.1,
            **UNUSED_IN_HYBRIDS,
        },
    ),
    "falcon_h1_tiny": TransformersCase(
        kind=FALCON_H1,
        seed=5,
        length=13,
        config={
            "vocab_size": 23,
            "hidden_size": 10,
            "intermediate_size": 7,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
            "mamba_d_ssm": 15,
            "mamba_n_heads": 5,
            "mamba_d_head": 3,
            "mamba_n_groups": 5,
            "mamba_d_state": 3,
            "mamba_d_conv": 3,
            "mamba_chunk_size": 4,
            "mamba_rms_norm": False,
            "mamba_norm_before_gate": False,
            "time_step_limit": (0.2, 0.9),
            "rms_norm_eps": 3e-4,
            "embedding_multiplier": 1.7,
            "lm_head_multiplier": 0.6,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.8,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            # transformers keeps these in float32.
            "ssm_multipliers": [1.375, 0.875, 0.75, 1.5, 1.25],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.6,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "num_logits_to_keep": 3,
            **UNUSED_IN_HYBRIDS,
        },
    ),
}


def make_transformers(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a case from transformers, which needs no official code."""
    del sdist
    for package in ("mamba_ssm", "causal_conv1d", "mambapy"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    kind, seed, length, fields = TRANSFORMERS_CASES[case]
    causal_lm = getattr(transformers, f"{kind.model}ForCausalLM")
    rng = np.random.default_rng(seed)
    model = causal_lm(getattr(transformers, f"{kind.model}Config")(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kind.random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = causal_lm.from_pretrained(folder).eval()
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} differs from the file"
        tokens = torch.from_numpy(rng.integers(model.config.vocab_size, size=length))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        assert logits_float32.dtype == torch.float32

        witness = kind.answers(model.double(), tokens)
        check(case, witness, loop_answers(kind.loop, weights, tokens, kind.sizes(model.config)))
        check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits differ by {rounding:.1e}; greedy {witness['greedy'].tolist()}")
        save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        publish(folder, out / case)
