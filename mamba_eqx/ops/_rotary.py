import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._dtypes import at_least_float32


def wrap(angle: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the equivalent angle between -pi and pi, with the derivative of the identity."""
    return angle - 2 * math.pi * jnp.round(angle / (2 * math.pi))


@jax.custom_jvp
def cos_sin(
    angle: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns the cosine and the sine of angles between -pi and pi.

    Both are computed by their power series, because XLA's CPU backend computes `jnp.cos` one number
    at a time, which takes ten times as long (docs/speed.md).
    """
    terms = 12 if angle.dtype == jnp.float64 else 7
    half_turns = jnp.round(angle / math.pi)
    rest, sign = angle - math.pi * half_turns, 1 - 2 * jnp.abs(half_turns)
    sin = rest * _series(rest**2, [1 / math.factorial(2 * i + 1) for i in range(terms)])
    cos = _series(rest**2, [1 / math.factorial(2 * i) for i in range(terms + 1)])
    return sign * cos, sign * sin


@cos_sin.defjvp
def _(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (cos, sin), (angle_dot,) = cos_sin(*primals), tangents
    return (cos, sin), (-sin * angle_dot, cos * angle_dot)


def _series(x: Float[Array, "*shape"], coefficients: list[float]) -> Float[Array, "*shape"]:
    """Returns the sum of `(-1)^i c_i x^i` over the coefficients `c_i`."""
    total = jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = coefficient - total * x
    return total


def rotary_embedding(
    x: Float[Array, "*seq nheads headdim"],
    positions: Integer[Array, "*seq"],
    *,
    dim: int,
    base: float,
    interleaved: bool,
) -> Float[Array, "*seq nheads headdim"]:
    r"""Applies rotary position embedding (Su et al., 2021) to the first `dim` features of every
    head.

    Pair $i$ rotates by the angle $\text{position} \cdot \text{base}^{-2i / \text{dim}}$, which is
    computed in float32 or better.

    **Arguments:**

    - `x`: queries or keys, shape `(*seq, nheads, headdim)`.
    - `positions`: the positions of the tokens, shape `(*seq,)`.
    - `dim`: the number of features that rotate, an even number of at most `headdim`. The other
        features are returned unchanged.
    - `base`: the base of the angles.
    - `interleaved`: whether neighbouring features form the pairs; otherwise features `dim / 2`
        apart do.

    **Returns:**

    The rotated queries or keys, in the shape and dtype of `x`.

    **Raises:** `ValueError` if `dim` is odd or more than `headdim`.
    """
    dtype = at_least_float32(x)
    rates = jnp.asarray(base, dtype) ** (-jnp.arange(0, dim, 2, dtype=dtype) / dim)
    angles = positions[..., None, None].astype(dtype) * rates
    rotated, rest = x[..., :dim].astype(dtype), x[..., dim:]
    rotated = rotate(rotated, jnp.cos(angles), jnp.sin(angles), interleaved=interleaved)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def rotate(
    x: Float[Array, "*#batch features"],
    cos: Float[Array, "*#batch pairs"],
    sin: Float[Array, "*#batch pairs"],
    *,
    interleaved: bool,
) -> Float[Array, "*batch features"]:
    r"""Rotates pairs of features, each by its own angle (rotary embedding: Su et al., 2021),

    $$(a, b) \mapsto (a \cos\theta_i - b \sin\theta_i,\; a \sin\theta_i + b \cos\theta_i).$$

    Features outside all pairs are returned unchanged.

    **Arguments:**

    - `x`: the features, shape `(*batch, features)`.
    - `cos`, `sin`: the cosines and sines of the angles $\theta_i$, shape `(*batch, pairs)`, with at
        most `features // 2` pairs.
    - `interleaved`: whether pair $i$ consists of neighbours, $(2i, 2i + 1)$; otherwise of features
        half the width of `x` apart, $(i, i + \lfloor\texttt{features} / 2\rfloor)$. This is half
        of the whole width even if only some features rotate. For pairs among the first features,
        pass these alone.

    **Returns:**

    The rotated features, in the dtype that `x`, `cos` and `sin` share.

    **Raises:** `ValueError` if the pairs need more features than `x` has.
    """
    pairs, features = cos.shape[-1], x.shape[-1]
    if 2 * pairs > features:
        raise ValueError(
            f"{pairs} angles rotate {2 * pairs} features, but the array has {features} of them."
        )
    if interleaved:
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        a, b = x[..., :pairs], x[..., features // 2 : features // 2 + pairs]
    a, b = a * cos - b * sin, a * sin + b * cos
    rest = jnp.broadcast_to(x, (*a.shape[:-1], features))
    if interleaved:
        rotated = jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], 2 * pairs)
        return jnp.concatenate([rotated, rest[..., 2 * pairs :]], axis=-1)
    middle, end = rest[..., pairs : features // 2], rest[..., features // 2 + pairs :]
    return jnp.concatenate([a, middle, b, end], axis=-1)
