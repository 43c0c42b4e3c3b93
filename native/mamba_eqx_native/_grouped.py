import jax
import jax.numpy as jnp
import numpy as np


_PRODUCT = "mamba_eqx_native_grouped_product"
_OUTER = "mamba_eqx_native_grouped_outer"


def grouped_product(x: jax.Array, sizes: jax.Array, weight: jax.Array, *, axis: int) -> jax.Array:
    r"""Multiplies every row by the weight of its group,

    $$y_i = W_{g(i)}\, x_i \quad (\texttt{axis} = 2), \qquad
      y_i = W_{g(i)}^\top x_i \quad (\texttt{axis} = 1).$$

    The rows are sorted by group. Rows after the last group give zeros, and groups end with the last
    row. The sums are computed in float32. The function runs on CPUs only, under `jax.jit` and in
    loops, but it has no derivatives and no batching rule.

    **Arguments:**

    - `x`: the rows, float32 or bfloat16 of shape `(rows, features)`.
    - `sizes`: the number of rows of every group, int32 of shape `(groups,)`.
    - `weight`: the weight of every group, of the dtype of `x` and of three axes, of which the first
        is that of the groups.
    - `axis`: the axis of the weight that is summed over, 1 or 2, with as many numbers as `x` has
        features.

    **Returns:**

    The products, of shape `(rows, outputs)` and the dtype of `x`, where `outputs` is the size of
    the weight's other axis.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together.
    """
    _check_dtypes("x", x, "weight", weight, sizes)
    shapes = f"{x.shape}, {sizes.shape} and {weight.shape} with axis={axis}"
    if (
        (x.ndim, sizes.ndim, weight.ndim) != (2, 1, 3)
        or axis not in (1, 2)
        or weight.shape[0] != sizes.shape[0]
        or weight.shape[axis] != x.shape[1]
    ):
        raise ValueError(
            "`x`, `sizes` and `weight` must have shapes (rows, features), (groups,) and (groups, "
            "outputs, features), or (groups, features, outputs) with axis=1, but got "
            f"{shapes}. Check the order of the axes."
        )
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[3 - axis]), x.dtype)
    return jax.ffi.ffi_call(_PRODUCT, result)(x, sizes, weight, axis=np.int64(axis))


def grouped_outer(a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
    r"""Sums the outer products of rows over every group,

    $$W_g = \sum_{i:\, g(i) = g} a_i b_i^\top.$$

    The conditions are those of `grouped_product`. Rows after the last group are left out.

    **Arguments:**

    - `a`, `b`: the rows, both float32 or bfloat16, of shapes `(rows, outputs)` and
        `(rows, features)`.
    - `sizes`: the number of rows of every group, int32 of shape `(groups,)`.

    **Returns:**

    The sums, of shape `(groups, outputs, features)` and the dtype of `a`.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together.
    """
    _check_dtypes("a", a, "b", b, sizes)
    if (a.ndim, b.ndim, sizes.ndim) != (2, 2, 1) or a.shape[0] != b.shape[0]:
        raise ValueError(
            "`a`, `b` and `sizes` must have shapes (rows, outputs), (rows, features) and "
            f"(groups,), but got {a.shape}, {b.shape} and {sizes.shape}. Check the order of the "
            "axes."
        )
    result = jax.ShapeDtypeStruct((sizes.shape[0], a.shape[1], b.shape[1]), a.dtype)
    return jax.ffi.ffi_call(_OUTER, result)(a, b, sizes)


def _check_dtypes(
    name: str, array: jax.Array, other_name: str, other: jax.Array, sizes: jax.Array
) -> None:
    if array.dtype not in (jnp.float32, jnp.bfloat16) or other.dtype != array.dtype:
        raise ValueError(
            f"`{name}` and `{other_name}` must both be float32 or bfloat16, but got {array.dtype} "
            f"and {other.dtype}. Convert them."
        )
    if sizes.dtype != jnp.int32:
        raise ValueError(f"`sizes` must be int32, but got {sizes.dtype}. Convert them.")
