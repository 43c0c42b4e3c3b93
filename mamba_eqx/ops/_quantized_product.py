"""Products with weights of 8 and 4 bits."""

import math
from functools import partial, reduce
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from .._dtypes import at_least_float32
from .._trees import vary_together
from ._native import is_split, kernels_accept, native_product
from ._quantize_weight import GROUP_UNIT


_Weight: TypeAlias = Int8[Array, "out_features in_features"] | UInt8[Array, "out_features bytes"]

# The bytes of a block of the expanded weight. For one vector, whose product is limited by memory, a
# block stays in the innermost caches. For several, larger products are faster. A weight of less
# than two blocks is expanded as one.
_VECTOR_BLOCK = 2**18
_MATRIX_BLOCK = 2**25

# The native kernel is made for products that are limited by memory. More rows are limited by
# arithmetic, for which JAX calls a fast routine.
_NATIVE_ROWS = 8


@partial(jax.jit, static_argnames=("dtype", "implementation"))
@jax.named_scope("mamba_eqx.ops.quantized_product")
def quantized_product(
    x: Float[Array, "*batch in_features"],
    weight: _Weight,
    scale: Float[Array, "out_features groups"],
    *,
    dtype: DTypeLike | None = None,
    implementation: Literal["jax", "native"] | None = None,
) -> Float[Array, "*batch out_features"]:
    r"""Multiplies the last axis of `x` by a weight of 8 or 4 bits,

    $$y_o = \sum_i s_{o,\,g(i)}\, q_{o,i}\, x_i,$$

    where every group $g$ of consecutive inputs shares a scale $s$. The integers $q$ are stored as
    they are for 8 bits. Of 4 bits, two integers share a byte: in every group, byte $j$ holds
    $q_j + 8$ in its lower half, and $q_{j + \text{group} / 2} + 8$ in its upper half.

    The weight is expanded in blocks, which are multiplied while they are in the cache (one vector),
    or take less than 64 MiB (several). All of JAX's derivatives for `x` and `scale` work, and
    expand the blocks again rather than store them. Under `jax.vmap` over `x` alone, every block is
    expanded once for all examples.

    **Arguments:**

    - `x`: the vectors, of shape `(..., in_features)`.
    - `weight`, `scale`: the weight, as returned by [`mamba_eqx.ops.quantize_weight`][].
    - `dtype`: the dtype of the result; that of `x` by default.
    - `implementation`: `"jax"`, or `"native"` for the C++ kernel of the package mamba-eqx-native,
        which computes in float32. Only CPUs have that kernel, and derivatives always run `"jax"`.
        The default is the kernel for at most 8 vectors, if that package is installed, but not for
        arrays that vary inside `jax.shard_map`, are sharded over a mesh with explicit axes, or have
        a symbolic number of vectors (`jax.export`). The environment variable `MAMBA_EQX_NATIVE=0`
        turns the kernel off.

    **Returns:**

    The products, of shape `(..., out_features)`. They are computed in float32 (float64 if `x` or
    `scale` is float64), and rounded once.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together, `x` or
    `scale` is not floating-point, or the `implementation` does not exist or does not serve them;
    `ImportError` if it is `"native"`, and the package cannot be used or is turned off.
    """
    if implementation not in (None, "jax", "native"):
        raise ValueError(
            f'`implementation` must be "jax", "native" or None, but got {implementation!r}.'
        )
    if weight.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(
            "`weight` must be int8 (8 bits) or uint8 (two integers of 4 bits in a byte), but got "
            f"{weight.dtype}. Convert it with `mamba_eqx.ops.quantize_weight`."
        )
    in_features = weight.shape[-1] * (2 if weight.dtype == jnp.uint8 else 1)
    groups = scale.shape[-1] if scale.ndim else 0
    if (
        weight.ndim != 2
        or scale.shape[:-1] != weight.shape[:-1]
        or 0 in (groups, in_features)
        or in_features % (groups * GROUP_UNIT) != 0
    ):
        raise ValueError(
            "`weight` and `scale` must have one row for each output, and groups of a multiple of "
            f"{GROUP_UNIT} inputs, but got shapes {weight.shape} ({weight.dtype}) and "
            f"{scale.shape}. Give both results of `mamba_eqx.ops.quantize_weight`."
        )
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"The last axis of `x` must have the {in_features} inputs of `weight`, but got shape "
            f"{x.shape}. Check the order of the axes."
        )
    for name, array in [("x", x), ("scale", scale)]:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"`{name}` must be floating-point, but got {array.dtype}. Convert it with "
                f"`{name}.astype(jnp.float32)`."
            )
    wide = at_least_float32(x, scale)
    dtype = x.dtype if dtype is None else dtype
    x, weight, scale = vary_together((x, weight, scale))
    run = _native if _is_native(implementation, x, weight, scale, wide) else _jax
    y = run(x.astype(wide), weight, scale.astype(wide))
    return y.astype(dtype)


def _is_native(
    implementation: str | None, x: Array, weight: Array, scale: Array, dtype: jnp.dtype
) -> bool:
    """Returns whether the native kernel runs the product."""
    arrays = (x, weight, scale)
    if implementation == "native":
        if dtype != jnp.float32:
            raise ValueError(
                f'`implementation="native"` must compute in float32, but got arguments of {dtype}. '
                'Cast them, or use `implementation="jax"`.'
            )
        if any(map(is_split, arrays)):
            raise ValueError(
                '`implementation="native"` must not be used for arrays that vary inside '
                "`jax.shard_map`, or that have a mesh with explicit axes. Use "
                '`implementation="jax"`, or leave it out.'
            )
        native_product(required=True)
        return True
    return (
        implementation is None
        and dtype == jnp.float32
        and kernels_accept(arrays)
        and _are_few(math.prod(x.shape[:-1]))
        and native_product() is not None
    )


def _are_few(rows: Any) -> bool:
    """Returns whether the native kernel is faster for a number of rows, which may be symbolic."""
    return not export.is_symbolic_dim(rows) and 0 < rows <= _NATIVE_ROWS


@jax.custom_jvp
def _native(x: Array, weight: Array, scale: Array) -> Array:
    """Runs the product in the native kernel on CPUs, and in operations of JAX elsewhere."""

    def on_cpu(x: Array, weight: Array, scale: Array) -> Array:
        y = _native_rows(_as_matrix(x), weight, scale)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    return lax.platform_dependent(x, weight, scale, cpu=on_cpu, default=_jax)


@partial(_native.defjvp, symbolic_zeros=True)
def _native_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    x, weight, scale = primals
    dx, _, dscale = tangents
    y = _native(x, weight, scale)
    terms: list[Array] = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_jax(dx, weight, scale))
    if not isinstance(dscale, SymbolicZero):
        terms.append(_jax(x, weight, dscale))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _as_matrix(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@custom_vmap
def _native_rows(x: Array, weight: Array, scale: Array) -> Array:
    product = native_product(required=True)
    assert product is not None
    return product(x, weight, scale)


@_native_rows.def_vmap
def _(size: int, batched: list[bool], x: Array, weight: Array, scale: Array) -> tuple[Array, bool]:
    """Multiplies the rows of all examples at once."""
    if batched != [True, False, False]:
        axes = [0 if is_batched else None for is_batched in batched]
        return jax.vmap(_jax, in_axes=axes, axis_size=size)(x, weight, scale), True
    rows = _as_matrix(x)
    run = _native_rows if _are_few(rows.shape[0]) else _jax
    return run(rows, weight, scale).reshape(*x.shape[:-1], weight.shape[0]), True


def _jax(x: Array, weight: Array, scale: Array) -> Array:
    """Runs the product in operations of JAX, in the dtype of `x` and `scale`."""
    out_features, in_features = weight.shape[0], x.shape[-1]
    size = _VECTOR_BLOCK if x.ndim == 1 else _MATRIX_BLOCK
    rows = max(1, size // (in_features * x.dtype.itemsize))
    parts = _split_inputs(x, scale.shape[1]) if weight.dtype == jnp.uint8 else (x,)

    # Without the checkpoint, the reverse pass would store every expanded block.
    @jax.checkpoint
    def product(weight: Array, scale: Array) -> Array:
        # XLA's CPU backend would otherwise fuse the expansion with the product, and no longer call
        # its fast routine for products.
        planes = lax.optimization_barrier(_planes(weight, scale))
        pairs = zip(planes, parts, strict=True)
        return reduce(jnp.add, (p @ t if x.ndim == 1 else t @ p.T for p, t in pairs))

    count = out_features // rows
    if count <= 1:
        return product(weight, scale)

    # Slices of a reshaped weight would be copies where `rows` does not divide `out_features`.
    def block(start: Array) -> Array:
        cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=rows)
        return product(cut(weight), cut(scale))

    blocks = lax.map(block, rows * jnp.arange(count))
    y = jnp.moveaxis(blocks, 0, -2).reshape(*x.shape[:-1], count * rows)
    if count * rows == out_features:
        return y
    rest = product(weight[count * rows :], scale[count * rows :])
    return jnp.concatenate([y, rest], axis=-1)


def _split_inputs(x: Array, groups: int) -> tuple[Array, Array]:
    """Returns the inputs of the lower and of the upper halves of the bytes."""
    halves = x.reshape(*x.shape[:-1], groups, 2, x.shape[-1] // (2 * groups))
    lower, upper = halves[..., 0, :], halves[..., 1, :]
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return lower.reshape(shape), upper.reshape(shape)


def _planes(weight: Array, scale: Array) -> tuple[Array, ...]:
    """Expands rows of a weight to the dtype of `scale`.

    **Returns:**

    The rows for 8 bits; for 4 bits the inputs of the lower halves of the bytes, and those of the
    upper halves. Joining the halves in order would cost more than two products.
    """
    grouped = weight.reshape(*scale.shape, -1)
    if weight.dtype == jnp.int8:
        integers = (grouped,)
    else:
        # XLA's CPU backend has vector instructions for shifts of 32 bits, not of 8.
        wide = grouped.astype(jnp.int32)
        integers = ((wide & 15) - 8, (wide >> 4) - 8)
    return tuple((q.astype(scale.dtype) * scale[..., None]).reshape(weight.shape) for q in integers)


def dequantize_weight(
    weight: Array, scale: Float[Array, "*stack out_features groups"]
) -> Float[Array, "*stack out_features in_features"]:
    """Expands a weight of 8 or 4 bits, the inverse of [`mamba_eqx.ops.quantize_weight`][] up to
    rounding.

    **Arguments:**

    - `weight`, `scale`: the results of `quantize_weight`, possibly with leading axes.

    **Returns:**

    The weight, of shape `(..., out_features, in_features)`, in the dtype of `scale`.
    """
    planes = [plane.reshape(*scale.shape, -1) for plane in _planes(weight, scale)]
    return jnp.concatenate(planes, axis=-1).reshape(*scale.shape[:-1], -1)
