from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree

from .._checks import check_positive_number
from .._dtypes import at_least_float32
from ..layers import Router, Routes, Stacked


Model = TypeVar("Model", bound=PyTree)


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
    weights = _weights(routes[0], mask)
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
    axes = tuple(range(weights.ndim))
    return _loads(routes, weights), jnp.sum(weights[..., None] * probabilities, axes)


def update_correction_bias(
    model: Model,
    routes: Sequence[Routes],
    mask: Bool[Array | np.ndarray, "*batch"] | Num[Array | np.ndarray, "*batch"] | None = None,
    *,
    rate: float = 0.001,
) -> Model:
    r"""Moves the `correction_bias` of every router towards the experts that got few tokens,

    $$b_e \leftarrow b_e + u\, \mathrm{sign}(\bar c - c_e),$$

    where $c_e$ is the number of tokens that chose expert $e$, $\bar c$ its mean over the experts of
    the layer, and $u$ is `rate`. Called after every training step, this balances the experts of
    models with sigmoid routing without a loss, so that no gradient works against that of the text.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*
    (2024), algorithm 1; used by DeepSeek-V3 and Nemotron 3.

    **Arguments:**

    - `model`: a model, or a [`mamba_eqx.MixtureOfExperts`][].
    - `routes`: the last result of [`mamba_eqx.LanguageModel.backbone_with_routes`][] of the model,
        of a sequence or, by `jax.vmap`, of several.
    - `mask`: true where the token counts, not padding; or the weight of each token, at least 0.
        `None` counts all tokens alike.
    - `rate`: the change of a bias in one call, above 0.

    **Returns:**

    The model with new biases. Routers with softmax routing have none, and keep their parameters.

    **Raises:** `ValueError` if `rate` is not positive and finite, no router has a
    `correction_bias`, there is not one entry of `routes` for every router, or the shape of `mask`
    is not that of the tokens.
    """
    check_positive_number("rate", rate)
    is_router = lambda node: isinstance(node, Router)
    found = [node for node in jax.tree.leaves(model, is_leaf=is_router) if is_router(node)]
    if all(router.correction_bias is None for router in found):
        raise ValueError(
            "`update_correction_bias` needs a router with a `correction_bias`, but the model has "
            'none. Use experts with routing="sigmoid", or `load_balancing_loss`.'
        )
    places, count = _places_of_routes(model)
    if len(routes) != count:
        raise ValueError(
            "`routes` must have one entry for every router of the model, in their order, but got "
            f"{len(routes)} entries for {count} routers. Pass the last result of "
            "`model.backbone_with_routes`."
        )
    biases: list[Array | None] = []
    for router, own in zip(found, places, strict=True):
        bias = router.correction_bias
        if bias is not None:
            layers = [routes[place] for place in own]
            loads = jnp.stack([_loads(layer, _weights(layer, mask)) for layer in layers])
            error = jnp.mean(loads, axis=-1, keepdims=True) - loads
            bias = bias + jnp.asarray(rate, bias.dtype) * jnp.sign(error).astype(
                bias.dtype
            ).reshape(bias.shape)
        biases.append(bias)
    new = iter(biases)

    def updated(node: PyTree) -> PyTree:
        if not is_router(node):
            return node
        bias = next(new)
        return node if bias is None else eqx.tree_at(lambda r: r.correction_bias, node, bias)

    return jax.tree.map(updated, model, is_leaf=is_router)


def _places_of_routes(tree: PyTree) -> tuple[list[list[int]], int]:
    """Returns the places of the routes of every router, and the number of all routes.

    The router of a `Stacked` has one route for each layer. Between them are those of the layer's
    other routers.
    """
    places: list[list[int]] = []
    count = 0
    is_node = lambda node: isinstance(node, Router | Stacked)
    for node in jax.tree.leaves(tree, is_leaf=is_node):
        if isinstance(node, Router):
            places.append([count])
            count += 1
        elif isinstance(node, Stacked):
            inner, each = _places_of_routes(node.layers)
            starts = [count + i * each for i in range(node.n_layer)]
            places += [[start + place for start in starts for place in own] for own in inner]
            count += node.n_layer * each
    return places, count


def _weights(
    routes: Routes,
    mask: Bool[Array | np.ndarray, "*batch"] | Num[Array | np.ndarray, "*batch"] | None,
) -> Float[Array, "*batch"]:
    """Returns the weight of every token, after checking the shape of the mask."""
    shape = routes.logits.shape[:-1]
    mask = jnp.ones(shape, jnp.bool_) if mask is None else jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(
            f"`mask` must have the shape of the tokens, but got {mask.shape} for routes of shape "
            f"{shape}. Broadcast the mask."
        )
    return mask.astype(at_least_float32(routes.logits))


def _loads(routes: Routes, weights: Float[Array, "*batch"]) -> Float[Array, " n_experts"]:
    """Returns the weight of the tokens that chose each expert."""
    experts = jnp.arange(routes.logits.shape[-1], dtype=routes.experts.dtype)
    chosen = jnp.any(routes.experts[..., None] == experts, axis=-2)
    return jnp.sum(jnp.where(chosen, weights[..., None], 0), tuple(range(weights.ndim)))
