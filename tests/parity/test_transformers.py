"""Agreement with transformers as installed, in both directions."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import make
from tests.support.parity import (
    check_they_load,
    check_we_load,
    difference,
    load_theirs,
    their_logits,
    their_model,
)
from tests.support.parity_models import OURS, THEIRS


pytestmark = pytest.mark.parity

ARCHITECTURES = {
    "mamba": "MambaForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
    "jamba": "JambaForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
}
HYBRIDS = ("bamba", "jamba", "granitemoehybrid", "falcon_h1")
# Longer than a chunk of Mamba-2.
SEQ = {"mamba2": 45}
# Fields that contradict others, and fields about initialisation and chunks. We do not keep them.
CHANGED = {
    "mamba": {"expand", "initializer_range", "time_step_floor"},
    "falcon_mamba": {"expand"},
    "mamba2": {"chunk_size", "initializer_range"},
    "bamba": set(),
    "jamba": set(),
    "granitemoehybrid": {"mamba_chunk_size"},
    # The multipliers of inputs are 1 in our files.
    "falcon_h1": {
        "attention_in_multiplier",
        "attention_out_multiplier",
        "key_multiplier",
        "mamba_chunk_size",
        "mamba_d_ssm",
        "mamba_expand",
        "mamba_norm_before_gate",
        "ssm_in_multiplier",
        "ssm_multipliers",
    },
}
# The largest numbers of bytes in one file.
OUR_SHARDS = {
    "mamba": [None, 2000],
    "bamba": [1000],
    "jamba": [1000],
    "granitemoehybrid": [1000],
    "falcon_h1": [1000],
}
THEIR_SHARDS = {"mamba": ["1GB", "3KB"]}


def cases(models: dict[str, dict[str, Any]], shards: dict[str, list[Any]], default: Any) -> Any:
    """Parametrises a test over models of all types and over sizes of shards."""
    return pytest.mark.parametrize(
        ("model_type", "name", "max_shard_size"),
        [
            pytest.param(
                kind,
                name,
                size,
                marks=[pytest.mark.slow] if kind in HYBRIDS else [],
                id=f"{kind}-{name}-{size}",
            )
            for kind, named in models.items()
            for name in named
            for size in shards.get(kind, [default])
        ],
    )


@cases(OURS, OUR_SHARDS, 2000)
def test_transformers_loads_ours(model_type, name, max_shard_size, torch, tmp_path):
    model, seq = make(OURS[model_type][name]), SEQ.get(model_type, 25)
    architecture = ARCHITECTURES[model_type]
    check_they_load(torch, model, tmp_path, architecture, seq=seq, max_shard_size=max_shard_size)


@cases(THEIRS, THEIR_SHARDS, "3KB")
def test_ours_loads_transformers(model_type, name, max_shard_size, torch, tmp_path):
    theirs = their_model(torch, THEIRS[model_type][name], model_type)
    want, again = check_we_load(
        torch,
        theirs,
        tmp_path,
        CHANGED[model_type],
        seq=SEQ.get(model_type, 25),
        max_shard_size=max_shard_size,
    )
    if model_type in ("mamba2", "falcon_h1"):
        assert difference(again, want) < 1e-5  # Chunks, or the factors of products, differ.
    else:
        assert np.array_equal(again, want)


def test_ours_loads_torch_files(torch, tmp_path):
    theirs = their_model(torch, THEIRS["mamba"]["default"])
    theirs.save_pretrained(tmp_path)
    want = from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # With the tied head.
    assert eqx.tree_equal(from_pretrained(tmp_path), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_loads_ours_in_half_precision(dtype, torch, tmp_path):
    model = make(OURS["mamba"]["odd"], dtype)
    save_pretrained(model, tmp_path)
    theirs = load_theirs(tmp_path)
    assert theirs.dtype == getattr(torch, dtype)
    for key, tensor in state_dict(model).items():
        loaded = theirs.state_dict()[key]
        # transformers has one dtype for all parameters.
        assert loaded.dtype == theirs.dtype
        want = np.asarray(tensor.astype(dtype)).astype(np.float32)
        assert np.array_equal(loaded.float().numpy(), want)


def test_bfloat16_is_more_accurate_than_transformers(torch, tmp_path):
    theirs = their_model(torch, THEIRS["mamba"]["default"])
    tokens = np.arange(25) * 11 % 29
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    truth = eqx.filter_jit(from_pretrained(tmp_path, dtype=jnp.float32))(jnp.asarray(tokens))
    ours = eqx.filter_jit(from_pretrained(tmp_path))(jnp.asarray(tokens))
    assert difference(ours, truth) < 0.05
    assert difference(ours, truth) < difference(their_logits(torch, theirs, tokens), truth)
