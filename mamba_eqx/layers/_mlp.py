import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_flag, check_positive
from .._dtypes import default_dtype
from ._linear import Linear


class GatedMLP(eqx.Module):
    r"""A gated feed-forward network, applied to every token separately,

    $$a, g = W_1 x, \qquad \text{out} = W_2 (a \odot \mathrm{SiLU}(g)).$$

    `fc1` emits `[a, g]`, with the gate $g$ last, as in the official
    `mamba_ssm.modules.mlp.GatedMLP`.
    """

    fc1: Linear
    fc2: Linear

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        bias: bool = False,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_intermediate`: the hidden width. (The official class rounds the width up to a
            multiple of 128.)
        - `bias`: whether `fc1` and `fc2` have a bias.
        - `residual_scale`: multiplies the initial weight of `fc2`; see [`mamba_eqx.Mamba1`][].
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, or `bias` is not a bool.
        """
        check_positive("d_model", d_model)
        check_positive("d_intermediate", d_intermediate)
        check_flag("bias", bias)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        fc1_key, fc2_key = jr.split(key)
        self.fc1 = Linear(d_model, 2 * d_intermediate, use_bias=bias, dtype=dtype, key=fc1_key)
        self.fc2 = Linear(
            d_intermediate, d_model, use_bias=bias, dtype=dtype, scale=residual_scale, key=fc2_key
        )

    @jax.named_scope("mamba_eqx.GatedMLP")
    def __call__(
        self, x: Float[Array, "*seq d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq d_model"]:
        """Applies the network.

        **Arguments:**

        - `x`: one token of shape `(d_model,)`, or tokens of shape `(..., d_model)`.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.

        **Returns:**

        An array of the same shape and dtype.
        """
        a, g = jnp.split(self.fc1(x.astype(self.fc1.weight.dtype)), 2, axis=-1)
        return self.fc2(a * jax.nn.silu(g)).astype(x.dtype)
