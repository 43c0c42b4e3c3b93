import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .. import ops
from .._checks import check_flag, check_positive
from .._dtypes import default_dtype
from ._arguments import check_token, checked_sequence, checked_state
from ._initialisers import uniform
from ._protocol import AbstractSequenceLayer, Length, Reset


class CausalConv1d(AbstractSequenceLayer[Float[Array, "lag {self.d_model}"]]):
    r"""A depthwise convolution over the current token and the `d_conv - 1` tokens before it,

    $$y_t = b + \sum_{k=0}^{K-1} w_k \odot x_{t-(K-1)+k}, \qquad K = \texttt{d\_conv}.$$

    The state is an array of the last `d_conv - 1` inputs, oldest first. This is the short
    convolution of the Mamba mixers (official `causal_conv1d`), and can be used as a layer by
    itself.
    """

    weight: Float[Array, "{self.d_conv} {self.d_model}"]
    bias: Float[Array, " {self.d_model}"] | None
    d_model: int = eqx.field(static=True)
    d_conv: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: the number of channels.
        - `d_conv`: the number of taps, including the current token.
        - `use_bias`: whether to add a bias.
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial weight and bias, uniform within
            `±1/sqrt(d_conv)`.

        **Raises:** `ValueError` if a size is not a positive integer, or `use_bias` is not a bool.
        """
        check_positive("d_model", d_model)
        check_positive("d_conv", d_conv)
        check_flag("use_bias", use_bias)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        weight_key, bias_key = jr.split(key)
        bound = d_conv**-0.5
        self.weight = uniform(weight_key, (d_conv, d_model), bound=bound, dtype=dtype)
        self.bias = uniform(bias_key, (d_model,), bound=bound, dtype=dtype) if use_bias else None
        self.d_model = d_model
        self.d_conv = d_conv

    def init_state(self, *, max_len: int | None = None) -> Float[Array, "lag {self.d_model}"]:
        """Returns zeros of shape `(d_conv - 1, d_model)`. `max_len` is ignored."""
        return jnp.zeros((self.d_conv - 1, self.d_model), self.weight.dtype)

    @jax.named_scope("mamba_eqx.CausalConv1d.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: Float[Array, "lag {self.d_model}"] | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], Float[Array, "lag {self.d_model}"]]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("CausalConv1d", self.d_model, x, reset, length)
        y, end = ops.causal_conv1d(
            x.astype(self.weight.dtype),
            self.weight,
            self.bias,
            state=checked_state(self, state),
            reset=reset,
            length=length,
        )
        return y.astype(x.dtype), end

    @jax.named_scope("mamba_eqx.CausalConv1d.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: Float[Array, "lag {self.d_model}"]
    ) -> tuple[Float[Array, " {self.d_model}"], Float[Array, "lag {self.d_model}"]]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("CausalConv1d", self.d_model, x)
        state = checked_state(self, state)
        y, state = ops.causal_conv1d_step(
            x.astype(self.weight.dtype), self.weight, self.bias, state=state
        )
        return y.astype(x.dtype), state
