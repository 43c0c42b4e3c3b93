"""Validation of prompts and token ids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from ._state import DecodingState


# The axes are called `_` because jaxtyping would otherwise require equal lengths of all prompts.
Prompt = Sequence[int] | Integer[Array, " _"] | Integer[np.ndarray, " _"]
"""One sequence of token ids."""
Prompts = Prompt | Sequence[Prompt] | Integer[np.ndarray, "_ _"] | Integer[Array, "_ _"]
"""One sequence of token ids, a list of sequences, or an array with one row for each sequence."""
Mask = Bool[np.ndarray, "_ _"] | Bool[Array, "_ _"]
"""True for the real tokens of an array of padded prompts."""


class Rows(NamedTuple):
    """Validated prompts: the token ids of each row."""

    tokens: list[np.ndarray]
    batched: bool

    @property
    def size(self) -> int | None:
        """The number of rows, or `None` for one prompt without a batch axis."""
        return len(self.tokens) if self.batched else None


def read_prompts(
    vocab_size: int, prompts: Prompts | None, mask: Mask | None, state: DecodingState | None
) -> Rows:
    """Validates prompts and removes their padding.

    **Raises:** `ValueError` if a prompt is not a sequence of token ids of the vocabulary, `mask` or
    `state` does not fit the prompts, or a prompt is empty without a `state`.
    """
    if mask is not None:
        prompts = _without_padding(prompts, mask)
    if state is not None and not isinstance(state, DecodingState):
        raise ValueError(
            f"`state` must be a `DecodingState`, but got {type(state).__name__}. Give the `state` "
            "of a `Generation`."
        )
    if prompts is None:
        if state is None:
            raise ValueError(
                "`prompts=None` needs a `state` to continue from, but got none. Give prompts, or "
                "the `state` of an earlier generation."
            )
        count = state.token.size
        return Rows([np.zeros(0, np.int32)] * count, batched=state.token.ndim == 1)
    is_sequence = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if not is_sequence and getattr(prompts, "ndim", 0) == 0:
        raise ValueError(
            "`prompts` must be a sequence of token ids, or a list of such sequences, but got "
            f"{prompts!r}. Tokenize text first."
        )
    # The rows of a batch are sequences; a 2-dimensional array is a batch of equal lengths.
    batched = len(prompts) > 0 and (np.ndim(prompts[0]) > 0 or isinstance(prompts[0], str))
    rows = [
        check_tokens(vocab_size, f"prompts[{i}]" if batched else "prompts", row)
        for i, row in enumerate(prompts if batched else [prompts])
    ]
    if state is not None:
        shape = (len(rows),) if batched else ()
        if state.token.shape != shape:
            raise ValueError(
                "`prompts` and `state` must have the same number of rows, but got prompts of "
                f"{_describe(shape)} and a state of {_describe(state.token.shape)}. Copy the state "
                "of one sequence with `fork`."
            )
        return Rows(rows, batched)
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(
                f"`{f'prompts[{i}]' if batched else 'prompts'}` must not be empty without a "
                "`state`. Give at least one token, such as the end-of-text token, or the `state` "
                "of an earlier generation."
            )
    return Rows(rows, batched)


def read_prompt(
    vocab_size: int, name: str, prompt: Prompt | None, state: DecodingState | None
) -> Rows:
    """Validates the prompt of the function `name`, which takes one prompt only."""
    rows = read_prompts(vocab_size, prompt, None, state)
    if rows.batched:
        raise ValueError(
            f"`{name}` takes one prompt, but got {rows.size} rows. Use `generate` for several."
        )
    return rows


def _without_padding(prompts: Prompts | None, mask: Mask) -> list[np.ndarray]:
    tokens, real = np.asarray(prompts), np.asarray(mask)
    if tokens.ndim != 2 or real.shape != tokens.shape or not np.isin(real, (0, 1)).all():
        raise ValueError(
            "`mask` must be boolean and have the shape (rows, seq) of the prompts, but got prompts "
            f"of shape {tokens.shape} and a mask of {real.dtype} and shape {real.shape}. Give the "
            "prompts as one padded array."
        )
    real = real.astype(bool)
    for i, row in enumerate(real):
        at = np.flatnonzero(row)
        if len(at) and len(at) != at[-1] - at[0] + 1:
            raise ValueError(
                "`mask` must have padding to the left or to the right of the real tokens only, but "
                f"row {i} has padding between real tokens. Remove the padding from the tokens."
            )
    return [row[keep] for row, keep in zip(tokens, real, strict=True)]


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} rows" if shape else "one sequence"


def check_tokens(vocab_size: int, name: str, tokens: object) -> Int[np.ndarray, " seq"]:
    """Validates a sequence of token ids and returns it as an array."""
    ids = check_token_ids(name, tokens)
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"Token ids must be within 0..{vocab_size - 1}, but got {name}[{at}]={ids[at]}. Use "
            "the tokenizer of this model."
        )
    return ids.astype(np.int32)


def check_token_ids(name: str, tokens: object) -> Integer[np.ndarray, " seq"]:
    """Validates a sequence of integers, whatever the vocabulary, and returns it as an array."""
    try:
        ids = np.asarray(tokens)
    except ValueError:
        ids = np.asarray(None)
    if ids.size == 0 and ids.ndim == 1:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be a sequence of integers, but got {tokens!r}. Tokenize text first."
        )
    return ids
