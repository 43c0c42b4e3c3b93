"""The kernels of the selective scan beside the loops in JAX. Skipped where mamba-eqx-native is not
installed."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from mamba_eqx import ops
from mamba_eqx.ops import _native, _selective_scan as module
from mamba_eqx.ops._exp import exp


installed = pytest.mark.skipif(
    importlib.util.find_spec("mamba_eqx_native") is None, reason="mamba-eqx-native is not installed"
)
pytestmark = pytest.mark.usefixtures("compile_fast")

EPS = float(np.finfo(np.float32).eps)
NAMES = ("x", "dt", "A", "B", "C", "state")


def inputs(
    seq: int, d_inner: int = 3, d_state: int = 2, dtype: str = "float32"
) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seq)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "x": normal(seq, d_inner),
        "dt": jax.nn.softplus(normal(seq, d_inner)),
        "A": -jnp.exp(normal(d_inner, d_state)),
        "B": normal(seq, d_state),
        "C": normal(seq, d_state),
        "state": normal(d_state, d_inner),
    }


def scan(arrays: dict[str, jax.Array], **options: Any) -> tuple[jax.Array, jax.Array]:
    # Without its own `jax.jit`, which remembers whether the kernels were used.
    return inspect.unwrap(ops.selective_scan)(**arrays, D=None, **options)


def scan_and_gradients(arrays: dict[str, jax.Array], **options: Any) -> PyTree:
    def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, PyTree]:
        y, state = scan(arrays, **options)
        weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(weight * y) + jnp.sum(jnp.sin(state)), (y, state)

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return results, gradients


def in_jax(function: Callable[..., PyTree], *args: Any, **options: Any) -> PyTree:
    """Calls a function with the loops in JAX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_native", lambda tokens: False)
        return jax.jit(partial(function, **options))(*args)


def in_kernels(function: Callable[..., PyTree], *args: Any, **options: Any) -> PyTree:
    """Calls a function, and checks that it uses the kernels."""
    compiled = jax.jit(partial(function, **options))
    assert calls(compiled, *args) > 0
    return compiled(*args)


def calls(function: Callable[..., Any], *args: Any) -> int:
    """Returns how often a function calls the kernels."""
    # A new function, since JAX remembers the traces of others.
    lowered = jax.jit(lambda *args: function(*args)).lower(*args)
    return lowered.as_text().count("@mamba_eqx_native_selective_scan")


def assert_near(got: PyTree, want: PyTree, bound: float = 16 * EPS) -> None:
    """Compares all arrays, relative to the largest number of each."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * scale)


def check_accuracy(
    seq: int, d_inner: int, d_state: int, chunk_size: int | None, reset: jax.Array | None
) -> None:
    """Checks that results and gradients of the kernels are as near to those in float64 as JAX's,
    in the root mean square."""
    options: dict[str, Any] = {"chunk_size": chunk_size, "reset": reset}
    arrays = inputs(seq, d_inner, d_state)
    got = in_kernels(scan_and_gradients, arrays, **options)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), arrays)
        exact = jax.tree.map(np.asarray, in_jax(scan_and_gradients, wide, **options))
    others = in_jax(scan_and_gradients, arrays, **options)
    for a, b, want in zip(*map(jax.tree.leaves, (got, others, exact)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, its = (rms(np.asarray(array) - want) for array in (a, b))
        # Of few numbers, either error may be zero by luck.
        scale = rms(want) if want.size > 1000 else 16 * max(1.0, np.abs(want).max(initial=0))
        assert error <= 1.5 * its + EPS * scale


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


@installed
@pytest.mark.parametrize("has_reset", [False, True])
def test_is_as_accurate_as_jax(has_reset: bool):
    """Two blocks of channels and a rest, and two chunks and a rest."""
    check_accuracy(70, 133, 17, None, jnp.arange(70) % 9 == 4 if has_reset else None)


@installed
@pytest.mark.slow
@settings(max_examples=12)
@given(
    seq=st.sampled_from([0, 1, 5, 33]),
    d_inner=st.sampled_from([1, 3, 15, 64, 130]),
    d_state=st.sampled_from([1, 4, 16, 33]),
    chunk_size=st.sampled_from([1, 4, None]),
    resets=st.sampled_from([None, 1, 3]),
)
def test_is_as_accurate_as_jax_in_all_sizes(
    seq: int, d_inner: int, d_state: int, chunk_size: int | None, resets: int | None
):
    reset = None if resets is None else jnp.arange(seq) % resets == 0
    check_accuracy(seq, d_inner, d_state, chunk_size, reset)


@installed
def test_is_the_default_in_float32():
    arrays, weights = inputs(5), inputs(5, dtype="bfloat16")
    mixed = weights | {"A": arrays["A"]}
    for case in (arrays, mixed):
        assert calls(scan, case) == 1
        assert calls(partial(scan, method="chunked"), case) == 1
        assert calls(partial(scan, method="sequential"), case) == 0
        assert calls(partial(scan, method="associative"), case) == 0
    assert calls(scan_and_gradients, arrays) == 2
    with jax.enable_x64(True):
        assert calls(scan, inputs(5, dtype="float64")) == 0


@installed
def test_exponential_is_that_of_jax():
    """With a state of ones and no input, the state after a token is its decay."""
    z = np.concatenate([np.linspace(-90, 90, 3001), [-87.5, -88.0, -100, 88.0, 88.5, 100]])
    special = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, -1e-40, -1e30, 1e30])
    z = jnp.asarray(np.concatenate([z, special]), jnp.float32)
    arrays = {
        "x": jnp.zeros((1, z.size)),
        "dt": jnp.ones((1, z.size)),
        "A": z[:, None],
        "B": jnp.zeros((1, 1)),
        "C": jnp.ones((1, 1)),
        "state": jnp.ones((1, z.size)),
    }
    y, state = in_kernels(scan, arrays)
    np.testing.assert_array_equal(y[0], state[0])
    np.testing.assert_allclose(state[0], exp(z), rtol=5e-7)
    normal, tail = (z > -87) & (z < 88), z < -87
    np.testing.assert_allclose(state[0][normal], np.exp(np.asarray(z, np.float64)[normal]), 5e-7)
    # Numbers below the smallest normal one may be zero.
    assert jnp.all(state[0][tail] <= 2e-38)


@installed
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_spread_as_in_jax(value: float):
    """A reset stops those of the state, and other channels and sequences have none."""
    arrays, reset = inputs(9, 5, 3), jnp.arange(9) == 6
    batch = {name: jnp.stack([array, array]) for name, array in arrays.items()}
    batch["x"] = batch["x"].at[0, 2, 1].set(value)
    batch["B"] = batch["B"].at[0, 4, 0].set(value)
    run = jax.vmap(partial(scan_and_gradients, reset=reset))
    got, want = in_kernels(run, batch), in_jax(run, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for test in (jnp.isnan, jnp.isposinf, jnp.isneginf):
            np.testing.assert_array_equal(test(a), test(b))
        assert jnp.all(jnp.isfinite(a[1]))


@installed
def test_vmap_shares_what_is_not_batched():
    """Each argument alone, and all but one of each kind, have a batch axis."""
    arrays = inputs(6, 5, 3)
    batch = {name: jnp.stack([array, array / 2, array / 3]) for name, array in arrays.items()}
    for mapped in (["x"], ["A"], ["state"], ["x", "dt", "B", "C"]):
        axes = {name: 0 if name in mapped else None for name in NAMES}
        case = {name: batch[name] if name in mapped else arrays[name] for name in NAMES}
        got = in_kernels(jax.vmap(scan, in_axes=(axes,)), case)
        one = {name: case[name][1] if name in mapped else arrays[name] for name in NAMES}
        assert_near(jax.tree.map(lambda t: t[1], got), in_kernels(scan, one))


@installed
@pytest.mark.slow
def test_nested_vmap():
    """Axes of two batches, in different places, with resets that only one of them has."""
    arrays = inputs(6, 5, 3)
    x = jnp.stack([arrays["x"] * (i + 1) for i in range(2)], axis=1)
    dt = jnp.stack([arrays["dt"] * (i + 1) for i in range(3)], axis=2)
    reset = jnp.stack([jnp.arange(6) == i for i in range(2)])

    def run(x: jax.Array, dt: jax.Array, reset: jax.Array) -> PyTree:
        return scan_and_gradients(arrays | {"x": x, "dt": dt}, reset=reset)

    double = jax.vmap(jax.vmap(run, in_axes=(None, 2, None)), in_axes=(1, None, 0))
    got = in_kernels(double, x, dt, reset)
    for i in range(2):
        for j in range(3):
            want = in_kernels(run, x[:, i], dt[:, :, j], reset[i])
            assert_near(jax.tree.map(lambda t: t[i, j], got), want)  # noqa: B023


@installed
def test_gradients_of_a_batch_are_summed_over_what_it_shares():
    arrays = inputs(6, 70, 3)
    x = jnp.stack([arrays["x"], arrays["x"] / 2, arrays["x"] - 1])

    def loss(arrays: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y, state = jax.vmap(lambda x: scan(arrays | {"x": x}))(x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    gradients = jax.grad(loss, argnums=(0, 1))
    assert_near(in_kernels(gradients, arrays, x), in_jax(gradients, arrays, x))


@installed
def test_forward_mode():
    arrays = inputs(6, 5, 3)
    run = lambda arrays: jax.jvp(scan, (arrays,), (jax.tree.map(jnp.sin, arrays),))
    assert_near(in_kernels(run, arrays), in_jax(run, arrays))


@installed
@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives(outer: Any):
    arrays, reset = inputs(3, 2, 1), jnp.array([False, True, False])

    def loss(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        y, state = scan(arrays | {"x": x}, reset=reset, chunk_size=2)
        return jnp.sum(y**2) + jnp.sum(jnp.sin(state))

    second = outer(jax.jacrev(loss, argnums=1))
    args = (arrays["x"], arrays)
    assert_near(in_kernels(second, *args), in_jax(second, *args), 64 * EPS)


@installed
def test_checkpoint_and_donation():
    arrays = inputs(9, 70, 3)

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(scan(arrays)[0]))

    want = in_kernels(jax.grad(loss), arrays)
    assert_near(in_kernels(jax.grad(jax.checkpoint(loss)), arrays), want, 0)
    donated = jax.jit(jax.grad(loss), donate_argnums=0)
    assert_near(donated(jax.tree.map(jnp.copy, arrays)), want, 0)


@installed
def test_results_do_not_depend_on_the_threads():
    run, arrays = jax.jit(scan_and_gradients), inputs(40, 600, 4)
    first = run(arrays)
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(arrays), first)


@installed
def test_runs_in_jax_inside_shard_map():
    arrays = inputs(6, 4, 3)
    batch = {name: jnp.stack([array, array / 2]) for name, array in arrays.items()}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        jax.vmap(scan_and_gradients), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    assert calls(run, batch) == 0
    assert_near(jax.jit(run)(batch), in_kernels(jax.vmap(scan_and_gradients), batch))


@installed
def test_runs_in_jax_on_an_explicit_mesh():
    arrays = inputs(6, 4, 3)
    want = in_kernels(scan, arrays)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = {**arrays, "x": jax.device_put(arrays["x"], NamedSharding(mesh, P(None, "model")))}
        assert calls(scan, split) == 0
        assert_near(jax.jit(scan)(split), want)


@installed
@pytest.mark.slow
def test_runs_in_jax_on_several_devices():
    """XLA would compute a call of a kernel for the whole batch on every device."""
    code = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from mamba_eqx import ops
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
x, B, A = put(jnp.ones((2, 5, 3))), put(jnp.ones((2, 5, 2))), -jnp.ones((3, 2))
run = jax.jit(jax.vmap(lambda x, B: ops.selective_scan(x, x, A, B, B, None)))
print(run.lower(x, B).as_text().count("mamba_eqx_native"), run(x, B)[0].sharding.spec)
print(run.lower(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 2))).as_text().count("mamba_eqx_native"))
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    split, alone = done.stdout.splitlines()
    assert split == "0 P('data',)" or split.startswith("0 PartitionSpec('data'")
    assert int(alone) > 0


@installed
@pytest.mark.usefixtures("as_users_run")
def test_exported_programs_contain_no_calls():
    """They run where the package is not installed, on all platforms and for all lengths."""
    arrays = inputs(6)
    want = in_kernels(scan, arrays)
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        exported = export.export(jax.jit(scan), platforms=platforms)(arrays)
        assert "mamba_eqx_native" not in exported.mlir_module()
        again = export.deserialize(exported.serialize())
        assert_near(again.call(arrays), want)
    (seq,) = export.symbolic_shape("seq")
    shapes = {
        name: jax.ShapeDtypeStruct((seq, *a.shape[1:]) if name in "x dt B C" else a.shape, a.dtype)
        for name, a in arrays.items()
    }
    assert_near(export.export(jax.jit(scan))(shapes).call(arrays), want)
    (batch,) = export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape), a.dtype), arrays)
    rows = jax.tree.map(lambda a: jnp.stack([a] * 2), arrays)
    found = export.export(jax.jit(jax.vmap(scan)))(shapes).call(rows)
    assert_near(jax.tree.map(lambda t: t[1], found), want)


@pytest.fixture
def fresh_search():
    """Looks for the package again, now and after the test."""
    _native._found.cache_clear()
    yield
    _native._found.cache_clear()


def test_turned_off(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAMBA_EQX_NATIVE", "0")
    assert calls(scan_and_gradients, inputs(5)) == 0


def test_runs_in_jax_with_an_older_version(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    """Version 0.1.0 of the package had products only."""
    old = types.ModuleType("mamba_eqx_native")
    old.product = None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.__spec__)
    monkeypatch.setattr(importlib, "import_module", lambda name: old)
    assert calls(scan_and_gradients, inputs(5)) == 0
