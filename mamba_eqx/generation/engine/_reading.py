"""The prompts of an engine that are being read, in pieces and in turn."""

import math
import time
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from ...layers import with_room
from ...models import LanguageModel
from .._prefill import compiled_size, compiled_sizes, prefill_rows
from .._prompts import Rows
from .._state import DecodingState
from ._job import EngineCounts, Job
from ._prefixes import Prefixes
from ._requests import Request
from ._slots import fit_layers, layer_shapes


class Reading:
    """A request whose prompt is being read."""

    def __init__(self, request: Request):
        self.request = request
        self.state: DecodingState | None = None
        self.read = 0
        """The number of tokens of the prompt that `state` has read, the pending one included."""
        self.begun = False

    @property
    def prompt(self) -> np.ndarray:
        return self.request.job.prompt


class Readings:
    """The requests whose prompts are being read, and the states kept after earlier texts."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        capacity: int,
        window: int,
        counts: EngineCounts,
        prefixes: Prefixes,
    ):
        """**Arguments:**

        - `model`: the model.
        - `capacity`: the capacity of caches, in tokens.
        - `window`: the number of last tokens that penalties look at.
        - `counts`: where the work is counted.
        - `prefixes`: the prefix cache.
        """
        self._model, self._capacity, self._window = model, capacity, window
        self._counts, self._prefixes = counts, prefixes
        self._readings: deque[Reading] = deque()
        self._shapes: dict[int, PyTree] = {}
        self._fastest = math.inf  # seconds for a token of a prompt

    def __len__(self) -> int:
        return len(self._readings)

    def __iter__(self) -> Iterator[Job]:
        return iter([reading.request.job for reading in self._readings])

    def add(self, request: Request) -> None:
        self._readings.append(Reading(request))

    def remove(self, job: Job) -> None:
        self._readings = deque(r for r in self._readings if r.request.job is not job)

    def run(self, most: int) -> Iterator[tuple[Request, DecodingState]]:
        """Runs a piece of one prompt after another, up to `most` tokens together, and yields those
        that have been read with their states."""
        left = most
        turns = len(self._readings)
        while self._readings and left > 0 and turns > 0:
            # The request is counted while its piece is run: other threads read the counts.
            reading = self._readings[0]
            if not reading.begun and self._is_being_read(reading.prompt):
                # Another request reads the same text, and its state is soon there.
                self._readings.rotate(-1)
                turns -= 1
                continue
            start = time.perf_counter()
            count = self._run_piece(reading, left)
            self._count(count, time.perf_counter() - start)
            left -= count
            if reading.read < len(reading.prompt):
                self._readings.rotate(-1)
                continue
            self._readings.popleft()
            assert reading.state is not None
            yield reading.request, reading.state

    def warm_up(self, most: int) -> None:
        """Compiles the programs that run pieces of up to `most` tokens."""
        for size in compiled_sizes(min(most, self._capacity)):
            rows = Rows([np.zeros(size + 1, np.int32)], batched=False)
            room = self._capacity - size - 1
            prefill_rows(self._model, rows, None, room=room, window=self._window)

    def keep(self, tokens: np.ndarray, state: DecodingState) -> None:
        """Puts a state into the prefix cache, without the room of its caches for more tokens."""
        if self._prefixes.enabled:
            size = compiled_size(len(tokens))
            if size not in self._shapes:  # Powers of two, of which there are few.
                self._shapes[size] = layer_shapes(self._model, size)
            layers = fit_layers(state.layers, self._shapes[size])
            kept = DecodingState(layers, state.token, state.position, state.recent)
            self._prefixes.add(tokens, kept)

    def _is_being_read(self, prompt: np.ndarray) -> bool:
        others = [reading.prompt for reading in self._readings if reading.begun]
        return self._prefixes.enabled and any(
            np.array_equal(prompt[: len(other)], other) for other in others
        )

    def _run_piece(self, reading: Reading, most: int) -> int:
        """Runs a piece of a prompt, and returns its number of tokens."""
        if not reading.begun:
            self._begin(reading)
        prompt, marks = reading.prompt, reading.request.keep
        # The last token that has been read is pending: the layers run it with the next piece.
        end = reading.read + most + (reading.state is None)
        end = min([end, len(prompt), *(mark for mark in marks if mark > reading.read)])
        new = prompt[reading.read : end]
        if len(new) == 0:
            return 0
        reading.state = prefill_rows(
            self._model,
            Rows([new], batched=False),
            reading.state,
            room=self._capacity - end,
            window=self._window,
        )
        jax.block_until_ready(reading.state.layers)  # Other threads must not pay for it.
        reading.read = end
        if end == len(prompt) or end in marks:
            self.keep(prompt[:end], reading.state)
        return len(new)

    def _count(self, tokens: int, seconds: float) -> None:
        self._counts.prefilled_tokens += tokens
        self._counts.prefill_seconds += seconds
        if tokens:
            self._fastest = min(self._fastest, seconds / tokens)

    def _begin(self, reading: Reading) -> None:
        """Looks for a state that has read the beginning of a prompt."""
        reading.begun = True
        job, counts = reading.request.job, self._counts
        job.reused, state = self._prefixes.longest(job.prompt)
        counts.prompt_tokens += len(job.prompt)
        counts.lookups += 1
        if state is None:
            return
        layers = with_room(state.layers, self._capacity)
        reading.state = DecodingState(layers, state.token, state.position, state.recent)
        reading.read = job.reused
        counts.hits += 1
        counts.reused_tokens += job.reused
        job.saved_seconds = job.reused * self._fastest
        counts.saved_seconds += job.saved_seconds
