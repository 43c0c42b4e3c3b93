"""Validation of prompts and token ids."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from ._state import DecodingState
from .sampling import shorten


# The axes are called `_` because jaxtyping would otherwise require equal lengths of all prompts.
_Ids = Sequence[int] | Integer[Array, " _"] | Integer[np.ndarray, " _"]
Prompt = _Ids | Mapping[str, object]
"""One sequence of token ids, or the result of a transformers tokenizer (a `BatchEncoding`)."""
Prompts = Prompt | Sequence[_Ids] | Integer[np.ndarray, "_ _"] | Integer[Array, "_ _"]
"""One sequence of token ids, a list of sequences, an array with one row for each sequence, or the
result of a transformers tokenizer."""
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
    given = prompts
    if isinstance(given, Mapping):
        prompts = _from_tokenizer(given, mask)
    else:
        prompts = given if mask is None else _without_padding(given, mask)
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
            f"{shorten(prompts)}. Tokenize text first."
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


def _from_tokenizer(
    result: Mapping[str, object], mask: Mask | None
) -> np.ndarray | list[np.ndarray] | list[int]:
    """Returns the token ids of the result of a transformers tokenizer, without the padding."""
    ids, real = result.get("input_ids"), result.get("attention_mask")
    if ids is None:
        raise ValueError(
            "`prompts` must have `input_ids` if they are a mapping, as the result of a "
            f"transformers tokenizer has, but got the keys {sorted(map(str, result))}. Give token "
            "ids."
        )
    if mask is not None:
        raise ValueError(
            "`mask` must be left out for the result of a tokenizer, which has an `attention_mask` "
            f"of its own, but got a mask of shape {np.shape(mask)}. Give one of the two."
        )
    # Lists stay lists, since their rows may differ in length. Tensors of torch become arrays.
    ids = ids if isinstance(ids, list) else _to_array(ids)
    if real is None or (isinstance(ids, np.ndarray) and ids.ndim == 0):
        return ids
    real = real if isinstance(real, list) else _to_array(real)
    if len(ids) > 0 and isinstance(ids[0], list | tuple | np.ndarray):
        if (isinstance(real, np.ndarray) and real.ndim == 0) or len(real) != len(ids):
            raise _wrong_mask(f"{len(ids)} rows", _to_array(real))
        return [_real_tokens(i, row, real[i]) for i, row in enumerate(ids)]
    return _real_tokens(0, ids, real)


def _without_padding(prompts: Prompts | None, mask: Mask) -> list[np.ndarray]:
    tokens, real = _to_array(prompts), _to_array(mask)
    if tokens.ndim != 2 or real.shape != tokens.shape:
        raise _wrong_mask(f"shape {tokens.shape}", real)
    return [
        _real_tokens(i, row, keep) for i, (row, keep) in enumerate(zip(tokens, real, strict=True))
    ]


def _real_tokens(i: int, tokens: object, mask: object) -> np.ndarray:
    """Returns the tokens of row `i` without its padding."""
    row, real = _to_array(tokens), _to_array(mask)
    if real.shape != row.shape or row.ndim != 1 or not np.isin(real, (0, 1)).all():
        raise _wrong_mask(f"shape {row.shape} in row {i}", real)
    real = real.astype(bool)
    at = np.flatnonzero(real)
    if len(at) and len(at) != at[-1] - at[0] + 1:
        raise ValueError(
            "`mask` must have padding to the left or to the right of the real tokens only, but "
            f"row {i} has padding between real tokens. Remove the padding from the tokens."
        )
    return row[real]


def _wrong_mask(prompts: str, mask: np.ndarray) -> ValueError:
    return ValueError(
        "`mask` must be boolean and have the shape (rows, seq) of the prompts, but got prompts of "
        f"{prompts} and a mask of {mask.dtype} and shape {mask.shape}. Give the prompts as one "
        "padded array."
    )


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
    ids = _to_array(tokens)
    if ids.size == 0 and ids.ndim == 1:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be a sequence of integers, but got {shorten(tokens)}. Tokenize text "
            "first."
        )
    return ids


def _to_array(value: object) -> np.ndarray:
    """Converts any value to an array, which holds the value itself if it is no array of numbers."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        # From lists of different lengths, random keys, or tensors of torch.
        return np.asarray(None)
