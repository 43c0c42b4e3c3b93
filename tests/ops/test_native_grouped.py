"""`grouped_product` in the kernels beside JAX. Skipped where mamba-eqx-native is not installed."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from mamba_eqx.ops import _native, grouped_product


installed = pytest.mark.skipif(
    importlib.util.find_spec("mamba_eqx_native") is None, reason="mamba-eqx-native is not installed"
)

# Rows, steps and columns with every rest, empty groups, rows after the last group, more rows than
# the kernel keeps sums of, and more steps than it copies at once.
SHAPES = [
    ([3, 0, 5, 11], 2, 37, 101),
    ([0, 40, 0, 26], 0, 38, 64),
    ([2, 530], 5, 1050, 70),
    ([0, 0], 4, 5, 6),
]


def arguments(
    sizes: list[int], rest: int, features: int, outputs: int, dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(sizes) + rest, features))
    weight = rng.standard_normal((len(sizes), outputs, features)) / features**0.5
    return jnp.asarray(x, dtype), jnp.asarray(sizes, jnp.int32), jnp.asarray(weight, dtype)


def product_and_gradients(x: jax.Array, sizes: jax.Array, weight: jax.Array) -> Any:
    def loss(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = grouped_product(x, sizes, weight)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.grad(loss, (0, 1), has_aux=True)(x, weight)


def calls(function: Any, *args: Any) -> int:
    """Returns how often a function calls the kernels."""
    # Products that are equal but for their weights are one function of the program.
    text = jax.jit(lambda *args: function(*args)).lower(*args).as_text()
    return text.count("@mamba_eqx_native_grouped")


def exact(x: jax.Array, sizes: jax.Array, weight: jax.Array) -> Any:
    """Returns what `product_and_gradients` does, in float64."""
    rows, weights = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y, x_bar, weight_bar = np.zeros((len(rows), weight.shape[1])), 0 * rows, 0 * weights
    ends = np.cumsum(sizes)
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:end] = rows[start:end] @ weights[g].T
        y_bar = np.cos(y[start:end])
        x_bar[start:end] = y_bar @ weights[g]
        weight_bar[g] = y_bar.T @ rows[start:end]
    return (x_bar, weight_bar), y


@installed
@pytest.mark.parametrize(("sizes", "rest", "features", "outputs"), SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("bfloat16", 1.5e-2)])
def test_matches_float64(
    sizes: list[int], rest: int, features: int, outputs: int, dtype: str, bound: float
):
    """Values and gradients. The cosines of results in bfloat16 have their rounding errors."""
    args = arguments(sizes, rest, features, outputs, dtype)
    assert calls(product_and_gradients, *args) == 3
    got = jax.jit(product_and_gradients)(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact(*args)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype)
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=bound * scale)


@installed
def test_sums_of_bfloat16_are_rounded_once():
    """Sums of 4097 ones stop growing at 256 in bfloat16, for every order of the axes."""
    x, sizes = jnp.ones((3, 4097), jnp.bfloat16), jnp.array([2, 1], jnp.int32)
    weight = jnp.ones((2, 70, 4097), jnp.bfloat16)
    kernels = _native.native_grouped()
    assert kernels is not None
    assert np.all(grouped_product(x, sizes, weight) == 4096)
    assert np.all(kernels.product(x, sizes, weight.swapaxes(1, 2), axis=1) == 4096)
    sums = kernels.outer(x.T, x.T, jnp.array([4000, 97], jnp.int32))
    assert np.all(sums == jnp.array([4000, 97], jnp.bfloat16)[:, None, None])


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_non_finite_values_stay_in_their_group(dtype: str):
    x, sizes, weight = arguments([3, 2, 5], 1, 10, 7, dtype)
    x = x.at[3].set(jnp.nan).at[10].set(jnp.inf)
    (x_bar, weight_bar), y = jax.jit(product_and_gradients)(x, sizes, weight)
    assert np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isnan(y[3]).all()
    assert np.isfinite(weight_bar[jnp.array([0, 2])]).all()
    assert np.isnan(weight_bar[1]).all()
    assert np.isfinite(np.delete(x_bar, 3, 0)).all()


@installed
def test_groups_end_with_the_last_row():
    """Sizes that promise more rows than there are read no memory behind them."""
    kernels = _native.native_grouped()
    assert kernels is not None
    x, _, weight = arguments([4, 4], 0, 8, 6)
    want = kernels.product(x, jnp.array([3, 5], jnp.int32), weight, axis=2)
    for sizes in ([3, 2**31 - 1], [3, 6]):
        got = kernels.product(x, jnp.array(sizes, jnp.int32), weight, axis=2)
        np.testing.assert_array_equal(got, want)
    negative = jnp.array([-2, 8], jnp.int32)
    np.testing.assert_allclose(kernels.product(x, negative, weight, axis=2), x @ weight[1].T, 1e-5)
    assert not np.any(kernels.outer(x, x, negative)[0])


@installed
def test_vmap_calls_the_kernels_once():
    x, sizes, weight = arguments([3, 0, 5, 1], 0, 6, 5)
    args = jnp.stack([x, 2 * x]), jnp.stack([sizes, sizes[::-1]]), weight
    batched = jax.vmap(product_and_gradients, (0, 0, None))
    assert calls(batched, *args) == 3
    (x_bars, weight_bars), ys = jax.jit(batched)(*args)
    for i in range(2):
        (x_bar, weight_bar), y = exact(args[0][i], args[1][i], weight)
        for a, b in ((x_bars[i], x_bar), (weight_bars[i], weight_bar), (ys[i], y)):
            np.testing.assert_allclose(a, b, atol=1e-4)


@installed
def test_runs_in_jax_where_kernels_cannot():
    """In float16 and float64, in programs for `jax.export`, and inside `jax.shard_map`."""
    x, sizes, weight = arguments([3, 0, 5, 1], 0, 6, 5)
    assert calls(grouped_product, x, sizes, weight) == 1
    half = x.astype(jnp.float16), sizes, weight.astype(jnp.float16)
    assert calls(grouped_product, *half) == 0
    with jax.enable_x64(True):
        assert calls(grouped_product, x.astype("float64"), sizes, weight.astype("float64")) == 0
    exported = export.export(jax.jit(lambda *args: grouped_product(*args)))(x, sizes, weight)
    assert "mamba_eqx_native" not in exported.mlir_module()
    want = grouped_product(x, sizes, weight)
    np.testing.assert_allclose(exported.call(x, sizes, weight), want, atol=1e-5)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P(), P())
    split = jax.shard_map(grouped_product, mesh=mesh, in_specs=specs, out_specs=P("data"))
    assert calls(split, x, sizes, weight) == 0
    np.testing.assert_allclose(split(x, sizes, weight), want, atol=1e-5)


@installed
@pytest.mark.parametrize(
    ("name", "shapes", "dtypes", "message"),
    [
        ("grouped_product", ((4, 3), (2,), (2, 5, 4)), "f4 i4 f4", "must have shapes .rows, fea"),
        ("grouped_product", ((4, 3), (3,), (2, 5, 3)), "f4 i4 f4", "Check the order of the axes"),
        ("grouped_product", ((3,), (2,), (2, 5, 3)), "f4 i4 f4", "Check the order of the axes"),
        ("grouped_product", ((4, 3), (2,), (2, 5, 3)), "f4 i4 f2", "must both be float32 or bfl"),
        ("grouped_product", ((4, 3), (2,), (2, 5, 3)), "f4 i2 f4", "`sizes` must be int32"),
        ("grouped_outer", ((4, 3), (5, 3), (2,)), "f4 f4 i4", "must have shapes .rows, outputs"),
        ("grouped_outer", ((4, 3), (4, 3), (2, 1)), "f4 f4 i4", "must have shapes .rows, outputs"),
        ("grouped_outer", ((4, 3), (4, 3), (2,)), "f2 f2 i4", "must both be float32 or bfloat16"),
        ("grouped_outer", ((4, 3), (4, 3), (2,)), "f4 f4 u4", "`sizes` must be int32"),
    ],
)
def test_invalid_arguments_raise(name: str, shapes: Any, dtypes: str, message: str):
    function = getattr(importlib.import_module("mamba_eqx_native"), name)
    function = partial(function, axis=2) if name == "grouped_product" else function
    pairs = zip(shapes, dtypes.split(), strict=True)
    with pytest.raises(ValueError, match=message):
        function(*(jnp.zeros(shape, dtype) for shape, dtype in pairs))


@installed
def test_the_library_itself_checks_its_arguments():
    importlib.import_module("mamba_eqx_native")
    floats = lambda *shape: jnp.zeros(shape, jnp.float32)
    sizes = jnp.zeros(2, jnp.int32)
    products = [
        (floats(4, 3), sizes, floats(2, 5, 4)),
        (floats(4, 3), sizes, floats(3, 5, 3)),
        (floats(4, 3), sizes, floats(2, 6, 3)),
        (floats(5, 3), sizes, floats(2, 5, 3)),
        (floats(4, 3), sizes, floats(2, 5, 3).astype(jnp.bfloat16)),
        (floats(4, 3), sizes[None], floats(2, 5, 3)),
        (floats(4, 3).astype(jnp.float16), sizes, floats(2, 5, 3).astype(jnp.float16)),
    ]
    outers = [
        (floats(4, 5), floats(3, 3), sizes),
        (floats(4, 5), floats(4, 3), sizes[:1]),
        (floats(4, 3), floats(4, 3), sizes),
        (floats(4, 5), floats(4, 3).astype(jnp.bfloat16), sizes),
    ]
    product = jax.ffi.ffi_call(
        "mamba_eqx_native_grouped_product", jax.ShapeDtypeStruct((4, 5), jnp.float32)
    )
    outer = jax.ffi.ffi_call(
        "mamba_eqx_native_grouped_outer", jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)
    )
    with_axis = lambda *args, axis=2: product(*args, axis=np.int64(axis))
    with_axis(floats(4, 3), sizes, floats(2, 5, 3))
    outer(floats(4, 5), floats(4, 3), sizes)
    for call, cases in ((with_axis, products), (outer, outers)):
        for case in cases:
            with pytest.raises(Exception, match="do not fit together"):
                jax.block_until_ready(call(*case))
    with pytest.raises(Exception, match="do not fit together"):
        jax.block_until_ready(with_axis(floats(4, 3), sizes, floats(2, 5, 3), axis=0))


@pytest.fixture
def fresh_search() -> Iterator[None]:
    """Looks for the package again, now and after the test."""
    _native._found.cache_clear()
    jax.clear_caches()
    yield
    _native._found.cache_clear()
    jax.clear_caches()


def test_turned_off(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAMBA_EQX_NATIVE", "0")
    assert calls(grouped_product, *arguments([3, 2], 0, 4, 5)) == 0


def test_runs_in_jax_with_an_older_version(fresh_search: None, monkeypatch: pytest.MonkeyPatch):
    """Version 0.2.0 of the package had no such products."""
    old = types.ModuleType("mamba_eqx_native")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys.__spec__)
    monkeypatch.setattr(importlib, "import_module", lambda name: old)
    assert calls(grouped_product, *arguments([3, 2], 0, 4, 5)) == 0
