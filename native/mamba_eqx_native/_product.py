import jax
import jax.numpy as jnp


_TARGET = "mamba_eqx_native_product"


def product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    r"""Multiplies rows by a weight of 8 or 4 bits,

    $$y_{no} = \sum_i s_{o,\,g(i)}\, q_{o,i}\, x_{n,i},$$

    where every group $g$ of consecutive inputs shares a scale $s$. The sums are computed in
    float32. The function runs on CPUs only, under `jax.jit` and in loops, but it has no derivatives
    and no batching rule: more vectors are more rows.

    **Arguments:**

    - `x`: the rows, float32 of shape `(rows, in_features)`.
    - `weight`: the integers. For 8 bits, int8 of shape `(out_features, in_features)`. For 4 bits,
        uint8 of shape `(out_features, in_features / 2)`: in every group, byte $j$ holds $q_j + 8$
        in its lower half, and $q_{j + \text{group} / 2} + 8$ in its upper half.
    - `scale`: the factors of the groups, float32 of shape `(out_features, in_features / group)`.
        `group` is a multiple of 32.

    **Returns:**

    The products, float32 of shape `(rows, out_features)`.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together.
    """
    dtypes = (x.dtype, weight.dtype, scale.dtype)
    if dtypes not in ((jnp.float32, jnp.int8, jnp.float32), (jnp.float32, jnp.uint8, jnp.float32)):
        raise ValueError(
            "`x`, `weight` and `scale` must be float32, int8 or uint8, and float32, but got "
            f"{x.dtype}, {weight.dtype} and {scale.dtype}. Convert them."
        )
    shapes = f"{x.shape}, {weight.shape} ({weight.dtype}) and {scale.shape}"
    if (x.ndim, weight.ndim, scale.ndim) != (2, 2, 2):
        raise ValueError(f"`x`, `weight` and `scale` must be matrices, but got shapes {shapes}.")
    in_features = weight.shape[1] * (2 if weight.dtype == jnp.uint8 else 1)
    groups = scale.shape[1]
    if (
        scale.shape[0] != weight.shape[0]
        or x.shape[1] != in_features
        or groups == 0
        or in_features == 0
        or in_features % (32 * groups) != 0
    ):
        raise ValueError(
            "`x` must have the inputs of `weight`, and `scale` its outputs and groups of a "
            f"multiple of 32 inputs, but got shapes {shapes}. Check the order of the axes."
        )
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, result)(x, weight, scale)
