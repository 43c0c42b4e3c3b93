"""The order in which tokens are read: pure functions of the number of a step."""

import functools

import numpy as np
from jaxtyping import Int, Integer

from ..._checks import check_positive
from ._batch import Batch
from ._token_files import document_starts


class Streams:
    """Every row reads a stretch of the text, window after window, and then jumps to another one.

    ```python
    data = training.Streams(tokens, batch=16, length=128, stretch=16, separator=0)
    batch = data[1000]
    ```

    That is truncated backpropagation through time: the model's state is carried from step to step,
    and `reset` is true where a stretch begins (rows jump at different steps) and where a document
    does. With a stretch of one window these are shuffled windows, each by itself.

    A batch is a function of the step and of the arguments, and of nothing else. In each epoch the
    text is cut at another place into stretches, which are read once, shuffled. The text is taken as
    a circle; no loss is counted from its end to its beginning. What is left over in an epoch is
    less than a stretch; and because rows jump at different steps, all but one begin the training
    in the middle of a stretch.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " token"],
        *,
        batch: int,
        length: int,
        stretch: int = 1,
        separator: int | None = None,
        seed: int = 0,
    ):
        """**Arguments:**

        - `tokens`: the text.
        - `batch`: the number of rows.
        - `length`: of a window, in tokens: what is read in one step.
        - `stretch`: how many windows a row reads before it jumps.
        - `separator`: the token that begins a document, if there is one.
        - `seed`: for the order.

        **Raises:** `ValueError` if the text is shorter than one stretch.
        """
        _check(batch, length, seed)
        check_positive("stretch", stretch)
        self._tokens = tokens
        self._batch = batch
        self._length = length
        self._stretch = stretch
        self._separator = separator
        self._seed = seed
        self._number = len(tokens) // (stretch * length)
        if self._number == 0:
            raise ValueError(
                f"The text has {len(tokens)} tokens, which is less than one stretch of {stretch} "
                f"windows of {length}: give more text, or a smaller `length` or `stretch`."
            )

    @property
    def steps_per_epoch(self) -> int:
        """After how many steps all of the text has been read once, rounded up."""
        return -(-self._number * self._stretch // self._batch)

    def __getitem__(self, step: int) -> Batch:
        _check_step(step)
        rows = np.arange(self._batch)
        turn, window = np.divmod(step + rows * self._stretch // self._batch, self._stretch)
        epoch, place = np.divmod(turn * self._batch + rows, self._number)
        start = np.empty(self._batch, np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            order = _permutation(self._seed, int(e), self._number)
            cut = _cut(self._seed, int(e), len(self._tokens))
            start[here] = cut + order[place[here]] * (self._stretch * self._length)
        position = (start + window * self._length)[:, None] + np.arange(self._length + 1)
        position %= len(self._tokens)
        tokens = self._tokens[position].astype(np.int32)
        separators = np.zeros(tokens.shape, np.bool_)
        if self._separator is not None:
            separators = tokens == self._separator
        reset = separators[:, :-1] | (position[:, :-1] == 0)
        reset[:, 0] |= (window == 0) | (step == 0)
        # The text's beginning does not follow from its end, unless it is a separator.
        mask = separators[:, 1:] | (position[:, 1:] != 0)
        return Batch(tokens[:, :-1], tokens[:, 1:], reset, mask)


class Packed:
    """Rows of whole documents, as many as fit in one, in a new order each epoch.

    No document shares a state with another one (`reset`), nor is its loss counted beyond its end,
    which is the separator of the next one; the rest of a row is padding without loss. Documents
    longer than a row are cut into pieces, each by itself. As in [`mamba_eqx.training.Streams`][], a
    batch is a function of the step.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " token"],
        *,
        batch: int,
        length: int,
        separator: int,
        seed: int = 0,
    ):
        """**Arguments:**

        - `tokens`: the documents, a separator before each.
        - `batch`, `length`: the number of rows, and their length.
        - `separator`: the token that begins a document.
        - `seed`: for the order.
        """
        _check(batch, length, seed)
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens are nothing to train on: give more text.")
        self._tokens = tokens
        self._batch = batch
        self._length = length
        self._separator = separator
        self._seed = seed
        self._starts, self._ends = _rows(document_starts(tokens, separator), len(tokens), length)

    @property
    def steps_per_epoch(self) -> int:
        """After how many steps all documents have been read once, rounded up."""
        return -(-len(self._starts) // self._batch)

    def __getitem__(self, step: int) -> Batch:
        _check_step(step)
        number = len(self._starts)
        epoch, place = np.divmod(step * self._batch + np.arange(self._batch), number)
        row = np.empty(self._batch, np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            row[here] = _permutation(self._seed, int(e), number)[place[here]]
        position = self._starts[row][:, None] + np.arange(self._length + 1)
        inside = position < self._ends[row][:, None]
        mask = inside[:, :-1] & (position[:, 1:] < len(self._tokens))
        tokens = self._tokens[np.minimum(position, len(self._tokens) - 1)].astype(np.int32)
        reset = (inside & (tokens == self._separator))[:, :-1]
        reset[:, 0] = True
        read = np.where(inside, tokens, self._separator)
        return Batch(read[:, :-1], np.where(mask, tokens[:, 1:], self._separator), reset, mask)


def _rows(starts: np.ndarray, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where rows of whole documents start and end in the text."""
    sizes = np.diff(starts, append=size)
    # Documents that are longer than a row are cut.
    pieces = -(-sizes // length)
    first = np.cumsum(pieces) - pieces
    starts = np.repeat(starts, pieces) + length * (
        np.arange(pieces.sum()) - np.repeat(first, pieces)
    )
    ends = np.append(starts[1:], size)
    # A row that starts with a piece goes on to the last one that still ends in it.
    next_row = np.searchsorted(ends, starts + length, side="right").tolist()
    rows = [0]
    while next_row[rows[-1]] < len(starts):
        rows.append(next_row[rows[-1]])
    row_starts = starts[rows]
    return row_starts, np.append(row_starts[1:], size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, number: int) -> Int[np.ndarray, " number"]:
    return np.random.default_rng([seed, epoch]).permutation(number)


@functools.lru_cache(maxsize=64)
def _cut(seed: int, epoch: int, size: int) -> int:
    return int(np.random.default_rng([seed, epoch, 1]).integers(size))


def _check(batch: int, length: int, seed: int) -> None:
    check_positive("batch", batch)
    check_positive("length", length)
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, but got {seed}.")


def _check_step(step: int) -> None:
    if step < 0:
        raise IndexError(f"Steps are counted from 0, but got step {step}.")
