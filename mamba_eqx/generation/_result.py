import enum

import equinox as eqx
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from ._state import DecodingState


class FinishReason(enum.IntEnum):
    """The reason why a row of a [`mamba_eqx.Generation`][], or a job, ended."""

    LENGTH = 0
    """The row has `max_new_tokens` tokens."""
    STOP_TOKEN = 1
    """The row ended with one of the `stop_tokens`."""
    STOP_STRING = 2
    """The last token completed one of the `stop_strings`."""
    NOT_FINITE = 3
    """The logits after the last token are NaN or infinite, so that no token can be chosen. The
    functions that generate raise a `ValueError` then; only within a `jax.jit` or `jax.vmap` of the
    caller, where nothing can be raised, they return this value. The jobs of an
    [`mamba_eqx.Engine`][] end with this value."""
    CANCELLED = 4
    """The job of an [`mamba_eqx.Engine`][] was cancelled."""
    TIME_LIMIT = 5
    """The time of the job of an [`mamba_eqx.Engine`][] was up."""
    NO_TOKEN = 6
    """No token may follow: the `constraint` allows none that the `logit_bias` does not ban. The
    text is complete, unless tokens were banned that it needs."""
    CONSTRAINT_FAILED = 7
    """The `constraint` of the job of an [`mamba_eqx.Engine`][] raised an error, which is the job's
    `error`."""


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
        """Whether a row ended by itself: with a stop token, with a stop string, or where no token
        may follow."""
        return self.finish != FinishReason.LENGTH


def check_finite(
    finish: Int[Array, "..."], position: Int[Array, "..."], rows_are: str = "row"
) -> None:
    """Raises if logits were not finite.

    **Arguments:**

    - `finish`: the `FinishReason` of each row. A traced value is not checked.
    - `position`: the number of tokens before the logits, for each row or for all.
    - `rows_are`: what messages call a row.

    **Raises:** `ValueError` for the first row whose logits are not finite.
    """
    if isinstance(finish, Tracer):
        return
    bad = np.atleast_1d(np.asarray(finish)) == FinishReason.NOT_FINITE
    if not bad.any():
        return
    row = int(bad.argmax())
    where = f" of {rows_are} {row}" if np.ndim(finish) > 0 else ""
    after = np.broadcast_to(np.asarray(position), bad.shape)[row]
    raise ValueError(
        f"The logits must be finite, but those{where} after {after} tokens are NaN or infinite, so "
        "that no token can be chosen. Check the weights of the model for NaN. If they are finite, "
        "use a wider dtype, such as float32; and if the given state is from compiled code of your "
        "own, check that no cache of attention in it has `overflowed`."
    )
