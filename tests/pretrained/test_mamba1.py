"""Saving and loading: dtypes, shards, gradients, and folders that are not empty."""

import itertools
import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.pretrained import (
    CheckpointError,
    _save,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import (
    BOTH,
    HYBRIDS,
    MAMBA1 as MODELS,
    assert_same,
    config,
    make,
    mamba2,
    save_edited,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_state_dict_of_gradients_and_moments(stacked):
    model = make(BOTH["tied"], stacked=stacked)
    loss = eqx.filter_grad(lambda m: sum(jnp.sum(x**2) for x in jax.tree.leaves(m)))
    grads = eqx.filter_jit(loss)(model)
    named = state_dict(grads)
    assert named["backbone.layers.1.mixer.conv1d.weight"].shape == (9, 1, 5)
    layer = grads.layers.unstack()[1]
    assert np.array_equal(
        named["backbone.layers.1.mixer.conv1d.weight"][:, 0, :], layer.mixer.conv1d.weight.T
    )
    assert np.array_equal(named["backbone.layers.1.mixer.dt_proj.bias"], layer.mixer.dt_bias)
    assert_same(load_state_dict(model, named), grads)

    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), grads)
    assert_same(load_state_dict(model, state_dict(narrow)), narrow)
    counts = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.int32), grads)
    assert_same(load_state_dict(model, state_dict(counts)), counts)


@pytest.mark.parametrize("stacked", [False, True])
def test_names_of_recurrence_parameters(stacked):
    model = make(BOTH["untied"], stacked=stacked)
    part, _ = eqx.partition(model, mbx.recurrence_mask(model))
    named = state_dict(part)
    ends = ("A_log", "D", "dt_proj.bias")
    assert named.keys() == {
        f"backbone.layers.{i}.mixer.{end}" for i in range(model.layers.n_layer) for end in ends
    }
    assert_same(load_state_dict(part, named), part)


def test_state_dict_works_under_jit():
    model = make(BOTH["tied"])
    named = eqx.filter_jit(state_dict)(model)
    assert_same(eqx.filter_jit(load_state_dict)(model, named), model)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype(stored, wanted, tmp_path):
    model = make(BOTH["tied"], stored)
    save_pretrained(model, tmp_path)
    assert_same(from_pretrained(tmp_path, dtype=wanted), mbx.cast(model, jnp.dtype(wanted)))


def test_float64(tmp_path):
    with jax.enable_x64(True):
        model = make(BOTH["tied"], "float64")
        assert model.embedding.weight.dtype == jnp.float64
        save_pretrained(model, tmp_path)
        assert_same(from_pretrained(tmp_path), model)
        narrow = mbx.cast(model, jnp.float32)
    with pytest.raises(CheckpointError, match="64-bit mode"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="64-bit mode"):
        from_pretrained(tmp_path, dtype=jnp.float64)
    assert_same(from_pretrained(tmp_path, dtype=jnp.float32), narrow)
    tensors = {k: v.read() for k, v in open_safetensors(tmp_path / "model.safetensors").items()}
    with pytest.raises(CheckpointError, match="64-bit mode"):
        load_state_dict(narrow, tensors)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_too_large_for_float16(stored, tmp_path):
    model = make(BOTH["tied"], stored)
    model = eqx.tree_at(lambda m: m.norm_f.weight, model, replace_fn=lambda w: w.at[0].set(1e6))
    save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"norm_f.weight has values too large for float16"):
        from_pretrained(tmp_path, dtype="float16")


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path):
    model = make(BOTH["tied"])
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same(loaded, model)


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize(
    ("wanted", "max_shard_size"),
    [(1, 1), (500, 500), ("0.5kB", 500), (" 1 KB", 1000), ("5GB", 5 * 10**9), (None, 10**9)],
)
def test_shards(layout, wanted, max_shard_size, tmp_path):
    model = make(BOTH["tied"])
    save_pretrained(model, tmp_path, layout=layout, max_shard_size=wanted)
    assert_same(from_pretrained(tmp_path), model)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    if max_shard_size >= 10**9:
        assert not shards
        return
    sizes = []
    for shard in shards:
        tensors = open_safetensors(shard)
        sizes.append(sum(tensor.read().nbytes for tensor in tensors.values()))
        assert sizes[-1] <= max_shard_size or len(tensors) == 1
    # None could have been joined with the next.
    assert all(a + b > max_shard_size for a, b in itertools.pairwise(sizes))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {shard.name for shard in shards}


def test_written_fields(tmp_path):
    save_pretrained(make(BOTH["tied"], "bfloat16"), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "mamba"
    assert fields["dtype"] == "bfloat16"
    assert fields["vocab_size"] == 16
    assert fields["intermediate_size"] == 9


# Saving to an existing folder.


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first, second = make(BOTH["tied"]), make(BOTH["untied"])
    save_pretrained(first, tmp_path)
    save_pretrained(second, tmp_path, max_shard_size=500)
    assert_same(from_pretrained(tmp_path), second)
    assert not (tmp_path / "model.safetensors").exists()
    save_pretrained(first, tmp_path)
    assert_same(from_pretrained(tmp_path), first)
    ours = ["README.md", "config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [*ours, "tokenizer.json"]
    assert not [name for name in os.listdir(tmp_path.parent) if name.endswith(".tmp")]


@pytest.mark.parametrize("layout", MODELS)
def test_model_card_is_written_unless_present(layout, tmp_path):
    save_pretrained(make(BOTH["tied"]), tmp_path / "me", layout=layout)
    card = tmp_path / "me" / "README.md"
    _, metadata, text = card.read_text().split("---\n")
    assert "library_name: mamba_eqx\npipeline_tag: text-generation\ntags:\n- mamba_eqx" in metadata
    assert "- mamba1" in metadata
    assert 'mbx.from_pretrained("me")' in text
    assert ("AutoModelForCausalLM" in text) == (layout == "transformers")
    card.write_text("mine")
    save_pretrained(make(BOTH["tied"]), tmp_path / "me", layout=layout)
    assert card.read_text() == "mine"


@pytest.mark.slow
def test_model_card_names_the_mixers_side_by_side(tmp_path):
    save_pretrained(make(HYBRIDS["transformers"]["falcon_h1"]), tmp_path)
    assert (
        "A language model of mamba2 and attention layers." in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize("at", range(6))
def test_failed_save_keeps_the_old_checkpoint(at, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    old, new = make(BOTH["tied"]), make(BOTH["untied"])
    save_pretrained(old, folder)
    calls = 0

    def failing(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError("the disk is full")
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        # At 0 a shard, from 1 on the moves (config and file away, three files in).
        patch.setattr(_save, "write_safetensors", failing(write_safetensors) if at == 0 else write)
        if at > 0:
            patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(OSError, match="disk is full"):
            save_pretrained(new, folder, max_shard_size=1000)
    assert_same(from_pretrained(folder), old)
    assert os.listdir(tmp_path) == ["folder"]
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


def write(path, tensors, metadata):
    """Does the same as `write_safetensors`, but without `os.replace`."""
    from safetensors.numpy import save_file

    save_file({k: np.array(v, order="C") for k, v in tensors.items()}, path, metadata=metadata)


def test_save_refuses_bad_targets(tmp_path):
    model = make(BOTH["tied"])
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(model, file)
    assert file.read_text() == "mine"
    for size in (0, "0KB", "5", "5 gigabytes", "-1GB", "1e9MB", ""):
        with pytest.raises(ValueError, match="max_shard_size"):
            save_pretrained(model, tmp_path / "new", max_shard_size=size)
    with pytest.raises(CheckpointError, match="'transformers', 'state-spaces'"):
        save_pretrained(model, tmp_path / "new", layout="onnx")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        save_pretrained(model, tmp_path / "old")
    assert sorted(os.listdir(tmp_path)) == ["file", "old"]


# What cannot be saved.


@pytest.mark.parametrize("layout", ["state-spaces", "transformers"])
def test_biased_mlps_are_refused(layout):
    """No layout has names for these biases, and they are not silently dropped."""
    model = make(config(mamba2(), d_intermediate=128))
    mlp = eqx.filter_eval_shape(lambda: mbx.GatedMLP(6, 128, bias=True, key=jr.key(0)))
    mlps = lambda model: [block.mlp for block in model.layers.layers]
    model = eqx.tree_at(mlps, model, [mlp] * model.layers.n_layer)
    with pytest.raises(CheckpointError, match=r"biases \(bias=True\)\. No layout can store"):
        state_dict(model, layout=layout)


def test_only_whole_models_are_saved(tmp_path):
    model = make(BOTH["tied"])
    part, _ = eqx.partition(model, mbx.recurrence_mask(model))
    with pytest.raises(CheckpointError, match=r"14 missing: backbone\.embeddings\.weight"):
        save_pretrained(part, tmp_path / "new")
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model)
    with pytest.raises(CheckpointError, match="Take one model out of an ensemble"):
        save_pretrained(ensemble, tmp_path / "new")
    counts = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), model)
    with pytest.raises(CheckpointError, match="22 not of a floating-point dtype"):
        save_pretrained(counts, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_width_of_state_spaces_is_rounded_down(tmp_path):
    """The official width is `int(expand * d_model)`."""
    want = config(mbx.Mamba1Config(d_model=5, d_inner=7), n_layer=1)
    folder = save_edited(want, tmp_path, "state-spaces", {"ssm_cfg.expand": 1.5})
    assert_same(from_pretrained(folder), make(want))
