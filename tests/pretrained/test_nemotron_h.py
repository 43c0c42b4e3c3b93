"""Checkpoints of Nemotron-H: what the laws of all checkpoints do not cover."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import DROPPED, HYBRIDS, assert_same, edit_config, make, save_edited


DENSE = HYBRIDS["transformers"]["nemotron_h"]
EXPERTS = HYBRIDS["transformers"]["nemotron_h_experts"]


def test_mixer_and_mlp_of_a_block_are_layers_of_the_file():
    model = make(DENSE)
    named, blocks = state_dict(model), model.layers.unstack()
    prefixes = {key.split(".mixer")[0] for key in named if ".mixer." in key}
    # The pattern is "M-M*-M*".
    assert prefixes == {f"backbone.layers.{i}" for i in range(7)}
    for i, block in {0: blocks[0], 3: blocks[2]}.items():
        assert isinstance(block, mbx.Block)
        assert isinstance(block.mlp, mbx.MLP)
        assert block.norm2 is not None
        want = {
            f"{i}.norm.weight": block.norm.weight,
            f"{i + 1}.norm.weight": block.norm2.weight,
            f"{i + 1}.mixer.up_proj.weight": block.mlp.fc1.weight,
            f"{i + 1}.mixer.down_proj.weight": block.mlp.fc2.weight,
        }
        for key, array in want.items():
            assert np.array_equal(named[f"backbone.layers.{key}"], array)


def test_written_fields(tmp_path):
    save_pretrained(make(DENSE), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "nemotron_h"
    assert (fields["hybrid_override_pattern"], fields["num_hidden_layers"]) == ("M-M*-M*", 7)
    assert (fields["mamba_num_heads"], fields["mamba_head_dim"]) == (5, 3)
    # transformers reads the lower limit from here.
    assert (fields["time_step_limit"], fields["time_step_min"]) == ([0.05, 0.6], 0.05)


@pytest.mark.parametrize(
    "fields",
    [
        # transformers 5, and versions before.
        {
            "hybrid_override_pattern": DROPPED,
            "num_hidden_layers": DROPPED,
            "layers_block_type": [
                *("linear_attention", "mlp", "linear_attention", "full_attention"),
                *("mlp", "linear_attention", "full_attention"),
            ],
            "mtp_layers_block_type": ["full_attention", "moe"],
            "num_nextn_predict_layers": 0,
            "n_routed_experts": 8,
            "moe_latent_size": None,
        },
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "attention"]},
        {
            "head_dim": DROPPED,
            "attention_head_dim": 8,
            "norm_eps": 1e-5,
            "rope_theta": 10000,
            "partial_rotary_factor": 1.0,
            "mtp_hybrid_override_pattern": "*E",
            "keep_mtp_spec_in_bf16": True,
        },
    ],
)
def test_fields_of_other_versions(fields, tmp_path):
    folder = save_edited(DENSE, tmp_path, "transformers", fields)
    assert_same(from_pretrained(folder), make(DENSE))


def test_names_of_other_versions_and_of_other_parts(tmp_path):
    model = make(DENSE)
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    renamed = {key.replace("backbone.", "model.", 1): value for key, value in tensors.items()}
    extra = {"mtp.layers.0.mixer.q_proj.weight": np.zeros((2, 2), np.int32)}
    save_file(renamed | extra, file, {"format": "pt"})
    assert_same(from_pretrained(tmp_path), model)
    # A name that is there twice is refused, as is an unknown one.
    twice = tensors | {"model.norm_f.weight": tensors["backbone.norm_f.weight"]}
    save_file(twice, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: 'model\.norm_f\.weight'"):
        from_pretrained(tmp_path)
    save_file(tensors | {"mtpx": tensors["lm_head.weight"]}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 unexpected: 'mtpx'"):
        from_pretrained(tmp_path)


def test_experts_are_tensors_of_their_own(tmp_path):
    model = make(EXPERTS)
    named, block = state_dict(model), model.layers.unstack()[1]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mlp, mbx.MixtureOfExperts)
    # The pattern is "ME*E*-".
    prefix = "backbone.layers.3.mixer."
    for e in range(6):
        assert np.array_equal(named[f"{prefix}experts.{e}.up_proj.weight"], block.mlp.fc1[e])
        assert np.array_equal(named[f"{prefix}experts.{e}.down_proj.weight"], block.mlp.fc2[e])
    assert np.array_equal(named[f"{prefix}gate.weight"], block.mlp.router.weight)

    key = f"{prefix}experts.4.down_proj.weight"
    without = {name: array for name, array in named.items() if name != key}
    with pytest.raises(CheckpointError, match=rf"1 missing: {key}\."):
        load_state_dict(model, without)
    with pytest.raises(CheckpointError, match=rf"{key} is \(5, 7\) and should be \(6, 7\)"):
        load_state_dict(model, named | {key: named[key][:5]})
    with pytest.raises(CheckpointError, match=rf"0.down_proj.weight is float32 and {key} is bfl"):
        load_state_dict(model, named | {key: named[key].astype(jnp.bfloat16)})


def test_router_stays_in_float32(tmp_path):
    save_pretrained(make(EXPERTS), tmp_path)
    block = from_pretrained(tmp_path, dtype="bfloat16").layers.unstack()[0]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mlp, mbx.MixtureOfExperts)
    assert block.mlp.fc1.dtype == jnp.bfloat16
    assert block.mlp.router.correction_bias is not None
    assert block.mlp.router.weight.dtype == block.mlp.router.correction_bias.dtype == jnp.float32


def test_limits_of_dt_come_from_the_config(tmp_path):
    """Those of transformers, `time_step_min` and infinity, contradict the config."""
    save_pretrained(make(DENSE), tmp_path)
    edit_config(tmp_path, {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4})
    assert_same(from_pretrained(tmp_path), make(DENSE))
    edit_config(tmp_path, {"time_step_limit": DROPPED})
    block = from_pretrained(tmp_path).layers.unstack()[0]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mixer, mbx.Mamba2)
    assert block.mixer.dt_limit == (0.0, float("inf"))
