"""`narrow_product` beside products in float64, and the form of the compiled products."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

import mamba_eqx as mbx
from mamba_eqx.ops import _narrow_product as module, narrow_product


EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""The largest relative error of rounding, times two."""


@pytest.fixture(params=[False, True], ids=["wide", "narrow"])
def form(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Chooses the products of a processor with or without instructions for bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiplies_bfloat16", lambda: request.param)
        patch.setattr(module, "_FEW_ROWS", 0)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


@pytest.fixture
def narrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiplies_bfloat16", lambda: True)
        jax.clear_caches()
        yield
    jax.clear_caches()


def dense(x: Any, weight: Any, *, dtype: Any = None) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight)


def loss(product: Any, x: Any, weight: Any) -> jax.Array:
    y = product(x, weight)
    return jnp.sum(jnp.sin(y.astype(jnp.float64 if y.dtype == jnp.float64 else jnp.float32)))


def every_mode(product: Any, x: Any, weight: Any) -> Any:
    """Returns values, directional derivatives, gradients and second derivatives."""
    gradient = jax.grad(partial(loss, product), (0, 1))
    tangents = x[::-1], weight[::-1]
    return (
        jax.jvp(product, (x, weight), tangents),
        gradient(x, weight),
        jax.jvp(gradient, (x, weight), tangents),
        jax.vjp(gradient, x, weight)[1](tangents),
    )


def every_batch(product: Any, x: Any, weight: Any) -> Any:
    """Returns values and gradients of batches, of each factor and of both."""
    xs, weights = jnp.stack([x, x[::-1]], -1), jnp.stack([weight, weight[::-1]], 1)
    found = []
    for axes in ((-1, None), (None, 1), (-1, 1)):
        case = (xs if axes[0] else x, weights if axes[1] else weight)
        batched = jax.vmap(product, axes)
        found += [batched(*case), jax.grad(partial(loss, batched), (0, 1))(*case)]
        found += [jax.vmap(jax.grad(partial(loss, product), (0, 1)), axes)(*case)]
    return found


def factors(*batch: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((*batch, 8)), rng.standard_normal((9, 8))
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


@pytest.mark.parametrize("run", [every_mode, every_batch])
@pytest.mark.parametrize("result", [None, "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [(), (7,), (3, 2)], ids=str)
def test_matches_float64(
    batch: tuple[int, ...], dtype: str, result: str | None, run: Callable[..., Any], form: bool
):
    x, weight = factors(*batch, dtype=dtype)
    product = partial(narrow_product, dtype=result)
    got = jax.jit(partial(run, product))(x, weight)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(x, np.float64)), jnp.asarray(np.asarray(weight, np.float64))
        want = jax.jit(partial(run, dense))(*wide)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype in (dtype, result or dtype)
        # Each derivative rounds the results of the one before, and `sin` makes more of errors.
        bound = 16 * EPS[dtype] * max(1, np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_wide(dtype: str, form: bool):
    """Sums of 4096 ones stop growing at 256 in bfloat16."""
    ones = partial(jnp.ones, dtype=dtype)
    assert np.all(narrow_product(ones((3, 4096)), ones((2, 4096))) == 4096)
    pull = jax.vjp(narrow_product, ones((4096, 3)), ones((2, 3)))[1]
    assert np.all(pull(ones((4096, 2)))[1] == 4096)
    pull = jax.vjp(narrow_product, ones((3, 2)), ones((4096, 2)))[1]
    assert np.all(pull(ones((3, 4096)))[0] == 4096)


def test_rounds_as_conversions_do():
    """All upper halves of float32, with lower halves around the ties: also infinities and NaN."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    y = jnp.asarray((upper | lower).view(np.float32))
    got, want = module._to_bfloat16(y), y.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    bits = partial(np.asarray, dtype=np.float32)
    np.testing.assert_array_equal(bits(got), bits(want))
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(bits(got)[finite]), np.signbit(bits(want)[finite]))


def test_float16_keeps_small_cotangents_of_float32_results(form: bool):
    """The gradient of a mean over many logits is less than the least number of float16."""
    x, weight = factors(7, dtype="float16")
    pull = jax.vjp(partial(narrow_product, dtype="float32"), x, weight)[1]
    small = pull(jnp.full((7, 9), 2.0**-28))[1]
    assert np.any(small == 0)
    large = pull(jnp.full((7, 9), 2.0**-22))[1]
    assert np.all(large != 0)


def test_vmap_reads_shared_weights_once():
    """A batch is one product, and the gradient of the weight is summed within it."""
    x, weight = factors(2, 7, dtype="bfloat16")
    batched = jax.vmap(narrow_product, (0, None))
    jaxpr = str(jax.make_jaxpr(jax.grad(partial(loss, batched), 1))(x, weight))
    assert jaxpr.count("mamba_eqx_narrow_product") == 2
    assert "bf16[2,9,8]" not in jaxpr


def test_shard_map_sums_gradients_of_shared_weights(form: bool):
    x, weight = factors(4, 3, dtype="bfloat16")
    gradient = jax.grad(partial(loss, jax.vmap(narrow_product, (0, None))), (0, 1))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = P("data"), P()
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs)
    for got, want in zip(jax.jit(sharded)(x, weight), jax.jit(gradient)(x, weight), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert "psum" in str(jax.make_jaxpr(sharded)(x, weight))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float16")])
def test_other_dtypes_are_refused(dtypes: tuple[str, str]):
    x, weight = (t.astype(d) for t, d in zip(factors(2, dtype="float16"), dtypes, strict=True))
    with pytest.raises(ValueError, match="must both be bfloat16 or float16"):
        narrow_product(x, weight)
    with pytest.raises(ValueError, match="but got float16, float16 and bfloat16"):
        narrow_product(*factors(2, dtype="float16"), dtype="bfloat16")


# --- The form of the products ---

BLOCKS = {
    "mamba1": mbx.BlockConfig(mbx.Mamba1Config(d_model=32, dt_rank=8)),
    "hybrid": mbx.BlockConfig(
        mbx.Mamba2Config(d_model=32, headdim=16),
        mlp=mbx.GatedMLPConfig(d_intermediate=48),
    ),
}


def model_loss(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(jax.vmap(model)(tokens)))


def model_and_tokens(kind: str, dtype: str) -> tuple[mbx.LanguageModel, jax.Array]:
    config = mbx.LanguageModelConfig(64, (BLOCKS[kind],))
    model = config.build(dtype=jnp.dtype(dtype), key=jr.key(0))
    return model, jnp.zeros((2, 48), jnp.int32)


def lowered(run: Callable[..., Any], model: mbx.LanguageModel, *args: Any) -> Any:
    arrays, static = eqx.partition(model, eqx.is_array)
    return jax.jit(lambda arrays, *args: run(eqx.combine(arrays, static), *args)).lower(
        arrays, *args
    )


PRODUCT = re.compile(r"(%\S+) = stablehlo.dot_general .* : \((.*), (.*)\) -> (.*)")
FAST = re.compile(r"dot_general.*: \(tensor<\S*xbf16>, tensor<\S*xbf16>\) -> tensor<\S*xf32>")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", BLOCKS)
def test_products_of_bfloat16_models_have_the_fast_form(kind: str):
    """In the program that XLA is given, and in that which XLA makes of it.

    XLA chooses the form for any processor, also for one that has to run it in float32.
    """
    model, tokens = model_and_tokens(kind, "bfloat16")
    weights = 5  # four of the layer and one of the head
    for run, passes in ((model_loss, 1), (eqx.filter_grad(model_loss), 3)):
        program = lowered(run, model, tokens)
        count = 0
        for function in program.as_text().split("func.func")[1:]:
            for line in function.splitlines():
                product = PRODUCT.search(line)
                if product is None or "bf16" not in line:
                    continue
                count += 1
                assert FAST.search(line), line
                name = re.escape(product[1])
                assert not re.search(rf"stablehlo.convert {name} .*bf16>", function), line
        assert count == passes * weights
        compiled = program.compile().as_text()
        operands = [
            [re.search(rf"{re.escape(name)} = (\w+)", compiled)[1] for name in pair]  # pyright: ignore
            for pair in re.findall(r" = f32\S* dot\((%\S+), (%\S+)\)", compiled)
        ]
        assert operands.count(["bf16", "bf16"]) == passes * weights


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerators_are_given_plain_products(dtype: str):
    """There, as for float32 on any platform, the result has the dtype that was asked for."""
    layer = mbx.layers.Linear(8, 9, dtype=jnp.dtype(dtype), key=jr.key(0))
    x = jnp.ones((7, 8), dtype)
    for platform in ("cuda", "tpu"):
        gradient = jax.jit(lambda x: jnp.sum(layer(x) ** 2))
        text = export.export(gradient, platforms=[platform])(x).mlir_module()
        short = "bf16" if dtype == "bfloat16" else "f32"
        assert f"-> tensor<7x9x{short}>" in next(
            line for line in text.splitlines() if "dot_general" in line
        )
        assert "bitcast_convert" not in text


@pytest.mark.usefixtures("as_users_run")
def test_a_symbolic_number_of_rows_can_be_exported(form: bool):
    x, weight = factors(7, dtype="bfloat16")
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape("rows"), 8), x.dtype)
    exported = export.export(jax.jit(narrow_product), platforms=["cpu"])(shape, weight)
    got, want = (np.asarray(t, np.float64) for t in (exported.call(x, weight), dense(x, weight)))
    np.testing.assert_allclose(got, want, atol=16 * EPS["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_products_are_those_of_jax(dtype: str):
    """Programs in float32 and float64 are the same as with `jax.numpy.matmul` alone."""
    with jax.enable_x64(dtype == "float64"):
        layer = mbx.layers.Linear(8, 9, use_bias=False, dtype=jnp.dtype(dtype), key=jr.key(0))
        x = jnp.ones((7, 8), dtype)

        def run(x: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(eqx.tree_at(lambda at: at.weight, layer, weight)(x)))

        def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(jnp.matmul(x, weight.T)))

        plain.__name__ = "run"
        texts = (
            jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, layer.weight).as_text()
            for f in (run, plain)
        )
        assert next(texts) == next(texts)
