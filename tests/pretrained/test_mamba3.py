"""Mamba-3 checkpoints: what the laws of all checkpoints do not cover."""

import json

import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    from_pretrained,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import MAMBA3, assert_same, config, make, save_edited


LAYOUT = "state-spaces"


MODELS = MAMBA3[LAYOUT]


def test_siso_has_no_tensors_of_mimo():
    siso = state_dict(make(MODELS["siso"]), layout=LAYOUT)
    assert not any("mimo" in name or "mixer.norm" in name for name in siso)
    assert siso["backbone.layers.0.mixer.B_bias"].shape == (6, 1, 5)


def test_written_fields(tmp_path):
    save_pretrained(make(MODELS["siso"]), tmp_path / "1", layout=LAYOUT)
    assert json.loads((tmp_path / "1" / "config.json").read_text())["ssm_cfg"] == {
        "layer": "Mamba3",
        "d_state": 5,
        "expand": 3,
        "headdim": 3,
        "ngroups": 2,
        "rope_fraction": 0.5,
        "A_floor": 1e-4,
        "is_outproj_norm": False,
        "is_mimo": False,
    }
    save_pretrained(make(MODELS["mimo"]), tmp_path / "2", layout=LAYOUT)
    written = json.loads((tmp_path / "2" / "config.json").read_text())["ssm_cfg"]
    assert (written["is_mimo"], written["mimo_rank"], written["chunk_size"]) == (True, 2, 32)
    assert (written["A_activation"], written["is_outproj_norm"]) == ("softplus", True)


@pytest.mark.parametrize("is_mimo", [False, True])
def test_published_configs(is_mimo, tmp_path):
    """The fields of `mamba3-siso-187m` and `mamba3-mimo-187m`, whose width 1264 becomes 1280."""
    mixer = mbx.Mamba3Config(d_model=32, mimo_rank=4 if is_mimo else None)
    want = config(mixer, n_layer=1, padded_vocab_size=16, d_intermediate=256)
    fields = {
        "d_intermediate": 160,
        "ssm_cfg": {
            "layer": "Mamba3",
            "d_state": 128,
            "expand": 2,
            "headdim": 64,
            "ngroups": 1,
            "rope_fraction": 0.5,
            "chunk_size": 16,
            "is_mimo": is_mimo,
            "mimo_rank": 4,
            "is_outproj_norm": False,
        },
        "attn_layer_idx": [],
        "rms_norm": True,
        "tie_embeddings": True,
        "pad_vocab_size_multiple": 16,
    }
    assert_same(from_pretrained(save_edited(want, tmp_path, LAYOUT, fields)), make(want))


def test_defaults(tmp_path):
    """The defaults are those of `Mamba3.__init__`, and fields about training are ignored."""
    want = config(mbx.Mamba3Config(d_model=32), n_layer=1)
    ignored = {"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3, "dropout": 0.0}
    fields = {"ssm_cfg": {"layer": "Mamba3", "chunk_size": 64} | ignored}
    assert_same(from_pretrained(save_edited(want, tmp_path, LAYOUT, fields)), make(want))
