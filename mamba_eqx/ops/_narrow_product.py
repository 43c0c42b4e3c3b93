"""Products of 16-bit arrays with 16-bit weights, and the transposes of these products."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._processor import multiplies_bfloat16
from .._trees import vary_together
from ._primitives import register


@jax.named_scope("mamba_eqx.ops.narrow_product")
def narrow_product(
    x: Float[Array, "*batch in_features"],
    weight: Float[Array, "out_features in_features"],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out_features"]:
    r"""Multiplies the last axis of a 16-bit array by a 16-bit weight,

    $$y = W x.$$

    The sums are computed in float32 and rounded once. So are those of the derivatives, whose
    factors have 16 bits too: the cotangent of a float32 result is first rounded to bfloat16. It
    stays float32 if the factors are float16, in which the small derivatives of logits are zero.

    A processor that has instructions for bfloat16 multiplies it several times as fast as float32,
    but XLA's CPU backend uses them only for products of two bfloat16 arrays whose last axes have
    not been transposed and whose result is float32. This function writes the product and its
    transposes in that form, which `jnp.matmul` and its derivatives do not have. On processors
    without the instructions, many rows are multiplied in float32, which is faster there.

    **Arguments:**

    - `x`: an array of shape `(..., in_features)`.
    - `weight`: an array of shape `(out_features, in_features)` and of the dtype of `x`.
    - `dtype`: the dtype of the result, that of the arguments (the default) or float32.

    **Returns:**

    An array of shape `(..., out_features)`.

    **Raises:** `ValueError` if the arguments are not both bfloat16 or both float16, or `dtype` is
    another one.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if x.dtype != weight.dtype or x.dtype not in _NARROW or dtype not in (x.dtype, jnp.float32):
        raise ValueError(
            "`x` and `weight` must both be bfloat16 or float16, and `dtype` that or float32, but "
            f"got {x.dtype}, {weight.dtype} and {dtype}. Use `jax.numpy.matmul` for other dtypes."
        )
    return product_of_two(x, weight, wanted="y", batch=0, dtype=dtype)


def as_dot_general(
    primitive: Primitive, parameters: dict[str, Any]
) -> tuple[Primitive, dict[str, Any]]:
    """Returns `dot_general_p` and its axes for the primitive of a narrow product and its
    parameters, and the arguments for any other primitive. Policies of `jax.checkpoint` know the
    products of JAX only."""
    if primitive is not _product_p:
        return primitive, parameters
    front = tuple(range(parameters["batch"]))
    return lax.dot_general_p, {"dimension_numbers": (((), ()), (front, front))}


_NARROW = (jnp.bfloat16, jnp.float16)

_Wanted = Literal["y", "x", "weight"]
"""Which of the three arrays is computed: `y` from `x` and `weight`, `x` from `y` and `weight`, or
`weight` from `y` and `x`."""

_FACTORS: dict[_Wanted, tuple[_Wanted, _Wanted]] = {
    "y": ("x", "weight"),
    "x": ("y", "weight"),
    "weight": ("y", "x"),
}

_Axis = int | None

# No function of JAX has all of forward mode, a transpose of its own, and a batching rule of its
# own. The sum over features, outputs and rows of y * weight * x is linear in each of the three
# arrays, so that the transpose of every product is another of the three.
_product_p = Primitive("mamba_eqx_narrow_product")


@partial(jax.jit, static_argnames=("wanted", "batch", "dtype"), inline=True)
def product_of_two(a: Array, b: Array, *, wanted: _Wanted, batch: int, dtype: jnp.dtype) -> Array:
    """Computes one of the arrays `y`, `x` and `weight` from the two others.

    **Arguments:**

    - `a`, `b`: the factors, as `_FACTORS` lists them. The shape of `y` is `(..., out_features)`,
        that of `x` `(..., in_features)`, that of `weight` `(out_features, in_features)`.
    - `wanted`: which of the arrays is computed.
    - `batch`: the number of axes that all three have in front.
    - `dtype`: the dtype of the result.
    """
    a, b = vary_together((a, b))
    return _product_p.bind(a, b, wanted=wanted, batch=batch, dtype=dtype)


def _numbers(a: Any, wanted: _Wanted, batch: int) -> lax.DotDimensionNumbers:
    """Returns the axes of `a` and `b` that are summed over, and those of the batch."""
    front, last = tuple(range(batch)), a.ndim - 1
    if wanted == "weight":
        rows = tuple(range(batch, last))
        return (rows, rows), (front, front)
    return ((last,), (batch + 1 if wanted == "y" else batch,)), (front, front)


def _shape(a: ShapedArray, b: ShapedArray, *, wanted: _Wanted, batch: int, dtype: jnp.dtype) -> Any:
    # Also finds how the result is sharded.
    return lax.dot_general_p.abstract_eval(
        a,
        b,
        dimension_numbers=_numbers(a, wanted, batch),
        precision=None,
        preferred_element_type=dtype,
        out_sharding=None,
    )[0]


def _on_accelerators(a: Array, b: Array, *, wanted: _Wanted, batch: int, dtype: jnp.dtype) -> Array:
    return _plain(a, b, _numbers(a, wanted, batch), dtype)


def _plain(a: Array, b: Array, numbers: lax.DotDimensionNumbers, dtype: jnp.dtype) -> Array:
    if a.dtype == b.dtype:
        return lax.dot_general(a, b, numbers, preferred_element_type=dtype)
    return _wide(a, b, numbers).astype(dtype)


def _wide(a: Array, b: Array, numbers: lax.DotDimensionNumbers) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


# Up to about this number of rows, products of bfloat16 arrays are faster on every processor, since
# widening the weight takes longer than the product.
_FEW_ROWS = 32


def _on_cpu(a: Array, b: Array, *, wanted: _Wanted, batch: int, dtype: jnp.dtype) -> Array:
    rows = math.prod(a.shape[batch:-1])
    is_many = export.is_symbolic_dim(rows) or rows > _FEW_ROWS
    numbers = _numbers(a, wanted, batch)
    if a.ndim == batch + 1:
        if wanted == "y" and batch == 0:
            # XLA's CPU backend would otherwise fuse the product with the code after it and no
            # longer call its fast routine: decoding would take half as long again
            # (docs/speed.md).
            y = lax.dot_general(b, a, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
            return lax.optimization_barrier(y)
        return _plain(a, b, numbers, dtype)
    if a.dtype != jnp.bfloat16 or b.dtype != jnp.bfloat16:
        return _plain(a, b, numbers, dtype)
    if is_many and not multiplies_bfloat16():
        # A result in bfloat16 makes XLA's CPU backend multiply in float32.
        wide = dtype == jnp.float32
        return _wide(a, b, numbers) if wide else _plain(a, b, numbers, dtype)
    if wanted == "weight":
        a = _rows_last(a, batch)
        sums = tuple(range(batch + 1, a.ndim))
        numbers = (sums, numbers[0][1]), numbers[1]
    y = lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)
    return y if dtype == jnp.float32 else _to_bfloat16(y)


def _rows_last(y: Array, batch: int) -> Array:
    """Moves the last axis of `y` before its rows, in a copy.

    XLA would otherwise turn the transpose into another layout of the same array, for which its CPU
    backend has no fast product. The barrier keeps XLA from undoing the transpose, and the reshapes
    keep the layout behind them from being that of the transpose.
    """
    moved = jnp.expand_dims(jnp.moveaxis(y, -1, batch), -1)
    return jnp.squeeze(lax.optimization_barrier(moved), -1)


def _to_bfloat16(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds float32 to the nearest bfloat16, ties to even.

    XLA may fold a conversion into the product before it, whose result is then bfloat16, and which
    it no longer runs in bfloat16. It does not see through arithmetic on the bits.
    """
    bits = lax.bitcast_convert_type(y, jnp.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + odd) >> 16
    quiet_nan = (bits >> 16) | 0x40
    upper = jnp.where(jnp.isnan(y), quiet_nan, rounded).astype(jnp.uint16)
    return lax.bitcast_convert_type(upper, jnp.bfloat16)


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Any], **parameters: Any
) -> tuple[Array, Array]:
    a, b = primals
    a_dot, b_dot = tangents
    terms = []
    if not isinstance(a_dot, ad.Zero):
        terms.append(product_of_two(a_dot, b, **parameters))
    if not isinstance(b_dot, ad.Zero):
        terms.append(product_of_two(a, b_dot, **parameters))
    return product_of_two(a, b, **parameters), sum(terms[1:], *terms[:1])


def _transpose(
    bar: Any, a: Any, b: Any, *, wanted: _Wanted, batch: int, dtype: jnp.dtype
) -> tuple[Any, Any]:
    if isinstance(bar, ad.Zero):
        return None, None
    unknown = 0 if ad.is_undefined_primal(a) else 1
    aval, other = (a.aval, b) if unknown == 0 else (b.aval, a)
    if other.dtype == jnp.bfloat16:
        bar = bar.astype(jnp.bfloat16)
    names = _FACTORS[wanted]
    factors = {wanted: bar, names[1 - unknown]: other}
    first, second = _FACTORS[names[unknown]]
    found = product_of_two(
        factors[first], factors[second], wanted=names[unknown], batch=batch, dtype=aval.dtype
    )
    return (found, None) if unknown == 0 else (None, found)


def _batched(
    arguments: Sequence[Array],
    axes: Sequence[_Axis],
    *,
    wanted: _Wanted,
    batch: int,
    dtype: jnp.dtype,
) -> tuple[Array, int]:
    a, b = arguments
    if wanted != "weight" and axes[0] is not None and axes[1] is None:
        # The examples are more rows of the same weight.
        a = jnp.moveaxis(a, axes[0], batch)
        return product_of_two(a, b, wanted=wanted, batch=batch, dtype=dtype), batch
    size = next(t.shape[i] for t, i in zip(arguments, axes, strict=True) if i is not None)
    a, b = (
        jnp.broadcast_to(t, (size, *t.shape)) if axis is None else jnp.moveaxis(t, axis, 0)
        for t, axis in zip(arguments, axes, strict=True)
    )
    return product_of_two(a, b, wanted=wanted, batch=batch + 1, dtype=dtype), 0


register(
    _product_p,
    product_of_two,
    _shape,
    (_on_accelerators, _on_cpu, _jvp, _transpose, _batched),
)
