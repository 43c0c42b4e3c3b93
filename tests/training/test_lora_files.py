"""A LoRA of an embedding, by the formulas of PEFT; its files are complete or not there at all."""

import dataclasses
import json
import os

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.training import LoRA, load_lora, save_lora
from tests.support import checkpoints
from tests.support.lora import TOKENS, VOCAB, WEIGHTS, logits, make, noisy


pytestmark = pytest.mark.usefixtures("compile_fast")

WITH_EMBEDDING = ["in_proj", "embedding"]


@pytest.mark.parametrize("tied", [False, True])
def test_changes_an_embedding_that_is_named(tied):
    """Its own weight alone: a tied head keeps the old one."""
    model = make(tied=tied)
    assert "embedding" not in LoRA.init(model, rank=2, key=jr.key(1)).pairs
    new = LoRA.init(model, rank=2, alpha=6, targets=WITH_EMBEDDING, key=jr.key(1))
    assert len(new.pairs) == 3
    np.testing.assert_array_equal(logits(model, new), logits(model))
    lora = noisy(new)
    merged = lora.merge(model)
    pair, old = lora.pairs["embedding"], np.asarray(model.embedding.weight)
    change = 3 * np.asarray(pair.b) @ np.asarray(pair.a)
    np.testing.assert_allclose(merged.embedding.weight, old + change, atol=1e-5)
    head = model.embedding if tied else model.lm_head
    assert merged.lm_head is not None
    assert head is not None
    np.testing.assert_array_equal(merged.lm_head.weight, head.weight)
    assert mbx.LanguageModelConfig.of(merged).tie_embeddings is False


@pytest.mark.slow
def test_stacked_models_in_a_tree_are_untied():
    tree = {
        "models": [make(stacked=True, tied=True)],
        "other": eqx.nn.Embedding(3, 4, key=jr.key(0)),
    }
    lora = noisy(LoRA.init(tree, rank=1, targets=["0.embedding", "other"], key=jr.key(1)))
    assert lora.pairs.keys() == {"models.0.embedding", "other"}
    merged = lora.merge(tree)
    np.testing.assert_array_equal(
        merged["models"][0].lm_head.weight, tree["models"][0].embedding.weight
    )
    assert not jnp.allclose(merged["other"].weight, tree["other"].weight)


@pytest.mark.slow
def test_rows_are_in_the_order_of_the_layout(tmp_path):
    """Granite's file has the gate of an MLP before its value, which is the reverse of ours."""
    config = checkpoints.HYBRIDS["transformers"]["granite_equal_experts"]
    for mlp in (checkpoints.GRANITE_EXPERTS, checkpoints.GATED):
        layers = tuple(dataclasses.replace(layer, mlp=mlp) for layer in config.layers)
        model = checkpoints.make(dataclasses.replace(config, layers=layers))
        lora = noisy(LoRA.init(model, rank=2, key=jr.key(1)))
        save_lora(lora, model, tmp_path)
        read = load_lora(tmp_path, model)
        assert eqx.tree_equal(read, lora)
        stored = open_safetensors(tmp_path / WEIGHTS)
        path = next(path for path in lora.pairs if path.endswith("fc1"))
        key = "base_model.model.model.layers.0.shared_mlp.input_linear.lora_B.weight"
        value, gate = np.split(np.asarray(lora.pairs[path].b), 2)
        np.testing.assert_array_equal(stored[key].read(), np.concatenate([gate, value]))


@pytest.mark.slow
def test_names_are_those_of_modules(tmp_path):
    """The modules of Nemotron-H in transformers have other names than the tensors of its files."""
    model = checkpoints.make(checkpoints.HYBRIDS["transformers"]["nemotron_h"])
    lora = noisy(LoRA.init(model, rank=2, targets=["mlp.fc1"], key=jr.key(1)))
    save_lora(lora, model, tmp_path)
    stored = {name: one.read() for name, one in open_safetensors(tmp_path / WEIGHTS).items()}
    assert "base_model.model.model.layers.1.mixer.up_proj.lora_A.weight" in stored
    assert eqx.tree_equal(load_lora(tmp_path, model), lora)
    old = {n.replace(".model.model.", ".model.backbone."): one for n, one in stored.items()}
    write_safetensors(tmp_path / WEIGHTS, old, {"format": "pt"})
    assert eqx.tree_equal(load_lora(tmp_path, model), lora)
    name = next(iter(stored))
    write_safetensors(tmp_path / WEIGHTS, old | {name: stored[name]}, {"format": "pt"})
    with pytest.raises(mbx.CheckpointError, match=r"backbone.*is unexpected"):
        load_lora(tmp_path, model)


def write_adapter(folder, tensors, **config):
    """Writes an adapter as PEFT does, with the scale 8 / 4."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(options))


def test_loads_an_embedding_by_the_formula_of_peft(tmp_path):
    """In PEFT the change of an embedding is the transpose of `scale * B @ A`."""
    model = make(tied=True)
    random = np.random.default_rng(0)
    name = "base_model.model.backbone.embeddings"
    a, b = (random.normal(size=s).astype(np.float32) for s in ((4, VOCAB), (8, 4)))
    tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    write_adapter(tmp_path, tensors, target_modules=["embeddings"])
    lora = load_lora(tmp_path, model)
    merged = lora.merge(model)
    want = np.asarray(model.embedding.weight) + 2 * (b @ a).T
    np.testing.assert_allclose(merged.embedding.weight, want, atol=1e-5)
    # It is saved under the same names, with the same values.
    save_lora(lora, model, tmp_path / "again")
    assert eqx.tree_equal(load_lora(tmp_path / "again", model), lora)
    stored = open_safetensors(tmp_path / "again" / WEIGHTS)
    assert {key: value.read().tolist() for key, value in stored.items()} == {
        key: value.tolist() for key, value in tensors.items()
    }
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["backbone.embeddings"]
    # PEFT may store the weight that it has changed.
    weight = np.array(model.embedding.weight)
    write_adapter(tmp_path, tensors | {f"{name}.base_layer.weight": weight})
    assert eqx.tree_equal(load_lora(tmp_path, model), lora)
    write_adapter(tmp_path, tensors | {f"{name}.base_layer.weight": weight + 1})
    with pytest.raises(mbx.CheckpointError, match=r"base_layer.weight differs from the model's"):
        load_lora(tmp_path, model)
    write_adapter(tmp_path, {f"{name}.lora_embedding_A": b, f"{name}.lora_embedding_B": a})
    with pytest.raises(mbx.CheckpointError, match=r"lora_embedding_A has shape .* \(4, 11\)"):
        load_lora(tmp_path, model)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_do_not_leave_the_folder(file, tmp_path):
    model = make()
    lora = noisy(LoRA.init(model, rank=2, targets=["in_proj"], key=jr.key(1)))
    save_lora(lora, model, tmp_path / "outside")
    save_lora(lora, model, tmp_path / "here")
    (tmp_path / "here" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        load_lora(tmp_path / "here", model)
    (tmp_path / "here" / file).symlink_to(tmp_path / "outside" / file)
    with pytest.raises(mbx.CheckpointError, match="a link that leaves the folder"):
        load_lora(tmp_path / "here", model)
    # Saving replaces the link, and does not write through it.
    before = (tmp_path / "outside" / file).read_bytes()
    save_lora(noisy(lora, 2), model, tmp_path / "here", base_model="another")
    assert eqx.tree_equal(load_lora(tmp_path / "here", model), noisy(lora, 2))
    assert (tmp_path / "outside" / file).read_bytes() == before


def test_failed_save_keeps_the_old_lora(tmp_path, monkeypatch):
    model = make()
    lora = LoRA.init(model, rank=2, targets=["in_proj"], key=jr.key(1))
    save_lora(lora, model, tmp_path / "here")
    replace, calls = os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise OSError("the disk is full")
        replace(*paths)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(
        "mamba_eqx.training.finetuning._peft_files.write_safetensors",
        lambda path, *_: path.write_bytes(b""),
    )
    for at in range(1, 5):  # noqa: B007
        calls.clear()
        with pytest.raises(OSError, match="disk is full"):
            save_lora(noisy(lora), model, tmp_path / "here")
        assert eqx.tree_equal(load_lora(tmp_path / "here", model), lora)
        assert len([*(tmp_path / "here").iterdir()]) == 2


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # Warnings of third-party packages.
@pytest.mark.parametrize("tied", [False, True])
def test_peft_parity_of_an_embedding(tied, tmp_path):
    """A tied head is unchanged in PEFT's own model, though not in what `merge_and_unload` makes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = make(tied=tied)
    mbx.save_pretrained(model, tmp_path / "base")

    def theirs():
        return transformers.MambaForCausalLM.from_pretrained(tmp_path / "base")

    def run(of):
        with torch.no_grad():
            return of(torch.tensor(np.asarray(TOKENS))[None].long(), use_cache=False).logits[0]

    lora = noisy(LoRA.init(model, rank=2, alpha=3, targets=WITH_EMBEDDING, key=jr.key(1)))
    save_lora(lora, model, tmp_path / "ours", base_model=str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(theirs(), str(tmp_path / "ours"))
    got = run(wrapped).numpy()
    assert np.abs(got - np.asarray(logits(model))).max() > 0.1
    np.testing.assert_allclose(got, logits(model, lora), atol=1e-4)

    modules = ["in_proj", "embeddings", *([] if tied else ["lm_head"])]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    other = peft.get_peft_model(theirs(), config)
    other.save_pretrained(str(tmp_path / "theirs"))
    read = load_lora(tmp_path / "theirs", model)
    assert len(read.pairs) == 2 + len(modules) - 1
    np.testing.assert_allclose(run(other).numpy(), logits(model, read), atol=1e-4)
