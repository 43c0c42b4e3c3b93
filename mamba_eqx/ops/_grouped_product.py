"""Products of rows with the weight of their group, and the transposes of these products."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, Integer

from .._dtypes import at_least_float32


# Without this `jax.jit`, every call outside a compiled function would compile the loops again.
@jax.jit
@jax.named_scope("mamba_eqx.ops.grouped_product")
def grouped_product(
    x: Float[Array, "rows in_features"],
    group_sizes: Integer[Array, " groups"],
    weight: Float[Array, "groups out_features in_features"],
) -> Float[Array, "rows out_features"]:
    r"""Multiplies every row by the weight of its group, as the experts of a mixture do,

    $$y_i = W_{g(i)}\, x_i.$$

    The rows are sorted by group: the first `group_sizes[0]` rows belong to group 0, the next
    `group_sizes[1]` rows to group 1. A group may be empty, and its weight is then not read.

    On a CPU, `jax.lax.ragged_dot` would multiply all rows by all weights. This function runs one
    product after another, each of some rows with a part of their weight that fits into the cache.
    On accelerators the function is `jax.lax.ragged_dot`. All of JAX's derivatives work, and cost
    as much as the derivatives of a matrix product with as many rows. Under `jax.vmap` with one
    weight for all examples, the rows of all examples are sorted and multiplied together.

    **Arguments:**

    - `x`: the rows, sorted by group, shape `(rows, in_features)`.
    - `group_sizes`: the number of rows of every group, shape `(groups,)`. The sum must be `rows`.
    - `weight`: the weight of every group, shape `(groups, out_features, in_features)`.

    **Returns:**

    The products, shape `(rows, out_features)`, in the common dtype of `x` and `weight`. The sums
    are computed in float32 (float64 if the dtype is).

    **Raises:** `ValueError` if the shapes of the arguments do not fit together.
    """
    groups, _, in_features = weight.shape
    if x.shape[1] != in_features or group_sizes.shape != (groups,):
        raise ValueError(
            "`weight` must have shape (groups, out_features, in_features), with as many groups as "
            f"`group_sizes` and as many in_features as `x`, but got {weight.shape}, "
            f"{group_sizes.shape} and {x.shape}. Check the order of the axes."
        )
    dtype = jnp.result_type(x, weight)
    x, weight = x.astype(dtype), weight.astype(dtype)
    return _product(x, group_sizes.astype(jnp.int32), weight, axis=2)


_Rows = Float[Array, "rows features"]
_Weight = Float[Array, "groups out_features in_features"]
_Sizes = Int[Array, " groups"]

# These are primitives of JAX because no other function of JAX has all of: forward mode, a transpose
# of its own, and a batching rule of its own. The product and the outer product are bilinear, and
# the transposes of each are the other and itself, so that derivatives of any order are defined.
_product_p = Primitive("mamba_eqx_grouped_product")
_outer_p = Primitive("mamba_eqx_grouped_outer")


@partial(jax.jit, static_argnames="axis")
def _product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Sums products of rows and weights over the rows' features and the weights' axis `axis`."""
    return _product_p.bind(x, sizes, weight, axis=axis)


@jax.jit
def _outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Sums the outer products of the rows of `a` and `b` over every group."""
    return _outer_p.bind(a, b, sizes)


class _Blocks(NamedTuple):
    """Consecutive rows of one group that are multiplied at once."""

    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    stop: Int[Array, " blocks"]


# A product has a static number of rows. The blocks have the least of these heights that holds their
# rows. The weight is packed once per block, which takes as long as a few dozen rows.
_HEIGHTS = (1, 8, 16, 32, 48, 64, 96, 128, 256)

# A part of a weight is copied before it is multiplied. The copy stays in the cache up to this size.
_SLICE_BYTES = 2**21 + 2**20


def _width(weight: _Weight, axis: int) -> int:
    """Returns the size of the slices of a weight along `axis`, a divisor of its size there."""
    size = weight.shape[axis]
    bytes_each = weight[0].size // max(size, 1) * weight.dtype.itemsize
    most = max(1, _SLICE_BYTES // max(bytes_each, 1))
    parts = -(-size // most)
    divisors = (d for d in range(parts, 2 * parts + 1) if size % d == 0)
    return size // next(divisors, 1) if size else 0


def _for_blocks(rows: int, sizes: _Sizes, slices: int, body, result: Array) -> Array:
    """Calls `body(height, start, stop, first, group, part, result)` for all blocks.

    **Arguments:**

    - `rows`: the number of rows.
    - `sizes`: the number of rows of every group.
    - `slices`: the number of parts of a weight. Each is visited by each block of its group.
    - `body`: a function of the (static) height of the block, `first` of `height` rows, the rows
        `start` to `stop` of these that belong to the block, its group, the part of the weight, and
        the result, which returns the next result.
    - `result`: the first result.
    """
    heights = [h for h in _HEIGHTS if h < rows] + [min(rows, _HEIGHTS[-1])]
    groups, most = sizes.shape[0], heights[-1]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    counts = -(-sizes // most)
    counts_ends = jnp.cumsum(counts, dtype=jnp.int32)
    # At most this many blocks are not empty: every group but the full blocks ends with one.
    index = jnp.arange(rows // most + min(groups, rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(counts_ends, index, side="right"), groups - 1)
    place = index - (counts_ends - counts)[group]
    start = (ends - sizes)[group] + place * most
    stop = jnp.minimum(ends[group], start + most)
    kind = jnp.searchsorted(jnp.array(heights, jnp.int32), stop - start)
    kind = jnp.where(index < counts_ends[-1], kind, len(heights))
    order = jnp.argsort(kind, stable=True)
    blocks = _Blocks(*(array[order].astype(jnp.int32) for array in (group, start, stop)))
    bounds = jnp.searchsorted(kind[order], jnp.arange(len(heights) + 1, dtype=kind.dtype))
    bounds = (bounds * slices).astype(jnp.int32)

    # One loop per height: within a `lax.switch`, XLA would copy the result for every block.
    for i, height in enumerate(heights):

        def run(step: Array, result: Array, height: int = height) -> Array:
            block, part = step // slices, step % slices
            start, stop = blocks.start[block], blocks.stop[block]
            first = jnp.minimum(start, rows - height)
            return body(height, start, stop, first, blocks.group[block], part, result)

        result = lax.fori_loop(bounds[i], bounds[i + 1], run, result)
    return result


def _blockwise_product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Computes `_product` on a CPU."""
    kept = 3 - axis
    rows, out_features = x.shape[0], weight.shape[kept]
    y = jnp.zeros((rows, out_features), x.dtype)
    if y.size == 0 or x.shape[1] == 0:
        return y
    width, wide = _width(weight, kept), at_least_float32(x)
    shape = (1, width, weight.shape[2]) if axis == 2 else (1, weight.shape[1], width)

    def body(
        height: int, start: Array, stop: Array, first: Array, group: Array, part: Array, y: Array
    ) -> Array:
        column = part * width
        zero = jnp.zeros_like(column)
        corner = (group, column, zero) if axis == 2 else (group, zero, column)
        w = lax.dynamic_slice(weight, corner, shape)[0]
        rows = lax.dynamic_slice_in_dim(x, first, height)
        if height == 1:
            # XLA's CPU backend would otherwise fuse the product with the code after it and no
            # longer call its fast routine.
            product = lax.dot_general(
                w, rows[0], (((axis - 1,), (0,)), ((), ())), preferred_element_type=wide
            )
            product = lax.optimization_barrier(product)[None]
        else:
            product = lax.dot_general(
                rows, w, (((1,), (axis - 1,)), ((), ())), preferred_element_type=wide
            )
        old = lax.dynamic_slice(y, (first, column), (height, width))
        own = _own(start, stop, first, height)
        return lax.dynamic_update_slice(
            y, jnp.where(own, product.astype(y.dtype), old), (first, column)
        )

    return _for_blocks(rows, sizes, out_features // width, body, y)


def _blockwise_outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Computes `_outer` on a CPU."""
    wide = at_least_float32(a)
    (rows, p), q = a.shape, b.shape[1]
    total = jnp.zeros((sizes.shape[0], p, q), wide)
    if total.size == 0 or rows == 0:
        return total.astype(a.dtype)
    width = _width(total, 1)

    def body(
        height: int, start: Array, stop: Array, first: Array, group: Array, part: Array, sum: Array
    ) -> Array:
        own = _own(start, stop, first, height)
        a_rows = lax.dynamic_slice(a, (first, part * width), (height, width))
        b_rows = lax.dynamic_slice_in_dim(b, first, height)
        # Both are masked, because zero times a non-finite row of another group is NaN.
        a_rows, b_rows = (jnp.where(own, rows, jnp.zeros_like(rows)) for rows in (a_rows, b_rows))
        outer = lax.dot_general(
            a_rows, b_rows, (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        corner = (group, part * width, jnp.zeros_like(part))
        old = lax.dynamic_slice(sum, corner, (1, width, q))
        return lax.dynamic_update_slice(sum, old + outer, corner)

    return _for_blocks(rows, sizes, p // width, body, total).astype(a.dtype)


def _own(start: Array, stop: Array, first: Array, height: int) -> Array:
    """Returns which of `height` rows from `first` on belong to the block, shape `(height, 1)`."""
    row = first + jnp.arange(height, dtype=jnp.int32)[:, None]
    return (row >= start) & (row < stop)


def _ragged_product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Computes `_product` on an accelerator."""
    numbers = lax.RaggedDotDimensionNumbers((((1,), (axis,)), ((), ())), (0,), (0,))
    wide = at_least_float32(x)
    y = lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=wide)
    return y.astype(x.dtype)


def _ragged_outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Computes `_outer` on an accelerator."""
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    wide = at_least_float32(a)
    y = lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=wide)
    return y.astype(a.dtype)


def _product_jvp(primals, tangents, *, axis):
    x, sizes, weight = primals
    x_dot, _, weight_dot = tangents
    y = _product(x, sizes, weight, axis=axis)
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(_product(x_dot, sizes, weight, axis=axis))
    if type(weight_dot) is not ad.Zero:
        terms.append(_product(x, sizes, weight_dot, axis=axis))
    return y, sum(terms[1:], *terms[:1])


def _product_transpose(y_bar, x, sizes, weight, *, axis):
    if type(y_bar) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(x):
        return _product(y_bar, sizes, weight, axis=3 - axis), None, None
    a, b = (y_bar, x) if axis == 2 else (x, y_bar)
    return None, None, _outer(a, b, sizes)


def _outer_jvp(primals, tangents):
    a, b, sizes = primals
    a_dot, b_dot, _ = tangents
    terms = []
    if type(a_dot) is not ad.Zero:
        terms.append(_outer(a_dot, b, sizes))
    if type(b_dot) is not ad.Zero:
        terms.append(_outer(a, b_dot, sizes))
    return _outer(a, b, sizes), sum(terms[1:], *terms[:1])


def _outer_transpose(y_bar, a, b, sizes):
    if type(y_bar) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(a):
        return _product(b, sizes, y_bar, axis=2), None, None
    return None, _product(a, sizes, y_bar, axis=1), None


def _product_batched(arguments, axes, *, axis):
    x, sizes, weight = arguments
    batch = _batch_size(arguments, axes)
    x, sizes = _batched(x, axes[0], batch), _batched(sizes, axes[1], batch)
    if axes[2] is None:
        # Rows of one group from all examples share the reading of its weight.
        order, merged = _merged(x.shape[1], sizes)
        y = _product(x.reshape(-1, x.shape[2])[order], merged, weight, axis=axis)
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    else:
        weight = _batched(weight, axes[2], batch)
        weight = weight.reshape(-1, *weight.shape[2:])
        y = _product(x.reshape(-1, x.shape[2]), sizes.reshape(-1), weight, axis=axis)
    return y.reshape(*x.shape[:2], -1), 0


def _outer_batched(arguments, axes):
    batch = _batch_size(arguments, axes)
    a, b, sizes = (_batched(array, axis, batch) for array, axis in zip(arguments, axes))
    y = _outer(a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2]), sizes.reshape(-1))
    return y.reshape(*sizes.shape, *y.shape[1:]), 0


def _merged(rows: int, sizes: Int[Array, "batch groups"]) -> tuple[Array, _Sizes]:
    """Returns the order that sorts the rows of all examples by group, and the groups' sizes."""
    ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)
    index = jnp.arange(rows, dtype=jnp.int32)
    group = jax.vmap(lambda ends: jnp.searchsorted(ends, index, side="right"))(ends)
    return jnp.argsort(group.reshape(-1), stable=True), jnp.sum(sizes, axis=0, dtype=jnp.int32)


def _batch_size(arguments, axes) -> int:
    return next(x.shape[axis] for x, axis in zip(arguments, axes) if axis is not None)


def _batched(x: Array, axis: int | None, batch: int) -> Array:
    """Returns `x` with the axis of the batch in front."""
    return jnp.broadcast_to(x, (batch, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


_product_p.def_impl(_product)
_product_p.def_abstract_eval(
    lambda x, sizes, weight, *, axis: jax.core.ShapedArray(
        (x.shape[0], weight.shape[3 - axis]), x.dtype
    )
)
ad.primitive_jvps[_product_p] = _product_jvp
ad.primitive_transposes[_product_p] = _product_transpose
batching.primitive_batchers[_product_p] = _product_batched
mlir.register_lowering(_product_p, mlir.lower_fun(_ragged_product, multiple_results=False))
mlir.register_lowering(
    _product_p, mlir.lower_fun(_blockwise_product, multiple_results=False), platform="cpu"
)

_outer_p.def_impl(_outer)
_outer_p.def_abstract_eval(
    lambda a, b, sizes: jax.core.ShapedArray((sizes.shape[0], a.shape[1], b.shape[1]), a.dtype)
)
ad.primitive_jvps[_outer_p] = _outer_jvp
ad.primitive_transposes[_outer_p] = _outer_transpose
batching.primitive_batchers[_outer_p] = _outer_batched
mlir.register_lowering(_outer_p, mlir.lower_fun(_ragged_outer, multiple_results=False))
mlir.register_lowering(
    _outer_p, mlir.lower_fun(_blockwise_outer, multiple_results=False), platform="cpu"
)
