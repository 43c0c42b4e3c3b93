"""The order in which tokens are read, as a pure function of the step."""

import functools

import numpy as np
from jaxtyping import Int, Integer

from ..._checks import check_positive
from ._batch import Batch
from ._documents import document_starts


class Streams:
    """Batches of long texts for truncated backpropagation through time.

    Each row of a batch reads a stretch of the text, window after window, and then jumps to another
    stretch.

    ```python
    import numpy as np
    from mamba_eqx import training

    tokens = np.frombuffer(b"To be, or not to be: that is the question. " * 100, np.uint8)
    data = training.Streams(tokens, batch=4, length=32, stretch=8, separator=0)
    batch = data[1000]
    ```

    The model's state is carried from step to step, and `reset` is true where a stretch starts (rows
    jump at different steps) and where a document starts. With `stretch=1` the rows are independent
    windows in shuffled order.

    A batch depends only on the step and the arguments. In each epoch the text is cut into stretches
    from a different offset, and each stretch is read once, in shuffled order. The text is treated
    as circular, but the loss excludes the target across the end. The rest of the text after the
    last stretch, which is shorter than a stretch, is not read in that epoch. Since rows jump at
    different steps, all but one of them begin training in the middle of a stretch.
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
        - `length`: the number of tokens in a window, which a row reads in one step.
        - `stretch`: the number of windows that a row reads before it jumps.
        - `separator`: the token id that starts a document; `None` if there is none.
        - `seed`: the seed of the shuffling, at least 0.

        **Raises:** `ValueError` if the text is shorter than one stretch, or an argument is out of
        range.
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
                f"The text must be at least one stretch long, that is {stretch} windows of "
                f"{length} tokens, but has {len(tokens)} tokens. Use a longer text, or a smaller "
                "`length` or `stretch`."
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which the text is read once, rounded up."""
        return -(-self._number * self._stretch // self._batch)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0.

        **Raises:** `IndexError` if `step` is negative.
        """
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
        # The first token does not follow the last one, unless it is a separator.
        mask = separators[:, 1:] | (position[:, 1:] != 0)
        return Batch(tokens[:, :-1], tokens[:, 1:], reset, mask)


class Packed:
    """Batches of rows that are packed with whole documents, in a different order in each epoch.

    Documents in a row are independent: the state is reset at the start of each. The last target of
    a document is the separator of the next one, and the padding at the end of a row is excluded
    from the loss. A document longer than a row is cut into pieces, which are independent too. As in
    [`mamba_eqx.training.Streams`][], a batch depends only on the step and the arguments.
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

        - `tokens`: the documents, each after its separator.
        - `batch`: the number of rows.
        - `length`: the number of tokens in a row.
        - `separator`: the token id that starts a document.
        - `seed`: the seed of the shuffling, at least 0.

        **Raises:** `ValueError` if there are fewer than two tokens, or an argument is out of range.
        """
        _check(batch, length, seed)
        if len(tokens) < 2:
            raise ValueError(
                f"`tokens` must have at least two tokens, but has {len(tokens)}. Give more text."
            )
        self._tokens = tokens
        self._batch = batch
        self._length = length
        self._separator = separator
        self._seed = seed
        self._starts, self._ends = _rows(document_starts(tokens, separator), len(tokens), length)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which every document is read once, rounded up."""
        return -(-len(self._starts) // self._batch)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0.

        **Raises:** `IndexError` if `step` is negative.
        """
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
    """Returns where each row of whole documents starts and ends in the text."""
    sizes = np.diff(starts, append=size)
    # A document longer than a row is cut into pieces.
    pieces = -(-sizes // length)
    first = np.cumsum(pieces) - pieces
    starts = np.repeat(starts, pieces) + length * (
        np.arange(pieces.sum()) - np.repeat(first, pieces)
    )
    ends = np.append(starts[1:], size)
    # A row holds all consecutive pieces that end within `length` tokens of its start.
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
        raise IndexError(f"A step must be at least 0, but got step {step}.")
