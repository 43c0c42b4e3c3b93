"""Agreement of Falcon-Mamba with transformers as installed."""

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
    model = jax.tree.map(lambda leaf: 0.5 * leaf, model)
    save_pretrained(model, tmp_path, max_shard_size=2000)
    theirs = load_theirs(tmp_path, "FalconMambaForCausalLM")
    tokens = np.arange(25) * 7 % 13
    logits = eqx.filter_jit(model)(jnp.asarray(tokens))
    assert difference(logits, their_logits(torch, theirs, tokens)) < 1e-5
    for key, tensor in state_dict(model).items():
        assert np.array_equal(theirs.state_dict()[key].numpy(), tensor)


@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, torch, tmp_path):
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    theirs = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**THEIRS[name]))
    theirs = theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    model = from_pretrained(tmp_path / "theirs")
    tokens = np.arange(25) * 11 % 29
    want = their_logits(torch, theirs, tokens)
    assert difference(eqx.filter_jit(model)(jnp.asarray(tokens)), want) < 1e-5

    save_pretrained(model, tmp_path / "ours")
    back = load_theirs(tmp_path / "ours", "FalconMambaForCausalLM")
    assert np.array_equal(their_logits(torch, back, tokens), want)
    there, here = theirs.config.to_dict(), back.config.to_dict()
    of_ours = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "expand"}
    assert {k for k in there if there[k] != here.get(k)} <= of_ours
