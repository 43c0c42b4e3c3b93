"""Checkpoints of Mamba-2 models: what is special to them, beside `test_pretrained.py`."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.checkpoints import MAMBA2 as MODELS, assert_same, config, make, mamba2 as mixer


CASES = [(layout, name) for layout, models in MODELS.items() for name in models]
cases = pytest.mark.parametrize(("layout", "name"), CASES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@cases
def test_round_trip(layout, name, dtype, tmp_path):
    model = make(MODELS[layout][name], dtype)
    save_pretrained(model, tmp_path, layout=layout)
    assert_same(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("stacked", [False, True])
@cases
def test_state_dict(layout, name, stacked):
    model = make(MODELS[layout][name], stacked=stacked)
    named = state_dict(model, layout=layout)
    assert_same(load_state_dict(model, named, layout=layout), model)
    if name == "mlp":
        return  # Its size is read off the weights.
    part, _ = eqx.partition(model, mbx.recurrence_mask(model))
    ends = {"A_log", "D", "dt_bias"}
    assert {key.rsplit(".", 1)[-1] for key in state_dict(part, layout=layout)} == ends


def test_names_and_shapes():
    named = state_dict(make(MODELS["transformers"]["tied"]))
    got = {k.removeprefix("backbone.layers.1."): v.shape for k, v in named.items() if ".1." in k}
    assert got == {
        "norm.weight": (6,),
        "mixer.in_proj.weight": (2 * 18 + 2 * 2 * 5 + 6, 6),
        "mixer.conv1d.weight": (18 + 2 * 2 * 5, 1, 3),
        "mixer.conv1d.bias": (18 + 2 * 2 * 5,),
        "mixer.dt_bias": (6,),
        "mixer.A_log": (6,),
        "mixer.D": (6,),
        "mixer.norm.weight": (18,),
        "mixer.out_proj.weight": (6, 18),
    }
    model = make(MODELS["state-spaces"]["per_channel"])
    D = state_dict(model, layout="state-spaces")["backbone.layers.0.mixer.D"]
    block = model.layers.unstack()[0]
    assert isinstance(block, mbx.Block)
    assert isinstance(block.mixer, mbx.Mamba2)
    # `rearrange(D, "(h p) -> h p")` in the official code.
    assert np.array_equal(D, np.concatenate(block.mixer.D))
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model)
    with pytest.raises(CheckpointError, match="ensemble"):
        state_dict(ensemble, layout="state-spaces")


# Configs.


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model, with fields of its config altered or dropped."""

    def save(layout, model, fields):
        save_pretrained(make(model), tmp_path, layout=layout)
        file = tmp_path / "config.json"
        values = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not DROPPED}))
        return tmp_path

    return save


DROPPED = object()
INFINITE = [math.inf, {"__float__": "Infinity"}]


def test_what_is_written(tmp_path):
    save_pretrained(make(MODELS["transformers"]["tied"]), tmp_path / "1")
    fields = json.loads((tmp_path / "1" / "config.json").read_text())
    assert fields["model_type"] == "mamba2"
    assert fields["tie_word_embeddings"] is True
    assert (fields["expand"], fields["num_heads"], fields["head_dim"]) == (3, 6, 3)
    assert (fields["n_groups"], fields["state_size"]) == (2, 5)
    assert "time_step_limit" not in fields
    save_pretrained(make(MODELS["transformers"]["lower_limit"]), tmp_path / "2")
    fields = json.loads((tmp_path / "2" / "config.json").read_text())
    assert fields["time_step_limit"] == [0.25, {"__float__": "Infinity"}]
    save_pretrained(make(MODELS["transformers"]["limits"]), tmp_path / "3", layout="state-spaces")
    fields = json.loads((tmp_path / "3" / "config.json").read_text())
    assert fields["ssm_cfg"]["layer"] == "Mamba2"
    assert fields["ssm_cfg"]["dt_limit"] == [0.25, 0.75]


@pytest.mark.parametrize("infinity", INFINITE)
def test_fields_that_do_not_matter_are_ignored(infinity, saved):
    """What Codestral's config holds, and old versions wrote."""
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
    assert_same(
        from_pretrained(saved("transformers", MODELS["transformers"]["tied"], fields)),
        make(MODELS["transformers"]["tied"]),
    )


@pytest.mark.parametrize("infinity", INFINITE)
def test_limits_are_read(infinity, saved):
    want = make(MODELS["transformers"]["lower_limit"])
    fields = {"time_step_limit": [0.25, infinity]}
    assert_same(from_pretrained(saved("transformers", config(mixer()), fields)), want)
    cfg = {"layer": "Mamba2", "expand": 3, "d_state": 5, "d_conv": 3, "headdim": 3, "ngroups": 2}
    fields = {"ssm_cfg": cfg | {"dt_limit": [0.25, infinity], "d_ssm": 18, "chunk_size": 4}}
    assert_same(from_pretrained(saved("state-spaces", config(mixer()), fields)), want)


def test_the_published_configs_of_state_spaces(saved):
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
    model = from_pretrained(saved("state-spaces", want, fields))
    assert_same(model, make(want))
    block = mbx.LanguageModelConfig.of(model).layers[0].mixer
    assert isinstance(block, mbx.Mamba2Config)
    assert (block.d_state, block.headdim, block.d_inner, block.ngroups) == (128, 64, 64, 1)


def test_defaults_of_transformers(saved):
    want = config(mbx.Mamba2Config(d_model=256, ngroups=8), n_layer=1, tie_embeddings=False)
    names = ["state_size", "head_dim", "n_groups", "expand", "conv_kernel", "tie_word_embeddings"]
    folder = saved("transformers", want, dict.fromkeys([*names, "use_bias"], DROPPED))
    assert_same(from_pretrained(folder), make(want))


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("transformers", {"num_heads": 5}, "`num_heads`.*times head_dim=3 must be .*= 18.*is 5"),
        ("transformers", {"expand": 3.0}, "`expand`.*integer.*3.0"),
        ("transformers", {"n_groups": 4}, "`ngroups` must divide.*ngroups=4 and 6 heads"),
        ("transformers", {"n_groups": 3}, "and should be"),
        ("transformers", {"hidden_act": "gelu"}, "`hidden_act`.*only as 'silu'"),
        ("transformers", {"time_step_limit": [0.1]}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [2, 1]}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [-1, 1]}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [0, 0]}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [math.inf] * 2}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [True, 1]}, "`time_step_limit`.*two numbers"),
        ("transformers", {"time_step_limit": [math.nan, 1]}, r"`time_step_limit\[0\]` is NaN"),
        ("transformers", {"D_has_hdim": True}, "unknown meaning.*'D_has_hdim'"),
        ("transformers", {"tie_word_embeddings": DROPPED}, "missing: lm_head.weight"),
        ("transformers", {"hidden_size": 2**24, "expand": 2**24}, "`expand`"),
        ("transformers", {"state_size": 2**24}, "should be"),
        ("state-spaces", {"d_state": 7}, "should be"),
        ("state-spaces", {"d_ssm": 21}, "`d_ssm` must be at most `d_inner`.*d_ssm=21"),
        ("state-spaces", {"d_ssm": 12}, "should be"),
        ("state-spaces", {"d_ssm": "12"}, "`d_ssm` of `ssm_cfg`.*integer"),
        ("state-spaces", {"expand": 2.5}, "`expand` of `ssm_cfg`.*2.5"),
        ("state-spaces", {"headdim": 4}, "`headdim` must divide `d_inner`"),
        ("state-spaces", {"rmsnorm": False}, "2 unexpected: .*mixer.norm.weight"),
        ("state-spaces", {"D_has_hdim": True}, r"mixer.D is \(6,\) and should be \(18,\)"),
        ("state-spaces", {"dt_limit": [0.5, "Infinity"]}, "`dt_limit`.*two numbers"),
        ("state-spaces", {"process_group": 1}, "`ssm_cfg` has fields.*'process_group'"),
    ],
)
def test_config_is_refused(layout, fields, message, saved):
    if layout == "state-spaces":
        sizes = {"expand": 3, "d_state": 5, "d_conv": 3, "headdim": 3, "ngroups": 2}
        fields = {"ssm_cfg": {"layer": "Mamba2"} | sizes | fields}
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_pretrained(saved(layout, MODELS["transformers"]["tied"], fields))


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ("transformers", config(mixer(D_has_hdim=True)), "D_has_hdim=True"),
        ("transformers", config(mixer(rms_norm=False)), "mixers have no norm"),
        ("transformers", config(mixer(d_ssm=12)), "an MLP .d_ssm=12 and d_inner=18"),
        ("transformers", config(mixer(norm_before_gate=True)), "norm before the gate"),
        ("transformers", config(mixer(norm_eps=1e-4)), "0.0001 in the mixers and 1e-05 outside"),
        ("transformers", config(mixer(d_inner=15, headdim=5, ngroups=3)), "d_inner=15 and d_mod"),
        ("state-spaces", config(mixer(d_inner=15, headdim=5, ngroups=3)), "d_inner=15 and d_mod"),
        ("state-spaces", config(mixer(norm_eps=1e-4)), "0.0001 in the mixers"),
    ],
)
def test_a_layout_refuses_what_it_cannot_hold(layout, model, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(make(model), tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()
