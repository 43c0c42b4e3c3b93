"""`quantized_product` beside products of the expanded weight in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_eqx import ops
from mamba_eqx.ops import _quantized_product as module


pytestmark = pytest.mark.usefixtures("compile_fast")


def random_weight(rows: int = 7, columns: int = 192, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def expanded(weight: Any, scale: Any) -> np.ndarray:
    """Expands a weight in float64, one group after another."""
    weight, scale = np.asarray(weight), np.asarray(scale, np.float64)
    rows, groups = scale.shape
    out = []
    for row, scales in zip(weight.reshape(rows, groups, -1), scale, strict=True):
        for packed, one in zip(row, scales, strict=True):
            if packed.dtype == np.int8:
                integers = packed.astype(np.int64)
            else:
                integers = np.concatenate([packed % 16, packed // 16]).astype(np.int64) - 8
            out.append(one * integers)
    return np.reshape(out, (rows, -1))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Splits the rows of the tests' weights into several blocks and a rest."""
    monkeypatch.setattr(module, "_VECTOR_BLOCK", 2 * 192 * 4)
    monkeypatch.setattr(module, "_MATRIX_BLOCK", 3 * 192 * 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("bits", [8, 4])
def test_products_match_float64(bits: int, small_blocks: None):
    """One vector, several, a batch of each, and none."""
    weight, scale = ops.quantize_weight(jnp.asarray(random_weight()), bits=bits, group=64)
    want, rng = expanded(weight, scale), np.random.default_rng(1)
    np.testing.assert_allclose(ops.dequantize_weight(weight, scale), want, rtol=1e-6)
    product = lambda x: ops.quantized_product(x, weight, scale)
    for shape in [(192,), (5, 192), (2, 3, 192), (0, 192)]:
        x = rng.standard_normal(shape).astype(np.float32)
        exact = x.astype(np.float64) @ want.T
        np.testing.assert_allclose(product(jnp.asarray(x)), exact, atol=2e-5)
        if len(shape) > 1 and shape[0]:
            np.testing.assert_allclose(jax.vmap(product)(jnp.asarray(x)), exact, atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_derivatives(bits: int, small_blocks: None):
    """Both modes, for the input and for the scales."""
    with jax.enable_x64(True):
        weight, scale = ops.quantize_weight(
            jnp.asarray(random_weight(), "float64"), bits=bits, group=32
        )
        rng = np.random.default_rng(1)
        for shape in [(192,), (4, 192)]:
            x, dx = jnp.asarray(rng.standard_normal((2, *shape)))

            def got(x: Any, scale: Any) -> Any:
                return jnp.sin(ops.quantized_product(x, weight, scale))

            def want(x: Any, scale: Any) -> Any:
                return jnp.sin(x @ ops.dequantize_weight(weight, scale).T)

            for derivative in (
                lambda f: jax.grad(lambda *a: f(*a).sum(), (0, 1))(x, scale),  # noqa: B023
                lambda f: jax.jvp(f, (x, scale), (dx, scale + 1)),  # noqa: B023
            ):
                for a, b in zip(*map(jax.tree.leaves, map(derivative, (got, want))), strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-11)


def test_a_batch_expands_the_weight_once():
    weight, scale = ops.quantize_weight(jnp.asarray(random_weight()), bits=4, group=64)
    batched = jax.vmap(partial(ops.quantized_product, weight=weight, scale=scale))
    for equation in str(jax.make_jaxpr(batched)(jnp.zeros((11, 192)))).splitlines():
        if "convert_element_type" in equation:
            assert "11" not in equation.split("=")[0], equation


@pytest.mark.parametrize(("bits", "share"), [(8, 1), (4, 0.9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding(bits: int, share: float, dtype: str):
    """Every value is off by at most half a step, but for outliers of 4 bits, which are cut off."""
    weight = random_weight(40)
    weight[3, :64] = 0
    got = ops.quantize_weight(jnp.asarray(weight), bits=bits, group=64, dtype=dtype)
    assert got.scale.dtype == dtype
    step = np.abs(np.asarray(got.scale, np.float64)).repeat(64, axis=1)
    error = np.abs(expanded(*got) - weight)
    assert np.mean(error <= 0.51 * step) >= share
    assert not np.any(expanded(*got)[3, :64])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("largest", [0.01, 1e-3, 1e-4, 1e-5, 3e-6, 3e-7, 2**-24])
def test_small_weights_in_float16(bits: int, largest: float):
    """Their scales are subnormal, but no value is lost or cut off."""
    weight = random_weight(40).reshape(-1, 64)
    weight = weight * (largest / np.abs(weight).max(1, keepdims=True))
    weight = weight.reshape(40, -1).astype(np.float16)
    assert np.all(np.abs(weight).reshape(-1, 64).max(1) > 0)
    got = ops.quantize_weight(jnp.asarray(weight), bits=bits, group=64)
    assert got.scale.dtype == jnp.float16
    step = np.abs(np.asarray(got.scale, np.float64))
    assert np.all(step <= max(1.1 * largest / (127 if bits == 8 else 6), 2**-23))
    off = np.abs(expanded(*got) - weight)
    if bits == 8:
        assert np.all(off <= 0.51 * step.repeat(64, axis=1))
    assert np.sqrt(np.mean(off**2)) <= max(0.12 * np.std(weight.astype(np.float64)), 2.0**-26)


def test_the_search_of_scales_beats_the_largest_value():
    weight = random_weight(100)
    found = ops.quantize_weight(jnp.asarray(weight), bits=4, group=64)
    groups = weight.reshape(100, 3, 64)
    step = np.abs(groups).max(-1, keepdims=True) / 7
    plain = (np.round(groups / step) * step).reshape(weight.shape)
    error = lambda other: np.square(other - weight).mean()
    assert error(expanded(*found)) < 0.75 * error(plain)


def test_stacked_weights():
    weight = np.stack([random_weight(seed=seed) for seed in range(3)])
    stacked = ops.quantize_weight(jnp.asarray(weight), bits=4, group=32)
    for i in range(3):
        one = ops.quantize_weight(jnp.asarray(weight[i]), bits=4, group=32)
        np.testing.assert_array_equal(stacked.weight[i], one.weight)
        np.testing.assert_array_equal(stacked.scale[i], one.scale)


def test_dtypes():
    weight, scale = ops.quantize_weight(jnp.asarray(random_weight()), bits=8, group=32)
    x = jnp.ones((2, 192), jnp.bfloat16)
    assert ops.quantized_product(x, weight, scale).dtype == jnp.bfloat16
    wide = ops.quantized_product(x, weight, scale, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expanded(weight, scale).sum(-1)[None].repeat(2, 0), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "`bits` must be 8 or 4, but got bits=5"),
        ({"bits": 8.0}, r"`bits` must be 8 or 4, but got bits=8\.0"),
        ({"group": 24}, "multiple of 32 that divides in_features, but got group=24"),
        ({"group": 128}, "got group=128 and in_features=192"),
        ({"group": 0}, "got group=0"),
        ({"weight": jnp.zeros((2, 64), jnp.int8)}, "is int8. A weight can be quantised only once"),
    ],
)
def test_invalid_quantization_raises(change: dict[str, Any], message: str, as_users_run: Any):
    options = {"weight": jnp.zeros((2, 192)), "bits": 8, "group": 32} | change
    with pytest.raises(ValueError, match=message):
        ops.quantize_weight(options.pop("weight"), **options)


@pytest.mark.parametrize(
    ("x", "weight", "scale", "message"),
    [
        ((64,), ((3, 64), "float32"), (3, 2), "must be int8 .* but got float32"),
        ((64,), ((3, 64), "int8"), (3, 3), r"multiple of 32 inputs, but got shapes \(3, 64\)"),
        ((64,), ((3, 32), "uint8"), (2, 2), r"one row for each output.*\(2, 2\)"),
        ((64,), ((3, 64), "uint8"), (3, 2), r"the 128 inputs of `weight`, but got shape \(64,\)"),
        ((), ((3, 64), "int8"), (3, 2), r"but got shape \(\)"),
    ],
)
def test_invalid_products_raise(x: Any, weight: Any, scale: Any, message: str, as_users_run: Any):
    with pytest.raises(ValueError, match=message):
        ops.quantized_product(jnp.zeros(x), jnp.zeros(*weight), jnp.zeros(scale))


@pytest.mark.parametrize("name", ["x", "scale"])
def test_integers_are_refused(name: str, as_users_run: Any):
    """A result in the dtype of an integer `x` would be rounded to integers."""
    weight = ops.quantize_weight(jnp.asarray(random_weight()), bits=8, group=32)
    arguments = {"x": jnp.ones(192), "weight": weight.weight, "scale": weight.scale}
    arguments[name] = arguments[name].astype(jnp.int32)
    with pytest.raises(ValueError, match=f"`{name}` must be floating-point, but got int32"):
        ops.quantized_product(**arguments)
