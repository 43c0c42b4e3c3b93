"""Mamba-2 checkpoints: what the laws of all checkpoints do not cover."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import (
    DROPPED,
    MAMBA2,
    assert_same,
    config,
    make,
    mamba2,
    save_edited,
)


MODELS = MAMBA2["transformers"]
# Infinity as Python and as transformers write it.
INFINITE = [math.inf, {"__float__": "Infinity"}]


def test_D_is_flattened():
    model = make(MAMBA2["state-spaces"]["per_channel"])
    D = state_dict(model, layout="state-spaces")["backbone.layers.0.mixer.D"]
    block = model.layers.unstack()[0]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mixer, mbx.Mamba2)
    # `rearrange(D, "(h p) -> h p")` in the official code.
    assert np.array_equal(D, np.concatenate(block.mixer.D))
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model)
    with pytest.raises(CheckpointError, match="ensemble"):
        state_dict(ensemble, layout="state-spaces")


def test_written_fields(tmp_path):
    save_pretrained(make(MODELS["tied"]), tmp_path / "1")
    fields = json.loads((tmp_path / "1" / "config.json").read_text())
    assert fields["model_type"] == "mamba2"
    assert fields["tie_word_embeddings"] is True
    assert (fields["expand"], fields["num_heads"], fields["head_dim"]) == (3, 6, 3)
    assert (fields["n_groups"], fields["state_size"]) == (2, 5)
    assert "time_step_limit" not in fields
    save_pretrained(make(MODELS["lower_limit"]), tmp_path / "2")
    fields = json.loads((tmp_path / "2" / "config.json").read_text())
    assert fields["time_step_limit"] == [0.25, {"__float__": "Infinity"}]
    save_pretrained(make(MODELS["limits"]), tmp_path / "3", layout="state-spaces")
    fields = json.loads((tmp_path / "3" / "config.json").read_text())
    assert fields["ssm_cfg"]["layer"] == "Mamba2"
    assert fields["ssm_cfg"]["dt_limit"] == [0.25, 0.75]


@pytest.mark.parametrize("infinity", INFINITE)
def test_fields_without_influence_are_ignored(infinity, tmp_path):
    """The fields of Codestral's config, and those of old versions."""
    fields = {
        "time_step_limit": [0.0, infinity],
        "chunk_size": 256,
        "norm_before_gate": True,
        "rms_norm": True,
        "intermediate_size": 8192,
        "rescale_prenorm_residual": False,
        "time_step_rank": 256,
        "time_step_init_scheme": "random",
        "time_step_scale": 1.0,
        "time_step_floor": 1e-4,
        "time_step_min": 0.001,
        "time_step_max": infinity,
        "use_cache": True,
        "torch_dtype": "float32",
    }
    folder = save_edited(MODELS["tied"], tmp_path, "transformers", fields)
    assert_same(from_pretrained(folder), make(MODELS["tied"]))


@pytest.mark.parametrize("infinity", INFINITE)
def test_limits_are_read(infinity, tmp_path):
    want = make(MODELS["lower_limit"])
    fields = {"time_step_limit": [0.25, infinity]}
    folder = save_edited(config(mamba2()), tmp_path / "1", "transformers", fields)
    assert_same(from_pretrained(folder), want)
    cfg = {"layer": "Mamba2", "expand": 3, "d_state": 5, "d_conv": 3, "headdim": 3, "ngroups": 2}
    fields = {"ssm_cfg": cfg | {"dt_limit": [0.25, infinity], "d_ssm": 18, "chunk_size": 4}}
    folder = save_edited(config(mamba2()), tmp_path / "2", "state-spaces", fields)
    assert_same(from_pretrained(folder), want)


def test_published_configs_of_state_spaces(tmp_path):
    """`mamba2-130m` and its siblings leave all sizes to the defaults."""
    want = config(mbx.Mamba2Config(d_model=32), n_layer=1, padded_vocab_size=16)
    fields = {
        "d_intermediate": 0,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    model = from_pretrained(save_edited(want, tmp_path, "state-spaces", fields))
    assert_same(model, make(want))
    block = mbx.LanguageModelConfig.of(model).layers[0].mixer
    assert isinstance(block, mbx.Mamba2Config)
    assert (block.d_state, block.headdim, block.d_inner, block.ngroups) == (128, 64, 64, 1)


def test_defaults_of_transformers(tmp_path):
    want = config(mbx.Mamba2Config(d_model=256, ngroups=8), n_layer=1, tie_embeddings=False)
    names = ["state_size", "head_dim", "n_groups", "expand", "conv_kernel", "tie_word_embeddings"]
    dropped = dict.fromkeys([*names, "use_bias"], DROPPED)
    folder = save_edited(want, tmp_path, "transformers", dropped)
    assert_same(from_pretrained(folder), make(want))
