import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


# $e^f \approx 1 + c_1 f + \dots + c_5 f^5$ for $|f| \le \ln(2) / 2$, with the least maximum of the
# relative error, 1e-7. The constant term is exactly 1, so that `exp(0)` is.
_COEFFICIENTS = (
    0.9999997063133542,
    0.49999147841128905,
    0.16667638127245935,
    0.04189815961854771,
    0.008290272112121168,
)

# The higher part of ln 2 has so few bits that its product with an exponent is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4

# Added to an integer n from -127 to 128, this number leaves n + 127 in the lowest bits, which
# shifted to the exponent's place are those of 2^n (0 for -127, and infinity for 128).
_TO_EXPONENT = 1.5 * 2**23 + 127


@jax.custom_jvp
def exp(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `jnp.exp`, in float32 by a polynomial on CPUs.

    The relative error in float32 is below 2.5e-7. Results below the smallest normal number may be
    zero, and those above `2**127.5`, which is 0.7 times the largest number, are infinite; decays
    are at most 1. XLA:CPU needs fewer operations for it than for its own exponential, and splits it
    among the cores already at smaller sizes (docs/speed.md).

    **Arguments:**

    - `z`: an array of any shape.

    **Returns:**

    The exponentials, in the dtype of `z`.
    """
    if z.dtype != jnp.float32:
        return jnp.exp(z)
    return lax.platform_dependent(z, cpu=_polynomial_exp, default=jnp.exp)


@exp.defjvp
def _exp_jvp(
    primals: tuple[Float[Array, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    # The bits of the exponent have no derivative that JAX knows.
    y = exp(*primals)
    return y, tangents[0] * y


def _polynomial_exp(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `2^n e^f`, where `z = n ln(2) + f`."""
    limits = np.array([-127, 128]) * np.log(2)
    z = lax.clamp(np.float32(limits[0]), z, np.float32(limits[1]))
    n = lax.round(z * np.float32(1 / np.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    f = (z - n * np.float32(_LN2_HIGH)) - n * np.float32(_LN2_LOW)
    y = jnp.full_like(z, _COEFFICIENTS[-1])
    for coefficient in (*_COEFFICIENTS[-2::-1], 1.0):
        y = y * f + np.float32(coefficient)
    bits = lax.bitcast_convert_type(n + np.float32(_TO_EXPONENT), jnp.int32)
    return y * lax.bitcast_convert_type(bits << 23, jnp.float32)
