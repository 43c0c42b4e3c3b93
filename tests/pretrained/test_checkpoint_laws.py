"""Laws that hold for every model of the registry in every layout that stores it."""

import json
import os
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    layouts_for,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from mamba_eqx.pretrained.layouts import LAYOUTS
from tests.support.checkpoints import FAMILIES, STORED, Stored, assert_same, edit_config, make


pytestmark = pytest.mark.usefixtures("compile_fast")


# Compile more than the others, which stand for them in a quick run.
SLOW = ("mamba2", "hybrid")


def case(stored: Stored, stacked: bool | None = None) -> object:
    """Returns the parameters of a law, marked slow for some families and for `Stacked` layers."""
    more = [] if stacked is None else [stacked]
    marks = [pytest.mark.slow] if stacked or stored.family in SLOW else []
    name = "-".join(map(str, (stored.layout, stored.family, stored.name, *more)))
    return pytest.param(stored, *more, marks=marks, id=name)


def cases(holds: Callable[[Stored], bool] = lambda stored: True) -> pytest.MarkDecorator:
    """Parametrises a law over the models of the registry for which it holds."""
    return pytest.mark.parametrize("stored", [case(stored) for stored in STORED if holds(stored)])


def cases_with_stacks(
    holds: Callable[[Stored], bool] = lambda stored: True,
) -> pytest.MarkDecorator:
    """Parametrises a law over the same models, `Unrolled` and, if possible, `Stacked`."""
    chosen = [
        case(stored, stacked)
        for stored in STORED
        for stacked in (False, True)
        if holds(stored) and (stored.stackable or not stacked)
    ]
    return pytest.mark.parametrize(("stored", "stacked"), chosen)


def has_shards(stored: Stored) -> bool:
    """Whether the layout may spread the weights over several files."""
    return LAYOUTS[stored.layout].weights_file == "model.safetensors"


def parts_suffice(stored: Stored) -> bool:
    """Whether the layout can store the config that is read from the recurrence parameters alone.

    Such a part lacks the biases that Mistral's layout requires.
    """
    return stored.layout != "mistral"


@cases()
def test_reading_inverts_writing_a_config(stored):
    layout = LAYOUTS[stored.layout]
    layout.check(stored.config)
    values = json.dumps(layout.write_config(stored.config, np.dtype(np.float32)))
    # Files spell infinity as an object, which the JSON reader turns into the number.
    values = json.loads(values.replace('{"__float__": "Infinity"}', "Infinity"))
    assert layout.read_config(values) == stored.config


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16"))],
)
@cases()
def test_loading_inverts_saving(stored, dtype, tmp_path):
    model = make(stored.config, dtype)
    save_pretrained(model, tmp_path / "new", layout=stored.layout)
    assert_same(from_pretrained(tmp_path / "new"), model)
    assert_same(from_pretrained(str(tmp_path / "new")), model)
    assert os.listdir(tmp_path) == ["new"]
    other = jnp.dtype("float16" if dtype == "bfloat16" else "bfloat16")
    assert_same(from_pretrained(tmp_path / "new", dtype=other), mbx.cast(model, other))


@pytest.mark.slow
@cases(has_shards)
def test_loads_from_shards(stored, tmp_path):
    model = make(stored.config, "bfloat16")
    save_pretrained(model, tmp_path, layout=stored.layout, max_shard_size=500)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(from_pretrained(tmp_path), model)
    assert_same(from_pretrained(tmp_path, dtype="float16"), mbx.cast(model, jnp.float16))


@cases_with_stacks()
def test_state_dict_has_the_names_and_values_of_the_file(stored, stacked, tmp_path):
    model = make(stored.config, stacked=stacked)
    assert stored.layout in layouts_for(model)
    named = state_dict(model, layout=stored.layout)
    save_pretrained(model, tmp_path, layout=stored.layout)
    layout = LAYOUTS[stored.layout]
    file = load_file(tmp_path / layout.weights_file)
    head = layout.tied_head(stored.config) if layout.keeps_tied_head else None
    assert file.keys() == named.keys() | ({head} if head else set())
    for key, tensor in named.items():
        assert np.array_equal(file[key], tensor)


@pytest.mark.slow
@cases_with_stacks()
def test_load_state_dict_inverts_state_dict(stored, stacked):
    model, layout = make(stored.config, stacked=stacked), stored.layout
    named = state_dict(model, layout=layout)
    assert_same(load_state_dict(model, named, layout=layout), model)
    hosted = {key: np.asarray(tensor) for key, tensor in named.items()}
    assert_same(load_state_dict(model, hosted, layout=layout), model)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert_same(load_state_dict(shapes, hosted, layout=layout), model)
    assert_same(eqx.filter_jit(load_state_dict)(model, named, layout=layout), model)


# The parameters that `float32_mask` chooses.
RECURRENCE: dict[type, tuple[str, ...]] = {
    type(None): (),
    mbx.GatedMLPConfig: (),
    mbx.MLPConfig: (),
    mbx.Mamba1Config: ("A_log", "D", "dt_proj.bias"),
    mbx.Mamba2Config: ("A_log", "D", "dt_bias"),
    mbx.Mamba3Config: ("D", "dt_bias"),
    mbx.AttentionConfig: (),
    # Mamba-2 and attention.
    mbx.ParallelConfig: ("A_log", "D", "dt_bias"),
}
# A family for each kind of routing.
ROUTERS = {
    "sigmoid": ("gate.weight", "gate.e_score_correction_bias"),
    "softmax": ("router.weight",),
    "softmax_of_chosen": ("router.layer.weight",),
}


def recurrence_names(part: object) -> tuple[str, ...]:
    """Returns the ends of the names of a part's parameters that stay in float32."""
    if isinstance(part, mbx.MixtureOfExpertsConfig):
        return ROUTERS[part.routing]
    return RECURRENCE[type(part)]


@cases_with_stacks(parts_suffice)
def test_part_of_a_model_has_part_of_the_names(stored, stacked):
    model, layout = make(stored.config, stacked=stacked), stored.layout
    part, _ = eqx.partition(model, mbx.layers.float32_mask(model))
    named = state_dict(part, layout=layout)
    assert named.keys() <= state_dict(model, layout=layout).keys()
    parts = [part for layer in stored.config.layers for part in (layer.mixer, layer.mlp)]
    ends = [end for part in parts for end in recurrence_names(part)]
    # Names such as "backbone.layers.0.mixer.A_log" and "model.layers.0.mamba.A_log".
    assert sorted(key.split(".", 4)[4] for key in named) == sorted(ends)
    assert_same(load_state_dict(part, named, layout=layout), part)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@cases(lambda stored: stored.stackable)
def test_stacked_is_saved_like_unrolled(stored, remat, tmp_path):
    stacked = make(stored.config, stacked=True, remat=remat)
    save_pretrained(stacked, tmp_path, layout=stored.layout)
    layers = mbx.Unrolled(stacked.layers.unstack())
    want = eqx.tree_at(lambda model: model.layers, stacked, layers)
    assert_same(from_pretrained(tmp_path), want)


@cases()
def test_unread_key_is_refused(stored, tmp_path):
    file = LAYOUTS[stored.layout].config_file
    save_pretrained(make(stored.config), tmp_path, layout=stored.layout)
    written = (tmp_path / file).read_text()
    values = json.loads(written)
    inner = [key for key in ("ssm_cfg", "attn_cfg", "rope_parameters") if values.get(key)]
    for prefix in ["", *(f"{key}." for key in inner)]:
        (tmp_path / file).write_text(written)
        edit_config(tmp_path, {f"{prefix}surprise": 1}, file)
        with pytest.raises(CheckpointError, match=r"unknown meaning.*'surprise'"):
            from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "layout", "name", "shapes"),
    [
        pytest.param(
            "mamba2",
            "transformers",
            "tied",
            {
                "norm.weight": (6,),
                "mixer.in_proj.weight": (2 * 18 + 2 * 2 * 5 + 6, 6),
                "mixer.conv1d.weight": (18 + 2 * 2 * 5, 1, 3),
                "mixer.conv1d.bias": (18 + 2 * 2 * 5,),
                "mixer.dt_bias": (6,),
                "mixer.A_log": (6,),
                "mixer.D": (6,),
                "mixer.norm.weight": (18,),
                "mixer.out_proj.weight": (6, 18),
            },
        ),
        pytest.param(
            "mamba3",
            "state-spaces",
            "mimo",
            {
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
            },
        ),
    ],
)
def test_names_and_shapes_of_a_layer(family, layout, name, shapes):
    named = state_dict(make(FAMILIES[family][layout][name]), layout=layout)
    prefix = "backbone.layers.1."
    got = {k.removeprefix(prefix): v.shape for k, v in named.items() if k.startswith(prefix)}
    assert got == shapes


class OwnMixer(mbx.AbstractSequenceLayer):
    """A mixer that no layout has names for."""

    layer: mbx.Mamba1
    d_model: int = eqx.field(static=True)

    def init_state(self, *, max_len=None):
        return self.layer.init_state(max_len=max_len)

    def scan(self, x, state=None, *, reset=None, length=None):
        return self.layer.scan(x, state, reset=reset, length=length)

    def step(self, x, state):
        return self.layer.step(x, state)


def test_no_layout_stores_a_mixer_of_the_users_own():
    model = make(next(iter(FAMILIES["mamba1"]["transformers"].values())))
    assert "transformers" in layouts_for(model)
    mixers_of = lambda model: [block.mixer for block in model.layers.layers]
    own = lambda mixer: OwnMixer(layer=mixer, d_model=mixer.d_model)
    assert layouts_for(eqx.tree_at(mixers_of, model, replace_fn=own)) == ()
