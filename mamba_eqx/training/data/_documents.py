"""Documents in an array of tokens: where they start, and holding some of them out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer


# The number of tokens compared at a time, so that memory does not grow with the size of a mapped
# file.
_PIECE = 2**22


def document_starts(
    tokens: Integer[np.ndarray, " token"], separator: int
) -> Int[np.ndarray, " document"]:
    """Returns the index at which each document starts: 0, and the index of each separator.

    A separator belongs to the document that it starts. The model reads the separator first, and
    learns to predict it at the end of the document before.

    **Arguments:**

    - `tokens`: the documents, one after another.
    - `separator`: the token id that starts a document.

    **Returns:**

    The indices, in increasing order.
    """
    found = [
        start + np.flatnonzero(tokens[start : start + _PIECE] == separator)
        for start in range(0, len(tokens), _PIECE)
    ]
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


def hold_out_end(
    tokens: Integer[np.ndarray, " token"], fraction: float
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " held_out"]]:
    """Holds out the last part of a text for evaluation.

    **Arguments:**

    - `tokens`: the text.
    - `fraction`: the share of the tokens to hold out, within `0 < fraction < 1`.

    **Returns:**

    The tokens to train on, and the held-out tokens. Both are views of `tokens`.

    **Raises:** `ValueError` if `fraction` is out of range, or so small that no token is held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must be between 0 and 1, but got {fraction}.")
    cut = len(tokens) - int(len(tokens) * fraction)
    if cut == len(tokens):
        raise ValueError(
            f"`fraction` must hold out at least one token, but got fraction={fraction} of "
            f"{len(tokens)} tokens. Use a larger fraction or a longer text."
        )
    return tokens[:cut], tokens[cut:]


def hold_out_documents(
    tokens: Integer[np.ndarray, " token"],
    names: Sequence[Sequence[int]],
    *,
    separator: int,
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " held_out"]]:
    """Holds out the documents that start with given tokens.

    **Arguments:**

    - `tokens`: the documents, one after another. A separator before the first is optional.
    - `names`: the opening tokens of each document to hold out, without its separator, such as
        `[b"TWELFTH NIGHT"]`.
    - `separator`: the token id that starts a document.

    **Returns:**

    The tokens to train on, and the held-out tokens. Both are copies, with a separator
    before each document.

    **Raises:** `ValueError` if no document starts with one of the names, if every document is held
    out, or if `tokens` cannot contain `separator`.
    """
    limits = np.iinfo(tokens.dtype)
    if not limits.min <= separator <= limits.max:
        raise ValueError(
            f"`separator` must be a token id of the dtype of `tokens`, but got {separator} and "
            f"{tokens.dtype}. Use the separator that the tokens were written with."
        )
    if len(tokens) == 0 or tokens[0] != separator:
        tokens = np.concatenate([np.array([separator], tokens.dtype), tokens])
    starts = document_starts(tokens, separator)
    held_out = np.zeros(len(starts), np.bool_)
    for name in names:
        wanted = np.array(list(name))
        named = [np.array_equal(tokens[s + 1 : s + 1 + len(wanted)], wanted) for s in starts]
        if not any(named):
            raise ValueError(
                f"`names` must be opening tokens of documents, but none of {len(starts)} documents "
                f"starts with {name!r}. Check the spelling and the separator."
            )
        held_out |= named
    if held_out.all():
        raise ValueError(
            f"`names` must leave documents to train on, but all {len(starts)} documents are held "
            "out. Name fewer of them."
        )
    sizes = np.diff(starts, append=len(tokens))
    chosen = np.repeat(held_out, sizes)
    return tokens[~chosen], tokens[chosen]
