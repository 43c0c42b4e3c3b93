"""The conversion of weights to 8 and 4 bits."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._dtypes import at_least_float32


# A group is a whole number of vector registers, in both halves of a group of 4 bits. A multiple of
# 32 is also what the formats of other programs have.
GROUP_UNIT = 32


class QuantizedWeight(NamedTuple):
    """A weight of 8 or 4 bits; see [`mamba_eqx.ops.quantize_weight`][]."""

    weight: Array
    """The integers: int8 of shape `(..., out_features, in_features)` for 8 bits, and uint8 of
    shape `(..., out_features, in_features / 2)` for 4 bits."""

    scale: Float[Array, "*stack out_features groups"]
    """The factors of the groups, of shape `(..., out_features, in_features / group)`."""


@partial(jax.jit, static_argnames=("bits", "group", "dtype"))
def quantize_weight(
    weight: Float[Array, "*stack out_features in_features"],
    *,
    bits: int,
    group: int,
    dtype: DTypeLike | None = None,
) -> QuantizedWeight:
    r"""Rounds a weight to 8 or 4 bits, for [`mamba_eqx.ops.quantized_product`][].

    The integers of every group are $q_i = \text{round}(w_i / s)$. With 8 bits they reach from -127
    to 127, and $s = \max_i |w_i| / 127$. With 4 bits they reach from -8 to 7, and $s$ is the one of
    several scales of both signs that gives the least squared error of the group.

    **Arguments:**

    - `weight`: the weight, of shape `(..., out_features, in_features)`.
    - `bits`: 8 or 4.
    - `group`: the number of consecutive inputs that share a scale: a multiple of 32 that divides
        `in_features`.
    - `dtype`: the dtype of the scales; that of `weight` by default. The scales are rounded before
        the integers are chosen, so that a narrow dtype adds no error of its own.

    **Returns:**

    The integers and the scales.

    **Raises:** `ValueError` if `bits` is neither 8 nor 4, `weight` is not floating-point, or
    `group` does not fit.
    """
    if type(bits) is not int or bits not in (8, 4):
        raise ValueError(f"`bits` must be 8 or 4, but got bits={bits!r}.")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"The weight must be floating-point, but is {weight.dtype}. A weight can be quantised "
            "only once: start from the original model."
        )
    in_features = weight.shape[-1]
    if group < 1 or group % GROUP_UNIT != 0 or in_features % group != 0:
        raise ValueError(
            f"`group` must be a multiple of {GROUP_UNIT} that divides in_features, but got "
            f"group={group!r} and in_features={in_features}. Choose a divisor of in_features."
        )
    dtype = jnp.dtype(weight.dtype if dtype is None else dtype)
    wide = at_least_float32(weight, dtype)

    def quantize_row(row: Array) -> tuple[Array, Array]:
        groups = row.astype(wide).reshape(-1, group)
        if bits == 8:
            scale = _scale_of_8_bits(groups, dtype)
            q = jnp.clip(_integers(groups, scale), -127, 127).astype(jnp.int8)
            return q.reshape(-1), scale.astype(dtype)
        scale = _best_scale(groups, dtype)
        q = (jnp.clip(_integers(groups, scale), -8, 7) + 8).astype(jnp.uint8)
        half = group // 2
        return (q[:, :half] | (q[:, half:] << 4)).reshape(-1), scale.astype(dtype)

    rows = weight.reshape(-1, in_features)
    # In batches, because the candidates of all rows would take many times the weight's memory.
    q, scale = lax.map(quantize_row, rows, batch_size=min(256, max(1, len(rows))))
    shape = weight.shape[:-1]
    return QuantizedWeight(q.reshape(*shape, -1), scale.reshape(*shape, -1))


def _scale_of_8_bits(groups: Array, dtype: jnp.dtype) -> Array:
    """Returns the scale of every group whose integers reach 127."""
    largest = jnp.max(jnp.abs(groups), axis=-1)
    scale = _rounded(largest / 127, dtype)
    # Small scales are subnormal in float16, and so coarse that one rounded down could cut off the
    # largest values.
    return jnp.where(127.5 * scale < largest, scale + _least(dtype), scale)


# What the value of largest magnitude of a group would be in units of the scale. Integers end at -8
# and 7, so scales of both signs are tried, and some for which outliers are cut off.
_EXTREMES = (-8.0, 8.0, -7.2, 7.2, -8.8, 8.8, -9.6, 9.6, -10.6, 10.6)


def _best_scale(groups: Array, dtype: jnp.dtype) -> Array:
    """Returns the scale of every group that gives the least squared error with 4 bits."""
    largest = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), axis=-1)[:, None], axis=-1)

    def error_of(scale: Array) -> Array:
        q = jnp.clip(_integers(groups, scale), -8, 7)
        return jnp.sum((q * scale[:, None] - groups) ** 2, axis=-1)

    def refined(scale: Array) -> Array:
        """Returns the best scale for the integers that `scale` gives."""
        q = jnp.clip(_integers(groups, scale), -8, 7)
        norm = jnp.sum(q * q, axis=-1)
        return jnp.where(norm > 0, jnp.sum(q * groups, axis=-1) / jnp.maximum(norm, 1), scale)

    def better(best: tuple[Array, Array], extreme: Array) -> tuple[tuple[Array, Array], None]:
        scale = _rounded(refined(largest[:, 0] / extreme), dtype)
        error = error_of(scale)
        found = error < best[1]
        return (jnp.where(found, scale, best[0]), jnp.where(found, error, best[1])), None

    plain = _rounded(largest[:, 0] / -8, dtype)
    extremes = jnp.asarray(_EXTREMES, groups.dtype)
    return lax.scan(better, (plain, error_of(plain)), extremes)[0][0]


def _rounded(scale: Array, dtype: jnp.dtype) -> Array:
    """Rounds scales to `dtype`, in which they will be stored, but none to zero in float16, whose
    least numbers are as large as the weights that these scales are for."""
    rounded = scale.astype(dtype).astype(scale.dtype)
    if dtype != jnp.float16:
        return rounded
    least = jnp.where(scale < 0, -_least(dtype), _least(dtype))
    return jnp.where((rounded == 0) & (scale != 0), least, rounded)


def _least(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).smallest_subnormal)


def _integers(groups: Array, scale: Array) -> Array:
    """Returns the nearest integers to the values of groups in units of their scales."""
    nonzero = jnp.where(scale == 0, 1, scale)
    return jnp.round(groups / nonzero[:, None])
