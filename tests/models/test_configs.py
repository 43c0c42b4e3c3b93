"""Configs: reading them from modules and from JSON."""

import json
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.cases import rebuild


pytestmark = pytest.mark.usefixtures("as_users_run", "compile_fast")

RMS, LAYER = eqx.nn.RMSNorm, eqx.nn.LayerNorm
MAMBA1 = mbx.Mamba1(5, bias=False, key=jr.key(0))
MLP = mbx.GatedMLP(5, 3, key=jr.key(0))
BLOCK = mbx.Block(MAMBA1, mlp=MLP)
MODEL = mbx.LanguageModel(mbx.Unrolled([BLOCK]), vocab_size=9, tie_embeddings=False, key=jr.key(0))


def replaced(module: Any, path: str, value: Any) -> Any:
    """Replaces what is at `path`."""

    def where(node: Any) -> Any:
        for name in path.split("."):
            node = getattr(node, name)
        return node

    return eqx.tree_at(where, module, value, is_leaf=lambda node: node is None)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (replaced(BLOCK, "norm", RMS(5, 0.5, use_bias=False)), "`norm2.eps` is 1e-05.*gives 0.5"),
        (replaced(BLOCK, "norm2", LAYER(5)), "`norm2` is a LayerNorm.*gives a RMSNorm"),
        (replaced(BLOCK, "norm", RMS(5, use_bias=True)), "`norm.use_bias` is True"),
        (replaced(BLOCK, "norm", LAYER(5, use_weight=False)), "`norm.use_weight` is False"),
        (replaced(BLOCK, "norm.weight", jnp.ones(6)), r"`norm.weight`.*\(6,\).*\(5,\)"),
        (replaced(BLOCK, "mlp.fc2.bias", jnp.ones(5)), r"`mlp.fc2.bias` is an array of shape \(5,"),
        (replaced(BLOCK, "mlp.fc1.weight", jnp.ones((6, 4))), r"`mlp.fc1.weight`.*\(6, 4\)"),
        (mbx.Block(MAMBA1, mlp=lambda x: x), "no config for an MLP of type function"),
        (mbx.Block(MAMBA1, mlp=eqx.nn.Identity()), "no config for an MLP of type Identity"),
        (mbx.Block(mbx.CausalConv1d(5, key=jr.key(0))), "no config for a mixer of type Causal"),
        (replaced(MAMBA1, "out_proj.bias", jnp.ones(5)), "Mamba1Config cannot.*`out_proj.bias`"),
        (replaced(MAMBA1, "dt_norm", RMS(1, use_bias=False)), "`B_norm` is None.*gives a RMSNorm"),
        (
            replaced(MAMBA1, "in_proj", eqx.nn.Linear(5, 20, use_bias=False, key=jr.key(0))),
            "`in_proj` is a Linear",
        ),
        (
            replaced(
                mbx.Mamba2(4, headdim=2, ngroups=2, key=jr.key(0)),
                "norm",
                mbx.layers.GatedRMSNorm(8),
            ),
            "`norm.ngroups` is 1.*gives 2",
        ),
        (
            replaced(
                mbx.Mamba3(4, headdim=2, key=jr.key(0)), "C_norm", RMS(128, 0.5, use_bias=False)
            ),
            "`C_norm.eps` is 0.5",
        ),
        (
            replaced(
                mbx.Attention(4, nheads=2, d_conv=4, key=jr.key(0)),
                "conv1d",
                mbx.CausalConv1d(11, key=jr.key(0)),
            ),
            r"`conv1d.weight` is an array of shape \(4, 11\)",
        ),
        (replaced(MODEL, "norm_f", LAYER(5, use_bias=False)), "`norm_f.use_bias` is False"),
        (replaced(MODEL, "lm_head.bias", jnp.ones(9)), "LanguageModelConfig.*`lm_head.bias`"),
        (replaced(MODEL, "layers", mbx.Unrolled([MAMBA1])), "no config for a layer of type Mamba1"),
    ],
)
def test_of_refuses_modules_that_no_config_builds(module: Any, message: str):
    """`of` raises for modules that no config builds, instead of losing a part of them."""
    with pytest.raises(ValueError, match=message):
        rebuild(module)


@pytest.mark.parametrize("bias", [True, False])
def test_of_reads_parts_of_modules(bias: bool):
    """A part of a module, whose other arrays are `None`, has the config of the whole."""
    block = mbx.Block(MAMBA1, mlp=mbx.GatedMLP(5, 3, bias=bias, key=jr.key(0)))
    part = eqx.tree_at(lambda b: [b.norm.weight, b.mixer.A_log], block, [None, None])
    assert mbx.BlockConfig.of(part) == mbx.BlockConfig.of(block)
    assert mbx.BlockConfig.of(block).mlp == mbx.GatedMLPConfig(3, bias=bias)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, jnp.float32])
def test_layers_take_numbers_of_numpy_and_jax(number: Any):
    """Layers store them as Python's, so that a config can be read off the layer. Configs refuse
    them."""
    eps, half = number(0.25), number(0.5)
    layers = [
        mbx.Mamba1(4, select_norm="weighted", select_norm_eps=eps, key=jr.key(0)),
        mbx.Mamba2(4, headdim=2, dt_limit=(eps, half), norm_eps=eps, key=jr.key(0)),
        mbx.Mamba3(4, headdim=2, rope_fraction=half, A_floor=eps, norm_eps=eps, key=jr.key(0)),
        mbx.Attention(
            4, nheads=2, rotary_emb_dim=2, rotary_emb_base=half, softmax_scale=eps, key=jr.key(0)
        ),
    ]
    blocks = [mbx.Block(layer, norm_eps=eps) for layer in layers]
    configs = [mbx.BlockConfig.of(block) for block in blocks]
    assert all(config.norm_eps == 0.25 for config in configs)
    model = mbx.LanguageModelConfig(vocab_size=9, layers=tuple(configs))
    assert mbx.LanguageModelConfig.from_json(model.to_json()) == model
    limited = mbx.Mamba2(4, headdim=2, dt_limit=[0.25, 0.5], key=jr.key(0))  # pyright: ignore
    assert limited.dt_limit == layers[1].dt_limit
    with pytest.raises(ValueError, match="`dt_limit` must be a tuple of two numbers"):
        mbx.Mamba2Config(4, headdim=2, dt_limit=[0.25, 0.5])  # pyright: ignore
    assert type(mbx.layers.GatedRMSNorm(4, eps=eps).eps) is float
    if number is not np.float64:  # a subclass of `float`
        with pytest.raises(ValueError, match="`norm_eps` must be a number"):
            mbx.BlockConfig(mbx.Mamba1Config(4), norm_eps=eps)


def test_of_reads_ensembles():
    """The models of an ensemble, stacked along a leading axis, share one config."""
    make = eqx.filter_vmap(lambda key: mbx.Mamba1(5, key=key))
    assert mbx.Mamba1Config.of(make(jr.split(jr.key(0), 3))) == mbx.Mamba1Config(5)


DELETE = object()


def change(config: Any, path: list[Any], value: Any) -> None:
    """Sets or deletes the entry at `path` in nested dicts and lists."""
    *parents, last = path
    for key in parents:
        config = config[key]
    if value is DELETE:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["vocab_size"], DELETE, r"missing \['vocab_size'\]"),
        (["vocabulary"], 3, r"unknown \['vocabulary'\]"),
        (["vocab_size"], "9", "`vocab_size`.*'9'"),
        (["padded_vocab_size"], 3, "padded_vocab_size=3.*vocab_size=9"),
        (["layers"], [], "`layers` must be one or more"),
        (["layers"], 7, "`layers` must be a list.*7"),
        (["layers", 0], None, "JSON object for an entry of `layers`.*None"),
        (["layers", 0, "mixer"], {"kind": "lstm"}, r"\['attention', .*'mamba1'.*lstm"),
        (["layers", 0, "mixer"], {"kind": ["lstm"]}, r"\['attention', .*'mamba1'.*lstm"),
        (["layers", 0, "mixer"], {"kind": {}}, r"\['attention', .*'mamba1'"),
        (["layers", 0, "mixer", "d_state"], 10.5, "`d_state`.*10.5"),
        (["layers", 0, "mixer", "bias"], 1, "`bias`.*True or False.*1"),
        (["layers", 0, "mixer", "select_norm"], True, '`select_norm` must be "weighted".*True'),
        (["layers", 0, "mixer", "select_norm_eps"], 0, "`select_norm_eps`.*between 0 and 1.*0"),
        (["layers", 0, "mixer", "width"], 1, r"object of kind 'mamba1'.*unknown \['width'\]"),
        (["layers", 0, "norm_eps"], float("nan"), "`norm_eps`.*nan"),
        (["layers", 0, "mixer", "d_model"], 7, r"share `d_model`.*\[7, 6\]"),
    ],
)
def test_invalid_json_raises(path: list[Any], value: Any, message: str):
    block = mbx.BlockConfig(mbx.Mamba1Config(d_model=6))
    config = json.loads(mbx.LanguageModelConfig(vocab_size=9, layers=(block, block)).to_json())
    change(config, path, value)
    with pytest.raises(ValueError, match=message):
        mbx.LanguageModelConfig.from_json(json.dumps(config))


def test_message_of_invalid_json_is_bounded():
    config = mbx.LanguageModelConfig(9, (mbx.BlockConfig(mbx.Mamba1Config(6)),))
    for text, message in {
        config.to_json().replace('"bias": false', f'"bias": "{"x" * 10**5}"'): "`bias` must be",
        '{"vocab_size":' * 9**5: "nested too deeply",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            mbx.LanguageModelConfig.from_json(text)
        assert len(str(caught.value)) < 1100
