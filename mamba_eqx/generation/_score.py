"""Reading text rather than writing it."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ..models import LanguageModel
from ._prefill import prefill, score_rows
from ._prompts import Mask, Prompts, read_prompts
from ._state import DecodingState


class Score(eqx.Module):
    """What [`mamba_eqx.score`][] returns. For one text there is no batch axis.

    - `log_probs`: the logarithm of the probability that the model gave to each token, from all
        that is before it. 0 for a first token with nothing before it, and after the end of a row.
    - `counts`: for how many tokens of a row that is: their number, or one less.
    - `state`: to go on from here.
    """

    log_probs: Float[np.ndarray, "*batch seq"]
    counts: Int[np.ndarray, "*batch"]
    state: DecodingState

    @property
    def perplexity(self) -> Float[np.ndarray, "*batch"]:
        r"""$\exp(-\frac{1}{n} \sum_t \log p_t)$, for each row; NaN where nothing was counted."""
        total = self.log_probs.sum(axis=-1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.exp(-total / self.counts))


def score(
    model: LanguageModel,
    texts: Prompts,
    *,
    mask: Mask | None = None,
    state: DecodingState | None = None,
) -> Score:
    """How probable each token of a text is for the model.

    Long texts are run in pieces, and the logits of a few tokens at a time are held: memory does
    not grow with the length. To read a document piece by piece yourself, pass the state on; the
    pieces give what the whole gives.

    **Arguments:**

    - `model`, `state`: as for [`mamba_eqx.generate`][].
    - `texts`, `mask`: as the `prompts` and the `mask` there.

    **Returns:** a [`mamba_eqx.generation.Score`][].

    **Raises:** `ValueError` for tokens that the model does not have, or an empty text.
    """
    prompts = read_prompts(model.vocab_size, texts, mask, state)
    end, scored = score_rows(model, prompts, state)
    rows, batched = prompts
    log_probs = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for out, row, found in zip(log_probs, rows, scored, strict=True):
        out[len(row) - len(found) : len(row)] = found
    counts = np.array([len(found) for found in scored])
    if not batched:
        return Score(log_probs[0], counts[0, ...], end)
    return Score(log_probs, counts, end)


def embed(
    model: LanguageModel, texts: Prompts, *, mask: Mask | None = None
) -> Float[Array, "*batch d_model"]:
    """The features of the last token, after `norm_f`: what the model has made of a whole text.

    **Arguments:** as for [`mamba_eqx.score`][].

    **Returns:** the features, one row for each text.
    """
    end = prefill(model, texts, mask=mask, room=1)
    return _last_features(model, end)


@eqx.filter_jit
def _last_features(model: LanguageModel, state: DecodingState) -> Float[Array, "*batch d_model"]:
    def row(state: DecodingState) -> Array:
        return model.backbone_step(state.token, state.layers)[0]

    return (row if state.token.ndim == 0 else jax.vmap(row))(state)
