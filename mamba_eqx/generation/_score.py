"""Running a model over given text: log-probabilities and embeddings."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ..models import LanguageModel
from ._prefill import prefill, score_rows
from ._prompts import Mask, Prompts, read_prompts
from ._state import DecodingState


class Score(eqx.Module):
    """The result of [`mamba_eqx.score`][]. For one text there is no batch axis.

    - `log_probs`: the log-probability of each token given all tokens before it, in nats, of shape
        `(rows, seq)`. 0 for a first token without a `state`, and after the end of a row.
    - `length`: the number of scored tokens of each row, of shape `(rows,)`: all its tokens, or all
        but the first.
    - `state`: the state after these texts, to continue from.
    """

    log_probs: Float[np.ndarray, "*batch seq"]
    length: Int[np.ndarray, "*batch"]
    state: DecodingState

    @property
    def perplexity(self) -> Float[np.ndarray, "*batch"]:
        r"""$\exp(-\frac{1}{n} \sum_t \log p_t)$ of each row, over its $n$ scored tokens. NaN if no
        token was scored."""
        total = self.log_probs.sum(axis=-1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.exp(-total / self.length))


def score(
    model: LanguageModel,
    texts: Prompts,
    *,
    mask: Mask | None = None,
    state: DecodingState | None = None,
) -> Score:
    """Computes the log-probability of each token under the model.

    Long texts are run in chunks, and logits are computed for a few tokens at a time, so that memory
    does not grow with the length of a text (except for the caches of [`mamba_eqx.Attention`][]). A
    document can also be scored piece by piece, each with the `state` of the piece before it; the
    result is the same.

    **Arguments:**

    - `model`: the model.
    - `texts`: one sequence of token ids; a list of sequences, of any lengths; or an array of shape
        `(rows, seq)`.
    - `mask`: for an array of texts with padding to the left or to the right: a boolean array of
        shape `(rows, seq)`, true for real tokens.
    - `state`: the state that the texts follow, instead of the empty past. The first token of each
        text is then scored as well.

    **Returns:**

    A [`mamba_eqx.generation.Score`][], with an axis of rows unless `texts` is one
    sequence.

    **Raises:** `ValueError` for token ids outside the vocabulary, or for an empty text without a
    `state`.
    """
    rows = read_prompts(model.vocab_size, texts, mask, state)
    scored = score_rows(model, rows, state)
    log_probs = np.zeros((len(rows.tokens), max(map(len, rows.tokens))), np.float32)
    for out, row, found in zip(log_probs, rows.tokens, scored.log_probs, strict=True):
        out[len(row) - len(found) : len(row)] = found
    length = np.array([len(found) for found in scored.log_probs])
    if not rows.batched:
        return Score(log_probs[0], length[0, ...], scored.state)
    return Score(log_probs, length, scored.state)


def embed(
    model: LanguageModel, texts: Prompts, *, mask: Mask | None = None
) -> Float[Array, "*batch d_model"]:
    """Computes an embedding of each text: the features of its last token, after `norm_f`.

    **Arguments:**

    - `model`: the model.
    - `texts`: one sequence of token ids; a list of sequences, of any lengths; or an array of shape
        `(rows, seq)`.
    - `mask`: for an array of texts with padding to the left or to the right: a boolean array of
        shape `(rows, seq)`, true for real tokens.

    **Returns:**

    The features, of shape `(rows, d_model)`, or `(d_model,)` for one text.

    **Raises:** `ValueError` for token ids outside the vocabulary, or for an empty text.
    """
    end = prefill(model, texts, mask=mask, room=1)
    return _last_features(model, end)


@eqx.filter_jit
def _last_features(model: LanguageModel, state: DecodingState) -> Float[Array, "*batch d_model"]:
    def features(state: DecodingState) -> Array:
        return model.backbone_step(state.token, state.layers)[0]

    return (features if state.token.ndim == 0 else jax.vmap(features))(state)
