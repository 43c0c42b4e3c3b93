import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from ..models import LanguageModel
from ._constrained import Constrained
from ._loop import Cursor, Decoded
from ._prefill import prefill_rows
from ._prompts import Rows
from ._result import FinishReason, check_finite
from ._state import DecodingState
from .constraints import Matching


def asking(
    matching: Matching, decode_block: Callable[[Cursor, int], Decoded]
) -> Callable[[Cursor, int], Decoded]:
    """Returns a `decode_block` that asks a constraint of the host before each token.

    **Arguments:**

    - `matching`: the constraint along the text of the stream.
    - `decode_block`: decodes one token.
    """

    def decode(cursor: Cursor, limit: int) -> Decoded:
        allowed = Constrained(None, jnp.asarray(matching.allowed))
        decoded = decode_block(cursor._replace(constrained=allowed), limit)
        out = decoded.out
        if not int(out.length):
            return decoded
        matching.advance(int(out.tokens[0]))
        if matching.over and int(out.finish) == FinishReason.LENGTH:
            finish = jnp.asarray(FinishReason.NO_TOKEN, jnp.int32)
            return decoded._replace(out=dataclasses.replace(out, finish=finish))
        return decoded

    return decode


class Stream(Iterator[int]):
    """The result of [`mamba_eqx.stream`][]: an iterator over token ids, decoded in blocks.

    Iteration may stop at any token (`break`, Ctrl-C); generation can continue there from `.state`.
    """

    def __init__(
        self,
        model: LanguageModel,
        begin: Callable[[], Cursor],
        decode_block: Callable[[Cursor, int], Decoded],
        max_new_tokens: int,
        block: int,
    ):
        """**Arguments:**

        - `model`: the model.
        - `begin`: runs the prompt and returns the position after it. It is called when the first
            token or the state is requested.
        - `decode_block`: decodes from a position (the first argument) at most a number of tokens
            (the second argument).
        - `max_new_tokens`: the maximum number of tokens of the stream.
        - `block`: the maximum number of tokens of a block. The first block has one token, and the
            following blocks double in size up to this number.
        """
        self._model = model
        self._begin = begin
        self._decode_block = decode_block
        self._undecoded = max_new_tokens
        self._size = 1
        self._block = block
        self._before: Cursor | None = None  # the positions before and after the current block
        self._after: Cursor | None = None
        self._tokens: list[int] = []  # of the current block
        self._taken = 0
        self._finish = FinishReason.LENGTH

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        while self._taken == len(self._tokens):
            self._advance()
        self._taken += 1
        return self._tokens[self._taken - 1]

    def _advance(self) -> None:
        """Decodes the next block."""
        before = self._position()
        check_finite(jnp.asarray(self._finish), before.state.position)
        if self._decoded_all:
            raise StopIteration
        limit = min(self._size, self._undecoded)
        decoded = self._decode_block(before, limit)
        out = decoded.out
        tokens = np.asarray(out.tokens)[: int(out.length)].tolist()
        self._finish = FinishReason(int(out.finish))
        self._undecoded -= limit
        self._size = min(2 * limit, self._block)
        self._before, self._after, self._tokens, self._taken = before, decoded.cursor, tokens, 0

    def _position(self) -> Cursor:
        """Returns the position after the current block, running the prompt if it has not been."""
        if self._after is None:
            self._after = self._begin()
        return self._after

    @property
    def _decoded_all(self) -> bool:
        return self._undecoded == 0 or self._finish != FinishReason.LENGTH

    @property
    def state(self) -> DecodingState:
        """The state after the tokens consumed so far. (Within a block, the consumed tokens of the
        block are run again, by `scan`.)"""
        after = self._position()
        if self._taken == len(self._tokens):
            return after.state
        assert self._before is not None
        before = self._before.state
        if self._taken == 0:
            return before
        consumed = np.array(self._tokens[: self._taken], np.int32)
        return prefill_rows(self._model, Rows([consumed], batched=False), before)

    @property
    def finish(self) -> FinishReason | None:
        """The reason why the stream ended, or `None` before its last token is consumed."""
        return self._finish if self._decoded_all and self._taken == len(self._tokens) else None
