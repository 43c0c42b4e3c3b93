"""Requests to the engine, with their validated options."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from .._options import Options, options_for
from .._sampling import Sampling
from ..constraints import Matching
from ._job import Job
from ._slots import NO_PENALTIES, RowOptions


class Request(NamedTuple):
    """A job with its options."""

    job: Job
    options: RowOptions
    stop_table: np.ndarray | None
    """The automaton of the stop strings; see `text.stop_table`."""
    keep: tuple[int, ...]
    """Numbers of tokens of the prompt after which states are kept, in ascending order."""
    matching: Matching | None
    """The constraint, along the text of the job."""


def row_options(
    sampling: Sampling,
    vocab_size: int,
    key: PRNGKeyArray | None,
    *,
    window: int,
    top: bool,
    end: int,
) -> tuple[RowOptions, np.ndarray | None]:
    """Validates the options of one request.

    **Arguments:**

    - `sampling`, `vocab_size`, `key`: as for `options_for`.
    - `window`: the largest window of penalties.
    - `top`: whether the most likely tokens are returned.
    - `end`: the position at which the row has all its tokens.

    **Returns:**

    The options, and the automaton of the stop strings or `None`.

    **Raises:** `ValueError` if `options_for` does, the window of the penalties is too large, or
    the key is of another kind than the default.
    """
    options = options_for(sampling, vocab_size, None, key)
    number = lambda value, neutral: neutral if value is None else value.item()
    penalties, width = NO_PENALTIES, 1
    if options.penalties is not None:
        width = options.window
        given = options.penalties
        values = (given.repetition, given.presence, given.frequency)
        penalties = tuple(np.asarray(value).item() for value in values)
    if width > window:
        raise ValueError(
            f"`window` of `Penalties` must be at most the engine's {window}, but got "
            f"window={width}. Make the engine with a larger `penalty_window`."
        )
    kind = None
    if options.temperature is not None:
        found = options.filters
        kind = (found.top_k is not None, found.top_p is not None, found.typical_p is not None)
    table = options.stopping.table
    row = RowOptions(
        kind,
        temperature=number(options.temperature, 1.0),
        top_k=number(options.filters.top_k, vocab_size),
        top_p=number(options.filters.top_p, 1.0),
        min_p=number(options.filters.min_p, 0.0),
        typical_p=number(options.filters.typical_p, 1.0),
        penalties=(penalties[0], penalties[1], penalties[2]),
        window=width,
        bias=None if options.bias is None else np.asarray(options.bias),
        stops=np.asarray(options.stopping.tokens),
        key=_key_data(options),
        top=top,
        end=end,
    )
    return row, None if table is None else np.asarray(table)


def key_size() -> int:
    """Returns the number of integers in a key of the default kind."""
    return jr.key_data(jr.key(0)).shape[0]


def _key_data(options: Options) -> np.ndarray | None:
    key = options.key
    if key is None:
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jr.key(0).dtype:
            raise ValueError(
                f"`key` must be of the default kind {jr.key(0).dtype}, but got {key.dtype}. Make "
                "it with `jax.random.key(seed)`."
            )
        return np.asarray(jr.key_data(key))
    return np.asarray(key)
