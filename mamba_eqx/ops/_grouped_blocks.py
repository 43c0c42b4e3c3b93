"""Products of groups of rows in operations of JAX, block after block, for XLA's CPU backend."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._dtypes import at_least_float32
from .._trees import vary_together
from ._narrow_product import product_of_two


_Rows = Float[Array, "rows _"]
_Weight = Float[Array, "groups _ _"]
_Sizes = Int[Array, " groups"]

# A block of rows has the least of these heights that holds its rows. For every block, a weight is
# packed anew, which takes as long as the product with a few dozen rows.
_HEIGHTS = (1, 8, 16, 32, 48, 64, 96, 128, 256)

# A part of a weight is copied before it is multiplied. Up to about this size, the copy stays in the
# cache.
_PART_BYTES = 3 * 2**20


class _Block(NamedTuple):
    """Consecutive rows that are multiplied at once, of which some belong to the group."""

    rows: tuple[Array, int]
    """The first row, and their (static) number."""
    own: Bool[Array, "height 1"]
    """Which of the rows belong to the group."""
    group: Int[Array, ""]
    column: Int[Array, ""]
    """Where the part of the weight begins."""


def _for_blocks(
    rows: int,
    sizes: _Sizes,
    columns: int,
    width: int,
    body: Callable[[_Block, Array], Array],
    result: Array,
) -> Array:
    """Returns `result` after `result = body(block, result)` for all blocks.

    **Arguments:**

    - `rows`: the number of rows, at least 1.
    - `sizes`: the number of rows of every group.
    - `columns`, `width`: the size of the weights along an axis, and that of the parts into which
        they are cut. Every block is visited once for each part.
    - `body`: a function of a block and the result.
    - `result`: the initial result.
    """
    groups, parts = sizes.shape[0], columns // width
    # Every height is a loop to compile, so that there are only heights near the usual group's.
    mean = rows / groups
    heights = [h for h in _HEIGHTS if mean / 4 <= h <= min(rows, 2 * mean + 4)]
    heights = heights or [min(rows, _HEIGHTS[-1])]
    most = heights[-1]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    # Every group has blocks of `most` rows, and one block with the rest.
    counts = -(-sizes // most)
    last = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(rows // most + min(groups, rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), groups - 1)
    start = (ends - sizes)[group] + (index - (last - counts)[group]) * most
    stop = jnp.minimum(ends[group], start + most)
    kind = jnp.searchsorted(jnp.array(heights, jnp.int32), stop - start)
    kind = jnp.where(index < last[-1], kind, len(heights))
    order = jnp.argsort(kind, stable=True)
    start, stop, group = (array[order].astype(jnp.int32) for array in (start, stop, group))
    bounds = jnp.searchsorted(kind[order], jnp.arange(len(heights) + 1, dtype=kind.dtype))
    bounds = bounds.astype(jnp.int32) * parts

    def block(height: int, step: Array) -> _Block:
        i, part = step // parts, step % parts
        first = jnp.minimum(start[i], rows - height)
        row = first + jnp.arange(height, dtype=jnp.int32)[:, None]
        own = (row >= start[i]) & (row < stop[i])
        return _Block((first, height), own, group[i], part * width)

    # One loop per height: in the branches of a `lax.switch`, XLA would copy the whole result.
    for i, height in enumerate(heights):
        step = lambda step, result, height=height: body(block(height, step), result)
        result = lax.fori_loop(bounds[i], bounds[i + 1], step, result)
    return result


def _width(columns: int, bytes_each: int) -> int:
    """Returns the size of the parts of a weight: a divisor of `columns`."""
    parts = max(1, -(-columns * bytes_each // _PART_BYTES))
    return columns // next((n for n in range(parts, 2 * parts) if columns % n == 0), 1)


def blockwise_product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Sums products of rows and the weights of their groups over the rows' features and the
    weights' axis `axis`."""
    columns, features = weight.shape[3 - axis], weight.shape[axis]
    dtype, is_narrow = x.dtype, at_least_float32(x) != x.dtype
    x, weight = _as_bits(x), _as_bits(weight)
    _, y = vary_together((x, jnp.zeros((x.shape[0], columns), x.dtype)))
    if y.size == 0 or features == 0:
        return _from_bits(y, dtype)
    width = _width(columns, features * weight.dtype.itemsize)

    def product(rows: Array, w: Array) -> Array:
        if is_narrow:
            # A vector has its own, faster form.
            vectors = rows[0] if len(rows) == 1 else rows
            wanted = "y" if axis == 2 else "x"
            y = product_of_two(vectors, w, wanted=wanted, batch=0, dtype=dtype)
            return y.reshape(len(rows), width)
        if len(rows) == 1:
            y = lax.dot_general(w, rows[0], (((axis - 1,), (0,)), ((), ())))
            # XLA's CPU backend would otherwise fuse the product with the code after it and no
            # longer call its fast routine.
            return lax.optimization_barrier(y)[None]
        return lax.dot_general(rows, w, (((1,), (axis - 1,)), ((), ())))

    def body(block: _Block, y: Array) -> Array:
        (first, height), zero = block.rows, jnp.zeros_like(block.column)
        if axis == 2:
            corner, shape = (block.group, block.column, zero), (1, width, features)
        else:
            corner, shape = (block.group, zero, block.column), (1, features, width)
        w = _from_bits(lax.dynamic_slice(weight, corner, shape)[0], dtype)
        rows = _from_bits(lax.dynamic_slice_in_dim(x, first, height), dtype)
        corner = (first, block.column)
        old = lax.dynamic_slice(y, corner, (height, width))
        new = jnp.where(block.own, _as_bits(product(rows, w)), old)
        return lax.dynamic_update_slice(y, new, corner)

    return _from_bits(_for_blocks(x.shape[0], sizes, columns, width, body, y), dtype)


def blockwise_outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Sums the outer products of the rows of `a` and `b` over every group."""
    dtype, wide = a.dtype, at_least_float32(a)
    (rows, columns), features = a.shape, b.shape[1]
    _, y = vary_together((a, jnp.zeros((sizes.shape[0], columns, features), wide)))
    if y.size == 0 or rows == 0:
        return y.astype(dtype)
    width = _width(columns, features * wide.itemsize)
    a, b = _as_bits(a), _as_bits(b)

    def body(block: _Block, y: Array) -> Array:
        first, height = block.rows
        a_rows = lax.dynamic_slice(a, (first, block.column), (height, width))
        b_rows = lax.dynamic_slice_in_dim(b, first, height)
        # Both are masked, because zero times a non-finite row of another group is NaN.
        a_rows, b_rows = (
            _from_bits(jnp.where(block.own, t, jnp.zeros_like(t)), dtype) for t in (a_rows, b_rows)
        )
        if wide == dtype:
            new = lax.dot_general(a_rows, b_rows, (((0,), (0,)), ((), ())))
        else:
            new = product_of_two(a_rows, b_rows, wanted="weight", batch=0, dtype=wide)
        corner = (block.group, block.column, jnp.zeros_like(block.column))
        new = new + lax.dynamic_slice(y, corner, (1, width, features))
        return lax.dynamic_update_slice(y, new, corner)

    return _for_blocks(rows, sizes, columns, width, body, y).astype(dtype)


# XLA's CPU backend reads and writes parts of 16-bit floats in float32, and would widen whole
# weights before the loops, or the result in each step. It leaves integers alone.


def _as_bits(array: Array) -> Array:
    """Returns 16-bit floats as integers, and others as they are."""
    return array if array.dtype.itemsize != 2 else lax.bitcast_convert_type(array, jnp.uint16)


def _from_bits(array: Array, dtype: jnp.dtype) -> Array:
    """Returns the array of floats that `_as_bits` was called with."""
    return lax.bitcast_convert_type(array, dtype) if array.dtype == jnp.uint16 else array
