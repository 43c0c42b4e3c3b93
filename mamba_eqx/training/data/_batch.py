from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Batch(NamedTuple):
    """What a model is trained on in one step: some rows of tokens, and the token after each.

    `targets[i, t]` is the token that follows `tokens[i, t]`, which is `tokens[i, t + 1]` inside a
    document.
    """

    tokens: Int[Array | np.ndarray, "batch seq"]
    """What the model reads."""

    targets: Int[Array | np.ndarray, "batch seq"]
    """What it is to say."""

    reset: Bool[Array | np.ndarray, "batch seq"]
    """Where a document begins: the model forgets everything before this token, a state that was
    handed over included."""

    mask: Bool[Array | np.ndarray, "batch seq"]
    """Which targets count. The others, padding or the other side of a border, have no loss."""
