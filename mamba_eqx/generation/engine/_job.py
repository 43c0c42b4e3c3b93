"""What an engine is asked for, and what it answers."""

import dataclasses
import time

import numpy as np

from .._result import FinishReason


class EngineFullError(RuntimeError):
    """The queue of an [`mamba_eqx.Engine`][] is full. Submit the request again later."""


class Job:
    """A request to an [`mamba_eqx.Engine`][], as `submit` returns it.

    - `prompt`: the token ids of the prompt, of shape `(seq,)`.
    - `tokens`: the token ids generated so far.
    - `log_probs`: the model's own log-probability of each of them; see
        [`mamba_eqx.Generation`][].
    - `top`: for each of them, the most likely token ids and their log-probabilities, the most
        likely first; empty unless the request asked for them.
    - `finish`: the [`mamba_eqx.generation.FinishReason`][], or `None` before the end.
    - `error`: what the constraint raised, if `finish` is `CONSTRAINT_FAILED`.
    - `reused`: the number of tokens of the prompt that were not run again, because the engine had
        kept a state after them.
    - `saved_seconds`: the time that the reused tokens would have taken at the highest speed of
        prefill so far, which is too long as long as all prompts were short.

    Other threads than the one that calls `step` may read a job. `log_probs` and `top` are never
    shorter than `tokens`.
    """

    def __init__(self, prompt: np.ndarray, deadline: float | None):
        """**Arguments:**

        - `prompt`: the token ids of the prompt.
        - `deadline`: the value of `time.monotonic` at which the job ends, or `None`.
        """
        self.prompt = prompt
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []
        self.finish: FinishReason | None = None
        self.error: Exception | None = None
        self.reused = 0
        self.saved_seconds = 0.0
        self._deadline = deadline
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the job with `CANCELLED` in the next step, in which its slot becomes free.

        Any thread may call this. A job that has ended stays as it is.
        """
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def interrupted(self) -> bool:
        """Ends the job if it was cancelled or its time is up, and returns whether it did."""
        if self._cancelled:
            self.finish = FinishReason.CANCELLED
        elif self._deadline is not None and time.monotonic() >= self._deadline:
            self.finish = FinishReason.TIME_LIMIT
        return self.finish is not None


@dataclasses.dataclass(frozen=True)
class Progress:
    """What one step of an [`mamba_eqx.Engine`][] did for a job.

    - `job`: the job.
    - `start`: the index in `job.tokens` of the first new token. There may be no new token at the
        end of a job.
    - `finish`: the reason why the job ended in this step, or `None`.
    """

    job: Job
    start: int
    finish: FinishReason | None


@dataclasses.dataclass
class EngineCounts:
    """What an [`mamba_eqx.Engine`][] has done so far.

    - `submitted`, `ended`: numbers of jobs.
    - `prompt_tokens`: the tokens of the prompts of jobs that have begun.
    - `prefilled_tokens`: the tokens of prompts that were run.
    - `reused_tokens`: the tokens of prompts that were not run, because a state was kept after them.
    - `lookups`, `hits`: how many jobs looked for a state in the prefix cache, and found one.
    - `generated_tokens`: the tokens generated.
    - `saved_seconds`: the time that the reused tokens would have taken at the highest speed of
        prefill so far, which is too long as long as all prompts were short.
    - `prefill_seconds`, `decode_seconds`: the time spent on prompts and on generated tokens.
    """

    submitted: int = 0
    ended: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    lookups: int = 0
    hits: int = 0
    generated_tokens: int = 0
    saved_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
