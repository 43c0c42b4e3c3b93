"""Stacks and configs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.test_util
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.cases import (
    CONFIG_TYPES,
    assert_close,
    fixed_case,
    fold,
    quick,
    rebuild,
    scan,
    structure,
)
from tests.support.configs import CONFIGS
from tests.support.laws import all_layers
from tests.support.registry import (
    MIXERS,
    SIZES,
    make_inputs,
    make_layer,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, PRODUCTS], ids=["everything", "products"])
def test_stack(remat: Any):
    """`Stacked` and `Unrolled` have the same outputs, states and gradients."""
    name, s = "block_mlp", SIZES[0]
    layers = [make_layer(name, s, "float32", seed) for seed in range(3)]
    unrolled, stacked = mbx.Unrolled(layers), mbx.Stacked(layers, remat=remat)
    assert eqx.tree_equal(mbx.Unrolled(stacked.unstack()), unrolled)
    x = make_inputs(name, s, 40, "float32", 0)
    reset = np.isin(np.arange(40), [0, 17, 35])

    for run in (
        lambda stack: scan(stack, x, stack.init_state(), reset),
        lambda stack: fold(stack, x[:2], stack.init_state()),
    ):
        (y, states), (want_y, want_states) = run(stacked), run(unrolled)
        assert_close(y, want_y, "float32")
        want_states = jax.tree.map(lambda *leaves: np.stack(leaves), *want_states)
        assert_close(states, want_states, "float32")
    hidden = unrolled.hidden_states(jnp.asarray(x))
    assert_close(stacked.hidden_states(jnp.asarray(x)), hidden, "float32")
    assert_close(hidden[-1], unrolled(jnp.asarray(x)), "float32")

    gradient = quick(jax.grad(lambda stack: jnp.sum(jnp.sin(stack(jnp.asarray(x))))))
    assert_close(gradient(stacked).unstack(), gradient(unrolled).unstack(), "float32")


@pytest.mark.parametrize("kind", [mbx.Unrolled, mbx.Stacked])
def test_stack_with_remat_recomputes(kind: Any):
    """`remat` recomputes the products that its policy does not store."""
    layer, x = fixed_case("block_mlp", 5)

    def products(run: Any, remat: Any) -> int:
        gradient = jax.grad(lambda stack, x: jnp.sum(run(stack, x)))
        return str(jax.make_jaxpr(gradient)(kind([layer], remat=remat), x)).count("dot_general")

    for run in (lambda stack, x: stack(x), lambda stack, x: stack.hidden_states(x)):
        assert products(run, False) == products(run, PRODUCTS) < products(run, True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stacked", [False, True])
def test_config(name: str, stacked: bool):
    """Reading a config from the model that it built, or from JSON, returns the same config."""
    config = CONFIGS[name]
    model = eqx.filter_eval_shape(lambda key: config.build(stacked=stacked, key=key), jr.key(0))
    assert mbx.LanguageModelConfig.of(model) == config
    assert mbx.LanguageModelConfig.from_json(config.to_json()) == config


@all_layers
def test_config_rebuilds_layers(name: str):
    """The config of a layer builds a layer of the same structure, shapes and kinds of dtypes."""
    for sizes in SIZES if name in MIXERS else SIZES[:1]:
        layer = make_layer(name, sizes, "float32", 0)
        if isinstance(layer, (*CONFIG_TYPES, mbx.Block, mbx.LanguageModel)):
            assert structure(rebuild(layer)) == structure(layer)
