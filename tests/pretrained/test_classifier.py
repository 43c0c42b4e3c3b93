"""Sequence classifiers are saved and loaded bit by bit, and damaged ones are refused."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats import write_safetensors
from tests.support.checkpoints import HYBRIDS, MAMBA3, assert_same, config, make


def made(backbone=None, n_classes=3):
    model = make(backbone or config(padded_vocab_size=16, n_layer=1))
    return mbx.SequenceClassifier(model, n_classes=n_classes, key=jr.key(0))


@pytest.mark.parametrize("tokenizer", [None, mbx.ByteTokenizer()])
@pytest.mark.parametrize("name", ["mamba", "jamba_untied"])
def test_round_trip(name, tokenizer, tmp_path):
    model = made(HYBRIDS["transformers"].get(name))
    mbx.save_classifier(model, tmp_path, labels=["no", "yes", "Ü"], tokenizer=tokenizer)
    loaded, labels = mbx.load_classifier(tmp_path)
    assert_same(loaded, model)
    assert labels == ("no", "yes", "Ü")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == [f"{name.split('_')[0].title()}ForSequenceClassification"]
    assert fields["label2id"] == {"no": 0, "yes": 1, "Ü": 2}
    assert "load_classifier" in (tmp_path / "README.md").read_text()


def test_dtype_and_several_files(tmp_path):
    model = made(n_classes=2)
    mbx.save_classifier(model, tmp_path, max_shard_size=600)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, labels = mbx.load_classifier(tmp_path, dtype=jnp.bfloat16)
    assert_same(loaded, mbx.cast(model, jnp.bfloat16))
    assert labels == ("LABEL_0", "LABEL_1")
    with pytest.raises(ValueError, match="`dtype` must be a floating-point dtype, but got int32"):
        mbx.load_classifier(tmp_path, dtype=jnp.int32)


def test_quantised_backbone(tmp_path):
    model = made(config(mbx.Mamba1Config(32, d_state=2), n_layer=1))
    quantised = eqx.tree_at(
        lambda model: model.backbone, model, mbx.quantize(model.backbone, bits=8, group=32)
    )
    # A quantised head of tokens would be a second copy of the embedding.
    quantised = mbx.SequenceClassifier(quantised.backbone, n_classes=3, key=jr.key(0))
    mbx.save_classifier(quantised, tmp_path)
    assert_same(mbx.load_classifier(tmp_path)[0], quantised)
    with pytest.raises(mbx.CheckpointError, match=r"`score` must be a `Linear`.*QuantizedLinear"):
        mbx.save_classifier(mbx.quantize(model, bits=8, group=32), tmp_path)


def test_models_and_classifiers_are_not_confused(tmp_path):
    model = made()
    mbx.save_classifier(model, tmp_path / "classifier")
    with pytest.raises(mbx.CheckpointError, match=r"Load it with `mamba_eqx\.load_classifier`"):
        mbx.from_pretrained(tmp_path / "classifier")
    mbx.save_pretrained(model.backbone, tmp_path / "model")
    with pytest.raises(mbx.CheckpointError, match=r"has no score\.weight.*`SequenceClassifier`"):
        mbx.load_classifier(tmp_path / "model")


SCORE = "score.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: t.update({SCORE: np.zeros((3, 5), np.float32)}),
            r"must be of shape \(n_classes, ",
        ),
        (
            lambda c, t: t.update({SCORE: np.zeros(3, np.float32)}),
            r"must be of shape \(n_classes, ",
        ),
        (lambda c, t: t.update({SCORE: t[SCORE].astype(np.int32)}), "floating-point dtype, but is"),
        (
            lambda c, t: t.update({"score.bias": np.zeros(3, np.float32)}),
            "unexpected: ",
        ),
        (lambda c, t: t.popitem(), "1 missing: "),
        (lambda c, t: c.update(id2label={"0": "a", "1": "b"}), "a name for each of the 3 classes"),
        (lambda c, t: c.update(id2label=["a", "b", "c"]), "a name for each of the 3 classes"),
        (lambda c, t: c.update(id2label={"0": "a", "1": "b", "2": 3}), "a name for each of the 3"),
        (
            lambda c, t: c.update(id2label={"0": "a", "1": "b", "x": "c"}),
            "with the keys '0' to '2'",
        ),
    ],
)
def test_damaged_classifiers_are_refused(change, message, tmp_path):
    from safetensors.numpy import load_file

    mbx.save_classifier(made(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    tensors = dict(sorted(load_file(tmp_path / "model.safetensors").items(), reverse=True))
    change(fields, tensors)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(mbx.CheckpointError, match=message) as found:
        mbx.load_classifier(tmp_path)
    assert str(tmp_path) in str(found.value)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (made, {"labels": ["a", "b"]}, ValueError, "`labels` must be 3 different names"),
        (made, {"labels": ["a", "b", "b"]}, ValueError, "`labels` must be 3 different names"),
        (made, {"labels": "abc"}, ValueError, "`labels` must be 3 different names"),
        (lambda: made().backbone, {}, ValueError, "must be a `SequenceClassifier`, but got Lang"),
        (
            lambda: made(MAMBA3["state-spaces"]["mimo"]),
            {},
            mbx.CheckpointError,
            r"The 'transformers' layout cannot store Mamba3 layers\.$",
        ),
        (
            lambda: jax.tree.map(lambda leaf: leaf[None], made()),
            {},
            mbx.CheckpointError,
            "take one model out of an ensemble first",
        ),
    ],
)
def test_nothing_is_saved_of_other_models(model, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        mbx.save_classifier(model(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
