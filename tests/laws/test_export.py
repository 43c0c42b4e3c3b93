"""Layers exported for other processes and devices."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from tests.support.cases import assert_close, fixed_case, scan, step
from tests.support.laws import all_layers_quickly


# A symbolic length is no `int` to the run-time type checks.
pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")


@all_layers_quickly("mamba1", "attention")
def test_export(name: str):
    """`scan` for a sequence of any length, and `step`, can be exported for all platforms at once.

    Lengths are symbolic. A call of Python, as a check at run time would be, could not be exported.
    """
    layer, x = fixed_case(name, 37)
    x, empty = jnp.asarray(x), layer.init_state(max_len=128)
    leaves, structure = jax.tree.flatten(empty)  # States of layers are unknown to `jax.export`.

    def run_scan(x: Any, state: Any, reset: Any, length: Any) -> Any:
        state = jax.tree.unflatten(structure, state)
        y, state = layer.scan(x, state, reset=reset, length=length)
        return layer(x), y, jax.tree.leaves(state)

    def run_step(x: Any, state: Any) -> Any:
        y, state = layer.step(x, jax.tree.unflatten(structure, state))
        return y, jax.tree.leaves(state)

    (seq,) = export.symbolic_shape("seq")
    platforms = ["cpu", "cuda", "rocm", "tpu"]
    # JAX vouches only for its own kernels. This one is in the program if mamba-eqx-native is there.
    native = export.DisabledSafetyCheck.custom_call("mamba_eqx_native_product")
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    exported = export.export(jax.jit(run_scan), platforms=platforms)(
        jax.ShapeDtypeStruct((seq, *x.shape[1:]), x.dtype),
        shapes,
        jax.ShapeDtypeStruct((seq,), jnp.bool_),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    one = export.export(jax.jit(run_step), platforms=platforms, disabled_checks=[native])(
        x[0], shapes
    )
    for seq in (1, 37):
        reset, length = jnp.arange(seq) == 3, jnp.int32(max(1, seq - 2))
        alone, y, state = exported.call(x[:seq], leaves, reset, length)
        want, want_state = scan(layer, x[:seq], empty, reset, length)
        assert_close(alone, scan(layer, x[:seq], None)[0], "float32")
        assert_close(y[:length], want[:length], "float32")
        assert_close(state, jax.tree.leaves(want_state), "float32")
    y, state = one.call(x[0], leaves)
    assert_close((y, jax.tree.unflatten(structure, state)), step(layer, x[0], empty), "float32")
