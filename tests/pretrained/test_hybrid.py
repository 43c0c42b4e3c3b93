"""Checkpoints of hybrids with attention: what is special to them, beside `test_pretrained.py`."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import (
    HYBRIDS as MODELS,
    NORMALISED,
    OFFICIAL,
    ROTARY,
    assert_same,
    attention,
    hybrid,
    make,
    mamba2,
)


CASES = [(layout, name) for layout, models in MODELS.items() for name in models]
cases = pytest.mark.parametrize(("layout", "name"), CASES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@cases
def test_round_trip(layout, name, dtype, tmp_path):
    model = make(MODELS[layout][name], dtype)
    save_pretrained(model, tmp_path, layout=layout, max_shard_size=500)
    assert_same(from_pretrained(tmp_path), model)
    other = jnp.dtype("float16" if dtype == "bfloat16" else "bfloat16")
    assert_same(from_pretrained(tmp_path, dtype=other), mbx.cast(model, other))


@cases
def test_state_dict(layout, name, tmp_path):
    model = make(MODELS[layout][name])
    named = state_dict(model, layout=layout)
    assert_same(load_state_dict(model, named, layout=layout), model)
    hosted = {key: np.asarray(tensor) for key, tensor in named.items()}
    assert_same(load_state_dict(model, hosted, layout=layout), model)
    assert_same(eqx.filter_jit(load_state_dict)(model, named, layout=layout), model)
    save_pretrained(model, tmp_path, layout=layout)
    stored = open_safetensors(tmp_path / "model.safetensors")
    assert stored.keys() - named.keys() <= {"lm_head.weight"}
    assert all(np.array_equal(stored[key].read(), tensor) for key, tensor in named.items())


def test_parts_of_an_array():
    model = make(MODELS["transformers"]["bamba"])
    named, block = state_dict(model), model.layers.unstack()[1]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mixer, mbx.Attention)
    assert block.mlp is not None
    q, k, v = jnp.split(block.mixer.in_proj.weight, [32, 48])
    up, gate = jnp.split(block.mlp.fc1.weight, 2)
    want = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
    want |= {"feed_forward.up_proj": up, "feed_forward.gate_proj": gate}
    for key, weight in want.items():
        assert np.array_equal(named[f"model.layers.1.{key}.weight"], weight)

    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=rf"1 missing: {key}\."):
        load_state_dict(model, {k: v for k, v in named.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"{key} is \(15, 6\) and should be \(16, 6\)"):
        load_state_dict(model, named | {key: named[key][:15]})
    with pytest.raises(CheckpointError, match=r"k_proj.weight is bfloat16.*of one dtype"):
        load_state_dict(model, named | {key: named[key].astype(jnp.bfloat16)})


def test_parts_of_different_dtypes(tmp_path):
    model = make(MODELS["transformers"]["bamba"])
    save_pretrained(model, tmp_path)
    file, key = tmp_path / "model.safetensors", "model.layers.0.feed_forward.up_proj.weight"
    tensors = {name: stored.read() for name, stored in open_safetensors(file).items()}
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    tensors[key] = tensors[key].astype(np.float16)
    write_safetensors(file, tensors, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight is float16.*of one dtype"):
        from_pretrained(tmp_path)
    assert from_pretrained(tmp_path, dtype="float32").embedding.weight.dtype == jnp.float32


# Configs.


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model, with fields of its config altered or dropped."""

    def save(layout, name, fields):
        save_pretrained(make(MODELS[layout][name]), tmp_path, layout=layout)
        file = tmp_path / "config.json"
        values = json.loads(file.read_text())
        for key, value in fields.items():
            inner = values.get(key) if isinstance(value, dict) else None
            value = inner | value if isinstance(inner, dict) else value
            if isinstance(value, dict):
                value = {k: v for k, v in value.items() if v is not DROPPED}
            values[key] = value
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not DROPPED}))
        return tmp_path

    return save


DROPPED = object()


def test_what_is_written(saved):
    fields = json.loads((saved("transformers", "bamba", {}) / "config.json").read_text())
    assert fields["model_type"] == "bamba"
    assert fields["attn_layer_indices"] == [1]
    assert fields["head_dim"] == 8
    assert fields["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
    }
    fields = json.loads((saved("transformers", "jamba_untied", {}) / "config.json").read_text())
    assert (fields["attn_layer_period"], fields["attn_layer_offset"]) == (3, 2)
    assert (fields["model_type"], fields["num_experts"]) == ("jamba", 1)
    fields = json.loads((saved("state-spaces", "mamba2", {}) / "config.json").read_text())
    assert (fields["attn_layer_idx"], fields["attn_cfg"]["softmax_scale"]) == ([1], 0.3)


@pytest.mark.parametrize(
    ("layout", "name", "fields"),
    [
        # Of published configs, older than transformers 5.
        (
            "transformers",
            "bamba",
            {
                "attn_rotary_emb": 4,
                "rope_theta": 50.0,
                "rope_scaling": None,
                "rope_parameters": DROPPED,
                "partial_rotary_factor": 0.5,
                "mamba_chunk_size": 256,
                "mamba_d_head": "auto",
                "num_logits_to_keep": 1,
                "use_mamba_kernels": True,
                "z_loss_coefficient": 0.0,
            },
        ),
        (
            "transformers",
            "jamba",
            {
                "sliding_window": None,
                "mamba_inner_layernorms": True,
                "calc_logits_for_entire_prompt": False,
                "num_key_value_heads": None,
                "n_ctx": 262144,
                "use_mamba_kernels": True,
            },
        ),
        # Of `mamba2attn-2.7b`, whose sizes are the defaults.
        (
            "state-spaces",
            "mamba2",
            {"attn_cfg": {"mlp_dim": 0, "out_proj_bias": False}, "ssm_cfg": {"chunk_size": 4}},
        ),
        ("state-spaces", "attention_alone", {"ssm_cfg": {"layer": "Mamba2", "headdim": 4}}),
    ],
)
def test_fields_that_change_nothing(layout, name, fields, saved):
    assert_same(from_pretrained(saved(layout, name, fields)), make(MODELS[layout][name]))


@pytest.mark.parametrize(
    ("layout", "name", "fields", "message"),
    [
        ("transformers", "bamba", {"attn_layer_indices": [3]}, "`attn_layer_indices`.*from 0 to 2"),
        ("transformers", "bamba", {"attn_layer_indices": [1, 1]}, "different integers"),
        ("transformers", "bamba", {"attn_layer_indices": [True]}, "different integers"),
        ("transformers", "bamba", {"attn_layer_indices": [2]}, "missing"),
        ("transformers", "bamba", {"mlp_bias": True}, "`mlp_bias`.*only as False"),
        ("transformers", "bamba", {"hidden_act": "gelu"}, "`hidden_act`.*only as 'silu'"),
        ("transformers", "bamba", {"head_dim": DROPPED}, "`num_attention_heads`.*must divide"),
        ("transformers", "bamba", {"attn_rotary_emb": 8}, "`attn_rotary_emb`.*0.5 of the 8"),
        ("transformers", "bamba", {"partial_rotary_factor": 0.25}, "only as 0.5"),
        ("transformers", "bamba", {"rope_scaling": {"type": "yarn"}}, "only as None"),
        ("transformers", "bamba", {"rope_parameters": {"rope_type": "yarn"}}, "only as 'default'"),
        ("transformers", "bamba", {"rope_parameters": {"factor": 2.0}}, "unknown meaning.*'factor"),
        ("transformers", "bamba", {"rope_parameters": 3}, "`rope_parameters` must be a JSON obj"),
        ("transformers", "bamba", {"mamba_n_heads": 5}, "`mamba_n_heads`.*times 3 per head.*18"),
        ("transformers", "bamba", {"num_key_value_heads": 3}, "must divide `nheads`"),
        ("transformers", "bamba", {"sliding_window": 4}, "unknown meaning.*'sliding_window'"),
        ("transformers", "jamba", {"num_experts": 2}, "`num_experts`.*only as 1"),
        ("transformers", "jamba", {"num_experts": DROPPED}, "`num_experts`.*only as 1"),
        ("transformers", "jamba", {"sliding_window": 4}, "`sliding_window`.*only as None"),
        ("transformers", "jamba", {"attn_layer_offset": 5}, "below attn_layer_period=3"),
        ("transformers", "jamba", {"mamba_inner_layernorms": False}, "only as True"),
        ("transformers", "jamba", {"attention_bias": True}, "unknown meaning"),
        ("state-spaces", "mamba2", {"attn_layer_idx": [3]}, "`attn_layer_idx`.*from 0 to 2"),
        ("state-spaces", "mamba2", {"attn_layer_idx": 1}, "`attn_layer_idx`.*must be a list"),
        ("state-spaces", "mamba2", {"attn_cfg": {"causal": DROPPED}}, "`causal`.*only as True"),
        ("state-spaces", "mamba2", {"attn_cfg": {"mlp_dim": 256}}, "`mlp_dim`.*only as 0"),
        ("state-spaces", "mamba2", {"attn_cfg": {"num_heads": DROPPED}}, "no `num_heads`"),
        ("state-spaces", "mamba2", {"attn_cfg": {"window": 5}}, "`attn_cfg` has fields.*'window'"),
        ("state-spaces", "mamba2", {"attn_cfg": {"rotary_emb_dim": 5}}, "`rotary_emb_dim` must be"),
        ("state-spaces", "mamba2", {"attn_cfg": {"qkv_proj_bias": DROPPED, "d_conv": 4}}, "should"),
    ],
)
def test_config_is_refused(layout, name, fields, message, saved):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_pretrained(saved(layout, name, fields))


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ("transformers", hybrid(mamba2(), attention()), "rotary embedding is none"),
        ("transformers", hybrid(mamba2(), OFFICIAL), "attention has a convolution"),
        ("transformers", hybrid(mamba2(), attention(window=4)), "attention has a window"),
        ("transformers", hybrid(mamba2(), attention(softmax_scale=0.3)), "softmax_scale=0.3"),
        ("transformers", hybrid(mamba2(), ROTARY, attention()), "layers differ within one kind"),
        ("transformers", hybrid(mamba2(), ROTARY, d_intermediate=None), "attention but no MLP"),
        ("transformers", hybrid(ROTARY, ROTARY), "layers are all attention"),
        ("transformers", hybrid(NORMALISED, mamba2()), "mixers are of these kinds.*Mamba1.*Mamba2"),
        ("transformers", hybrid(NORMALISED, ROTARY), "attention has a rotary embedding"),
        ("transformers", hybrid(NORMALISED, attention(out_proj_bias=True)), "attention has biases"),
        (
            "transformers",
            hybrid(NORMALISED, NORMALISED, attention(), attention()),
            r"not in every so many layers \(it is in \[2, 3\]",
        ),
        ("transformers", hybrid(mbx.Mamba1Config(6), d_intermediate=9), "layers have an MLP"),
        ("state-spaces", hybrid(mamba2(), attention(window=4), d_intermediate=None), "a window"),
        (
            "state-spaces",
            hybrid(mamba2(), ROTARY, OFFICIAL, d_intermediate=None),
            "layers differ within one kind",
        ),
        ("state-spaces", hybrid(mamba2(), ROTARY), "not a multiple of 128 wide"),
        (
            "state-spaces",
            hybrid(NORMALISED, ROTARY, d_intermediate=None),
            "`dt`, `B` and `C` are normed",
        ),
    ],
)
def test_a_layout_refuses_what_it_cannot_hold(layout, model, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(make(model), tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()
