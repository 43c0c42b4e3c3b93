"""The factor that keeps the gradients of a float16 model from underflow."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


_INITIAL = 2.0**16
_GROWTH_INTERVAL = 2000


class LossScale(eqx.Module):
    """The factor of the loss while the gradient of a float16 model is computed.

    The smallest positive number of float16 is `6e-8`, and smaller gradients are zero. The gradient
    of the loss times a large factor is not, and is divided by the factor in float32 afterwards. The
    factor is doubled after 2000 finite steps in a row. A step whose gradient is not finite is
    skipped, and halves the factor, to 1 at least.

    Reference: Micikevicius et al., *Mixed Precision Training* (2018), section 3.2. The rules are
    those of torch's `GradScaler`, apart from the least factor.
    """

    scale: Float[Array, ""]
    """The factor, a power of two, so that multiplying by the factor does not round."""

    finite_steps: Int[Array, ""]
    """The number of finite steps in a row since the factor changed."""

    @staticmethod
    def init() -> "LossScale":
        """Returns the factor of the first step, `2**16`."""
        return LossScale(jnp.asarray(_INITIAL, jnp.float32), jnp.zeros((), jnp.int32))

    def next(self, finite: Bool[Array, ""]) -> "LossScale":
        """Returns the factor of the next step.

        **Arguments:**

        - `finite`: whether the loss and the gradient of this step are finite.
        """
        steps = self.finite_steps + 1
        grows = finite & (steps == _GROWTH_INTERVAL)
        larger = jnp.where(jnp.isfinite(self.scale * 2), self.scale * 2, self.scale)
        scale = jnp.where(grows, larger, self.scale)
        scale = jnp.where(finite, scale, jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(finite & ~grows, steps, jnp.zeros_like(steps)))
