"""Layers under JAX's transformations."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from mamba_eqx.testing import _laws as laws
from tests.support.cases import (
    fixed_case,
    fold,
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
    laws.batching(layer, x, pasts, reset, "float32")


@all_layers
def test_pytree(name: str):
    """`jax.jit`, `jax.grad`, `jax.tree.map` and serialisation work on layers."""
    layer, x = fixed_case(name, 4)
    laws.pytree(layer, make_layer(name, SIZES[0], "float32", 1), x, "float32")


@all_layers
def test_donation(name: str):
    """The state can be donated to `step` and to `scan`, the initial one included."""
    laws.donation(*fixed_case(name, 4), "float32")


# Compiling with XLA's optimisations takes long, so the quick run checks three mixers only.
@all_layers_quickly("conv", "mamba1", "mamba2")
def test_jit(name: str):
    """Every method gives the same result under `jit`, and other values do not recompile."""
    layer, x = fixed_case(name, 7)
    # Without `jit`, except that the parts of composites have been run so.
    run_step = layer.step if name in MIXERS else functools.partial(step, layer)
    other = make_layer(name, SIZES[0], "float32", 1)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        laws.jit(layer, other, x, "float32", run_step=run_step)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
