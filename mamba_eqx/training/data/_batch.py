"""The input of a training step."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Integer, Num


class Batch(NamedTuple):
    """The input of one training step: rows of tokens, and the token that follows each of them.

    Inside a document `targets[i, t]` equals `tokens[i, t + 1]`.
    """

    tokens: Integer[Array | np.ndarray, "batch seq"]
    """The tokens that the model reads."""

    targets: Integer[Array | np.ndarray, "batch seq"]
    """The tokens to predict."""

    reset: Bool[Array | np.ndarray, "batch seq"]
    """True at the first token of a document, where the model forgets everything before, including a
    carried state."""

    mask: Bool[Array | np.ndarray, "batch seq"] | Num[Array | np.ndarray, "batch seq"]
    """True where the target counts. Padding and targets across document boundaries are excluded
    from the loss. Weights, at least 0, make the loss a weighted mean."""
