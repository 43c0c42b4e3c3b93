"""Products of rows with the weight of their group, and the transposes of these products."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.extend.core import Primitive
from jax.interpreters import ad
from jaxtyping import Array, Bool, Float, Int, Integer

from .._dtypes import at_least_float32
from .._trees import vary_together
from ._grouped_blocks import blockwise_outer, blockwise_product
from ._native import NativeGrouped, kernels_accept, native_grouped
from ._primitives import register


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
    `group_sizes[1]` rows to group 1. A group may be empty, and its weight is then not read. Rows
    after the last group give zeros, and groups end with the last row.

    On a CPU, `jax.lax.ragged_dot` would multiply all rows by all weights. This function runs one
    product after another, each of some rows with a part of their weight that fits into the cache,
    or calls the C++ kernels of the package mamba-eqx-native for float32 and bfloat16, if that is
    installed. On accelerators the function is `jax.lax.ragged_dot`. All of JAX's derivatives work,
    and cost as much as the derivatives of a matrix product with as many rows. Under `jax.vmap` with
    one weight for all examples, the rows of all examples are sorted and multiplied together.

    **Arguments:**

    - `x`: the rows, sorted by group, shape `(rows, in_features)`.
    - `group_sizes`: the number of rows of every group, at least 0, shape `(groups,)`.
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
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), x.shape[0])
    return _product(x, jnp.diff(ends, prepend=jnp.zeros_like(ends[:1])), weight, axis=2)


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
    x, sizes, weight = vary_together((x, sizes, weight))
    return _product_p.bind(x, sizes, weight, axis=axis)


@jax.jit
def _outer(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Sums the outer products of the rows of `a` and `b` over every group."""
    a, b, sizes = vary_together((a, b, sizes))
    return _outer_p.bind(a, b, sizes)


def _product_on_cpu(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Computes `_product` on a CPU."""
    # Blocks have sizes.
    run = _ragged_product if export.is_symbolic_dim(x.shape[0]) else blockwise_product
    return run(x, sizes, weight, axis=axis)


def _outer_on_cpu(a: _Rows, b: _Rows, sizes: _Sizes) -> _Weight:
    """Computes `_outer` on a CPU."""
    run = _ragged_outer if export.is_symbolic_dim(a.shape[0]) else blockwise_outer
    return run(a, b, sizes)


def _ragged_product(x: _Rows, sizes: _Sizes, weight: _Weight, *, axis: int) -> _Rows:
    """Computes `_product` on an accelerator."""
    numbers = lax.RaggedDotDimensionNumbers((((1,), (axis,)), ((), ())), (0,), (0,))
    wide = at_least_float32(x)
    y = lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=wide)
    return _only(_in_groups(x.shape[0], sizes), y.astype(x.dtype))


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
        y = _product(rows, _joined(_filled(x.shape[1], sizes)), _joined(weights[0]), axis=axis)
        y = _only(jax.vmap(partial(_in_groups, x.shape[1]))(sizes).reshape(-1), y)
    else:
        # The rows of one group, of all examples, become one group.
        group = jax.vmap(partial(_groups, x.shape[1]))(sizes)
        order = jnp.argsort(group.reshape(-1), stable=True)
        sorted_y = _product(rows[order], jnp.sum(sizes, 0, dtype=jnp.int32), weight, axis=axis)
        y = sorted_y[jnp.argsort(order)]
    return y.reshape(*x.shape[:2], y.shape[1]), 0


def _outer_batched(arguments: Sequence[Array], axes: Sequence[_Axis]) -> tuple[Array, int]:
    a, b, sizes = _in_front(arguments, axes)
    rows = a.shape[1]
    own = jax.vmap(partial(_in_groups, rows))(sizes).reshape(-1)
    y = _outer(_only(own, _joined(a)), _only(own, _joined(b)), _joined(_filled(rows, sizes)))
    return y.reshape(*sizes.shape, *y.shape[1:]), 0


def _in_groups(rows: int, sizes: _Sizes) -> Bool[Array, " rows"]:
    """Returns which rows belong to a group."""
    return jnp.arange(rows, dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)


def _only(own: Bool[Array, " rows"], array: _Rows) -> _Rows:
    """Returns an array with zeros in the rows that belong to no group."""
    return jnp.where(own[:, None], array, jnp.zeros_like(array))


def _filled(rows: int, sizes: Int[Array, "batch groups"]) -> Int[Array, "batch groups"]:
    """Adds the rows after the last group to it, so that the next example begins at its own rows."""
    rest = rows - jnp.sum(sizes, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([sizes[:, :-1], sizes[:, -1:] + rest], axis=1)


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


def _kernels(args: Sequence[Array]) -> NativeGrouped | None:
    """Returns the native kernels if they serve these arguments."""
    is_served = args[0].dtype in (jnp.float32, jnp.bfloat16) and kernels_accept(args)
    return native_grouped() if is_served else None


def _product_kernel(args: Sequence[Array]) -> Callable[..., Array] | None:
    kernels = _kernels(args)
    return None if kernels is None else kernels.product


def _outer_kernel(args: Sequence[Array]) -> Callable[..., Array] | None:
    kernels = _kernels(args)
    return None if kernels is None else kernels.outer


register(
    _product_p,
    _product,
    lambda x, _, weight, *, axis: x.update(shape=(x.shape[0], weight.shape[3 - axis])),
    (_ragged_product, _product_on_cpu, _product_jvp, _product_transpose, _product_batched),
    _product_kernel,
)
register(
    _outer_p,
    _outer,
    lambda a, b, sizes: a.update(shape=(sizes.shape[0], a.shape[1], b.shape[1])),
    (_ragged_outer, _outer_on_cpu, _outer_jvp, _outer_transpose, _outer_batched),
    _outer_kernel,
)
