import enum

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from ._state import DecodingState


class FinishReason(enum.IntEnum):
    """Why a row of a [`mamba_eqx.Generation`][] ended."""

    LENGTH = 0
    """The row has `max_new_tokens` tokens."""
    STOP_TOKEN = 1
    """The row ended with one of the `stop_tokens`."""
    STOP_STRING = 2
    """The last token completed one of the `stop_strings`."""


class Generation(eqx.Module):
    """The result of [`mamba_eqx.generate`][]. For one prompt there is no batch axis.

    - `tokens`: the new token ids, of shape `(rows, max_new_tokens)`, without the prompt. A stop
        token is the last one of its row. Padded with -1, which is no token.
    - `length`: the number of real tokens of each row.
    - `log_probs`: the model's own log-probability of each token among the `vocab_size` tokens, in
        nats, without temperature, filters, penalties and bias. 0 in the padding.
    - `finish`: why each row ended, a [`mamba_eqx.generation.FinishReason`][].
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
