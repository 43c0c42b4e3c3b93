import enum

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from ._state import DecodingState


class FinishReason(enum.IntEnum):
    """Why a row of a [`mamba_eqx.Generation`][] ended."""

    LENGTH = 0
    """At `max_new_tokens`."""
    STOP_TOKEN = 1
    STOP_STRING = 2


class Generation(eqx.Module):
    """What [`mamba_eqx.generate`][] returns. For one prompt there is no batch axis.

    - `tokens`: the new tokens, without the prompt. A stop token that ended a row is its last one.
        After the end there is padding of -1, which is no token.
    - `length`: how many of them are real.
    - `log_probs`: the logarithm of the probability that the model itself gave to each token, that
        is without temperature, filters, penalties and bias, among the `vocab_size` tokens. 0 after
        the end.
    - `finish`: why each row ended, a [`mamba_eqx.generation.FinishReason`][].
    - `state`: to go on from here, `generate(model, None, n, state=generation.state)`.
    """

    tokens: Int[Array, "*batch new"]
    length: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    finish: Int[Array, "*batch"]
    state: DecodingState

    @property
    def stopped(self) -> Bool[Array, "*batch"]:
        """Whether a row ended by itself, rather than at `max_new_tokens`."""
        return self.finish != FinishReason.LENGTH
