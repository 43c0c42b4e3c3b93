from collections.abc import Iterator

import numpy as np

from ..models import LanguageModel
from ._prefill import start
from ._result import FinishReason, Generation
from ._state import DecodingState


class Stream(Iterator[int]):
    """What [`mamba_eqx.stream`][] returns: an iterator over tokens that knows where it is.

    It may be left at any token, by `break` or by Ctrl-C, and gone on from there.
    """

    def __init__(self, model: LanguageModel, blocks: Iterator[Generation], max_new_tokens: int):
        """**Arguments:**

        - `blocks`: of tokens, one after another; the first one is empty, with the state after the
            prompt.
        """
        self._model = model
        self._blocks = blocks
        self._left = max_new_tokens
        self._before: DecodingState | None = None  # the block that is being taken from
        self._after: DecodingState | None = None
        self._tokens: list[int] = []
        self._taken = 0
        self._finish = FinishReason.LENGTH

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        while self._taken == len(self._tokens):
            self._advance()
        self._taken += 1
        self._left -= 1
        return self._tokens[self._taken - 1]

    def _advance(self) -> None:
        block = next(self._blocks)
        self._before, self._after = self._after, block.state
        self._tokens = np.asarray(block.tokens)[: int(block.lengths)].tolist()
        self._taken = 0
        self._finish = FinishReason(int(block.finish))

    @property
    def state(self) -> DecodingState:
        """The state after the tokens that were taken, be it all or some of them. (Within a block,
        its first tokens are read once more, by `scan`.)"""
        if self._after is None:
            self._advance()
        assert self._after is not None
        if self._taken == len(self._tokens):
            return self._after
        assert self._before is not None
        taken = np.array(self._tokens[: self._taken], np.int32)
        return start(self._model, [taken], False, self._before) if len(taken) else self._before

    @property
    def finish(self) -> FinishReason | None:
        """Why it ended, or `None` before the last token was taken."""
        ended = self._left == 0 or self._finish != FinishReason.LENGTH
        return self._finish if ended and self._taken == len(self._tokens) else None
