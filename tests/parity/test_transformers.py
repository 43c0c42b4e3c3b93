"""Agreement with transformers as installed, in both directions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import make
from tests.support.parity import (
    check_they_load,
    check_we_load,
    difference,
    load_theirs,
    run,
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
    "nemotron_h": "NemotronHForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
}
# Longer than a chunk of Mamba-2.
SEQ = {"mamba2": 45}
# Fields that contradict others, and fields about initialisation and chunks. We do not keep them.
CHANGED = {
    "mamba": {"expand", "initializer_range", "time_step_floor"},
    "falcon_mamba": {"expand"},
    "mamba2": {"chunk_size", "initializer_range"},
    "bamba": set(),
    "jamba": set(),
    "nemotron_h": {"chunk_size", "time_step_min"},
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
# Compile more than the others.
SLOW = ("bamba", "jamba", "granitemoehybrid", "nemotron_h", "falcon_h1")
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
                marks=[pytest.mark.slow] if kind in SLOW else [],
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
    if model_type in ("mamba2", "nemotron_h", "falcon_h1"):
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


_MAMBA2 = mbx.Mamba2Config(48, d_state=16, headdim=12)
_ATTENTION = mbx.AttentionConfig(48, nheads=4, nheads_kv=2, headdim=12, softmax_scale=0.3)
MIXERS: dict[str, tuple[mbx.models.AbstractMixerConfig, ...]] = {
    "mamba": (mbx.Mamba1Config(48),) * 2,
    "mamba2": (_MAMBA2,) * 2,
    "granitemoehybrid": (_MAMBA2, _ATTENTION),
}


def _distance(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Returns the Euclidean distance of two sets of arrays, relative to the length of `want`."""
    pairs = [(np.asarray(got[k], np.float64), np.asarray(want[k], np.float64)) for k in want]
    squares = np.sum([(np.sum((a - b) ** 2), np.sum(b**2)) for a, b in pairs], axis=0)
    return np.sqrt(squares[0] / squares[1])


def _errors(torch: Any, model_type: str, seed: int, folder: Any) -> np.ndarray:
    """Returns the distances to float64 of our bfloat16 logits and gradients (first row), and of
    those of transformers (second row)."""
    mlp = mbx.GatedMLPConfig(80) if model_type == "granitemoehybrid" else None
    blocks = tuple(mbx.BlockConfig(mixer, mlp=mlp) for mixer in MIXERS[model_type])
    model = mbx.LanguageModelConfig(64, blocks).build(key=jr.key(seed))
    # Larger embeddings than the initial ones, as after training, lead to logits that differ.
    embedding = lambda m: m.embedding.weight
    model = eqx.tree_at(embedding, model, replace_fn=lambda w: 10 * w)
    # transformers rounds all parameters to bfloat16, and this library keeps some in float32. All
    # three have the same parameters if they are rounded beforehand.
    model = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), model)
    save_pretrained(model, folder)
    tokens = np.random.default_rng(seed).integers(0, 64, 96)

    with jax.enable_x64(True):
        truth = run(from_pretrained(folder, dtype=jnp.float64), jnp.asarray(tokens))
        logits, grads = np.asarray(truth.logits), state_dict(truth.grads)
        grads = {name: np.asarray(grad) for name, grad in grads.items()}
    ours = run(from_pretrained(folder, dtype=jnp.bfloat16), jnp.asarray(tokens, jnp.int32))
    theirs = load_theirs(folder, ARCHITECTURES[model_type]).to(torch.bfloat16)
    ids = torch.tensor(tokens)[None]
    their_logits = theirs(ids, use_cache=False).logits[0].float()
    torch.nn.functional.cross_entropy(their_logits[:-1], ids[0, 1:]).backward()
    named = {k: v.grad.float().numpy() for k, v in theirs.named_parameters()}
    assert named.keys() <= grads.keys()  # transformers lists a tied head once.
    grads = {name: grads[name] for name in named}
    their_logits = their_logits.detach().numpy()
    want = {"logits": logits}
    return np.array(
        [
            [_distance({"logits": ours.logits}, want), _distance(state_dict(ours.grads), grads)],
            [_distance({"logits": their_logits}, want), _distance(named, grads)],
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MIXERS)
def test_bfloat16_is_as_near_to_float64_as_transformers(model_type, torch, tmp_path):
    """Compares the errors of logits and gradients, in the median of five models."""
    errors = [_errors(torch, model_type, seed, tmp_path / str(seed)) for seed in range(5)]
    ours, theirs = np.moveaxis(np.array(errors), 1, 0)
    ratios = np.median(ours / theirs, axis=0)
    print(f"{model_type}: ours {np.median(ours, 0)}, theirs {np.median(theirs, 0)}, {ratios}")
    assert np.all(ratios <= 1)
