"""The native kernel beside the products in JAX. Skipped where mamba-eqx-native is not installed."""

import importlib
import importlib.util
import sys
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from mamba_eqx import ops
from mamba_eqx.ops import _native as module


installed = pytest.mark.skipif(
    importlib.util.find_spec("mamba_eqx_native") is None, reason="mamba-eqx-native is not installed"
)
native = partial(ops.quantized_product, implementation="native")
reference = partial(ops.quantized_product, implementation="jax")


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def quantized(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> ops.QuantizedWeight:
    return ops.quantize_weight(random((rows, columns), seed), bits=bits, group=group)


def calls(function: Any, *args: Any) -> int:
    """Returns how often a function calls the kernel."""
    return str(jax.make_jaxpr(function)(*args)).count("target_name=mamba_eqx_native_product")


@installed
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 192])
def test_matches_float64(bits: int, group: int):
    """One vector, and numbers of rows and outputs with every rest, in one and several blocks.

    The error is bounded by one rounding of the sum of all magnitudes. With 4 bits the kernel sums
    q + 8, and subtracts the eights separately.
    """
    for outputs in (1, 7, 300):
        weight = quantized(outputs, 192, bits, group)
        exact = np.asarray(ops.dequantize_weight(*weight), np.float64)
        eights = 8 * np.abs(np.asarray(weight.scale)).repeat(group, axis=1) * (bits == 4)
        magnitudes = np.abs(exact) + eights
        for shape in [(192,), (1, 192), (2, 192), (7, 192), (2, 3, 192), (0, 192)]:
            x = random(shape, seed=1)
            want = np.asarray(x, np.float64) @ exact.T
            got = native(x, *weight)
            assert got.shape == want.shape
            bound = np.finfo(np.float32).eps * (np.abs(np.asarray(x)) @ magnitudes.T)
            np.testing.assert_array_less(np.abs(got - want), bound)


@installed
def test_is_the_default_for_few_vectors():
    weight = quantized(8, 64, 8, 32)
    for shape, count in [((64,), 1), ((8, 64), 1), ((2, 4, 64), 1), ((9, 64), 0), ((0, 64), 0)]:
        assert calls(ops.quantized_product, jnp.zeros(shape), *weight) == count, shape
    assert calls(ops.quantized_product, jnp.zeros(64, jnp.bfloat16), *weight) == 1
    assert calls(reference, jnp.zeros(64), *weight) == 0


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_vmap_multiplies_all_rows_at_once(bits: int):
    weight = quantized(40, 96, bits, 32)
    batched = jax.vmap(lambda x: ops.quantized_product(x, *weight))
    for size, count in [(5, 1), (8, 1), (9, 0)]:
        x = random((size, 96), seed=1)
        assert calls(batched, x) == count
        np.testing.assert_allclose(jax.jit(batched)(x), reference(x, *weight), atol=1e-5)


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_vmap_over_weights(bits: int):
    weights = [quantized(6, 64, bits, 32, seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = random((3, 64), seed=1)
    for each, axis in [(x, 0), (x[0], None)]:
        got = jax.vmap(ops.quantized_product, in_axes=(axis, 0, 0))(each, *stacked)
        want = [reference(x[i] if axis == 0 else x[0], *weights[i]) for i in range(3)]
        np.testing.assert_allclose(got, want, atol=1e-5)


@installed
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sharded", ["x", "weight"])
def test_runs_in_jax_inside_shard_map(bits: int, sharded: str):
    weight, x = quantized(6, 64, bits, 32), random((4, 64), seed=1)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P(), P()) if sharded == "x" else (P(), P("data"), P("data"))
    out = P("data") if sharded == "x" else P(None, "data")
    for product in (ops.quantized_product, jax.vmap(ops.quantized_product, (0, None, None))):
        split = jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=out)
        assert calls(split, x, *weight) == 0
        np.testing.assert_allclose(split(x, *weight), reference(x, *weight), atol=1e-5)
    with pytest.raises(ValueError, match=r"vary inside `jax.shard_map`.*implementation=\"jax\""):
        jax.shard_map(native, mesh=mesh, in_specs=specs, out_specs=out)(x, *weight)


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_runs_in_jax_on_an_explicit_mesh(bits: int):
    weight, x = quantized(6, 64, bits, 32), random((4, 64), seed=1)
    want = reference(x, *weight)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        for product in (ops.quantized_product, jax.vmap(ops.quantized_product, (0, None, None))):
            assert calls(product, x, *weight) == 0
            np.testing.assert_allclose(product(x, *weight), want, atol=1e-5)
            assert jax.typeof(product(x, *weight)).sharding.spec[0] == "data"


@installed
@pytest.mark.usefixtures("as_users_run")
def test_a_symbolic_number_of_rows_runs_in_jax():
    weight, x = quantized(6, 64, 8, 32), random((4, 64), seed=1)
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape("rows"), 64), jnp.float32)
    alone = partial(ops.quantized_product, weight=weight[0], scale=weight[1])
    for product in (alone, jax.vmap(alone)):
        exported = export.export(jax.jit(product))(shape)
        np.testing.assert_allclose(exported.call(x), reference(x, *weight), atol=1e-5)


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_in_loops(bits: int):
    """A loop of products, alone and with a batch whose rows stop at different times."""
    weight = quantized(64, 64, bits, 32)

    def loop(product: Any, x: jax.Array, steps: jax.Array) -> jax.Array:
        body = lambda c: (c[0] + 1, jnp.tanh(product(c[1] / 16, *weight)))
        return lax.while_loop(lambda c: c[0] < steps, body, (0, x))[1]

    x, steps = random((3, 64), seed=1), jnp.array([1, 4, 2])
    for run in (loop, lambda *args: jax.vmap(partial(loop, args[0]))(*args[1:])):
        args = (x[0], steps[0]) if run is loop else (x, steps)
        got = jax.jit(partial(run, native))(*args)
        np.testing.assert_allclose(got, run(reference, *args), atol=1e-5)


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_derivatives_are_those_of_jax(bits: int):
    weight, scale = quantized(5, 64, bits, 32)
    x, dx = random((2, 64), seed=1)

    def derivatives(product: Any) -> tuple[Any, ...]:
        f = lambda x, scale: jnp.sin(product(x, weight, scale)).sum()
        return (
            jax.grad(f, (0, 1))(x, scale),
            jax.grad(f, 1)(x, scale),
            jax.jvp(f, (x, scale), (dx, scale + 1)),
            jax.hessian(f)(x, scale),
            jax.vmap(jax.grad(f), in_axes=(0, None))(jnp.stack([x, dx]), scale),
        )

    pairs = zip(*(jax.tree.leaves(derivatives(p)) for p in (native, reference)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@installed
def test_non_finite_values_stay_in_their_row():
    weight = quantized(5, 64, 4, 32)
    x = jnp.ones((2, 64)).at[0, 3].set(jnp.nan)
    y = native(x, *weight)
    assert jnp.all(jnp.isnan(y[0]))
    assert jnp.all(jnp.isfinite(y[1]))


@installed
def test_float64_is_an_error():
    with jax.enable_x64(True), pytest.raises(ValueError, match="must compute in float32"):
        native(jnp.zeros(64, jnp.float64), *quantized(3, 64, 8, 32))


@installed
@pytest.mark.parametrize(
    ("x", "weight", "scale", "message"),
    [
        ((1, 64), ((3, 64), "float32"), (3, 2), "must be float32, int8 or uint8"),
        ((64,), ((3, 64), "int8"), (3, 2), "must be matrices"),
        ((1, 64), ((3, 64), "uint8"), (3, 2), "must have the inputs of `weight`"),
        ((1, 64), ((3, 64), "int8"), (2, 2), "must have the inputs of `weight`"),
        ((1, 64), ((3, 64), "int8"), (3, 3), "multiple of 32 inputs"),
        ((1, 0), ((3, 0), "int8"), (3, 2), "multiple of 32 inputs"),
    ],
)
def test_invalid_arguments_raise(x: Any, weight: Any, scale: Any, message: str):
    product = importlib.import_module("mamba_eqx_native").product
    with pytest.raises(ValueError, match=message):
        product(jnp.zeros(x), jnp.zeros(*weight), jnp.zeros(scale))


@installed
def test_the_library_itself_checks_its_arguments():
    importlib.import_module("mamba_eqx_native")
    call = jax.ffi.ffi_call("mamba_eqx_native_product", jax.ShapeDtypeStruct((1, 3), jnp.float32))
    good = [jnp.zeros((1, 64)), jnp.zeros((3, 64), jnp.int8), jnp.zeros((3, 2))]
    call(*good)
    wrong = [
        (0, jnp.zeros((1, 32))),
        (0, jnp.zeros(64)),
        (0, jnp.zeros((2, 64))),
        (0, jnp.zeros((1, 64), jnp.bfloat16)),
        (1, jnp.zeros((3, 64), jnp.int16)),
        (1, jnp.zeros((4, 64), jnp.int8)),
        (1, jnp.zeros((3, 64), jnp.uint8)),
        (2, jnp.zeros((3, 0))),
        (2, jnp.zeros((3, 4))),
        (2, jnp.zeros((2, 2))),
    ]
    for index, array in wrong:
        with pytest.raises(Exception, match=r"do not fit together|must be int8|Wrong buffer"):
            jax.block_until_ready(call(*good[:index], array, *good[index + 1 :]))


@pytest.fixture
def fresh_search():
    """Looks for the package again, now and after the test."""
    module._found.cache_clear()
    jax.clear_caches()
    yield
    module._found.cache_clear()
    jax.clear_caches()


def test_without_the_package(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    weight = quantized(3, 64, 8, 32)
    assert calls(ops.quantized_product, jnp.zeros(64), *weight) == 0
    with pytest.raises(ImportError, match=r"not installed.*pip install .*/native"):
        native(jnp.zeros(64), *weight)


def test_turned_off(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    """Without the kernel, whose calls `jax.export` refuses, a product of few rows is exported."""
    monkeypatch.setenv("MAMBA_EQX_NATIVE", "0")
    weight, x = quantized(3, 64, 8, 32), random((64,), seed=1)
    assert calls(ops.quantized_product, x, *weight) == 0
    exported = export.export(jax.jit(lambda x: ops.quantized_product(x, *weight)))(x)
    np.testing.assert_allclose(exported.call(x), reference(x, *weight), atol=1e-5)
    with pytest.raises(ImportError, match=r"MAMBA_EQX_NATIVE=0 turns off .* Unset it"):
        native(x, *weight)


def test_an_unknown_value_of_the_switch(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAMBA_EQX_NATIVE", "off")
    with pytest.raises(ValueError, match="MAMBA_EQX_NATIVE must be 0 or 1, but is 'off'"):
        ops.quantized_product(jnp.zeros(64), *quantized(3, 64, 8, 32))


def test_an_unusable_package_is_named(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    def fail(name: str) -> types.ModuleType:
        raise ImportError("API version (0.9) is incompatible. Reinstall it.")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.__spec__)
    monkeypatch.setattr(importlib, "import_module", fail)
    weight = quantized(3, 64, 8, 32)
    with pytest.warns(RuntimeWarning, match=r"cannot be used. API version .* in JAX instead"):
        assert calls(ops.quantized_product, jnp.zeros(64), *weight) == 0
    with pytest.raises(ImportError, match=r"cannot be used\. API version"):
        native(jnp.zeros(64), *weight)


def test_unknown_implementation_raises(as_users_run: Any):
    with pytest.raises(ValueError, match='must be "jax", "native" or None, but got \'fast\''):
        ops.quantized_product(jnp.zeros(64), *quantized(3, 64, 8, 32), implementation="fast")
