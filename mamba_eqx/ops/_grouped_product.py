"""Products of rows with the weight of their group, and the transposes of these products."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Int, Integer

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
    - `group_sizes`: the number of rows of every group, shape `(groups,)`. The sum must be `rows`,
        which is not checked.
    - `weight`: the weight of every group, shape `(groups, out_features, in_features)`.

    **Returns:**

    The products, shape `(rows, out_features)`, in the common dtype of `x` and `weight`. The sums
    are computed in float32 (float64 if the dtype is).

    **Raises:** `ValueError` if the shapes of the arguments do not fit together.
    """
    shapes = (*group_sizes.shape, *x.shape[1:])
    if x.ndim != 2 or weight.ndim != 3 or shapes != (weight.shape[0], weight.shape[2]):
        raise ValueError(
            "`weight` must have shape (groups, out_features, in_features), with as many groups as "
            f"`group_sizes` and as many in_features as `x`, but got {weight.shape}, "
            f"{group_sizes.shape} and {x.shape}. Check the order of the axes."
        )
    dtype = jnp.result_type(x, weight)
    x, weight = x.astype(dtype), weight.astype(dtype)
    return _product(x, group_sizes.astype(jnp.int32), weight, axis=2)


_Rows = Float[Array, "rows _"]
_Weight = Float[Array, "groups _ _"]
_Sizes = Int[Array, " groups"]
_Axis = int | None

# These are primitives of JAX because no function of JAX has all of forward mode, a transpose of its
# own, and a batching rule of its own. The product and the outer product are bilinear, and each is
# the transpose of both, so that derivatives of any order are defined.
_product_p = Primitive("mamba_eqx_grouped_product")
_outer_p = Primitive("mamba_eqx_grouped_outer")


@partial(jax.jit, static_argnames="axis")
def _product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Sums products of rows and weights over the rows' features and the weights' axis `axis`."""
    x, sizes, weight = _varying_alike(x, sizes, weight)
    return _product_p.bind(x, sizes, weight, axis=axis)


@jax.jit
def _outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Sums the outer products of the rows of `a` and `b` over every group."""
    a, b, sizes = _varying_alike(a, b, sizes)
    return _outer_p.bind(a, b, sizes)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Marks all arrays as varying over the same axes of a `jax.shard_map`, as JAX's own functions
    do. The transpose of the mark sums the gradient of weights over the devices that share them."""
    axes = [_varying_axes(array) for array in arrays]
    every = frozenset().union(*axes)
    return [
        lax.pcast(array, tuple(every - own), to="varying") if every - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def _varying_axes(array: Array) -> frozenset[str]:
    # The attribute of JAX before and after 0.10.
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


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


def _blockwise_product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Computes `_product` on a CPU."""
    columns, features = weight.shape[3 - axis], weight.shape[axis]
    _, y = _varying_alike(x, jnp.zeros((x.shape[0], columns), x.dtype))
    if y.size == 0 or features == 0:
        return y
    wide = at_least_float32(x)
    width = _width(columns, features * weight.dtype.itemsize)

    def body(block: _Block, y: Array) -> Array:
        (first, height), zero = block.rows, jnp.zeros_like(block.column)
        if axis == 2:
            corner, shape = (block.group, block.column, zero), (1, width, features)
        else:
            corner, shape = (block.group, zero, block.column), (1, features, width)
        w = lax.dynamic_slice(weight, corner, shape)[0]
        rows = lax.dynamic_slice_in_dim(x, first, height)
        if height == 1:
            contract = (((axis - 1,), (0,)), ((), ()))
            new = lax.dot_general(w, rows[0], contract, preferred_element_type=wide)
            # XLA's CPU backend would otherwise fuse the product with the code after it and no
            # longer call its fast routine.
            new = lax.optimization_barrier(new)[None]
        else:
            contract = (((1,), (axis - 1,)), ((), ()))
            new = lax.dot_general(rows, w, contract, preferred_element_type=wide)
        corner = (first, block.column)
        old = lax.dynamic_slice(y, corner, (height, width))
        new = jnp.where(block.own, new.astype(y.dtype), old)
        return lax.dynamic_update_slice(y, new, corner)

    return _for_blocks(x.shape[0], sizes, columns, width, body, y)


def _blockwise_outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Computes `_outer` on a CPU."""
    wide = at_least_float32(a)
    (rows, columns), features = a.shape, b.shape[1]
    _, y = _varying_alike(a, jnp.zeros((sizes.shape[0], columns, features), wide))
    if y.size == 0 or rows == 0:
        return y.astype(a.dtype)
    width = _width(columns, features * wide.itemsize)

    def body(block: _Block, y: Array) -> Array:
        first, height = block.rows
        a_rows = lax.dynamic_slice(a, (first, block.column), (height, width))
        b_rows = lax.dynamic_slice_in_dim(b, first, height)
        # Both are masked, because zero times a non-finite row of another group is NaN.
        a_rows = jnp.where(block.own, a_rows, jnp.zeros_like(a_rows))
        b_rows = jnp.where(block.own, b_rows, jnp.zeros_like(b_rows))
        contract = (((0,), (0,)), ((), ()))
        new = lax.dot_general(a_rows, b_rows, contract, preferred_element_type=wide)
        corner = (block.group, block.column, jnp.zeros_like(block.column))
        new = new + lax.dynamic_slice(y, corner, (1, width, features))
        return lax.dynamic_update_slice(y, new, corner)

    return _for_blocks(rows, sizes, columns, width, body, y).astype(a.dtype)


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


def _product_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, axis: int
) -> tuple[Array, Array]:
    x, sizes, weight = primals
    x_dot, _, weight_dot = tangents
    terms = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(_product(x_dot, sizes, weight, axis=axis))
    if not isinstance(weight_dot, ad.Zero):
        terms.append(_product(x, sizes, weight_dot, axis=axis))
    return _product(x, sizes, weight, axis=axis), sum(terms[1:], *terms[:1])


def _product_transpose(
    y_bar: Any, x: Any, sizes: Array, weight: Any, *, axis: int
) -> tuple[Array | None, ...]:
    if isinstance(y_bar, ad.Zero):
        return None, None, None
    if ad.is_undefined_primal(x):
        return _product(y_bar, sizes, weight, axis=3 - axis), None, None
    a, b = (y_bar, x) if axis == 2 else (x, y_bar)
    return None, None, _outer(a, b, sizes)


def _outer_jvp(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Array]:
    a, b, sizes = primals
    a_dot, b_dot, _ = tangents
    terms = []
    if not isinstance(a_dot, ad.Zero):
        terms.append(_outer(a_dot, b, sizes))
    if not isinstance(b_dot, ad.Zero):
        terms.append(_outer(a, b_dot, sizes))
    return _outer(a, b, sizes), sum(terms[1:], *terms[:1])


def _outer_transpose(y_bar: Any, a: Any, b: Any, sizes: Array) -> tuple[Array | None, ...]:
    if isinstance(y_bar, ad.Zero):
        return None, None, None
    if ad.is_undefined_primal(a):
        return _product(b, sizes, y_bar, axis=2), None, None
    return None, _product(a, sizes, y_bar, axis=1), None


def _product_batched(
    arguments: Sequence[Array], axes: Sequence[_Axis], *, axis: int
) -> tuple[Array, int]:
    weight = arguments[2]
    x, sizes, *weights = _in_front(arguments[: 2 + (axes[2] is not None)], axes)
    rows = _joined(x)
    if weights:
        y = _product(rows, _joined(sizes), _joined(weights[0]), axis=axis)
    else:
        # The rows of one group, of all examples, become one group.
        group = jax.vmap(partial(_groups, x.shape[1]))(sizes)
        order = jnp.argsort(group.reshape(-1), stable=True)
        sorted_y = _product(rows[order], jnp.sum(sizes, 0, dtype=jnp.int32), weight, axis=axis)
        y = sorted_y[jnp.argsort(order)]
    return y.reshape(*x.shape[:2], y.shape[1]), 0


def _outer_batched(arguments: Sequence[Array], axes: Sequence[_Axis]) -> tuple[Array, int]:
    a, b, sizes = _in_front(arguments, axes)
    y = _outer(_joined(a), _joined(b), _joined(sizes))
    return y.reshape(*sizes.shape, *y.shape[1:]), 0


def _joined(array: Array) -> Array:
    """Joins the first two axes, of which either may be empty."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _groups(rows: int, sizes: _Sizes) -> Int[Array, " rows"]:
    """Returns the group of every row."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return jnp.searchsorted(ends, jnp.arange(rows, dtype=jnp.int32), side="right")


def _in_front(arrays: Sequence[Array], axes: Sequence[_Axis]) -> list[Array]:
    """Moves the batch of every array to the first axis, or repeats an array without one."""
    pairs = list(zip(arrays, axes[: len(arrays)], strict=True))
    batch = next(array.shape[axis] for array, axis in pairs if axis is not None)
    return [
        jnp.broadcast_to(array, (batch, *array.shape))
        if axis is None
        else jnp.moveaxis(array, axis, 0)
        for array, axis in pairs
    ]


def _register(
    primitive: Primitive,
    call: Callable[..., Array],
    shape: Callable[..., ShapedArray],
    rules: tuple[Callable[..., Any], ...],
) -> None:
    """Tells JAX how to run, differentiate and batch a primitive.

    **Arguments:**

    - `primitive`: the primitive.
    - `call`: calls the primitive.
    - `shape`: the shape of the result, as a function of the shapes of the arguments.
    - `rules`: the function on accelerators and that on a CPU, and the rules for derivatives,
        transposes and batches.
    """
    accelerator, cpu, jvp, transpose, batched = rules
    primitive.def_impl(call)
    primitive.def_abstract_eval(shape)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(accelerator, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")


_register(
    _product_p,
    _product,
    lambda x, _, weight, *, axis: x.update(shape=(x.shape[0], weight.shape[3 - axis])),
    (_ragged_product, _blockwise_product, _product_jvp, _product_transpose, _product_batched),
)
_register(
    _outer_p,
    _outer,
    lambda a, b, sizes: a.update(shape=(sizes.shape[0], a.shape[1], b.shape[1])),
    (_ragged_outer, _blockwise_outer, _outer_jvp, _outer_transpose, _outer_batched),
)
