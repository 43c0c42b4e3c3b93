"""`mbx.quantize`: what is rounded, what is kept, and what the model then can do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.layers import QuantizedLinear
from mamba_eqx.training import LoRA


pytestmark = pytest.mark.usefixtures("compile_fast")

BLOCK = mbx.BlockConfig(mbx.Mamba1Config(64), mlp=mbx.GatedMLPConfig(32))
CONFIG = mbx.LanguageModelConfig(40, (BLOCK, BLOCK))


def make(**options: Any) -> mbx.LanguageModel:
    return CONFIG.build(key=jr.key(0), **options)


def bits_by_path(model: Any) -> dict[str, int]:
    is_quantized = lambda node: isinstance(node, QuantizedLinear)
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_quantized)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): node.bits
        for path, node in leaves
        if is_quantized(node)
    }


def test_rounds_the_linear_maps():
    model = mbx.quantize(make(), bits=4)
    names = ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    want = {f"layers.layers.{i}.{name}" for i in range(2) for name in names}
    # The 4 inputs of `dt_proj` are no whole group.
    assert bits_by_path(model) == dict.fromkeys(want | {"lm_head"}, 4)
    first: Any = model.layers.unstack()[0]
    mixer = first.mixer
    assert (mixer.in_proj.group, mixer.out_proj.group) == (64, 64)
    assert first.mlp.fc2.group == 32  # Of 32 inputs.
    assert mixer.A_log.dtype == model.embedding.weight.dtype == jnp.float32


@pytest.mark.slow
def test_stacked_layers_are_rounded_alike():
    unrolled, stacked = mbx.quantize(make(), bits=8), mbx.quantize(make(stacked=True), bits=8)
    assert eqx.tree_equal(mbx.Unrolled(stacked.layers.unstack()), unrolled.layers)
    tokens = jnp.arange(9)
    np.testing.assert_allclose(stacked(tokens), unrolled(tokens), atol=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.006), (4, 0.091)])
def test_logits_are_close(bits: Any, error: float):
    """Every map adds the error of its weight, and errors of independent maps add as squares do."""
    model, tokens = make(), jr.randint(jr.key(1), (30,), 0, 40)
    want, got = model(tokens), mbx.quantize(model, bits=bits)(tokens)
    in_turn = 2 * len(("in_proj", "out_proj", "fc1", "fc2")) + len(("lm_head",))
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < error * in_turn**0.5


def test_keep():
    model = make()
    kept = mbx.quantize(model, keep=["lm_head", "1.mixer.in_proj"])
    assert kept.lm_head is None
    assert bits_by_path(kept).keys() == bits_by_path(mbx.quantize(model)).keys() - {
        "lm_head",
        "layers.layers.1.mixer.in_proj",
    }
    only = mbx.quantize(model, keep=lambda path: not path.endswith("fc1"))
    assert bits_by_path(only).keys() == {f"layers.layers.{i}.mlp.fc1" for i in range(2)}


def test_config_is_that_of_the_model_before():
    model = mbx.quantize(make(), bits=4)
    config = mbx.LanguageModelConfig.of(model)
    assert config == mbx.LanguageModelConfig(40, (BLOCK, BLOCK), tie_embeddings=False)
    assert mbx.LanguageModelConfig.of(eqx.filter(model, eqx.is_inexact_array)) == config
    assert mbx.LanguageModelConfig.of(mbx.quantize(make(), keep=["lm_head"])) == CONFIG


@pytest.mark.parametrize("bits", [8, 4])
def test_generates_and_casts(bits: Any):
    model = mbx.quantize(make(), bits=bits)
    tokens = mbx.generate(model, jnp.arange(5), 6).tokens
    np.testing.assert_array_equal(list(mbx.stream(model, jnp.arange(5), 6)), tokens)
    narrow = mbx.cast(model, jnp.bfloat16)
    assert narrow.lm_head is not None
    assert narrow.lm_head.dtype == jnp.bfloat16
    assert narrow(jnp.arange(5)).dtype == jnp.float32


@pytest.mark.slow
def test_gradients_flow_through_frozen_weights():
    model = mbx.quantize(make(), bits=4)
    gradient = eqx.filter_grad(lambda model: jnp.sum(jnp.sin(model(jnp.arange(7)))))(model)
    assert float(jnp.abs(gradient.embedding.weight).max()) > 0
    assert gradient.lm_head.weight is None
    assert float(jnp.abs(gradient.layers.layers[0].mixer.in_proj.scale).max()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "`bits` must be 8 or 4, but got bits=5"),
        ({"bits": 8.0}, r"`bits` must be 8 or 4, but got bits=8\.0"),
        ({"group": 48}, "`group` must be a multiple of 32, but got group=48"),
        ({"keep": "lm_head"}, "`keep` must be a list of names.* keep='lm_head'"),
        ({"keep": ["proj"]}, "must be the end of a path, but got 'proj'. The model has layers"),
        ({"keep": lambda path: True}, "at least one linear map to quantise"),
        ({"model": mbx.quantize(make())}, "must not be quantised already, but layers"),
    ],
)
def test_invalid_arguments_raise(change: dict[str, Any], message: str, as_users_run: Any):
    options: dict[str, Any] = {"model": make()} | change
    with pytest.raises(ValueError, match=message):
        mbx.quantize(options.pop("model"), **options)


@pytest.mark.parametrize(
    ("inputs", "group"), [(31, None), (96, 96), (100, None), (1000 * 32, 32000)]
)
def test_a_group_of_any_size(inputs: int, group: int | None):
    """A config may ask for it, and is not searched number by number."""
    assert mbx.Quantization(8, 32 * 10**12).group_of(inputs) == group


def test_a_lora_is_refused(as_users_run: Any):
    model = make()
    lora = LoRA.init(model, rank=2, key=jr.key(0))
    quantized = mbx.quantize(model)
    for run in (lambda: LoRA.init(quantized, rank=2, key=jr.key(0)), lambda: lora.merge(quantized)):
        with pytest.raises(ValueError, match="quantise the merged model"):
            run()
    mbx.quantize(lora.merge(model))


def test_a_layer_is_refused_twice(as_users_run: Any):
    linear = mbx.layers.Linear(64, 3, key=jr.key(0))
    once: Any = QuantizedLinear.of(linear, bits=8, group=32)
    with pytest.raises(ValueError, match="quantised only once"):
        QuantizedLinear.of(once, bits=8, group=32)
    assert (once.bits, once.group, once.in_features) == (8, 32, 64)
    np.testing.assert_allclose(once(jnp.ones(64)), linear(jnp.ones(64)), atol=1e-2)
