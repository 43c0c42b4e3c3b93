import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wrap(angle: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same angle within half a turn of zero, with the derivative of the identity."""
    return angle - 2 * math.pi * jnp.round(angle / (2 * math.pi))


@jax.custom_jvp
def cos_sin(
    angle: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The cosine and the sine of angles within half a turn of zero.

    By their series, since XLA's CPU backend computes `jnp.cos` one number at a time, ten times as
    slowly (docs/speed.md).
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
    """The sum of `(-1)^i c_i x^i`."""
    total = jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = coefficient - total * x
    return total
