"""Stop tokens and stop strings within the compiled loop."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..text import stop_table
from ._prompts import check_tokens
from ._result import FinishReason
from ._sampling import Sampling, has_rows, stop_tokens_of


class Stopping(eqx.Module):
    """The stop tokens, and the automaton that recognises the stop strings.

    The automaton reads tokens. Its transition table comes from `text.stop_table`. The automaton
    reaches its last state when a stop string is complete, and remains there.
    """

    tokens: Int[Array, "*batch stop"]
    """Padded with -1, which is not a token id."""
    table: Int[Array, "states vocab"] | None
    """Shared by all rows."""

    def start(self, shape: tuple[int, ...]) -> Int[Array, "*batch"]:
        """Returns the state of the automaton before the first generated token."""
        return jnp.zeros(shape, jnp.int32)

    def is_stop_token(self, tokens: Int[Array, "*seq"]) -> Bool[Array, "*seq"]:
        return jnp.any(tokens[..., None] == self.tokens, axis=-1)

    def advance(
        self, state: Int[Array, ""], token: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Feeds a token to the automaton.

        **Returns:**

        The new state of the automaton, and the `FinishReason` of the row, which is
        `LENGTH` while the row continues.
        """
        stops = self.is_stop_token(token)
        finish = jnp.where(stops, FinishReason.STOP_TOKEN, FinishReason.LENGTH)
        if self.table is not None:
            state = self.table[state, token]
            complete = state == len(self.table) - 1
            still_going = finish == FinishReason.LENGTH
            finish = jnp.where(still_going & complete, FinishReason.STOP_STRING, finish)
        return state, finish.astype(jnp.int32)


def stopping_for(sampling: Sampling, vocab_size: int, rows: int | None) -> Stopping:
    """Validates the stop tokens and strings, and converts them to arrays.

    **Arguments:**

    - `sampling`: the options.
    - `vocab_size`: the number of token ids of the model.
    - `rows`: the number of rows, or `None` for one prompt without a batch axis.
    """
    tokens = read_stop_tokens(sampling, vocab_size, rows)
    return Stopping(jnp.asarray(tokens), _stop_table(sampling, vocab_size))


def read_stop_tokens(
    sampling: Sampling, vocab_size: int, rows: int | None
) -> Int[np.ndarray, "*rows stop"]:
    """Validates the stop tokens and returns them as an array, with an axis of rows for a batch."""
    given = stop_tokens_of(sampling)
    if not has_rows(given):
        tokens = check_tokens(vocab_size, "stop_tokens", given)
        return tokens if rows is None else np.broadcast_to(tokens, (rows, len(tokens)))
    if rows is None or len(given) != rows:
        raise ValueError(
            "`stop_tokens` must be a list of token ids, or one such list for each row, but got "
            f"{len(given)} lists for {'one prompt' if rows is None else f'{rows} rows'}."
        )
    each = [check_tokens(vocab_size, f"stop_tokens[{i}]", row) for i, row in enumerate(given)]
    padded = np.full((rows, max(map(len, each))), -1, np.int32)
    for padded_row, row in zip(padded, each, strict=True):
        padded_row[: len(row)] = row
    return padded


def _stop_table(sampling: Sampling, vocab_size: int) -> Int[Array, "states vocab"] | None:
    if not sampling.stop_strings:
        return None
    assert sampling.tokenizer is not None
    table = stop_table(sampling.tokenizer, sampling.stop_strings)
    # Token ids beyond the tokenizer's vocabulary have no text. They end every partial match, but
    # must not leave the last state.
    missing = vocab_size - table.shape[1]
    table = np.pad(table, ((0, 0), (0, max(0, missing))))
    table[-1] = len(table) - 1
    return jnp.asarray(table)
