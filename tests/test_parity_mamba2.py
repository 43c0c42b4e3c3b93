"""Agreement of Mamba-2 with transformers as installed."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict

from .test_parity import difference, load_theirs, their_logits, torch as torch
from .test_pretrained import config, make


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
    model = jax.tree.map(lambda leaf: 0.5 * leaf, make(OURS[name]))
    save_pretrained(model, tmp_path, max_shard_size=2000)
    theirs = load_theirs(tmp_path, "Mamba2ForCausalLM")
    tokens = np.arange(45) * 7 % 13
    logits = eqx.filter_jit(model)(jnp.asarray(tokens))
    assert difference(logits, their_logits(torch, theirs, tokens)) < 1e-5
    for key, tensor in state_dict(model).items():
        assert np.array_equal(theirs.state_dict()[key].numpy(), tensor)


@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, torch, tmp_path):
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**THEIRS[name])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    model = from_pretrained(tmp_path / "theirs")
    tokens = np.arange(45) * 11 % 29
    want = their_logits(torch, theirs, tokens)
    assert difference(eqx.filter_jit(model)(jnp.asarray(tokens)), want) < 1e-5

    save_pretrained(model, tmp_path / "ours")
    back = load_theirs(tmp_path / "ours", "Mamba2ForCausalLM")
    there, here = theirs.config.to_dict(), back.config.to_dict()
    # How to initialise, which chunks to make, and what ends a text.
    of_ours = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"} | {
        "chunk_size",
        "initializer_range",
    }
    assert {k for k in there if there[k] != here.get(k)} <= of_ours
    again = their_logits(torch, back, tokens)
    assert difference(again, want) < 1e-5  # In other chunks.
