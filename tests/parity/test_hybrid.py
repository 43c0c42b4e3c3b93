"""Agreement of hybrids with attention: the golden files, and transformers as installed."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, state_dict
from tests.support.checkpoints import HYBRIDS as MODELS, make
from tests.support.parity import (
    GOLDEN,
    check_they_load,
    check_we_load,
    difference,
    named_state,
    run,
    their_model,
)


CASES = {
    "bamba_tiny": "transformers",
    "jamba_tiny": "transformers",
    "state_spaces_hybrid": "state-spaces",
}


@pytest.mark.parametrize("name", CASES)
def test_golden_float64(name):
    folder = GOLDEN / name
    golden = load_file(folder / "golden.safetensors")
    with jax.enable_x64(True):
        model = from_pretrained(folder, dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(model, jnp.asarray(golden["tokens"]))
        got = {"loss": loss, "logits": logits, "hidden_states.norm_f": hidden[-1]}
        for i, state in enumerate(states):
            got |= {f"hidden_states.{i}": hidden[i]} | named_state(i, state, golden)
        grads = state_dict(grads, layout=CASES[name])
        got |= {f"grad.{key}": grad for key, grad in grads.items()}
        assert got.keys() == golden.keys() - {"tokens", "greedy", "logits_float32"}
        for key in golden:
            if key.endswith(".conv"):
                golden[key] = golden[key][:, 1:]  # The oldest is of no use to what follows.
        off = {key: difference(got[key], golden[key]) for key in got}
    assert max(off.values()) < 1e-12, off


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_float32(name):
    """From the checkpoint as it is, and on through the cache."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model = from_pretrained(GOLDEN / name)
    logits = eqx.filter_jit(model)(jnp.asarray(golden["tokens"]))
    assert difference(logits, golden["logits"]) < 1e-5
    out = mbx.generate(model, golden["tokens"], len(golden["greedy"]))
    assert np.array_equal(out.tokens, golden["greedy"])


# transformers.

pytestmark = pytest.mark.parity
ARCHITECTURES = {"bamba": "BambaForCausalLM", "jamba": "JambaForCausalLM"}
OURS = [name for name in MODELS["transformers"] if name != "no_attention"]
THEIRS: dict[str, dict[str, Any]] = {
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
    },
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
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_ours(name, torch, tmp_path):
    architecture = ARCHITECTURES[name.split("_")[0]]
    model = make(MODELS["transformers"][name])
    check_they_load(torch, model, tmp_path, architecture, max_shard_size=1000)


@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, torch, tmp_path):
    theirs = their_model(torch, THEIRS[name], name)
    want, again = check_we_load(torch, theirs, tmp_path, set())
    assert np.array_equal(again, want)
