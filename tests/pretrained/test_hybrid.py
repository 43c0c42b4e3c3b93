"""Hybrid checkpoints: what the laws of all checkpoints do not cover."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
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
from mamba_eqx.pretrained._arrays import to_jax
from mamba_eqx.pretrained.layouts import LAYOUTS, Slot, group_by_leaf
from tests.support.checkpoints import DROPPED, HYBRIDS as MODELS, assert_same, make, save_edited


def test_leaf_is_split_into_tensors():
    model = make(MODELS["transformers"]["bamba"])
    named, block = state_dict(model), model.layers.unstack()[1]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mixer, mbx.Attention)
    assert isinstance(block.mlp, mbx.GatedMLP)
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
    with pytest.raises(CheckpointError, match=r"k_proj.weight is bfloat16.*the same dtype"):
        load_state_dict(model, named | {key: named[key].astype(jnp.bfloat16)})


def test_gate_precedes_value_in_granite():
    model = make(MODELS["transformers"]["granite"])
    block = model.layers.unstack()[0]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mlp, mbx.GatedMLP)
    value, gate = jnp.split(block.mlp.fc1.weight, 2)
    weight = state_dict(model)["model.layers.0.shared_mlp.input_linear.weight"]
    assert np.array_equal(weight, jnp.concatenate([gate, value]))


def test_experts_are_read_under_the_names_of_transformers_in_memory():
    model = make(MODELS["transformers"]["granite_experts"])
    in_memory = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }
    named = state_dict(model)
    for key in [key for key in named if ".block_sparse_moe." in key]:
        layer, _, name = key.partition(".block_sparse_moe.")
        named[f"{layer}.block_sparse_moe.{in_memory[name]}"] = named.pop(key)
    assert_same(load_state_dict(model, named), model)
    # Not both at once.
    router = "model.layers.1.block_sparse_moe.router"
    both = named | {f"{router}.layer.weight": named[f"{router}.weight"]}
    with pytest.raises(CheckpointError, match=rf"1 unexpected: '{router}.weight'"):
        load_state_dict(model, both)


def test_gate_precedes_value_in_experts_of_granite():
    model = make(MODELS["transformers"]["granite_experts"])
    block = model.layers.unstack()[1]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mlp, mbx.MixtureOfExperts)
    value, gate = jnp.split(block.mlp.fc1, 2, axis=1)
    named = state_dict(model)
    weight = named["model.layers.1.block_sparse_moe.input_linear.weight"]
    assert np.array_equal(weight, jnp.concatenate([gate, value], axis=1))


def test_file_has_the_names_of_its_own_model_type(tmp_path):
    # Without multipliers, the same model would be saved as a Bamba model.
    multipliers: list[str] = ["residual_multiplier", "embedding_multiplier", "logits_scaling"]
    model = MODELS["transformers"]["granite_mamba"]
    fields = dict.fromkeys(multipliers, DROPPED)
    loaded = from_pretrained(save_edited(model, tmp_path / "1", "transformers", fields))
    blocks = tuple(dataclasses.replace(b, residual_multiplier=1.0) for b in model.layers)
    plain = mbx.LanguageModelConfig(13, blocks)
    assert mbx.LanguageModelConfig.of(loaded) == plain
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(make(model))))
    save_pretrained(loaded, tmp_path / "2")
    assert json.loads((tmp_path / "2" / "config.json").read_text())["model_type"] == "bamba"
    assert_same(from_pretrained(tmp_path / "2"), loaded)


def test_logits_scaling_is_kept_exactly():
    for divisor in (1, 3, 6, 8, 10, 49, 0.3):
        model = dataclasses.replace(
            MODELS["transformers"]["granite"], logits_multiplier=1 / divisor
        )
        fields = LAYOUTS["transformers"].write_config(model, np.dtype(np.float32))
        assert fields["logits_scaling"] == divisor
        assert "logits_multiplier" not in fields
        assert LAYOUTS["transformers"].read_config(fields) == model
    # No number has this reciprocal.
    model = dataclasses.replace(MODELS["transformers"]["granite"], logits_multiplier=1.9)
    fields = LAYOUTS["transformers"].write_config(model, np.dtype(np.float32))
    assert (fields["logits_scaling"], fields["logits_multiplier"]) == (1 / 1.9, 1.9)


def test_leaf_of_experts_is_split_by_experts_and_rows():
    leaf = np.arange(3 * 5 * 2.0).reshape(3, 5, 2)
    # The second tensor of each expert has its first rows.
    slots = [
        Slot(f"{e}.{name}", "fc1", rows=rows, expert=e)
        for e in range(3)
        for name, rows in {"up": (2, 5), "gate": (0, 2)}.items()
    ]
    tensors = {slot.name: slot.to_file(leaf) for slot in slots}
    assert np.array_equal(tensors["1.up"], leaf[1, 2:])
    assert slots[1].file_shape(leaf) == (2, 2)
    parts = group_by_leaf([(slot, tensors[slot.name]) for slot in slots])["fc1"]
    arrays = [slot.from_file(tensor) for slot, tensor in parts]
    assert np.array_equal(to_jax("fc1", arrays, leaf.shape, np.dtype(np.float32)), leaf)


def test_parts_of_a_leaf_must_share_a_dtype(tmp_path):
    model = make(MODELS["transformers"]["bamba"])
    save_pretrained(model, tmp_path)
    file, key = tmp_path / "model.safetensors", "model.layers.0.feed_forward.up_proj.weight"
    tensors = {name: stored.read() for name, stored in open_safetensors(file).items()}
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    tensors[key] = tensors[key].astype(np.float16)
    write_safetensors(file, tensors, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight is float16.*the same dtype"):
        from_pretrained(tmp_path)
    assert from_pretrained(tmp_path, dtype="float32").embedding.weight.dtype == jnp.float32


def written(folder: Path, layout: str, name: str) -> dict[str, Any]:
    """Saves a model and returns the fields of its config."""
    save_pretrained(make(MODELS[layout][name]), folder, layout=layout)
    return json.loads((folder / "config.json").read_text())


def test_written_fields(tmp_path):
    fields = written(tmp_path / "1", "transformers", "bamba")
    assert fields["model_type"] == "bamba"
    assert fields["attn_layer_indices"] == [1]
    assert fields["head_dim"] == 8
    assert fields["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
    }
    fields = written(tmp_path / "2", "transformers", "jamba_untied")
    assert (fields["attn_layer_period"], fields["attn_layer_offset"]) == (3, 2)
    assert (fields["model_type"], fields["num_experts"]) == ("jamba", 1)
    fields = written(tmp_path / "3", "state-spaces", "mamba2")
    assert (fields["attn_layer_idx"], fields["attn_cfg"]["softmax_scale"]) == ([1], 0.3)


@pytest.mark.parametrize(
    ("layout", "name", "fields"),
    [
        # Published configs, older than transformers 5.
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
        # Like `granite-4.0-h-350m`, whose attention has no positions.
        (
            "transformers",
            "granite",
            {
                "attention_dropout": 0.0,
                "init_method": "mup",
                "intermediate_size": 2048,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "mamba_chunk_size": 256,
                "normalization_function": "rmsnorm",
                "num_experts_per_tok": 0,
                "output_router_logits": False,
                "position_embedding_type": None,
                "rope_scaling": None,
                "rope_theta": 10000,
                "router_aux_loss_coef": 0.0,
            },
        ),
        # Like `granite-4.0-350m`, which has Mamba-2's fields but no such layer.
        (
            "transformers",
            "granite_attention",
            {
                "mamba_conv_bias": True,
                "mamba_d_conv": 4,
                "mamba_d_head": 64,
                "mamba_d_state": 256,
                "mamba_expand": 2,
                "mamba_n_groups": 1,
                "mamba_n_heads": 128,
                "mamba_proj_bias": False,
                "rope_parameters": DROPPED,
                "rope_theta": 50,
            },
        ),
        (
            "transformers",
            "nemotron_h",
            {"rope_parameters": {"rope_theta": 50}, "rope_scaling": None, "head_dim": 8},
        ),
        # Like `mamba2attn-2.7b`.
        (
            "state-spaces",
            "mamba2",
            {"attn_cfg.mlp_dim": 0, "attn_cfg.out_proj_bias": False, "ssm_cfg.chunk_size": 4},
        ),
        ("state-spaces", "attention_alone", {"ssm_cfg.layer": "Mamba2", "ssm_cfg.headdim": 4}),
    ],
)
def test_fields_without_influence_are_ignored(layout, name, fields, tmp_path):
    folder = save_edited(MODELS[layout][name], tmp_path, layout, fields)
    assert_same(from_pretrained(folder), make(MODELS[layout][name]))


def test_falcon_h1_multipliers_of_inputs_are_contained_in_others():
    layout = LAYOUTS["transformers"]
    model = MODELS["transformers"]["falcon_h1"]
    fields = layout.write_config(model, np.dtype(np.float32))
    of_inputs = {"ssm_in_multiplier": 0.25, "attention_in_multiplier": 3.0, "key_multiplier": 0.7}
    mixer = layout.read_config(fields | of_inputs).layers[0].mixer
    assert isinstance(mixer, mbx.ParallelConfig)
    mamba, heads = mixer.mixers
    assert isinstance(mamba, mbx.Mamba2Config)
    assert isinstance(heads, mbx.AttentionConfig)
    assert mamba.ssm_multipliers == (0.1, 0.05, 0.175, 0.125, 0.325)
    assert heads.softmax_scale == pytest.approx(9 * 0.7 / 8**0.5, rel=1e-15)
    assert mixer.scales == (0.6, 3.0 * 1.4)


def test_falcon_h1_key_multiplier_is_kept_exactly():
    layout = LAYOUTS["transformers"]
    fields = layout.write_config(MODELS["transformers"]["falcon_h1"], np.dtype(np.float32))
    # The first two are published.
    for multiplier in (0.39062499999999994, 0.011048543456039804, 1.0, 0.3, 0.7, 1.9):
        model = layout.read_config(fields | {"key_multiplier": multiplier})
        written = layout.write_config(model, np.dtype(np.float32))
        assert "softmax_scale" not in written
        assert written["key_multiplier"] == pytest.approx(multiplier, rel=1e-15)
        assert layout.read_config(written) == model
