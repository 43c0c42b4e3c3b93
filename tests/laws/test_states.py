"""States and outputs have one structure, shape and dtype, and a sequence may be empty."""

import jax
import jax.numpy as jnp
import pytest

import mamba_eqx as mbx
from mamba_eqx.testing import _laws as laws
from tests.support.cases import (
    DTYPES,
    fixed_case,
    precision,
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
            layer, x = make_layer(name, s, dtype, 0), make_inputs(name, s, 3, dtype, 0)
            laws.closure(layer, x, all_options=s == SIZES[0])


@all_layers
def test_closure_under_lax_scan(name: str):
    """A state is a valid carry of `jax.lax.scan`."""
    laws.closure_under_lax_scan(*fixed_case(name, 4), "float32")


@all_layers_quickly("conv", "mamba1", "attention")
def test_empty(name: str):
    """A sequence without tokens has no outputs and leaves the state as it is."""
    laws.empty(*fixed_case(name, 1))


@all_layers_quickly("conv", "attention")
def test_length_of_any_integer_dtype(name: str):
    """`length` may have any integer dtype, in JAX's 64-bit mode as well."""
    for wide in (False, True):
        with jax.enable_x64(wide):
            dtypes = "int8", "uint16", "int32", "uint64" if wide else "uint32"
            laws.length_of_any_integer_dtype(*fixed_case(name, 3), dtypes)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("x_dtype", DTYPES[:2])
def test_dtype(name: str, dtype: str, x_dtype: str):
    """The output has the dtype of the input, whatever the dtype of the parameters."""
    layer = make_layer(name, SIZES[0], dtype, 0)
    laws.dtype(layer, make_inputs(name, SIZES[0], 3, x_dtype, 0), x_dtype)


@all_layers
def test_dtype_of_recurrence(name: str):
    """In a bfloat16 layer, hidden states and the parameters of recurrences and routers stay in
    float32."""
    made = make_layer(name, SIZES[0], "bfloat16", 0)
    for layer in (made, mbx.cast(make_layer(name, SIZES[0], "float32", 0), jnp.bfloat16)):
        mask = mbx.layers.float32_mask(layer)
        for leaf, wide in zip(jax.tree.leaves(layer), jax.tree.leaves(mask), strict=True):
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                continue  # The weights of quantised maps.
            assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16)
        is_cache = lambda node: isinstance(node, mbx.KVCache)
        state = layer.init_state(max_len=128)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_cache):
            if isinstance(leaf, mbx.KVCache):
                assert leaf.k.dtype == leaf.v.dtype == jnp.bfloat16
                continue
            # The whole state of Mamba-3 belongs to the recurrence.
            kept = jax.tree_util.keystr(path).endswith((".ssm", ".angle", ".k", ".v"))
            assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)
