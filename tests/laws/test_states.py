"""States and outputs have one structure, shape and dtype, and a sequence may be empty."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.cases import (
    DTYPES,
    assert_close,
    fixed_case,
    fold_in_jax,
    precision,
    scan,
    scan_uncompiled,
    step,
)
from tests.support.laws import all_layers, all_layers_quickly
from tests.support.registry import (
    LAYERS,
    MIXERS,
    SIZES,
    make_inputs,
    make_layer,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


@all_layers
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)])
def test_closure(name: str, dtype: str):
    """`init_state`, `scan` and `step` return the same structure, shapes and dtypes."""
    with precision(dtype):
        for s in SIZES if name in MIXERS else SIZES[:1]:
            layer, x = make_layer(name, s, dtype, 0), jnp.asarray(make_inputs(name, s, 3, dtype, 0))
            state, reset = layer.init_state(max_len=128), jnp.array([False, True, False])
            like = jax.eval_shape(lambda state=state: state)
            # Without a state, the capacity of a cache is the length of the sequence.
            alone = jax.eval_shape(lambda layer=layer: layer.init_state(max_len=3))
            many = itertools.product((None, state), (None, reset), (None, jnp.array(2)))
            for options in many if s == SIZES[0] else [(None, reset, None), (state, None, None)]:
                want = alone if options[0] is None else like
                assert jax.eval_shape(scan, layer, x, *options)[1] == want
            assert jax.eval_shape(step, layer, x[0], state)[1] == like


@all_layers
def test_closure_under_lax_scan(name: str):
    """A state is a valid carry of `jax.lax.scan`."""
    layer, x = fixed_case(name, 4)
    state = layer.init_state(max_len=128)
    assert_close(fold_in_jax(layer, state, x), scan(layer, x, state), "float32")


@all_layers_quickly("conv", "mamba1", "attention")
def test_empty(name: str):
    """A sequence without tokens has no outputs and leaves the state as it is."""
    layer, x = fixed_case(name, 1)
    state = jax.tree.map(jnp.ones_like, layer.init_state(max_len=2))
    x, reset = jnp.asarray(x[:0]), jnp.zeros(0, bool)
    for options in ({}, {"reset": reset, "length": jnp.array(0)}):
        y, end = layer.scan(x, state, **options)
        assert y.shape == jax.eval_shape(layer, x).shape
        assert y.shape[0] == 0
        jax.tree.map(np.testing.assert_array_equal, end, state)


@all_layers_quickly("conv", "attention")
def test_length_of_any_integer_dtype(name: str):
    """`length` may have any integer dtype, in JAX's 64-bit mode as well."""
    layer, x = fixed_case(name, 3)
    state, reset = layer.init_state(max_len=4), jnp.array([True, False, True])
    for wide in (False, True):
        with jax.enable_x64(wide):
            for dtype in ("int8", "uint16", "int32", "uint64" if wide else "uint32"):
                length = jax.ShapeDtypeStruct((), dtype)
                jax.eval_shape(scan_uncompiled, layer, jnp.asarray(x), state, reset, length)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("x_dtype", DTYPES[:2])
def test_dtype(name: str, dtype: str, x_dtype: str):
    """The output has the dtype of the input, whatever the dtype of the parameters."""
    layer = make_layer(name, SIZES[0], dtype, 0)
    x = jnp.asarray(make_inputs(name, SIZES[0], 3, x_dtype, 0))
    assert jax.eval_shape(layer, x).dtype == x_dtype
    assert jax.eval_shape(step, layer, x[0], layer.init_state(max_len=128))[0].dtype == x_dtype


@all_layers
def test_dtype_of_recurrence(name: str):
    """In a bfloat16 layer, the parameters of recurrences and hidden states stay in float32."""
    made = make_layer(name, SIZES[0], "bfloat16", 0)
    for layer in (made, mbx.cast(make_layer(name, SIZES[0], "float32", 0), jnp.bfloat16)):
        mask = mbx.recurrence_mask(layer)
        for leaf, recurrence in zip(jax.tree.leaves(layer), jax.tree.leaves(mask), strict=True):
            assert leaf.dtype == (jnp.float32 if recurrence else jnp.bfloat16)
        is_cache = lambda node: isinstance(node, mbx.KVCache)
        state = layer.init_state(max_len=128)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_cache):
            if isinstance(leaf, mbx.KVCache):
                assert leaf.k.dtype == leaf.v.dtype == jnp.bfloat16
                continue
            # The whole state of Mamba-3 belongs to the recurrence.
            kept = jax.tree_util.keystr(path).endswith((".ssm", ".angle", ".k", ".v"))
            assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)
