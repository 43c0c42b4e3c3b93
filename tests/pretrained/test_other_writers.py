"""Checkpoints as other tools write them: configs with more fields, and models without a head."""

import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from tests.support.checkpoints import BOTH, FAMILIES, assert_same, edit_config, make


MISTRAL = FAMILIES["mistral"]["mistral"]["tied"]
BAMBA = FAMILIES["hybrid"]["transformers"]["bamba"]
TOOLS = {
    "architectures": ["MambaForCausalLM"],
    "_name_or_path": "me/mine",
    "dtype": "bfloat16",
    "auto_map": {"AutoModel": "modeling.Mamba"},
    "max_new_tokens": 20,
    "_attn_implementation": "sdpa",
    "unsloth_version": "2025.1",
    "model_max_length": 2048,
    "quantization_config": None,
    "transformers_version": "4.39.0",
    "eos_token_id": [0, 2],
}


@pytest.mark.parametrize(
    ("layout", "model", "file"),
    [
        ("transformers", BOTH["tied"], "config.json"),
        ("state-spaces", BOTH["tied"], "config.json"),
        ("mistral", MISTRAL, "params.json"),
    ],
    ids=["transformers", "state-spaces", "mistral"],
)
def test_fields_of_tools_are_ignored(layout, model, file, tmp_path):
    mbx.save_pretrained(make(model), tmp_path, layout=layout)
    edit_config(tmp_path, TOOLS, file)
    assert_same(mbx.from_pretrained(tmp_path), make(model))
    edit_config(tmp_path, {"quantization_config": {"quant_method": "bitsandbytes"}}, file)
    message = r"`quantization_config` \(.*bitsandbytes.*quantised checkpoints are not read"
    with pytest.raises(mbx.CheckpointError, match=message):
        mbx.from_pretrained(tmp_path)
    edit_config(tmp_path, {"quantization_config": None, "logit_scale": 2}, file)
    with pytest.raises(mbx.CheckpointError, match=r"unknown meaning.*logit_scale"):
        mbx.from_pretrained(tmp_path)


def shorten(folder, *, keep=""):
    """Removes the head, and the first part of every name except one."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.read() for name, tensor in open_safetensors(file).items()}
    short = {
        name if name == keep else name.partition(".")[2]: tensor
        for name, tensor in tensors.items()
        if not name.startswith("lm_head")
    }
    write_safetensors(file, short, {})


@pytest.mark.parametrize(
    ("layout", "model"),
    [("transformers", BOTH["tied"]), ("state-spaces", BOTH["tied"]), ("transformers", BAMBA)],
    ids=["mamba", "official", "bamba"],
)
def test_models_without_their_head_are_read(layout, model, tmp_path):
    """As transformers' `MambaModel` saves them: every name lacks its first part."""
    mbx.save_pretrained(make(model), tmp_path, layout=layout)
    shorten(tmp_path)
    assert_same(mbx.from_pretrained(tmp_path), make(model))


def test_only_whole_checkpoints_without_a_head_are_read(tmp_path):
    mbx.save_pretrained(make(BOTH["tied"]), tmp_path / "mixed")
    shorten(tmp_path / "mixed", keep="backbone.norm_f.weight")
    with pytest.raises(mbx.CheckpointError, match=r"missing: backbone.*unexpected: 'embeddings"):
        mbx.from_pretrained(tmp_path / "mixed")
    mbx.save_pretrained(make(BOTH["untied"]), tmp_path / "untied")
    shorten(tmp_path / "untied")
    with pytest.raises(mbx.CheckpointError, match=r"1 missing: lm_head\.weight"):
        mbx.from_pretrained(tmp_path / "untied")


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_saves_models_without_their_head(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    mbx.save_pretrained(make(BOTH["tied"]), tmp_path / "ours")
    base = transformers.MambaModel.from_pretrained(tmp_path / "ours")
    base.save_pretrained(tmp_path / "theirs")
    names = {
        name.partition(".")[0]
        for name in open_safetensors(tmp_path / "theirs" / "model.safetensors")
    }
    assert names == {"embeddings", "layers", "norm_f"}
    assert_same(mbx.from_pretrained(tmp_path / "theirs"), make(BOTH["tied"]))
