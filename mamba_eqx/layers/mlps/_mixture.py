import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ... import ops
from ..._checks import check_positive, to_python
from ..._dtypes import default_dtype
from ..._explicit_axes import with_derived_shardings
from .._initialisers import uniform
from .._linear import AbstractLinear, Linear
from ._gated_mlp import GatedMLP
from ._mlp import MLP
from ._protocol import AbstractMLP
from ._router import Router, Routes
from ._validation import Routing, check_mixture


class MixtureOfExperts(AbstractMLP):
    r"""A feed-forward network in which a router chooses a few of many experts for every token,

    $$\text{out} = W_\text{out} \sum_{e \in \text{chosen}(x)} w_e(x)\,
        \mathrm{expert}_e(W_\text{in} x) + \mathrm{shared}(x).$$

    An expert is a [`mamba_eqx.GatedMLP`][], or a [`mamba_eqx.MLP`][] if not `gated`. See
    [`mamba_eqx.layers.Router`][] for the choice and for the weights $w_e$. The shared expert, which
    all tokens have, and the projections to and from a smaller space for the experts
    ($W_\text{in}$ and $W_\text{out}$) are optional.

    Only the chosen experts are computed, and no token is dropped. The tokens are sorted by expert,
    and [`mamba_eqx.ops.grouped_product`][] multiplies each expert's weight by the tokens that chose
    it. A single token reads the weights of its experts only. Which other tokens an expert has may
    change the rounding of a token's output, and nothing else.

    Reference: Shazeer et al., *Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer* (2017); the `MoE` classes of Granite 4, Jamba and Nemotron 3 in
    transformers.
    """

    router: Router
    fc1_latent: AbstractLinear | None
    fc1: Float[Array, "n_experts fc1_features d_expert"]
    fc2: Float[Array, "n_experts d_expert d_intermediate"]
    fc2_latent: AbstractLinear | None
    shared: GatedMLP | MLP | None
    d_model: int = eqx.field(static=True)
    d_intermediate: int = eqx.field(static=True)
    gated: bool = eqx.field(static=True)
    d_latent: int | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        n_experts: int,
        top_k: int,
        routing: Routing = "softmax_of_chosen",
        n_group: int = 1,
        topk_group: int = 1,
        renormalise: bool = True,
        scaling: float = 1.0,
        gated: bool = True,
        d_shared: int | None = None,
        d_latent: int | None = None,
        residual_scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: the number of features of the input and the output.
        - `d_intermediate`: the hidden width of an expert.
        - `n_experts`: the number of experts.
        - `top_k`: the number of experts that are chosen for a token.
        - `routing`, `n_group`, `topk_group`, `renormalise`, `scaling`: how experts are chosen and
            weighted; see [`mamba_eqx.layers.Router`][].
        - `gated`: whether experts are gated with SiLU, rather than ungated with a squared ReLU.
        - `d_shared`: the hidden width of the shared expert; `None` for no shared expert.
        - `d_latent`: the number of features of the space in which the experts compute; `None` for
            `d_model` and no projections.
        - `residual_scale`: multiplies the initial weights of the last linear maps; see
            [`mamba_eqx.Mamba1`][].
        - `dtype`: the dtype of the parameters, except for the router's, which are in float32 at
            least; float32 by default (float64 in JAX's 64-bit mode).
        - `key`: the random key for the initial parameters.

        **Raises:** `ValueError` for values that do not fit together.
        """
        scaling = to_python(scaling)
        check_positive("d_model", d_model)
        check_mixture(
            d_intermediate=d_intermediate,
            n_experts=n_experts,
            top_k=top_k,
            routing=routing,
            n_group=n_group,
            topk_group=topk_group,
            renormalise=renormalise,
            scaling=scaling,
            gated=gated,
            d_shared=d_shared,
            d_latent=d_latent,
        )
        dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
        router_key, fc1_key, fc2_key, shared_key, in_key, out_key = jr.split(key, 6)
        self.router = Router(
            d_model,
            n_experts,
            top_k,
            routing=routing,
            n_group=n_group,
            topk_group=topk_group,
            renormalise=renormalise,
            scaling=scaling,
            dtype=dtype,
            key=router_key,
        )
        d_expert = d_model if d_latent is None else d_latent
        fc1_shape = (n_experts, d_intermediate * (2 if gated else 1), d_expert)
        fc2_shape = (n_experts, d_expert, d_intermediate)
        fc2_bound = d_intermediate**-0.5 * (residual_scale if d_latent is None else 1)
        self.fc1 = uniform(fc1_key, fc1_shape, bound=d_expert**-0.5, dtype=dtype)
        self.fc2 = uniform(fc2_key, fc2_shape, bound=fc2_bound, dtype=dtype)
        if d_latent is None:
            self.fc1_latent = self.fc2_latent = None
        else:
            self.fc1_latent = Linear(d_model, d_latent, use_bias=False, dtype=dtype, key=in_key)
            self.fc2_latent = Linear(
                d_latent, d_model, use_bias=False, scale=residual_scale, dtype=dtype, key=out_key
            )
        if d_shared is None:
            self.shared = None
        else:
            self.shared = (GatedMLP if gated else MLP)(
                d_model, d_shared, residual_scale=residual_scale, dtype=dtype, key=shared_key
            )
        self.d_model = d_model
        self.d_intermediate = d_intermediate
        self.gated = gated
        self.d_latent = d_latent

    @jax.named_scope("mamba_eqx.MixtureOfExperts")
    def __call__(
        self, x: Float[Array, "*seq {self.d_model}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractMLP`][]."""
        return self.with_routes(x)[0]

    def with_routes(
        self, x: Float[Array, "*seq {self.d_model}"]
    ) -> tuple[Float[Array, "*seq {self.d_model}"], Routes]:
        """Applies the map, and returns the choice of the router too.

        **Arguments:**

        - `x`: tokens, shape `(..., d_model)`.

        **Returns:**

        An array of the same shape and dtype, and the choice of experts for every token.
        """
        routes = self.router(x)
        tokens = x.astype(self.fc1.dtype)
        latent = tokens if self.fc1_latent is None else self.fc1_latent(tokens)
        experts = lambda x, routes, self: self._experts(x, routes)
        y = with_derived_shardings(experts, latent, routes, self)
        y = y if self.fc2_latent is None else self.fc2_latent(y)
        y = y if self.shared is None else y + self.shared(tokens)
        return y.astype(x.dtype), routes

    def _experts(
        self, x: Float[Array, "*seq d_expert"], routes: Routes
    ) -> Float[Array, "*seq d_expert"]:
        """Returns the weighted sum of the chosen experts' outputs."""
        n_experts, top_k = self.fc1.shape[0], self.router.top_k
        tokens = x.reshape(-1, x.shape[-1])
        experts = routes.experts.reshape(-1)
        weights = routes.weights.reshape(-1, top_k, 1)
        # One row for each token and expert, sorted by expert.
        order = jnp.argsort(experts, stable=True)
        rank = jnp.argsort(order)
        chose = experts[:, None] == jnp.arange(n_experts, dtype=jnp.int32)
        sizes = jnp.sum(chose, axis=0, dtype=jnp.int32)
        hidden = ops.grouped_product(tokens[order // top_k], sizes, self.fc1)
        if self.gated:
            a, g = jnp.split(hidden, 2, axis=-1)
            hidden = a * jax.nn.silu(g)
        else:
            hidden = jax.nn.relu(hidden)
            hidden = hidden * hidden
        rows = ops.grouped_product(hidden, sizes, self.fc2)
        # Every token sums in the order of its choice, so that other tokens do not affect rounding.
        rows = rows[rank].reshape(-1, top_k, rows.shape[-1]).astype(weights.dtype)
        return jnp.sum(weights * rows, axis=1).astype(x.dtype).reshape(x.shape)
