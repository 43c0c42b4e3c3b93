"""Mistral's layout, of which Codestral is the one release: the official model within another."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import CheckpointError, from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import MISTRAL, assert_same, config, make


MODELS = MISTRAL["mistral"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, dtype, tmp_path):
    model = make(MODELS[name], dtype)
    save_pretrained(model, tmp_path, layout="mistral")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "consolidated.safetensors",
        "params.json",
    ]
    assert_same(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("file", ["params.json", "config.json"])
def test_what_mistral_inference_has(file, tmp_path):
    """`MambaArgs`, and the state dict of a module whose `model` is the official one."""
    model = make(MODELS["untied"])
    official = state_dict(model, layout="state-spaces")
    tensors = {f"model.{name}": np.asarray(tensor) for name, tensor in official.items()}
    args = {
        "dim": 64,
        "n_layers": 1,
        "vocab_size": 13,
        "n_groups": 2,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "model_type": "mamba",
    }
    (tmp_path / file).write_text(json.dumps(args))
    save_file(tensors, tmp_path / "consolidated.safetensors")
    assert_same(from_pretrained(tmp_path), model)

    save_pretrained(model, tmp_path / "ours", layout="mistral")
    assert json.loads((tmp_path / "ours" / "params.json").read_text()) == args
    ours = load_file(tmp_path / "ours" / "consolidated.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(np.array_equal(ours[name], tensors[name]) for name in ours)


def test_a_tied_head_is_stored_twice(tmp_path):
    save_pretrained(make(MODELS["tied"]), tmp_path, layout="mistral")
    tensors = load_file(tmp_path / "consolidated.safetensors")
    assert np.array_equal(
        tensors["model.lm_head.weight"], tensors["model.backbone.embedding.weight"]
    )
    tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight"):
        from_pretrained(tmp_path)


def test_a_repository_of_both_layouts(tmp_path):
    """Mistral's has transformers' files beside its own: the usual config goes first."""
    first, second = make(MODELS["untied"]), make(MODELS["tied"])
    save_pretrained(first, tmp_path, layout="mistral")
    save_pretrained(second, tmp_path)
    assert (tmp_path / "params.json").exists()
    assert_same(from_pretrained(tmp_path), second)
    # But what is saved is what is loaded.
    save_pretrained(first, tmp_path, layout="mistral")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "consolidated.safetensors",
        "params.json",
    ]
    assert_same(from_pretrained(tmp_path), first)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 63}, "`headdim` must divide"),
        ({"n_groups": 1}, "should be"),
        ({"n_layers": 2}, "missing"),
        ({"model_type": "transformer"}, "`model_type`.*only as 'mamba'"),
        ({"tie_embeddings": None}, "`tie_embeddings`.*true or false"),
        ({"d_state": 16}, "unknown meaning.*'d_state'"),
        ({"pad_vocab_size_multiple": 16}, "should be"),
    ],
)
def test_config_is_refused(fields, message, tmp_path):
    save_pretrained(make(MODELS["untied"]), tmp_path, layout="mistral")
    file = tmp_path / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_pretrained(tmp_path)


def test_every_field_is_required(tmp_path):
    save_pretrained(make(MODELS["untied"]), tmp_path, layout="mistral")
    file = tmp_path / "params.json"
    values = json.loads(file.read_text())
    for name in values.keys() - {"model_type"}:
        file.write_text(json.dumps({k: v for k, v in values.items() if k != name}))
        with pytest.raises(CheckpointError, match=f"`{name}`"):
            from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        config(mbx.Mamba1Config(d_model=32)),
        config(mbx.Mamba2Config(d_model=32, d_state=64)),
        config(mbx.Mamba2Config(d_model=32, d_inner=128)),
        config(mbx.Mamba2Config(d_model=64, d_ssm=64)),
        config(mbx.Mamba2Config(d_model=32), d_intermediate=128),
    ],
)
def test_the_layout_refuses_what_it_cannot_hold(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"'mistral' layout has only.*but layer 0 is"):
        save_pretrained(make(model), tmp_path / "new", layout="mistral")
    with pytest.raises(CheckpointError, match=r"give `max_shard_size=None`"):
        save_pretrained(make(MODELS["tied"]), tmp_path / "new", layout="mistral", max_shard_size=9)
    assert not (tmp_path / "new").exists()
