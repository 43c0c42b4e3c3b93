"""Checkpoints of Mamba-3 models: what is special to them, beside `test_pretrained.py`."""

import json

import equinox as eqx
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import MAMBA3, assert_same, config, make, mamba3 as mixer


LAYOUT = "state-spaces"


MODELS = MAMBA3[LAYOUT]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, dtype, tmp_path):
    model = make(MODELS[name], dtype)
    save_pretrained(model, tmp_path, layout=LAYOUT)
    assert_same(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["siso", "mimo"])
def test_state_dict(name, stacked):
    model = make(MODELS[name], stacked=stacked)
    named = state_dict(model, layout=LAYOUT)
    assert_same(load_state_dict(model, named, layout=LAYOUT), model)
    part, _ = eqx.partition(model, mbx.recurrence_mask(model))
    ends = {key.rsplit(".", 1)[-1] for key in state_dict(part, layout=LAYOUT)}
    assert ends == {"D", "dt_bias"}


def test_names_and_shapes():
    named = state_dict(make(MODELS["mimo"]), layout=LAYOUT)
    got = {k.removeprefix("backbone.layers.1."): v.shape for k, v in named.items() if ".1." in k}
    assert got == {
        "norm.weight": (6,),
        "mixer.in_proj.weight": (2 * 18 + 2 * 5 * 2 * 2 + 3 * 6 + 2, 6),
        "mixer.dt_bias": (6,),
        "mixer.B_bias": (6, 2, 5),
        "mixer.C_bias": (6, 2, 5),
        "mixer.B_norm.weight": (5,),
        "mixer.C_norm.weight": (5,),
        "mixer.mimo_x": (6, 2, 3),
        "mixer.mimo_z": (6, 2, 3),
        "mixer.mimo_o": (6, 2, 3),
        "mixer.D": (6,),
        "mixer.norm.weight": (18,),
        "mixer.out_proj.weight": (6, 18),
    }
    siso = state_dict(make(MODELS["siso"]), layout=LAYOUT)
    assert not any("mimo" in name or "mixer.norm" in name for name in siso)
    assert siso["backbone.layers.0.mixer.B_bias"].shape == (6, 1, 5)


# Configs.


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model, with fields of its config altered."""

    def save(model, fields):
        save_pretrained(make(model), tmp_path, layout=LAYOUT)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return tmp_path

    return save


def test_what_is_written(tmp_path):
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
def test_the_published_configs(is_mimo, saved):
    """The fields of `mamba3-siso-187m` and `mamba3-mimo-187m`; 1264 channels become 1280 there."""
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
    assert_same(from_pretrained(saved(want, fields)), make(want))


def test_defaults(saved):
    """Those of `Mamba3.__init__`; and what is only about training is ignored."""
    want = config(mbx.Mamba3Config(d_model=32), n_layer=1)
    ignored = {"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3, "dropout": 0.0}
    fields = {"ssm_cfg": {"layer": "Mamba3", "chunk_size": 64} | ignored}
    assert_same(from_pretrained(saved(want, fields)), make(want))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_state": 7}, "should be"),
        ({"ngroups": 4}, "`ngroups` must divide.*ngroups=4 and 6 heads"),
        ({"headdim": 4}, "`headdim` must divide `d_inner`"),
        ({"rope_fraction": 0.25}, "`rope_fraction` of `ssm_cfg` is supported only as 0.5 or 1"),
        ({"d_state": 3}, "`d_state \\* rope_fraction` must be at least 2"),
        ({"is_mimo": True, "mimo_rank": 2}, "missing: .*mimo_x"),
        ({"is_mimo": 1}, "`is_mimo` of `ssm_cfg` must be true or false"),
        ({"mimo_rank": 0}, "`mimo_rank` of `ssm_cfg` must be an integer"),
        ({"is_outproj_norm": True}, "missing: .*mixer.norm.weight"),
        ({"A_floor": 0}, "`A_floor` of `ssm_cfg` must be above 0"),
        ({"A_activation": "exp"}, "`A_activation`.*'heavy_tail' or 'softplus'"),
        ({"expand": 0.1}, "`expand` of `ssm_cfg`"),
        ({"d_conv": 4}, "`ssm_cfg` has fields.*'d_conv'"),
    ],
)
def test_config_is_refused(fields, message, saved):
    sizes = {"layer": "Mamba3", "expand": 3, "d_state": 5, "headdim": 3, "ngroups": 2}
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_pretrained(saved(MODELS["siso"], {"ssm_cfg": sizes | fields}))


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ("transformers", MODELS["siso"], "Mamba3"),
        (LAYOUT, config(mixer(norm_eps=1e-4)), "0.0001 in the mixers"),
    ],
)
def test_a_layout_refuses_what_it_cannot_hold(layout, model, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(make(model), tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()
