from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from .._dtypes import at_least_float32
from ..layers import Routes


def load_balancing_loss(
    routes: Sequence[Routes],
    mask: Bool[Array | np.ndarray, "*batch"] | Num[Array | np.ndarray, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""Computes how unevenly tokens are distributed over the experts of a model,

    $$E \sum_{e < E} f_e P_e, \qquad
      f_e = \frac{1}{L \sum_i m_i} \sum_{l, i} m_i\, [e \in \mathrm{chosen}_l(i)], \quad
      P_e = \frac{1}{L \sum_i m_i} \sum_{l, i} m_i\, p_{lie},$$

    where $l$ is one of $L$ layers with experts, $i$ is a token of weight $m_i$, and $p$ are
    `probabilities` of [`mamba_eqx.layers.Routes`][]. If all experts are chosen equally often, the
    loss is `top_k`. Only $P$ has a gradient, which lowers the probabilities of the experts that
    were chosen more often than others.

    With sigmoid routing, $p$ are the sigmoids divided by their sum, as in the balance loss of
    DeepSeek-V3. That loss differs in two ways: it is computed for every sequence and layer
    separately, and it is divided by `top_k`.

    Reference: Fedus et al., *Switch Transformers* (2021), equations 4 to 6, as transformers
    computes them (`load_balancing_loss_func`), over all layers together; *DeepSeek-V3 Technical
    Report* (2024), equations 17 to 20.

    **Arguments:**

    - `routes`: the last result of [`mamba_eqx.LanguageModel.backbone_with_routes`][], of a sequence
        or, by `jax.vmap`, of several.
    - `mask`: true where the token counts, not padding; or the weight of each token, at least 0.
        `None` counts all tokens alike.

    **Returns:**

    The loss, a scalar in float32 or wider; 0 if no token counts.

    **Raises:** `ValueError` if there are no routes, two layers differ in the number of experts, or
    the shape of `mask` is not that of the tokens.
    """
    if not routes:
        raise ValueError(
            "`load_balancing_loss` needs the routes of at least one layer, but got none: no block "
            "of the model has a `MixtureOfExperts`."
        )
    numbers = sorted({layer.logits.shape[-1] for layer in routes})
    if len(numbers) > 1:
        raise ValueError(
            "The layers of `load_balancing_loss` must have the same number of experts, but got "
            f"layers of {' and '.join(map(str, numbers))} experts. Add the losses of the layers "
            "instead, one call for each number of experts."
        )
    shape = routes[0].logits.shape[:-1]
    mask = jnp.ones(shape, jnp.bool_) if mask is None else jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(
            f"`mask` must have the shape of the tokens, but got {mask.shape} for routes of shape "
            f"{shape}. Broadcast the mask."
        )
    weights = mask.astype(at_least_float32(routes[0].logits))
    layers = [_totals(layer, weights) for layer in routes]
    chosen, probable = (jnp.sum(jnp.stack(part), axis=0) for part in zip(*layers, strict=True))
    total = len(routes) * jnp.sum(weights)
    total = jnp.where(total == 0, jnp.ones_like(total), total)
    return numbers[0] * jnp.sum((chosen / total) * (probable / total))


def _totals(
    routes: Routes, weights: Float[Array, "*batch"]
) -> tuple[Float[Array, " n_experts"], Float[Array, " n_experts"]]:
    """Returns, for every expert, the weight of the tokens that chose it and its probabilities,
    both summed over the tokens."""
    counts = (weights != 0)[..., None]
    # Zero times NaN is NaN, so NaN in the logits of padding would reach the gradient.
    logits = jnp.where(counts, routes.logits, jnp.zeros_like(routes.logits))
    probabilities = eqx.tree_at(lambda r: r.logits, routes, logits).probabilities
    n_experts = logits.shape[-1]
    experts = jnp.arange(n_experts, dtype=routes.experts.dtype)
    chosen = jnp.any(routes.experts[..., None] == experts, axis=-2)
    axes = tuple(range(weights.ndim))
    weights = weights[..., None]
    return jnp.sum(jnp.where(chosen, weights, 0), axes), jnp.sum(weights * probabilities, axes)
