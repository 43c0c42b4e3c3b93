"""Agreement with other implementations: the golden files, and transformers as installed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import BIASED, ODD, config, make
from tests.support.parity import (
    GOLDEN,
    check_they_load,
    check_we_load,
    difference,
    load_theirs,
    run,
    their_logits,
    their_model,
)


CASES = {
    "mamba_tiny": "transformers",
    "mamba_tied": "transformers",
    "state_spaces_mamba": "state-spaces",
    "mamba2_tiny": "transformers",
    "falcon_tiny": "transformers",
    "state_spaces_mamba2": "state-spaces",
}


@pytest.fixture(params=CASES)
def case(request):
    """A checkpoint, its layout, and what others compute with it."""
    folder = GOLDEN / request.param
    return folder, CASES[request.param], load_file(folder / "golden.safetensors")


def test_golden_float64(case):
    folder, layout, golden = case
    with jax.enable_x64(True):
        model = from_pretrained(folder, dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(model, jnp.asarray(golden["tokens"]))
        got = {"loss": loss, "logits": logits, "hidden_states.norm_f": hidden[-1]}
        for i, state in enumerate(states):
            got[f"hidden_states.{i}"] = hidden[i]
            got[f"state.{i}.ssm"] = jnp.moveaxis(state.ssm, 0, -1)
            # The oldest column there is of no use to what follows.
            golden[f"state.{i}.conv"] = golden[f"state.{i}.conv"][:, 1:]
            got[f"state.{i}.conv"] = state.conv.T
        got |= {f"grad.{name}": grad for name, grad in state_dict(grads, layout=layout).items()}
        assert got.keys() == golden.keys() - {"tokens", "greedy", "logits_float32"}
        off = {name: difference(got[name], golden[name]) for name in got}
    assert max(off.values()) < 1e-10, off


@pytest.mark.slow
def test_golden_float32(case):
    folder, _, golden = case
    model = from_pretrained(folder)
    logits, state = eqx.filter_jit(model.scan)(jnp.asarray(golden["tokens"]))
    assert logits.dtype == jnp.float32
    assert difference(logits, golden["logits"]) < 1e-5
    if "logits_float32" in golden:
        assert difference(logits, golden["logits_float32"]) < 1e-5
    step, tokens, last = eqx.filter_jit(model.step), [], logits[-1]
    while len(tokens) < len(golden["greedy"]):
        tokens.append(jnp.argmax(last))
        last, state = step(tokens[-1], state)
    assert np.array_equal(tokens, golden["greedy"])


# transformers.

OURS = {
    "odd": config(ODD, norm_eps=3e-4, padded_vocab_size=16),
    "biased_untied": config(BIASED, tie_embeddings=False, residual_in_fp32=False),
    "wide_taps": config(
        mbx.Mamba1Config(d_model=11, d_inner=37, d_state=5, d_conv=2, dt_rank=9, bias=True),
        n_layer=3,
        norm_eps=1e-3,
    ),
}

THEIRS = {
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
}


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_size", [None, 2000])
@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_ours(name, max_shard_size, torch, tmp_path):
    model = make(OURS[name])
    check_they_load(torch, model, tmp_path, "MambaForCausalLM", max_shard_size=max_shard_size)


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_size", ["1GB", "3KB"])
@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, max_shard_size, torch, tmp_path):
    theirs = their_model(torch, THEIRS[name])
    of_ours = {
        "expand",  # in contradiction with `intermediate_size`, which wins
        "initializer_range",
        "time_step_floor",
    }
    want, again = check_we_load(torch, theirs, tmp_path, of_ours, max_shard_size=max_shard_size)
    assert np.array_equal(again, want)


@pytest.mark.parity
def test_ours_loads_torch_files(torch, tmp_path):
    theirs = their_model(torch, THEIRS["default"])
    theirs.save_pretrained(tmp_path)
    want = from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # With the tied head.
    assert eqx.tree_equal(from_pretrained(tmp_path), want)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_loads_ours_in_half_precision(dtype, torch, tmp_path):
    model = make(OURS["odd"], dtype)
    save_pretrained(model, tmp_path)
    theirs = load_theirs(tmp_path)
    assert theirs.dtype == getattr(torch, dtype)
    for key, tensor in state_dict(model).items():
        loaded = theirs.state_dict()[key]
        # It has one dtype for all.
        assert loaded.dtype == theirs.dtype
        want = np.asarray(tensor.astype(dtype)).astype(np.float32)
        assert np.array_equal(loaded.float().numpy(), want)


@pytest.mark.parity
def test_our_bfloat16_is_nearer_to_the_truth(torch, tmp_path):
    theirs = their_model(torch, THEIRS["default"])
    tokens = np.arange(25) * 11 % 29
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    truth = eqx.filter_jit(from_pretrained(tmp_path, dtype=jnp.float32))(jnp.asarray(tokens))
    ours = eqx.filter_jit(from_pretrained(tmp_path))(jnp.asarray(tokens))
    assert difference(ours, truth) < 0.05
    assert difference(ours, truth) < difference(their_logits(torch, theirs, tokens), truth)
