import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._checks import check_flag, check_positive, positive_float
from ..._dtypes import default_dtype
from .._gate import gated
from .._linear import AbstractLinear, Linear
from .._scaled import scaled
from ._protocol import AbstractMLP


class GatedMLP(AbstractMLP):
    r"""A gated feed-forward network, applied to every token separately,

    $$a, g = W_1 x, \qquad
      \text{out} = \beta\, W_2 (a \odot \mathrm{SiLU}(\alpha g)),$$

    where $\alpha$ and $\beta$ are the numbers `gate_multiplier` and `out_multiplier`, 1 except in
    models like Falcon-H1. `fc1` emits `[a, g]`, with the gate $g$ last, as in the official
    `mamba_ssm.modules.mlp.GatedMLP`.
    """

    fc1: AbstractLinear
    fc2: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_intermediate: int = eqx.field(static=True)
    gate_multiplier: float = eqx.field(static=True)
    out_multiplier: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        bias: bool = False,
        gate_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_intermediate`: the hidden width. (The official class rounds the width up to a
            multiple of 128.)
        - `bias`: whether `fc1` and `fc2` have a bias.
        - `gate_multiplier`: a positive number that multiplies the gate.
        - `out_multiplier`: a positive number that multiplies the output.
        - `residual_scale`: multiplies the initial weight of `fc2`; see [`mamba_eqx.Mamba1`][].
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` if a size is not a positive integer, `bias` is not a bool, or a
        multiplier is not a positive number.
        """
        check_positive("d_model", d_model)
        check_positive("d_intermediate", d_intermediate)
        check_flag("bias", bias)
        self.gate_multiplier = positive_float("gate_multiplier", gate_multiplier)
        self.out_multiplier = positive_float("out_multiplier", out_multiplier)
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        fc1_key, fc2_key = jr.split(key)
        self.fc1 = Linear(d_model, 2 * d_intermediate, use_bias=bias, dtype=dtype, key=fc1_key)
        self.fc2 = Linear(
            d_intermediate, d_model, use_bias=bias, dtype=dtype, scale=residual_scale, key=fc2_key
        )
        self.d_model = d_model
        self.d_intermediate = d_intermediate

    @jax.named_scope("mamba_eqx.GatedMLP")
    def __call__(
        self, x: Float[Array, "*seq {self.d_model}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractMLP`][]."""
        a, g = jnp.split(self.fc1(x), 2, axis=-1)
        y = self.fc2(gated(a, scaled(g, self.gate_multiplier)))
        return scaled(y, self.out_multiplier).astype(x.dtype)
