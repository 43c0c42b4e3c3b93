import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._checks import check_positive, to_python
from ..._dtypes import at_least_float32, default_dtype
from .._initialisers import uniform
from .._recurrence_parameters import FLOAT32
from ._validation import Routing, check_routing


_TINY = 1e-20
"""The official term against a division by zero, if all scores are zero."""


class Routes(eqx.Module):
    """The experts of tokens, as a [`mamba_eqx.layers.Router`][] chooses them."""

    logits: Float[Array, "*seq n_experts"]
    """The products of the tokens with the router's weight."""
    experts: Int[Array, "*seq top_k"]
    """The indices of the chosen experts of every token, the best first."""
    weights: Float[Array, "*seq top_k"]
    """The factors of the chosen experts' outputs."""
    routing: Routing = eqx.field(static=True)
    """How the experts were chosen; see [`mamba_eqx.layers.Router`][]."""

    @property
    def probabilities(self) -> Float[Array, "*seq n_experts"]:
        r"""A distribution over all experts, which a loss can differentiate: the softmax of the
        logits $r$, or $\sigma(r_e) / \sum_j \sigma(r_j)$ with sigmoid routing."""
        if self.routing == "sigmoid":
            scores = jax.nn.sigmoid(self.logits)
            return scores / (jnp.sum(scores, axis=-1, keepdims=True) + _TINY)
        return jax.nn.softmax(self.logits)


class Router(eqx.Module):
    r"""The choice of `top_k` experts for every token of a [`mamba_eqx.MixtureOfExperts`][].

    The logits are $r = W x$. The three kinds of routing in use are

    - `"softmax_of_chosen"` (Mixtral, Granite 4): the experts with the largest logits, whose
        weights are the softmax over these logits alone;
    - `"softmax"` (Switch Transformer, Jamba): the weights are the softmax over all logits, and the
        largest are taken as they are;
    - `"sigmoid"` (DeepSeek-V3, Nemotron 3): the scores are $s = \sigma(r)$. Chosen are the experts
        with the largest $s + b$, where $b$ is `correction_bias`; the weights are their $s$,
        divided by the sum of these if `renormalise`, times `scaling`. With `n_group` groups of
        experts, only experts of the `topk_group` groups are chosen whose two best experts have the
        largest sum of $s + b$.

    Of equal experts, the one with the lowest index is chosen.

    Everything is computed in float32 (float64 if the tokens are), and the parameters stay in
    float32 like those of recurrences (see [`mamba_eqx.cast`][]): where two experts are close, a
    rounding error decides between them. `correction_bias` has no gradient;
    [`mamba_eqx.training.update_correction_bias`][] updates it after a training step.
    """

    weight: Float[Array, "n_experts d_model"] = eqx.field(metadata=FLOAT32)
    correction_bias: Float[Array, " n_experts"] | None = eqx.field(metadata=FLOAT32)
    n_experts: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    routing: Routing = eqx.field(static=True)
    n_group: int = eqx.field(static=True)
    topk_group: int = eqx.field(static=True)
    renormalise: bool = eqx.field(static=True)
    scaling: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        routing: Routing = "softmax_of_chosen",
        n_group: int = 1,
        topk_group: int = 1,
        renormalise: bool = True,
        scaling: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: the number of features of a token.
        - `n_experts`: the number of experts.
        - `top_k`: the number of experts that are chosen for a token.
        - `routing`: how they are chosen; see above.
        - `n_group`, `topk_group`: the number of groups of experts, and of chosen groups.
        - `renormalise`: whether the weights of a token's experts are divided by their sum.
        - `scaling`: a positive number that multiplies the weights.
        - `dtype`: the dtype of the model. The parameters are in float32 if it is narrower.
        - `key`: the random key for the weight, which is uniform within `±1 / sqrt(d_model)`.

        `n_group`, `topk_group`, `renormalise` and `scaling` require `routing="sigmoid"`.

        **Raises:** `ValueError` for values that do not fit together.
        """
        scaling = to_python(scaling)
        check_positive("d_model", d_model)
        check_routing(
            n_experts=n_experts,
            top_k=top_k,
            routing=routing,
            n_group=n_group,
            topk_group=topk_group,
            renormalise=renormalise,
            scaling=scaling,
        )
        dtype = at_least_float32(default_dtype() if dtype is None else dtype)
        self.weight = uniform(key, (n_experts, d_model), bound=d_model**-0.5, dtype=dtype)
        self.correction_bias = jnp.zeros(n_experts, dtype) if routing == "sigmoid" else None
        self.n_experts = n_experts
        self.top_k = top_k
        self.routing = routing
        self.n_group = n_group
        self.topk_group = topk_group
        self.renormalise = renormalise
        self.scaling = float(scaling)

    @jax.named_scope("mamba_eqx.Router")
    def __call__(self, x: Float[Array, "*seq d_model"]) -> Routes:
        """Chooses the experts.

        **Arguments:**

        - `x`: tokens, shape `(..., d_model)`.

        **Returns:**

        The choice, whose logits and weights are in float32 (float64 if an input is).
        """
        dtype = at_least_float32(x, self.weight)
        logits = jnp.matmul(x.astype(dtype), self.weight.astype(dtype).T)
        if self.routing == "softmax_of_chosen":
            chosen, experts = lax.top_k(logits, self.top_k)
            return Routes(logits, experts, jax.nn.softmax(chosen), self.routing)
        if self.routing == "softmax":
            weights, experts = lax.top_k(jax.nn.softmax(logits), self.top_k)
            return Routes(logits, experts, weights, self.routing)
        scores = jax.nn.sigmoid(logits)
        experts = self._best(lax.stop_gradient(scores))
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.renormalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _TINY)
        return Routes(logits, experts, weights * self.scaling, self.routing)

    def _best(self, scores: Float[Array, "*seq n_experts"]) -> Int[Array, "*seq top_k"]:
        """Returns the experts with the largest corrected scores within the best groups."""
        if self.correction_bias is not None:
            scores = scores + lax.stop_gradient(self.correction_bias).astype(scores.dtype)
        if self.topk_group < self.n_group:
            size = self.n_experts // self.n_group
            groups = scores.reshape(*scores.shape[:-1], self.n_group, size)
            ranks = jnp.sum(lax.top_k(groups, 2)[0], axis=-1)
            best = lax.top_k(ranks, self.topk_group)[1]
            allowed = jnp.any(
                best[..., None] == jnp.arange(self.n_group, dtype=best.dtype), axis=-2
            )
            groups = jnp.where(allowed[..., None], groups, -jnp.inf)
            scores = groups.reshape(scores.shape)
        return lax.top_k(scores, self.top_k)[1]
