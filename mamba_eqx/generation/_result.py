import enum

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from ._state import DecodingState


class FinishReason(enum.IntEnum):
    """The reason why a row of a [`mamba_eqx.Generation`][] ended."""

    LENGTH = 0
    """The row has `max_new_tokens` tokens."""
    STOP_TOKEN = 1
    """The row ended with one of the `stop_tokens`."""
    STOP_STRING = 2
    """The last token completed one of the `stop_strings`."""


class Generation(eqx.Module):
    """The result of [`mamba_eqx.generate`][]. For one prompt there is no batch axis.

    - `tokens`: the new token ids, of shape `(rows, max_new_tokens)`, without the prompt. A stop
        token is included, as the last token of its row. Padded with -1, which is not a token
        id.
    - `length`: the number of real tokens of each row, of shape `(rows,)`.
    - `log_probs`: the model's own log-probability of each token among the `vocab_size` tokens, in
        nats, before penalties, bias, temperature and filters. Of shape `(rows, max_new_tokens)`; 0
        in the padding.
    - `finish`: why each row ended, of shape `(rows,)`: values of
        [`mamba_eqx.generation.FinishReason`][].
    - `state`: the state after these tokens. `generate(model, None, n, state=generation.state)`
        continues from it.
    """

    tokens: Int[Array, "*batch new"]
    length: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    finish: Int[Array, "*batch"]
    state: DecodingState

    @property
    def stopped(self) -> Bool[Array, "*batch"]:
        """Whether a row ended before `max_new_tokens`, with a stop token or a stop string."""
        return self.finish != FinishReason.LENGTH
