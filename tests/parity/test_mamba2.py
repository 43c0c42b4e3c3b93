"""Agreement of Mamba-2 with transformers as installed."""

import math

import pytest

import mamba_eqx as mbx
from tests.support.checkpoints import config, make
from tests.support.parity import check_they_load, check_we_load, difference, their_model


pytestmark = pytest.mark.parity

OURS = {
    "groups": config(
        mbx.Mamba2Config(
            d_model=7, d_inner=21, d_state=5, d_conv=3, headdim=3, ngroups=1, norm_eps=3e-4
        ),
        norm_eps=3e-4,
        padded_vocab_size=16,
    ),
    "biased_untied": config(
        mbx.Mamba2Config(d_model=9, d_state=6, headdim=3, ngroups=3, bias=True, conv_bias=False),
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
}

THEIRS = {
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
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_ours(name, torch, tmp_path):
    check_they_load(torch, make(OURS[name]), tmp_path, "Mamba2ForCausalLM", seq=45)


@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, torch, tmp_path):
    theirs = their_model(torch, THEIRS[name], "mamba2")
    # How to initialise, and which chunks to make.
    of_ours = {"chunk_size", "initializer_range"}
    want, again = check_we_load(torch, theirs, tmp_path, of_ours, seq=45)
    assert difference(again, want) < 1e-5  # In other chunks.
