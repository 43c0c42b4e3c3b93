import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._checks import check_flag, check_positive
from ..._dtypes import default_dtype
from .._linear import AbstractLinear, Linear
from ._protocol import AbstractMLP


class MLP(AbstractMLP):
    r"""A feed-forward network with a squared ReLU, applied to every token separately,

    $$\text{out} = W_2 \max(W_1 x, 0)^2.$$

    Reference: So et al., *Primer: Searching for Efficient Transformers for Language Modeling*
    (2021); the MLP of Nemotron-H.
    """

    fc1: AbstractLinear
    fc2: AbstractLinear
    d_model: int = eqx.field(static=True)
    d_intermediate: int = eqx.field(static=True)

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
        - `d_intermediate`: the hidden width.
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
        self.fc1 = Linear(d_model, d_intermediate, use_bias=bias, dtype=dtype, key=fc1_key)
        self.fc2 = Linear(
            d_intermediate, d_model, use_bias=bias, dtype=dtype, scale=residual_scale, key=fc2_key
        )
        self.d_model = d_model
        self.d_intermediate = d_intermediate

    @jax.named_scope("mamba_eqx.MLP")
    def __call__(
        self, x: Float[Array, "*seq {self.d_model}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractMLP`][]."""
        hidden = jax.nn.relu(self.fc1(x))
        return self.fc2(hidden * hidden).astype(x.dtype)
