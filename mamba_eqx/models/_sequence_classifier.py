import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, PRNGKeyArray, PyTree

from .._checks import check_positive
from .._dtypes import at_least_float32
from ..layers import AbstractLinear, Length, Linear, Reset
from ._language_model import LanguageModel


class SequenceClassifier(eqx.Module):
    r"""A classifier of token sequences: a language model without its head, and a linear map from
    the features of the last real token to the logits of the classes.

    $$\text{logits} = W h_{n - 1}, \qquad h = \text{backbone}(\text{tokens})$$

    where $n$ is the number of real tokens. In a causal model, only the last token has heard all
    others. Padding on the right is exact: `length` is $n$, and what the padding holds has no
    effect.

    ```python
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import mamba_eqx as mbx

    model = mbx.from_pretrained(mbx.SHIPPED)
    classifier = mbx.SequenceClassifier(model, n_classes=3, key=jr.key(0))
    tokens = jnp.zeros((2, 5), jnp.int32)
    logits = jax.vmap(classifier)(tokens, length=jnp.array([5, 3]))  # (2, 3)
    ```

    A text can also be given in pieces, or token by token, as it arrives. `scan` and `step` return
    the logits that the text would have if it ended at each token, and the state to continue from.
    They obey the laws of sequence layers; see [`mamba_eqx.AbstractSequenceLayer`][]. (A call does
    not: it returns the logits of one token, not of all.)

    The head is that of transformers' `JambaForSequenceClassification` and others, under the same
    name. transformers takes the last token that differs from `pad_token_id` for the last real one,
    so that a text that ends in this token is cut there. Here `length` alone decides.
    """

    backbone: LanguageModel
    """The language model, without a head of its own."""

    score: AbstractLinear
    """The linear map to the logits of the classes, without a bias."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        n_classes: int,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `model`: the language model, new or pretrained. Its head is left out; a tied embedding
            stays.
        - `n_classes`: the number of classes, at least 1. (A single logit can be that of a
            regression, or of one of two classes.)
        - `dtype`: the dtype of the weight of `score`; by default that of the embedding.
        - `key`: the random key for the weight of `score`, uniform within `±1/sqrt(d_model)`.

        **Raises:** `ValueError` if `model` is not a language model, or `n_classes` is not a
        positive integer.
        """
        if not isinstance(model, LanguageModel):
            raise ValueError(
                f"`model` must be a `LanguageModel`, but got {type(model).__name__}. For other "
                "models, apply a `Linear` to the output of the last real token."
            )
        check_positive("n_classes", n_classes)
        dtype = model.embedding.weight.dtype if dtype is None else dtype
        self.backbone = eqx.tree_at(
            lambda model: model.lm_head, model, None, is_leaf=lambda node: node is None
        )
        self.score = Linear(model.d_model, n_classes, use_bias=False, dtype=dtype, key=key)

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return self.score.weight.shape[-2]

    @property
    def d_model(self) -> int:
        """The number of features of the residual stream."""
        return self.backbone.d_model

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """Returns the state of the empty past.

        **Arguments:**

        - `max_len`: the maximum number of tokens that will be run from this state. Layers with a
            cache need it; state-space models ignore it.

        **Returns:**

        The initial state of the layers.
        """
        return self.backbone.init_state(max_len=max_len)

    def __call__(
        self,
        tokens: Integer[Array, " seq"],
        *,
        length: Length = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " {self.n_classes}"]:
        """Classifies a whole sequence.

        **Arguments:**

        - `tokens`: token ids within `0..vocab_size - 1`, an integer array of shape `(seq,)`.
        - `length`: the number of real tokens, within `1..seq`; the rest is padding. By default all
            are real.
        - `key`: ignored; accepted for compatibility with other Equinox modules.

        **Returns:**

        The logits of the classes, an array of shape `(n_classes,)`, at least in float32. A traced
        `length` of 0 cannot be refused, and gives NaN.

        **Raises:** `ValueError` if there is no real token, or an argument has the wrong shape or
        dtype.
        """
        features, _ = self.backbone.backbone(tokens, length=length)
        seq = tokens.shape[0]
        known = length is None or isinstance(length, int | np.integer)
        if seq == 0 or (known and length == 0):
            raise ValueError(
                "`SequenceClassifier` must be given at least one real token, but got "
                f"{seq} tokens and length={length}. Leave empty texts out."
            )
        if length is None:
            return self._logits(features[-1])
        count = jnp.asarray(length)
        logits = self._logits(features[jnp.maximum(count - 1, 0)])
        return logits if known else jnp.where(count > 0, logits, jnp.nan)

    @jax.named_scope("mamba_eqx.SequenceClassifier.scan")
    def scan(
        self,
        tokens: Integer[Array, " seq"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.n_classes}"], PyTree]:
        """Runs a piece of a sequence.

        **Arguments:**

        - `tokens`: token ids within `0..vocab_size - 1`, an integer array of shape `(seq,)`.
        - `state`, `reset`, `length`: see [`mamba_eqx.AbstractSequenceLayer.scan`][].

        **Returns:**

        The logits of the classes if the text ended at each token, an array of shape
        `(seq, n_classes)`, at least in float32; and the state after the last real token. With
        several documents in one sequence, those at the last token of each are the documents'.

        **Raises:** `ValueError` if an argument has the wrong shape or dtype.
        """
        features, state = self.backbone.backbone(tokens, state, reset=reset, length=length)
        return self._logits(features), state

    @jax.named_scope("mamba_eqx.SequenceClassifier.step")
    def step(
        self, token: Integer[Array, ""], state: PyTree
    ) -> tuple[Float[Array, " {self.n_classes}"], PyTree]:
        """Runs one token.

        **Arguments:**

        - `token`: a token id within `0..vocab_size - 1`, of shape `()`.
        - `state`: the state after the tokens before `token`.

        **Returns:**

        The logits of the classes if the text ended here, an array of shape `(n_classes,)`, at least
        in float32; and the state after `token`.

        **Raises:** `ValueError` if an argument has the wrong shape or dtype.
        """
        features, state = self.backbone.backbone_step(token, state)
        return self._logits(features), state

    def _logits(self, features: Float[Array, "*seq d_model"]) -> Float[Array, "*seq n_classes"]:
        return self.score(features, dtype=at_least_float32(self.score.dtype))
