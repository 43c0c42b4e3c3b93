"""The configs of public checkpoints, as published, give models of the published sizes.

The weights, which are gigabytes, are not needed for that.
"""

import math
from pathlib import Path

import jax
import pytest

from mamba_eqx._trees import named_leaves
from mamba_eqx.pretrained._state_dict import LAYOUTS
from mamba_eqx.pretrained.layouts import skeleton
from tests.pretrained import table
from tests.support.published_falcon_h1 import FALCON_H1
from tests.support.published_hybrids import HYBRIDS


ROOT = Path(__file__).parents[2]

MAMBA = {
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MAMBA2 = MAMBA | {
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
# The converted configs still contain the fields of the official ones, which nobody reads.
MAMBA_HF = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": 50280,
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_scale": 1.0,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_init_scheme": "random",
    "time_step_floor": 0.0001,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "initializer_range": 0.1,
    "rescale_prenorm_residual": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "ssm_cfg": {},
    "rms_norm": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
CODESTRAL = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "state_size": 128,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 256,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "rms_norm": True,
    "norm_before_gate": True,
    "residual_in_fp32": True,
    "time_step_rank": 256,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "tie_word_embeddings": False,
    "rescale_prenorm_residual": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0.dev0",
}


FALCON = {
    "architectures": ["FalconMambaForCausalLM"],
    "model_type": "falcon_mamba",
    "vocab_size": 65024,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "expand": 16,  # Ignored in favour of `intermediate_size`.
    "intermediate_size": 8192,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 256,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 11,
    "pad_token_id": 11,
    "torch_dtype": "bfloat16",
}
MAMBA2_ATTENTION = MAMBA2 | {
    "attn_layer_idx": [9, 18, 27, 36, 45, 56],
    "attn_cfg": {
        "causal": True,
        "d_conv": 4,
        "head_dim": 128,
        "num_heads": 30,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": 64,
    },
}


def mamba3(n_layer: int, d_model: int, d_intermediate: int, **ssm_cfg: object) -> dict:
    cfg = {
        "layer": "Mamba3",
        "d_state": 128,
        "expand": 2,
        "headdim": 64,
        "ngroups": 1,
        "rope_fraction": 0.5,
        "chunk_size": 64,
        "is_mimo": False,
        "mimo_rank": 4,
        "is_outproj_norm": False,
    }
    fields = {"vocab_size": 128256, "d_intermediate": d_intermediate, "ssm_cfg": cfg | ssm_cfg}
    return official(MAMBA2, n_layer, d_model) | fields


def official(base: dict, n_layer: int, d_model: int) -> dict:
    return base | {"n_layer": n_layer, "d_model": d_model}


def converted(n_layer: int, d_model: int) -> dict:
    sizes = {"hidden_size": d_model, "num_hidden_layers": n_layer, "intermediate_size": 2 * d_model}
    rank = {"time_step_rank": d_model // 16, "d_inner": 2 * d_model}
    return MAMBA_HF | sizes | rank | {"d_model": d_model, "n_layer": n_layer}


CHECKPOINTS = (
    {
        "state-spaces/mamba-130m": (official(MAMBA, 24, 768), 129_135_360),
        "state-spaces/mamba-370m": (official(MAMBA, 48, 1024), 371_516_416),
        "state-spaces/mamba-790m": (official(MAMBA, 48, 1536), 793_204_224),
        "state-spaces/mamba-1.4b": (official(MAMBA, 48, 2048), 1_372_178_432),
        "state-spaces/mamba-2.8b": (official(MAMBA, 64, 2560), 2_768_345_600),
        "state-spaces/mamba-130m-hf": (converted(24, 768), 129_135_360),
        "state-spaces/mamba-2.8b-hf": (converted(64, 2560), 2_768_345_600),
        "state-spaces/mamba2-130m": (official(MAMBA2, 24, 768), 128_989_632),
        "state-spaces/mamba2-370m": (official(MAMBA2, 48, 1024), 368_346_624),
        "state-spaces/mamba2-780m": (official(MAMBA2, 48, 1536), 780_161_280),
        "state-spaces/mamba2-1.3b": (official(MAMBA2, 48, 2048), 1_343_757_312),
        "state-spaces/mamba2-2.7b": (official(MAMBA2, 64, 2560), 2_702_599_680),
        "state-spaces/mamba2attn-2.7b": (official(MAMBA2_ATTENTION, 64, 2560), 2_697_590_880),
        "state-spaces/mamba3-siso-187m": (mamba3(12, 768, 1536), 186_849_600),
        # The width of the MLP is rounded up to 1280 in the weights.
        "state-spaces/mamba3-mimo-187m": (
            mamba3(12, 768, 1264, is_mimo=True, chunk_size=16),
            187_291_968,
        ),
        "tiiuae/falcon-mamba-7b": (FALCON, 7_272_665_088),
        "mistralai/Mamba-Codestral-7B-v0.1": (CODESTRAL, 7_285_403_648),
    }
    | HYBRIDS
    | FALCON_H1
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_gives_model_of_published_size(name):
    values, parameters = CHECKPOINTS[name]
    layout = LAYOUTS["transformers" if "model_type" in values else "state-spaces"]
    config = layout.read_config(values)
    model = skeleton(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters
    # Every parameter has a name, and no two have the same.
    slots = layout.table(config)
    assert {slot.path for slot in slots} == set(named_leaves(model))
    assert len({slot.name for slot in slots}) == len(slots)
    # Only parameters that are divided among several tensors have several names.
    whole = [slot.path for slot in slots if slot.rows is slot.expert is None]
    assert len(set(whole)) == len(whole)


@pytest.mark.slow
def test_docs_have_the_table_of_sizes():
    text = (ROOT / "docs" / "pretrained.md").read_text("utf-8")
    assert "\n".join([table.HEAD, *table.rows()]) in text
