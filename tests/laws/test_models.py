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


@pytest.mark.parametrize(
    "mixer", [mbx.Mamba1Config(16, d_state=4, bias=True), mbx.Mamba2Config(16, headdim=8)]
)
def test_stack_with_separate_weights(mixer: Any):
    """`Stacked.separate` computes the same function of the same memory, for one token and many."""
    stacked = mbx.Stacked([mbx.Block(mixer.build(key=jr.key(seed))) for seed in range(3)])
    separate = stacked.separate()
    weight = stacked.layers.mixer.in_proj.weight  # pyright: ignore
    linears = separate.layers.mixer.in_proj.linears  # pyright: ignore
    start, size = weight.unsafe_buffer_pointer(), weight[0].nbytes
    assert [linear.weight.unsafe_buffer_pointer() for linear in linears] == [
        start + i * size for i in range(3)
    ]

    assert eqx.tree_equal(separate.unstack(), stacked.unstack())
    state = stacked.init_state()
    assert eqx.tree_equal(separate.init_state(), state)
    x = jr.normal(jr.key(0), (5, stacked.d_model))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), state)

    @quick
    def run(stack: mbx.Stacked) -> Any:
        return stack.scan(x), stack.step(x[0], state), jax.vmap(stack.step)(x, states)

    assert_close(run(separate), run(stacked), "float32")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stack_that_is_separate_can_be_separated_again(dtype: Any):
    """`generate` separates every model, also one that its user separated and cast."""
    block = mbx.BlockConfig(mbx.Mamba1Config(16, d_state=4))
    model = mbx.LanguageModelConfig(32, layers=(block,) * 3).build(key=jr.key(0))
    stack = mbx.Stacked(model.layers.unstack())
    separate = stack.separate()
    assert eqx.tree_equal(separate.separate(), separate)
    of = lambda layers: mbx.cast(eqx.tree_at(lambda m: m.layers, model, layers), dtype)
    want, found = (mbx.generate(of(layers), [1, 2, 3], 4) for layers in (stack, separate))
    np.testing.assert_array_equal(found.tokens, want.tokens)


def test_stack_of_shapes_remains_stacked():
    stack = mbx.Stacked([mbx.Mamba1(16, d_state=4, key=jr.key(seed)) for seed in range(2)])
    shapes = eqx.filter_eval_shape(lambda: stack)
    assert eqx.tree_equal(shapes.separate(), shapes)


def test_stack_map_outside_its_loop_raises():
    stack = mbx.Stacked([mbx.Mamba1(16, d_state=4, key=jr.key(seed)) for seed in range(2)])
    linear = stack.separate().layers.in_proj  # pyright: ignore
    for use in (lambda: linear(jnp.ones(16)), lambda: linear.weight):
        with pytest.raises(ValueError, match=r"maps of 2 layers.*`stacked.unstack\(\)\[i\]`"):
            use()


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


def unquantized(layer: Any) -> Any:
    """Returns a layer with the same weights, all of them floating-point."""
    is_quantized = lambda node: isinstance(node, mbx.layers.QuantizedLinear)
    return jax.tree.map(
        lambda node: node.dequantized() if is_quantized(node) else node, layer, is_leaf=is_quantized
    )


@all_layers
def test_config_rebuilds_layers(name: str):
    """The config of a layer builds a layer of the same structure, shapes and kinds of dtypes, but
    with weights that are not quantised."""
    for sizes in SIZES if name in MIXERS else SIZES[:1]:
        layer = make_layer(name, sizes, "float32", 0)
        if isinstance(layer, (*CONFIG_TYPES, mbx.Block, mbx.LanguageModel)):
            assert structure(rebuild(layer)) == structure(eqx.filter_eval_shape(unquantized, layer))
