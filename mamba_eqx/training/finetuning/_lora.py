"""Low-rank adaptation of the linear layers and the embeddings of a model."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._checks import check_positive
from ..._dtypes import at_least_float32
from ..._trees import path_name, paths_with_ends
from ...layers import Linear, QuantizedLinear
from ...models import LanguageModel, linear_maps, with_head


_Model = TypeVar("_Model", bound=PyTree)
_Layer = Linear | eqx.nn.Linear | eqx.nn.Embedding


class LoRAPair(eqx.Module):
    """The two factors of the change of one weight, `scale * b @ a`.

    The leading axes are those that the weight has before its last two, such as the layers of a
    [`mamba_eqx.Stacked`][] or the members of an ensemble.
    """

    a: Float[Array, "*stack rank in_features"]
    """The factor $A$, which is applied to the input first. For an embedding, whose weight has a row
    for each token, `in_features` is the size of a row."""

    b: Float[Array, "*stack out_features rank"]
    """The factor $B$, zero at the start. For an embedding, `out_features` is the number of
    tokens."""


class LoRA(eqx.Module):
    r"""A low-rank adaptation (LoRA): a small trainable change of the linear layers of a model,
    and of its embedding if wanted,

    $$W' = W + \frac{\alpha}{r} B A, \qquad A \in \mathbb{R}^{r \times \text{in}},\;
      B \in \mathbb{R}^{\text{out} \times r}.$$

    The model itself is not changed. Inside the loss, `merge` returns an ordinary model with the
    changed weights, and gradients flow through it into $A$ and $B$:

    ```python
    import jax
    import jax.random as jr
    import mamba_eqx as mbx
    from mamba_eqx.training import LoRA

    config = mbx.LanguageModelConfig(32, (mbx.BlockConfig(mbx.Mamba1Config(16)),))
    model = config.build(key=jr.key(0))
    tokens = jr.randint(jr.key(1), (9,), 0, 32)

    def loss(lora, model):
        log_probs = jax.nn.log_softmax(lora.merge(model)(tokens[:-1]))
        return -log_probs[jax.numpy.arange(8), tokens[1:]].mean()

    lora = LoRA.init(model, rank=8, key=jr.key(2))
    value, grads = jax.value_and_grad(loss)(lora, model)
    ```

    $B$ starts at zero, so at first the merged model equals the model. The pairs are float32 or
    wider, and the sum is rounded to the dtype of the weight. In bfloat16 this rounding would lose
    small changes, so cast a model stored in bfloat16 inside the loss, `lora.merge(mbx.cast(model,
    jnp.float32))`, which costs a copy of its weights.

    The usual design wraps each linear layer and adds $B A x$ to its output. Merging instead needs
    no change to any module and also works for modules that read the `weight` directly, which would
    bypass a wrapper; and the merged model can be saved, scanned and stepped like any other. In
    return it computes the gradients of the merged weights, which a wrapper avoids, though a wrapper
    keeps more for the reverse pass. Measured (`python benchmarks/lora.py`, medians in turns): a
    gradient of the bundled model on 2048 tokens took 1.01 times as long as with wrappers, in 10 %
    less temporary memory; at the width of mamba-130m, with four layers, 1.16 times, in 6 % less.
    Dropout before $A$ is not supported, because merging has no place for it.

    An embedding is changed only if `targets` names it. A head that is tied to it keeps the weight
    that it has, as in PEFT's adapters, so `merge` returns a model with a head of its own. The
    experts and the router of a [`mamba_eqx.MixtureOfExperts`][] are not changed.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models* (2021), section 4.
    """

    pairs: dict[str, LoRAPair]
    """The pair of each layer that is changed, by the path to the layer."""

    scale: float = eqx.field(static=True)
    r"""The factor $\alpha / r$."""

    @classmethod
    def init(
        cls,
        model: PyTree,
        *,
        rank: int,
        alpha: float | int | None = None,
        targets: Sequence[str] | Callable[[str], bool] | None = None,
        key: PRNGKeyArray,
    ) -> "LoRA":
        r"""Initialises the pairs of a model, with $B = 0$.

        **Arguments:**

        - `model`: any pytree that contains [`mamba_eqx.layers.Linear`][] or `equinox.nn.Linear`.
        - `rank`: $r$, at least 1.
        - `alpha`: $\alpha$, above 0; by default `rank`, that is a scale of 1.
        - `targets`: the layers to change, by the ends of their paths, such as `"in_proj"` or
            `"layers.0.mixer.out_proj"`; or a function that returns whether the linear layer at a
            path is changed. By default all linear layers are. An `equinox.nn.Embedding` is changed
            only if one of the names is the end of its path, such as `"embedding"`.
        - `key`: the key of $A$, which is uniform within $\pm 1/\sqrt{\text{in}}$ as in PEFT, and
            standard normal for an embedding.

        **Returns:**

        The `LoRA`, whose merged model equals `model`.

        **Raises:** `ValueError` if no layer is selected, a target matches none, an argument is out
        of range, or the model is quantised.
        """
        check_positive("rank", rank)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"`alpha` must be positive, but got alpha={alpha}.")
        chosen = _select(adaptable_layers(model), targets)
        keys = jr.split(key, len(chosen))
        pairs = {
            path: _new_pair(layer, rank, pair_key)
            for (path, layer), pair_key in zip(chosen.items(), keys, strict=True)
        }
        return cls(pairs, 1.0 if alpha is None else alpha / rank)

    def merge(self, model: _Model) -> _Model:
        """Returns the model with the changed weights, in the dtypes of the model.

        **Arguments:**

        - `model`: the model that the pairs were initialised for, or one of the same structure.

        **Returns:**

        A model of the same structure, shapes and dtypes, except that a head tied to a changed
        embedding is one of its own.

        **Raises:** `ValueError` if the model lacks a layer of the `LoRA`, or has it with another
        shape, or is quantised.
        """
        missing = sorted(self.pairs.keys() - adaptable_layers(model).keys())
        if missing:
            raise ValueError(
                f"The model must have every layer that the LoRA changes, but has none at "
                f"{', '.join(missing)}. Give the model that the LoRA was initialised for (paths in "
                "a `Stacked` differ from those in an `Unrolled`)."
            )

        def merged(path: KeyPath, node: PyTree) -> PyTree:
            name = path_name(path)
            return self._merged(name, node, self.pairs[name]) if name in self.pairs else node

        untied = jax.tree_util.tree_map_with_path(self._untied, model, is_leaf=_is_model)
        return jax.tree_util.tree_map_with_path(merged, untied, is_leaf=_is_adaptable)

    def _untied(self, path: KeyPath, node: PyTree) -> PyTree:
        """Gives a language model with a tied head a head of its own if its embedding is changed."""
        embedding = f"{path_name(path)}.embedding".removeprefix(".")
        if not isinstance(node, LanguageModel) or embedding not in self.pairs:
            return node
        if node.lm_head is not None:
            return node
        return with_head(node, Linear.of(node.embedding.weight))

    def _merged(self, path: str, layer: _Layer, pair: LoRAPair) -> _Layer:
        weight = layer.weight
        change = self.scale * jnp.matmul(pair.b, pair.a)
        if change.shape != weight.shape:
            raise ValueError(
                f"The weight of {path} must have the shape {change.shape} of the LoRA's pair, but "
                f"has shape {weight.shape}. Give the model that the LoRA was initialised for."
            )
        new = (weight.astype(change.dtype) + change).astype(weight.dtype)
        return eqx.tree_at(lambda layer: layer.weight, layer, new)


def adaptable_layers(model: PyTree) -> dict[str, _Layer]:
    """Returns the linear layers and the embeddings of a model by path.

    **Raises:** `ValueError` if the model has quantised layers.
    """
    quantized = [
        p for p, linear in linear_maps(model).items() if isinstance(linear, QuantizedLinear)
    ]
    if quantized:
        raise ValueError(
            "The layers that a LoRA changes must have floating-point weights, but the model is "
            f"quantised ({quantized[0]} and {len(quantized) - 1} more). Initialise and merge the "
            "LoRA with the original model, and quantise the merged model."
        )
    nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_adaptable)
    return {path_name(path): node for path, node in nodes if _is_adaptable(node)}


def _is_adaptable(node: object) -> bool:
    return isinstance(node, _Layer)


def _is_model(node: object) -> bool:
    return isinstance(node, LanguageModel)


def _select(
    layers: dict[str, _Layer], targets: Sequence[str] | Callable[[str], bool] | None
) -> dict[str, _Layer]:
    """Returns the layers that `targets` selects."""
    linears: dict[str, _Layer] = {
        path: layer for path, layer in layers.items() if not isinstance(layer, eqx.nn.Embedding)
    }
    if targets is None:
        found = linears
    elif callable(targets):
        found = {path: linear for path, linear in linears.items() if targets(path)}
    else:
        wanted = paths_with_ends("targets", targets, layers, what="layers that can be changed")
        found = {path: layer for path, layer in layers.items() if path in wanted}
    if not found:
        raise ValueError(
            "`targets` must select at least one layer, but selects none. The model has "
            f"{', '.join(linears) or 'no linear layers'}."
        )
    return found


def _new_pair(layer: _Layer, rank: int, key: PRNGKeyArray) -> LoRAPair:
    *stack, out_features, in_features = layer.weight.shape
    dtype, shape = at_least_float32(layer.weight), (*stack, rank, in_features)
    if isinstance(layer, eqx.nn.Embedding):
        a = jr.normal(key, shape, dtype)
    else:
        bound = in_features**-0.5
        a = jr.uniform(key, shape, dtype, -bound, bound)
    return LoRAPair(a=a, b=jnp.zeros((*stack, out_features, rank), dtype))
