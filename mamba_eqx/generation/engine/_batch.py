"""The rows of an engine: which requests decode, and their tokens."""

import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ...models import LanguageModel
from .._model import separated
from .._result import FinishReason
from .._state import DecodingState
from ..constraints import Matching
from ._job import EngineCounts, Job, Progress
from ._requests import Request, key_size
from ._slots import (
    RUNNING,
    Block,
    Choice,
    Kinds,
    choice,
    decode,
    empty_states,
    extract,
    insert,
    take_rows,
)


_SHRINK_AFTER = 64  # tokens with half of the rows free, after which the batch shrinks
_STEP_SECONDS = 0.1  # about the time that a block of tokens may take


class Row:
    """A request that decodes, and the state of its stop-string automaton."""

    def __init__(self, request: Request):
        self.request = request
        self.stop_state = 0


class Batch:
    """The rows, of which the smallest power of two is computed that has room for all requests."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        capacity: int,
        window: int,
        block: int,
        counts: EngineCounts,
        keep: Callable[[np.ndarray, DecodingState], None] | None,
    ):
        """**Arguments:**

        - `model`: the model.
        - `capacity`: the capacity of caches, in tokens.
        - `window`: the number of last tokens that penalties look at.
        - `block`: the maximum number of tokens of a call of `decode`.
        - `counts`: where the work is counted.
        - `keep`: takes the tokens and the state of a request that has ended. `None` takes none.
        """
        self._model = separated(model)
        self._block, self._counts, self._keep = block, counts, keep
        self._key_size = key_size()
        self._kinds = Kinds()
        self._rows: list[Row | None] = [None]
        self._states = empty_states(self._model, 1, capacity, window)
        self._choice: Choice | None = None  # made again when rows change
        self._running = jnp.zeros(1, bool)
        self._spare_tokens = self._last_count = 0
        self._pace = 0.0  # seconds for a token of all rows, lately

    def __len__(self) -> int:
        return sum(row is not None for row in self._rows)

    def __iter__(self) -> Iterator[Job]:
        return iter([row.request.job for row in self._rows if row is not None])

    def state(self, job: Job) -> DecodingState | None:
        """Returns a copy of the state of a job, or `None` if it has no row."""
        i = self._find(job)
        return None if i is None else extract(self._states, jnp.asarray(i, jnp.int32))

    def leave(self, job: Job) -> None:
        """Frees the row of a job."""
        i = self._find(job)
        if i is not None:
            self._leave(i)

    def join(self, request: Request, state: DecodingState) -> None:
        """Gives a request a row, from a state in which its prompt has been run."""
        if None not in self._rows:
            self._resize(2 * len(self._rows))
        i = self._rows.index(None)
        self._rows[i] = Row(request)  # First, since other threads read the number of rows.
        self._states = insert((state, jnp.asarray(i, jnp.int32)), self._states)
        self._kinds = self._kinds.union(request.options.kinds())
        self._choice = None

    def decode(self, most: int, soon: int) -> list[Progress]:
        """Generates tokens for each request.

        **Arguments:**

        - `most`: the maximum number of tokens for each, at most `block`.
        - `soon`: the number of requests that will join.

        **Returns:**

        What is new, for each request.
        """
        start = time.perf_counter()
        ended = [self._end(i, FinishReason.NO_TOKEN) for i in self._over()]
        self._shrink(soon)
        if not len(self):
            return ended
        if self._choice is None:
            options = [None if row is None else row.request.options for row in self._rows]
            self._choice = choice(options, self._kinds, self._model.vocab_size, self._key_size)
            self._running = jnp.asarray([row is not None for row in self._rows])
        # The first token of a request is not held back for the tokens after it.
        allowed = self._allowed()
        limit = 1 if any(not job.tokens for job in self) else min(most, self._in_time())
        limit = limit if allowed is None else 1
        kept = self._model, self._choice, self._running, jnp.asarray(limit, jnp.int32), allowed
        self._states, block = decode(kept, self._states, size=self._block if allowed is None else 1)
        found = _Found(block)
        self._last_count = found.count
        progress = [
            self._feed(i, row, found) for i, row in enumerate(self._rows) if row is not None
        ]
        seconds = time.perf_counter() - start
        self._counts.decode_seconds += seconds
        self._pace = (self._pace + seconds / max(1, found.count)) / 2
        return ended + progress

    def _over(self) -> list[int]:
        """Returns the rows whose constraint allows no token at the beginning of their text."""
        rows = enumerate(self._rows)
        return [i for i, row in rows if row is not None and (m := row.request.matching) and m.over]

    def _allowed(self) -> Bool[Array, "rows vocab"] | None:
        """Returns the tokens that the constraints allow next, or `None` without constraints."""
        found = [None if row is None else row.request.matching for row in self._rows]
        if not any(found):
            return None
        free = np.ones(self._model.vocab_size, bool)
        return jnp.asarray(np.stack([free if m is None else m.allowed for m in found]))

    def _in_time(self) -> int:
        """Returns how many tokens a block may have, so that nobody waits long for a step."""
        if self._pace == 0:
            return self._block
        return max(1, min(self._block, int(_STEP_SECONDS / self._pace)))

    def warm_up(self, slots: int, kinds: Kinds, *, constrained: bool) -> None:
        """Compiles the programs for every number of rows up to `slots`, for some kinds of options,
        and also for rows with a constraint if `constrained`. No row may decode."""
        self._kinds = self._kinds.union(kinds)
        self._choice = None
        states = self._states
        for size in (1 << n for n in range(slots.bit_length())):
            states = take_rows(states, jnp.zeros(size, jnp.int32))  # From half as many rows.
            first = jnp.zeros((), jnp.int32)
            states = insert((extract(states, first), first), states)
            options = choice([None] * size, self._kinds, self._model.vocab_size, self._key_size)
            kept = self._model, options, jnp.zeros(size, bool), jnp.zeros((), jnp.int32)
            states, _ = decode((*kept, None), states, size=self._block)
            if constrained:
                allowed = jnp.ones((size, self._model.vocab_size), bool)
                states, _ = decode((*kept, allowed), states, size=1)

    def _find(self, job: Job) -> int | None:
        rows = enumerate(self._rows)
        return next((i for i, row in rows if row is not None and row.request.job is job), None)

    def _leave(self, i: int) -> None:
        self._rows[i] = None
        self._choice = None

    def _shrink(self, soon: int) -> None:
        """Halves the number of rows after many tokens with half of them free."""
        spare = len(self._rows) > 1 and len(self) + soon <= len(self._rows) // 2
        self._spare_tokens = self._spare_tokens + self._last_count if spare else 0
        if self._spare_tokens >= _SHRINK_AFTER:
            self._resize(len(self._rows) // 2)

    def _resize(self, size: int) -> None:
        """Changes the number of rows to `size`, which has room for all requests that decode."""
        used = [i for i, row in enumerate(self._rows) if row is not None]
        order = used + [0] * (size - len(used))
        self._states = take_rows(self._states, jnp.asarray(order, jnp.int32))
        self._rows = [self._rows[i] for i in used] + [None] * (size - len(used))
        self._choice = None
        self._spare_tokens = 0

    def _feed(self, i: int, row: Row, found: "_Found") -> Progress:
        """Gives a job its new tokens, and frees its row if the job has ended."""
        job, finish = row.request.job, found.finish[i]
        begin = len(job.tokens)
        count = found.count - (finish == FinishReason.NOT_FINITE)
        overrun = 0
        for at in range(count):
            token = int(found.tokens[at, i])
            job.log_probs.append(float(found.log_probs[at, i]))
            if row.request.options.top:
                job.top.append(found.top(at, i))
            # The token comes last: a thread that sees it may read the others.
            job.tokens.append(token)
            is_stop_token = at == count - 1 and finish == FinishReason.STOP_TOKEN
            if self._completes_stop_string(row, token) and not is_stop_token:
                finish, overrun = FinishReason.STOP_STRING, found.count - 1 - at
                break
        if row.request.matching is not None and count:
            finish = self._advance(row.request.matching, job, finish)
        self._counts.generated_tokens += len(job.tokens) - begin
        if finish == RUNNING:
            return Progress(job, begin, None)
        # After an overrun, the state has read tokens that the job does not have.
        if self._keep is not None and finish != FinishReason.NOT_FINITE and not overrun:
            text = np.concatenate([job.prompt, np.array(job.tokens, np.int32)])
            self._keep(text, extract(self._states, jnp.asarray(i, jnp.int32)))
        return self._end(i, FinishReason(finish), begin)

    def _end(self, i: int, finish: FinishReason, begin: int = 0) -> Progress:
        """Ends the job of a row, whose tokens from `begin` on are new."""
        row = self._rows[i]
        assert row is not None
        self._leave(i)
        self._counts.ended += 1
        row.request.job.finish = finish
        return Progress(row.request.job, begin, finish)

    def _advance(self, matching: Matching, job: Job, finish: int) -> int:
        """Tells a constraint the last token of a job, and returns why the job ends now. An error of
        a constraint ends its own job only."""
        if finish not in (RUNNING, FinishReason.LENGTH):
            return finish
        try:
            matching.advance(job.tokens[-1])
        except Exception as error:
            job.error = error
            return FinishReason.CONSTRAINT_FAILED
        return FinishReason.NO_TOKEN if matching.over else finish

    def _completes_stop_string(self, row: Row, token: int) -> bool:
        table = row.request.stop_table
        if table is None:
            return False
        row.stop_state = int(table[row.stop_state, token])
        return row.stop_state == len(table) - 1


class _Found:
    """The tokens of a block, in NumPy."""

    def __init__(self, block: Block):
        self.count = int(block.count)
        self.finish: list[int] = np.asarray(block.finish).tolist()
        self.tokens, self.log_probs = np.asarray(block.tokens), np.asarray(block.log_probs)
        self._ids = None if block.top_ids is None else np.asarray(block.top_ids)
        self._values = None if block.top_log_probs is None else np.asarray(block.top_log_probs)

    def top(self, at: int, row: int) -> list[tuple[int, float]]:
        """Returns the most likely tokens at a place, and their log-probabilities."""
        assert self._ids is not None
        assert self._values is not None
        ids, values = self._ids[at, row].tolist(), self._values[at, row].tolist()
        return list(zip(ids, values, strict=True))
