"""The layout of Mistral: what the laws of all checkpoints do not cover."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mamba_eqx.pretrained import CheckpointError, from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import MISTRAL, assert_same, make


MODELS = MISTRAL["mistral"]


def test_files(tmp_path):
    save_pretrained(make(MODELS["untied"]), tmp_path, layout="mistral")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "consolidated.safetensors",
        "params.json",
    ]


@pytest.mark.parametrize("file", ["params.json", "config.json"])
def test_reads_files_of_mistral_inference(file, tmp_path):
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


def test_tied_head_is_stored_twice(tmp_path):
    save_pretrained(make(MODELS["tied"]), tmp_path, layout="mistral")
    tensors = load_file(tmp_path / "consolidated.safetensors")
    assert np.array_equal(
        tensors["model.lm_head.weight"], tensors["model.backbone.embedding.weight"]
    )
    tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight"):
        from_pretrained(tmp_path)


def test_config_json_wins_over_params_json(tmp_path):
    """Mistral's repository has the files of transformers beside its own."""
    first, second = make(MODELS["untied"]), make(MODELS["tied"])
    save_pretrained(first, tmp_path, layout="mistral")
    save_pretrained(second, tmp_path)
    assert (tmp_path / "params.json").exists()
    assert_same(from_pretrained(tmp_path), second)
    # Saving replaces both.
    save_pretrained(first, tmp_path, layout="mistral")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "consolidated.safetensors",
        "params.json",
    ]
    assert_same(from_pretrained(tmp_path), first)


def test_every_field_is_required(tmp_path):
    save_pretrained(make(MODELS["untied"]), tmp_path, layout="mistral")
    file = tmp_path / "params.json"
    values = json.loads(file.read_text())
    for name in values.keys() - {"model_type"}:
        file.write_text(json.dumps({k: v for k, v in values.items() if k != name}))
        with pytest.raises(CheckpointError, match=f"`{name}`"):
            from_pretrained(tmp_path)


def test_weights_are_one_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"give `max_shard_size=None`"):
        save_pretrained(make(MODELS["tied"]), tmp_path / "new", layout="mistral", max_shard_size=9)
    assert not (tmp_path / "new").exists()
