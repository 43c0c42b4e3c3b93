import threading
import time
from collections import deque
from collections.abc import Sequence

import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from ..._checks import check_count, check_flag, check_positive_number
from ...models import LanguageModel
from .._constrained import matching_for
from .._prefill import compiled_size
from .._prompts import Prompt, read_prompt
from .._sampling import Sampling
from .._state import WINDOW, DecodingState
from ._batch import Batch
from ._job import EngineCounts, EngineFullError, Job, Progress
from ._prefixes import Prefixes
from ._reading import Readings
from ._requests import Request, row_options
from ._slots import Kinds


_BLOCK_BESIDE_PREFILL = 4  # the maximum number of tokens between two pieces of prompts


class Engine:
    """Generates for many requests at once, which come and go at any time.

    The engine decodes a batch of rows, each of which is a slot for one request. A request joins
    the batch as soon as a slot is free and its prompt has been run, in pieces between the tokens of
    the others, and leaves the batch when it ends. The tokens of each request are those that
    [`mamba_eqx.generate`][] gives for it alone with the same key, whatever other requests do.

    The engine does nothing by itself: `step` does a small part of the work and returns what is new.

    ```python
    engine = mbx.Engine(model, slots=8)
    job = engine.submit(prompt, 100, mbx.Sampling(temperature=0.8), key=jax.random.key(0))
    while job.finish is None:
        for progress in engine.step():
            print(progress.job.tokens[progress.start :])
    ```

    One thread calls `step`. Any thread may call `submit` and `Job.cancel` meanwhile.

    States after prompts and answers are kept in a prefix cache. A request whose prompt begins with
    the whole text of such a state, such as the next turn of a conversation, runs only the tokens
    after it.

    The number of rows that are computed is the smallest power of two with room for all requests. A
    program is compiled once for each such number, and again when a request is the first one with a
    filter, penalties, a bias, a constraint, or the most likely tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 8,
        max_len: int = 4096,
        queue: int = 64,
        block: int = 32,
        piece: int = 512,
        prefix_bytes: int = 2**28,
        penalty_window: int = WINDOW,
    ):
        """**Arguments:**

        - `model`: the model.
        - `slots`: the maximum number of requests that decode together, a power of two.
        - `max_len`: the maximum number of tokens of a request, its prompt included. Caches of
            [`mamba_eqx.Attention`][] have this capacity in every slot, rounded up to a power of
            two.
        - `queue`: the maximum number of requests that wait for a slot.
        - `block`: the maximum number of tokens that a step generates for each request. There are
            fewer while prompts are run, for the first token of a request, and if a step would take
            longer than about 0.1 s.
        - `piece`: the maximum number of tokens of prompts that are run in a step.
        - `prefix_bytes`: the maximum size of all states in the prefix cache. 0 keeps none.
        - `penalty_window`: the largest `window` of penalties that requests may have.

        **Raises:** `ValueError` if `slots` is not a power of two, or another number is out of
        range.
        """
        counts = {"slots": slots, "max_len": max_len, "block": block, "piece": piece}
        for name, value in {**counts, "penalty_window": penalty_window}.items():
            check_count(name, value)
        check_count("queue", queue, least=0)
        if isinstance(prefix_bytes, bool) or not isinstance(prefix_bytes, int) or prefix_bytes < 0:
            raise ValueError(
                "`prefix_bytes` must be an integer of at least 0, but got "
                f"prefix_bytes={prefix_bytes!r}."
            )
        if slots & (slots - 1):
            raise ValueError(
                f"`slots` must be a power of two, but got slots={slots}. Use "
                f"{1 << slots.bit_length()}."
            )
        self._vocab_size = model.vocab_size
        self._slots, self._max_len, self._queue = slots, max_len, queue
        self._block, self._piece, self._window = block, piece, max(penalty_window, WINDOW)
        self.counts = EngineCounts()
        """What the engine has done so far, an [`mamba_eqx.generation.EngineCounts`][]."""
        self._prefixes = Prefixes(prefix_bytes)
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()  # of `_waiting` and of `counts.submitted`
        capacity = compiled_size(max_len)
        self._readings = Readings(
            model,
            capacity=capacity,
            window=self._window,
            counts=self.counts,
            prefixes=self._prefixes,
        )
        self._batch = Batch(
            model,
            capacity=capacity,
            window=self._window,
            block=block,
            counts=self.counts,
            keep=self._readings.keep if self._prefixes.enabled else None,
        )

    @property
    def busy(self) -> bool:
        """Whether a step has work to do."""
        return bool(self._waiting or self._readings or self._batch)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def prefilling(self) -> int:
        """The number of requests with a slot whose prompts are being run."""
        return len(self._readings)

    @property
    def decoding(self) -> int:
        """The number of requests that decode."""
        return len(self._batch)

    @property
    def prefix_states(self) -> int:
        """The number of states in the prefix cache."""
        return len(self._prefixes)

    @property
    def prefix_bytes(self) -> int:
        """The size of all states in the prefix cache."""
        return self._prefixes.bytes

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        *,
        key: PRNGKeyArray | None = None,
        seconds: float | None = None,
        top_log_probs: bool = False,
        keep: Sequence[int] = (),
    ) -> Job:
        """Adds a request to the queue.

        **Arguments:**

        - `prompt`: one sequence of token ids.
        - `max_new_tokens`: the maximum number of tokens to generate, at least 1.
        - `sampling`: how to choose tokens, and where the text ends: a [`mamba_eqx.Sampling`][]
            without options per row. While a text with a constraint decodes, a step generates one
            token for each request.
        - `key`: the key of the random numbers, required if the temperature is positive.
        - `seconds`: the time from now after which the job ends with `TIME_LIMIT`. `None`, the
            default, is no limit.
        - `top_log_probs`: whether to return the 20 most likely tokens at each place.
        - `keep`: numbers of tokens of the prompt, such as the lengths of the turns of a
            conversation, after which the prefix cache keeps states too. The state after the whole
            prompt is always kept.

        **Returns:**

        The [`mamba_eqx.generation.Job`][], which `step` adds tokens to.

        **Raises:** `ValueError` in the same cases as [`mamba_eqx.generate`][], and for more tokens
        than `max_len`; [`mamba_eqx.generation.EngineFullError`][] if the queue is full.
        """
        check_count("max_new_tokens", max_new_tokens)
        check_flag("top_log_probs", top_log_probs)
        if seconds is not None:
            check_positive_number("seconds", seconds)
        tokens = read_prompt(self._vocab_size, "submit", prompt, None).tokens[0]
        if len(tokens) + max_new_tokens > self._max_len:
            raise ValueError(
                f"The prompt and `max_new_tokens` must be at most `max_len={self._max_len}` tokens "
                f"together, but got {len(tokens)} and {max_new_tokens}. Shorten the prompt, or "
                "generate fewer tokens."
            )
        for count in keep:
            check_count("keep", count)
        marks = tuple(sorted({int(count) for count in keep if count < len(tokens)}))
        options, table = row_options(
            sampling,
            self._vocab_size,
            key,
            window=self._window,
            top=top_log_probs,
            end=len(tokens) - 1 + max_new_tokens,
        )
        with self._lock:
            self._check_queue()  # A full engine does not work on grammars first.
        matching = matching_for(sampling, self._vocab_size)
        deadline = None if seconds is None else time.monotonic() + seconds
        job = Job(tokens, deadline)
        with self._lock:
            self._check_queue()
            self._waiting.append(Request(job, options, table, marks, matching))
            self.counts.submitted += 1
        return job

    def _check_queue(self) -> None:
        """Raises an error if no more requests can wait. The caller holds the lock."""
        waiting = sum(not request.job.cancelled for request in self._waiting)
        # Cancelled requests leave the queue in the next step only, so they are limited too.
        limit = self._queue + self._free
        if waiting >= limit or len(self._waiting) >= 4 * (self._queue + self._slots):
            raise EngineFullError(
                f"The queue must have fewer than {self._queue} waiting requests, but is full. "
                "Submit the request again later."
            )

    def warm_up(self, *samplings: Sampling) -> None:
        """Compiles ahead of the first request, so that no request waits for it.

        The programs that decode are compiled for every number of rows, and those that run prompts
        for every size of a piece, a power of two. This takes as long as compiling
        [`mamba_eqx.generate`][] several times, unless [`mamba_eqx.use_compilation_cache`][] has
        kept them.

        **Arguments:**

        - `samplings`: options like those of the requests to come, of which only the kinds matter:
            which filters are set, and whether there are penalties, a bias and a constraint.

        **Raises:** `ValueError` if options do not fit the model, or if requests are decoding.
        """
        if self._batch:
            raise ValueError(
                f"`warm_up` must come before requests decode, but {len(self._batch)} do. Call it "
                "right after the engine is made."
            )
        kinds = Kinds()
        for sampling in samplings:
            options, _ = row_options(
                sampling, self._vocab_size, jr.key(0), window=self._window, top=False, end=0
            )
            kinds = kinds.union(options.kinds())
        self._readings.warm_up(self._piece)
        constrained = any(sampling.constraint is not None for sampling in samplings)
        self._batch.warm_up(self._slots, kinds, constrained=constrained)

    def step(self) -> list[Progress]:
        """Runs a piece of the prompts and generates some tokens for each request.

        **Returns:**

        What is new: an element for each job that got tokens or ended.
        """
        progress = self._interrupt()
        with self._lock:
            while self._waiting and self._free > 0:
                self._readings.add(self._waiting.popleft())
        for request, state in self._readings.run(self._piece):
            self._batch.join(request, state)
        if self._batch:
            most = _BLOCK_BESIDE_PREFILL if self._readings else self._block
            progress += self._batch.decode(most, soon=len(self._readings))
        return progress

    def state(self, job: Job) -> DecodingState | None:
        """Returns a copy of the state of a job.

        **Arguments:**

        - `job`: a job of this engine.

        **Returns:**

        The state after all its tokens: that of its row, or of the prefix cache if the job has
        ended. `None` while its prompt is run, and for a state that is not kept.
        """
        if job.finish is None:
            return self._batch.state(job)
        return self._prefixes.get(np.concatenate([job.prompt, np.array(job.tokens, np.int32)]))

    @property
    def _free(self) -> int:
        """The number of free slots."""
        return self._slots - len(self._batch) - len(self._readings)

    def _interrupt(self) -> list[Progress]:
        """Ends jobs that were cancelled or whose time is up."""
        with self._lock:
            waiting = [request.job for request in self._waiting]
            ended = [job for job in waiting if job.interrupted()]
            self._waiting = deque(r for r in self._waiting if r.job.finish is None)
        for job in self._readings:
            if job.interrupted():
                self._readings.remove(job)
                ended.append(job)
        for job in self._batch:
            if job.interrupted():
                self._batch.leave(job)
                ended.append(job)
        self.counts.ended += len(ended)
        return [Progress(job, len(job.tokens), job.finish) for job in ended]
