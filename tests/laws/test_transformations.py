"""Layers under JAX's transformations."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.support.cases import (
    assert_close,
    fixed_case,
    fold,
    quick,
    scan,
    step,
)
from tests.support.laws import all_layers, all_layers_quickly
from tests.support.registry import (
    MIXERS,
    SIZES,
    make_inputs,
    make_layer,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


@all_layers
@given(data=st.data())
def test_batching(name: str, data: Any):
    """`vmap` of `scan` and of `step` equals a loop over the batch."""
    seeds = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    layer, s = make_layer(name, SIZES[0], "float32", 0), SIZES[0]
    empty = layer.init_state(max_len=128)
    pasts = [fold(layer, make_inputs(name, s, 5, "float32", seed), empty)[1] for seed in seeds]
    x = np.stack([make_inputs(name, s, 4, "float32", 10 + seed) for seed in seeds])
    reset = np.random.default_rng(seeds).random((3, 4)) < 0.3
    length = np.array([4, 0, 2])

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    batched = jax.vmap(scan, in_axes=(None, 0, 0, 0, 0))
    y, states = batched(layer, x, stack(pasts), reset, length)
    for i in range(3):
        y_i, state = scan(layer, x[i], pasts[i], reset[i], length[i])
        assert_close(y[i, : length[i]], y_i[: length[i]], "float32")
        assert_close(jax.tree.map(lambda leaf: leaf[i], states), state, "float32")  # noqa: B023

    one_by_one = stack([step(layer, x[i, 0], pasts[i]) for i in range(3)])
    batched = jax.vmap(step, in_axes=(None, 0, 0))
    assert_close(batched(layer, x[:, 0], stack(pasts)), one_by_one, "float32")


@all_layers
def test_pytree(name: str):
    """`jax.jit`, `jax.grad`, `jax.tree.map` and serialisation work on layers."""
    layer, x = fixed_case(name, 4)
    x = jnp.asarray(x)
    value_and_grad = quick(jax.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2)))
    loss, grads = value_and_grad(layer)
    assert jax.tree.structure(grads) == jax.tree.structure(layer)
    # NumPy needs no compilation.
    rate = 1e-3 / np.sqrt(sum(np.square(np.asarray(g)).sum() for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: np.asarray(p) - rate * np.asarray(g), layer, grads)
    assert value_and_grad(moved)[0] < loss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.eqx"
        eqx.tree_serialise_leaves(path, layer)
        other = make_layer(name, SIZES[0], "float32", 1)
        jax.tree.map(np.testing.assert_array_equal, eqx.tree_deserialise_leaves(path, other), layer)


# Compiling with XLA's optimisations takes long, so the quick run checks three mixers only.
@all_layers_quickly("conv", "mamba1", "mamba2")
def test_jit(name: str):
    """Every method gives the same result under `jit`, and other values do not recompile."""
    layer, x = fixed_case(name, 7)
    x, state = jnp.asarray(x), layer.init_state(max_len=128)
    reset, length = jnp.arange(7) == 3, jnp.array(5)
    traces = []

    @jax.jit
    def run(layer: Any, x: Any, state: Any, reset: Any, length: Any) -> Any:
        traces.append(1)
        y, state = layer.scan(x, state, reset=reset, length=length)
        y_t, state = layer.step(x[0], state)
        return layer(x), y[:5], y_t, state

    y, end = scan(layer, x, state, reset, length)
    # Without `jit`, except that the parts of composites have been run so.
    run_step = layer.step if name in MIXERS else functools.partial(step, layer)
    y_t, end = run_step(x[0], end)
    want = (scan(layer, x, None)[0], y[:5], y_t, end)
    other = make_layer(name, SIZES[0], "float32", 1)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert_close(run(layer, x, state, reset, length), want, "float32")
        run(other, 1 - x, end, ~reset, length + 1)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert len(traces) == 1
