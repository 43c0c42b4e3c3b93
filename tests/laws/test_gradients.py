"""The gradients of `scan`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from mamba_eqx.testing import _laws as laws
from tests.support.cases import (
    fixed_case,
    fold,
    quick,
    scan_uncompiled,
)
from tests.support.laws import all_layers_quickly
from tests.support.registry import (
    EVERYTHING,
    LANGUAGE_MODELS,
    MIXERS,
    SIZES,
    VOCAB_SIZE,
    Sizes,
    make_inputs,
    make_layer,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize(
    ("name", "s", "seq"),
    [(name, SIZES[0], 40) for name in EVERYTHING]
    + [pytest.param(name, s, 3, marks=pytest.mark.slow) for name in MIXERS for s in SIZES[1:]],
)
def test_gradients(name: str, s: Sizes, seq: int):
    """The gradients of `scan` equal the gradients of `step` folded: for inputs, parameters and
    initial state, through the outputs and through the final state."""
    with jax.enable_x64(True):
        layer = make_layer(name, s, "float64", 0)
        past = make_inputs(name, s, 5, "float64", 1)
        state = fold(layer, past, layer.init_state(max_len=128))[1]
        laws.gradients(layer, state, make_inputs(name, s, seq, "float64", 0), "float64")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("conv", "mamba1") else pytest.param(name, marks=pytest.mark.slow)
        for name in MIXERS
    ],
)
def test_gradients_equal_finite_differences(name: str):
    """The gradients of `scan` equal finite differences."""
    with jax.enable_x64(True):
        layer = make_layer(name, SIZES[0], "float64", 0)
        x = jnp.asarray(make_inputs(name, SIZES[0], 3, "float64", 0))
        state = fold(layer, np.asarray(x), layer.init_state(max_len=128))[1]
        varied, fixed = eqx.partition((layer, x, state), eqx.is_inexact_array)

        @jax.jit
        def run(varied: Any) -> Any:
            return eqx.filter(scan_uncompiled(*eqx.combine(varied, fixed)), eqx.is_inexact_array)

        jax.test_util.check_grads(run, (varied,), order=1, modes=["rev"])


@all_layers_quickly(*MIXERS)
def test_gradients_in_forward_mode(name: str):
    """Forward-mode derivatives of `scan` equal reverse-mode derivatives."""
    with jax.enable_x64(True):
        layer = make_layer(name, SIZES[0], "float64", 0)
        tangent = eqx.filter(make_layer(name, SIZES[0], "float64", 1), eqx.is_inexact_array)
        x = jnp.asarray(make_inputs(name, SIZES[0], 4, "float64", 0))
        varied, fixed = eqx.partition(layer, eqx.is_inexact_array)

        @quick
        def run(varied: Any, tangent: Any) -> Any:
            output = lambda varied: eqx.combine(varied, fixed)(x)
            y, y_dot = jax.jvp(output, (varied,), (tangent,))
            (grads,) = jax.vjp(output, varied)[1](y)
            return jnp.vdot(y, y_dot), grads

        forward, grads = run(varied, tangent)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(tangent), strict=True)
        np.testing.assert_allclose(forward, sum(np.vdot(a, b) for a, b in pairs))


@all_layers_quickly("conv", "mamba1", "attention")
def test_length_in_gradients(name: str):
    """The gradients of a padded sequence are those of the sequence without its padding, which may
    be NaN or infinite, hold any token id, contain a reset, and exceed the room of a cache."""
    n, seq = 4, 7
    with jax.enable_x64(True):
        layer = make_layer(name, SIZES[0], "float64", 0)
        x = make_inputs(name, SIZES[0], seq, "float64", 0)
        padding = [2**20, -3, VOCAB_SIZE] if name in LANGUAGE_MODELS else [np.nan, np.inf, -np.inf]
        x[n:] = np.array(padding, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        laws.length_in_gradients(layer, x, n, "float64")


@all_layers_quickly("conv")
def test_empty_in_gradients(name: str):
    """Without tokens, the gradients are zero, except that the final state is the initial state.
    XLA aborts on some programs without elements, which `jit` removes before it compiles."""
    layer, x = fixed_case(name, 1)
    state = layer.init_state(max_len=2)
    varied, fixed = eqx.partition((layer, state), eqx.is_inexact_array)

    def loss(varied: Any) -> Any:
        layer, state = eqx.combine(varied, fixed)
        out = layer.scan(jnp.asarray(x[:0]), state)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(eqx.filter(out, eqx.is_inexact_array)))

    for_layer, for_state = jax.grad(loss)(varied)
    for leaf in jax.tree.leaves(for_layer):
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(for_state):
        np.testing.assert_array_equal(leaf, 1)
