"""`grouped_product` beside a sum over gathered weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from mamba_eqx.ops import (
    _grouped_blocks as blocks,
    _grouped_product as module,
    grouped_product,
)
from tests.support.ops import assert_close


pytestmark = pytest.mark.usefixtures("compile_fast")


def dense(x: Any, sizes: Any, weight: Any) -> jax.Array:
    group = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    return jnp.einsum("ni,noi->no", x, weight[group])


def arguments(sizes: Any, out: int = 5, features: int = 3, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes, np.int32)
    rows = sizes.sum(axis=-1).flat[0]
    x = rng.standard_normal((*sizes.shape[:-1], rows, features))
    weight = rng.standard_normal((sizes.shape[-1], out, features))
    return jnp.asarray(x), jnp.asarray(sizes), jnp.asarray(weight)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Splits the tests' small weights into parts, and their groups into blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_PART_BYTES", 64)
        patch.setattr(blocks, "_HEIGHTS", (1, 2, 4))
        jax.clear_caches()
        yield
    jax.clear_caches()


def gradients(product: Any, x: Any, sizes: Any, weight: Any) -> Any:
    def loss(x: Any, weight: Any) -> jax.Array:
        return jnp.sum(jnp.sin(product(x, sizes, weight)))

    return jax.grad(loss, (0, 1))(x, weight)


@partial(jax.jit, static_argnums=0)
def derivatives(product: Any, x: Any, sizes: Any, weight: Any) -> Any:
    """Returns the values, their directional derivatives, and the gradients."""
    tangents = x[::-1] + 1, weight[::-1] - 1
    forward = jax.jvp(lambda x, w: product(x, sizes, w), (x, weight), tangents)
    return forward, gradients(product, x, sizes, weight)


# With one number of rows and of groups, everything is compiled once.
CASES = ([3, 0, 5, 3], [0, 0, 0, 11], [11, 0, 0, 0], [1, 1, 1, 8], [2, 9, 0, 0])


@pytest.mark.parametrize("sizes", CASES)
def test_matches_gathered_weights(sizes: list[int]):
    with jax.enable_x64(True):
        case = arguments(sizes)
        assert_close(derivatives(grouped_product, *case), derivatives(dense, *case))


@pytest.mark.slow
@given(cuts=st.tuples(*[st.integers(0, 11)] * 3), seed=st.integers(0, 9))
def test_matches_for_any_sizes(cuts: tuple[int, ...], seed: int):
    with jax.enable_x64(True):
        case = arguments(np.diff([0, *sorted(cuts), 11]), seed=seed)
        assert_close(derivatives(grouped_product, *case), derivatives(dense, *case))


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0)])
def test_empty_arrays(shape: tuple[int, int, int]):
    rows, features, out = shape
    x, sizes = jnp.ones((rows, features)), jnp.array([0, rows], jnp.int32)
    weight = jnp.ones((2, out, features))
    y = grouped_product(x, sizes, weight)
    assert y.shape == (rows, out)
    assert not np.any(y)
    grads = gradients(grouped_product, x, sizes, weight)
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]


@pytest.mark.slow
def test_second_derivatives_match():
    """Derivatives of the outer products, which are the derivatives by the weights, are right."""
    with jax.enable_x64(True):
        x, sizes, weight = arguments([3, 0, 5, 1])

        def second(product: Any, outer: Any, inner: Any) -> Any:
            def loss(args: Any) -> jax.Array:
                return jnp.sum(jnp.sin(product(args[0], sizes, args[1])))

            def size(args: Any) -> jax.Array:
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(inner(loss)(args)))  # pyright: ignore

            return outer(size)((x, weight))

        for outer in (jax.grad, jax.jacfwd):
            assert_close(second(grouped_product, outer, jax.grad), second(dense, outer, jax.grad))


BATCHED = [(0, 0, None), (1, 0, None), (0, None, None), (None, None, 0), (0, 0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("axes", BATCHED)
def test_vmap(axes: tuple[int | None, ...]):
    """The batched product and its gradients, taken inside or outside of `vmap`, are right."""
    with jax.enable_x64(True):
        x, sizes, weight = arguments([[3, 0, 5, 1], [0, 9, 0, 0], [2, 2, 2, 3]])
        x = x[0] if axes[0] is None else jnp.moveaxis(x, 0, axes[0])
        sizes = sizes[0] if axes[1] is None else sizes
        weight = weight if axes[2] is None else jnp.stack([weight, 2 * weight, -weight])
        for run in (
            lambda f: jax.vmap(f, axes)(x, sizes, weight),
            lambda f: gradients(jax.vmap(f, axes), x, sizes, weight),
            lambda f: jax.vmap(lambda *a: gradients(f, *a), axes)(x, sizes, weight),
        ):
            assert_close(run(grouped_product), run(dense))


def test_vmap_reads_shared_weights_once():
    """A batch is one product, and the gradient by the weights is summed within it."""
    x, sizes, weight = arguments([[3, 0, 5, 1], [0, 9, 0, 0]])
    batched = jax.vmap(grouped_product, (0, 0, None))
    jaxpr = str(jax.make_jaxpr(lambda w: gradients(batched, x, sizes, w)[1])(weight))
    assert jaxpr.count("mamba_eqx_grouped_outer") == 1
    assert "f32[18,5]" in jaxpr
    assert "f32[2,4," not in jaxpr


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("axes", [(0, 0, None), (0, 0, 0)])
def test_vmap_of_empty_arrays(shape: tuple[int, int], axes: tuple[int | None, ...]):
    batch, rows = shape
    x, sizes = jnp.ones((batch, rows, 4)), jnp.zeros((batch, 3), jnp.int32).at[:, 1].set(rows)
    weight = jnp.ones((3, 5, 4) if axes[2] is None else (batch, 3, 5, 4))
    batched = jax.vmap(grouped_product, axes)
    assert batched(x, sizes, weight).shape == (batch, rows, 5)
    grads = gradients(batched, x, sizes, weight)
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]


def test_shard_map_sums_gradients_of_shared_weights():
    """On one device, where the sum over devices is visible in the program only."""
    x, sizes, weight = arguments([[3, 0, 5, 1], [0, 9, 0, 0]])

    def run(product: Any, x: Any, sizes: Any, weight: Any) -> Any:
        return gradients(jax.vmap(product, (0, 0, None)), x, sizes, weight)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows, shared = P("data"), P()
    sharded = jax.shard_map(
        partial(run, grouped_product),
        mesh=mesh,
        in_specs=(rows, rows, shared),
        out_specs=(rows, shared),
    )
    assert_close(jax.jit(sharded)(x, sizes, weight), run(dense, x, sizes, weight), rtol=1e-5)
    assert "psum" in str(jax.make_jaxpr(sharded)(x, sizes, weight))


@pytest.mark.parametrize("sizes", [[[3, 2], [1, 0]], [[7, 1], [3, 9]]])
@pytest.mark.parametrize("axes", [(0, 0, None), (0, 0, 0)])
def test_any_sum_of_sizes(sizes: list[list[int]], axes: tuple[int | None, ...]):
    """Rows after the last group give zeros, and groups end with the last row, in values and
    gradients and in every example of a batch."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((2, 6, 3)))
        weight = jnp.asarray(rng.standard_normal((2, 5, 3)))
        weights = weight if axes[2] is None else jnp.stack([weight, -2 * weight])

        def padded(x: Any, sizes: Any, weight: Any) -> jax.Array:
            ends = jnp.minimum(jnp.cumsum(sizes), 6)
            group = jnp.searchsorted(ends, jnp.arange(6, dtype=ends.dtype), side="right")
            padded_weight = jnp.concatenate([weight, jnp.zeros((1, 5, 3))])
            return jnp.einsum("ni,noi->no", x, padded_weight[group])

        sizes_array = jnp.asarray(sizes, jnp.int32)
        for run in (
            lambda f: jax.vmap(f, axes)(x, sizes_array, weights),
            lambda f: gradients(jax.vmap(f, axes), x, sizes_array, weights),
            lambda f: [f(x[i], sizes_array[i], weight) for i in range(2)],
        ):
            assert_close(run(grouped_product), run(padded))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_wide(dtype: str):
    """Sums of 4096 ones stop growing at 256 in bfloat16."""
    x, sizes = jnp.ones((3, 4096), dtype), jnp.array([2, 1], jnp.int32)
    weight = jnp.ones((2, 2, 4096), dtype)
    y = grouped_product(x, sizes, weight)
    assert y.dtype == dtype
    assert np.all(y == 4096)
    rows, total = jnp.ones((4096, 1), dtype), jnp.array([4096], jnp.int32)
    grad = jax.grad(lambda w: jnp.sum(grouped_product(rows, total, w)).astype(jnp.float32))
    assert np.all(grad(jnp.ones((1, 1, 1), dtype)) == 4096)


def test_weights_of_16_bits_are_read_in_parts():
    """XLA's CPU backend would otherwise widen all of them before the loops."""
    for dtype in ("bfloat16", "float16"):
        x, sizes, weight = (jnp.asarray(t, dtype) for t in arguments([3, 0, 5, 3], 8, 6))
        sizes = sizes.astype(jnp.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "native_grouped", lambda: None)
            program = jax.jit(lambda *args: grouped_product(*args)).lower(x, sizes, weight)
        assert "f32[4,8,6]" not in (program.compile().as_text() or "")


def test_rows_of_other_groups_do_not_spread_nan():
    """Blocks reach into other groups, whose NaN must reach neither values nor gradients."""
    x, sizes, weight = arguments([3, 2, 5])
    x = x.at[3].set(jnp.nan)
    y = grouped_product(x, sizes, weight)
    assert np.isfinite(np.delete(y, 3, 0)).all()
    _, grad = gradients(grouped_product, x, sizes, weight)
    assert np.isfinite(grad[0]).all()
    assert np.isfinite(grad[2]).all()
    assert np.isnan(grad[1]).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str):
    """The function and its gradients are `ragged_dot` there."""
    x, sizes, weight = arguments([3, 0, 5, 1])
    for function, count in ((grouped_product, 1), (lambda *a: gradients(grouped_product, *a), 3)):
        exported = export.export(jax.jit(function), platforms=[platform])(x, sizes, weight)
        assert exported.mlir_module().count("chlo.ragged_dot") >= count


@pytest.mark.usefixtures("as_users_run")
def test_wrong_shapes_are_refused():
    x, sizes, weight = arguments([3, 0, 5, 1])
    with pytest.raises(ValueError, match=r"`weight` must have shape \(groups, out_features, in"):
        grouped_product(x, sizes, weight.swapaxes(1, 2))
    for wrong in ((x[0], sizes, weight), (x, sizes[:3], weight), (x, sizes, weight[0])):
        with pytest.raises(ValueError, match="as many groups as `group_sizes`"):
            grouped_product(*wrong)
