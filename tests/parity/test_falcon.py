"""Agreement of Falcon-Mamba with transformers as installed."""

import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.checkpoints import config, make
from tests.support.parity import check_they_load, check_we_load, their_model


pytestmark = pytest.mark.parity

OURS = {
    "eps": mbx.Mamba1Config(
        d_model=6,
        d_inner=9,
        d_state=3,
        d_conv=5,
        dt_rank=2,
        select_norm="weightless",
        select_norm_eps=0.03,
    ),
    "biased": mbx.Mamba1Config(
        d_model=9, d_state=5, bias=True, conv_bias=False, select_norm="weightless"
    ),
}

THEIRS = {
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
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_ours(name, torch, tmp_path):
    model = make(config(OURS[name], tie_embeddings=False))
    check_they_load(torch, model, tmp_path, "FalconMambaForCausalLM")


@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, torch, tmp_path):
    theirs = their_model(torch, THEIRS[name], "falcon_mamba")
    want, again = check_we_load(torch, theirs, tmp_path, {"expand"})
    assert np.array_equal(again, want)
