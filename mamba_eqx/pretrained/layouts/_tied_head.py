from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from ...formats import CheckpointError
from ...models import LanguageModelConfig
from ._layout import Layout


_Tensor = TypeVar("_Tensor")


def check_tied_head(
    layout: Layout,
    config: LanguageModelConfig,
    tensors: Mapping[str, _Tensor],
    read: Callable[[_Tensor], np.ndarray],
) -> None:
    """Checks that a head that is tied to the embedding, if it is stored as well, equals it.

    **Arguments:**

    - `tensors`: the tensors by name.
    - `read`: returns the values of a tensor.

    **Raises:** `CheckpointError` if the two differ.
    """
    head, embedding = layout.tied_head(config), layout.embedding(config)
    if head is None or head not in tensors or embedding not in tensors:
        return
    one, other = read(tensors[head]), read(tensors[embedding])
    # Compared as bits, because NaN is not equal to itself.
    if one.dtype != other.dtype or not np.array_equal(_bits(one), _bits(other)):
        raise CheckpointError(
            f"{head} differs from {embedding}, although the config says that they are tied. "
            "If the head is meant, set `tie_word_embeddings` (in official configs "
            "`tie_embeddings`) to false."
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
