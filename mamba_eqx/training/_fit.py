"""The training loop, which resumes, evaluates, saves checkpoints and records metrics."""

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import PyTree

from ._checkpoints import Checkpoints
from ._interruption import exclusive, stop_on_signal
from ._metrics import MetricsFile, Scalar
from ._progress import ProgressBar
from ._write_error import CheckpointWriteError


State = TypeVar("State")
_Step = Callable[[State, PyTree], tuple[State, Mapping[str, Scalar]]]
_Evaluate = Callable[[State], Mapping[str, Scalar]]


@runtime_checkable
class Data(Protocol):
    """The batches of a training run, such as [`mamba_eqx.training.Streams`][] or a list.

    A step must always have the same batch, so that a resumed run continues exactly.
    """

    def __getitem__(self, step: int, /) -> PyTree:
        """Returns the batch of a step, counted from 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Fit(Generic[State]):
    """The result of [`mamba_eqx.training.fit`][]."""

    state: State
    """The state after the last step."""

    step: int
    """The number of completed steps."""

    interrupted: bool
    """Whether Ctrl-C or SIGTERM ended the run."""


def fit(
    step: Callable[[State, PyTree], tuple[State, Mapping[str, Scalar]]],
    state: State,
    data: Data,
    *,
    steps: int,
    folder: str | os.PathLike[str],
    config: Mapping[str, object] | None = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    evaluate: Callable[[State], Mapping[str, Scalar]] | None = None,
    evaluate_every: int = 500,
    best: str | None = None,
    log_every: int = 20,
    progress: bool = True,
) -> Fit[State]:
    """Trains for a number of steps, resuming from the newest checkpoint in `folder` if there is
    one.

    ```python
    import jax
    import jax.numpy as jnp
    from mamba_eqx import training

    @jax.jit
    def step(state, batch):
        error = state - batch
        return state - 0.1 * error, {"loss": error**2}

    data = [float(i % 2) for i in range(100)]
    state = training.fit(step, jnp.zeros(()), data, steps=100, folder="runs/mean").state
    ```

    `fit` is model-agnostic: `step` and `state` may be anything. A run that is killed, at any
    moment, and started again ends bit for bit like an uninterrupted one, metrics included, if
    `step` and `data` are pure functions and the machine is the same.

    The folder contains `checkpoints/` ([`mamba_eqx.training.Checkpoints`][]) and `metrics.jsonl`,
    with one line for each step and one for each evaluation. Ctrl-C and SIGTERM finish the current
    step and save a checkpoint; a second signal interrupts immediately. If a checkpoint cannot be
    written, `fit` warns and continues. If a checkpoint or a part of `metrics.jsonl` is damaged,
    `fit` warns, keeps the damaged file under another name, and resumes from what is intact.

    A finished run is extended by a larger number of `steps`. `fit` knows nothing of learning-rate
    schedules: one that depends on the total number of steps, as that of
    [`mamba_eqx.training.recipe`][], continues at the same step of the new, longer schedule.

    **Arguments:**

    - `step`: a function from a state and a batch to the next state and a dictionary of scalar
        metrics, usually jitted. It may donate the state, which `fit` does not use again.
    - `state`: the initial state of a new run, a pytree of arrays with everything that changes: the
        model, the optimiser's state, a carried recurrent state, PRNG keys.
    - `data`: `data[i]` is the batch of step `i`, counted from 0.
    - `steps`: the total number of steps, those of earlier runs included.
    - `folder`: the folder of the run. It is created if it does not exist.
    - `config`: the settings that distinguish this run from others, as JSON. Resuming with other
        settings is an error. Leave out what may change between runs, such as `steps`.
    - `checkpoint_every`: the number of steps between checkpoints.
    - `keep`: the number of newest checkpoints to keep, at least 1.
    - `evaluate`: a function from a state to a dictionary of scalar metrics.
    - `evaluate_every`: the number of steps between evaluations. The last step is always evaluated.
    - `best`: the name of a metric of `evaluate`. A checkpoint is saved, and kept, whenever this
        metric is lower than ever before.
    - `log_every`: the number of steps after which metrics are fetched from the device. In between
        the device is not synchronised.
    - `progress`: whether to show a progress bar on stderr, with tokens per second and the time
        left, and the metrics of each evaluation.

    **Returns:**

    A [`mamba_eqx.training.Fit`][].

    **Raises:** `ValueError` for an argument out of range, metrics that are not scalars or that
    `step` and `evaluate` both return, and a folder in which another process is training;
    [`mamba_eqx.CheckpointError`][] if the checkpoints belong to a run with another `config` or
    another structure of `state`, or all are damaged;
    [`mamba_eqx.training.CheckpointWriteError`][] if the folder cannot
    be written to. If the last checkpoint cannot be written, the error carries the state.
    """
    for name, value in [
        ("steps", steps),
        ("checkpoint_every", checkpoint_every),
        ("evaluate_every", evaluate_every),
        ("log_every", log_every),
    ]:
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {value}.")
    if best is not None and evaluate is None:
        raise ValueError(
            f"`best` requires `evaluate`, but got best={best!r} and no `evaluate`. Give the "
            "function that returns this metric."
        )
    folder = Path(folder)
    checkpoints = Checkpoints(folder / "checkpoints", config=config, keep=keep)
    with exclusive(folder), stop_on_signal() as stop:
        state, done = checkpoints.restore(state) or (state, 0)
        bar = ProgressBar(steps) if progress else None
        metrics = MetricsFile(folder, done, repeated=checkpoint_every)
        run = _Run(step, data, state, done, checkpoints, metrics, bar)
        try:
            while run.done < steps and not stop.requested:
                run.advance()
                last = run.done == steps
                saving = run.done % checkpoint_every == 0
                evaluating = last or run.done % evaluate_every == 0
                if last or saving or run.done % log_every == 0 or (evaluate and evaluating):
                    run.log()
                if evaluate is not None and evaluating:
                    saving |= run.evaluate(evaluate, best)
                if saving and not last:
                    run.save_or_warn()
            run.log()
        except Exception:
            run.rescue()
            raise
        finally:
            run.close()
        run.finish()
    return Fit(run.state, run.done, stop.requested)


class _Run(Generic[State]):
    """A training run: its state, the number of completed steps, and the files that it writes."""

    def __init__(
        self,
        step: _Step[State],
        data: Data,
        state: State,
        done: int,
        checkpoints: Checkpoints,
        metrics: MetricsFile,
        bar: ProgressBar | None,
    ):
        self.state = state
        self.done = done
        self._step = step
        self._data = data
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._bar = bar
        self._pending: list[Mapping[str, Scalar]] = []  # metrics that are still on the device
        self._metric_names: set[str] = set()  # of the last step
        self._score: float | None = None  # of the state, if it has been evaluated for `best`
        self._saved = done  # the step of the newest checkpoint
        self._intact = True  # whether the memory of the state is valid, not donated

    def advance(self) -> None:
        """Makes one step."""
        batch = self._data[self.done]
        if self._bar is not None:
            self._bar.open(batch, self.done)
        # `step` may donate the state. If `step` then raises, the state is lost.
        self._intact = False
        self.state, values = self._step(self.state, batch)
        self._intact = True
        self.done += 1
        self._score = None
        self._pending.append(values)
        self._metric_names = set(values)

    def log(self) -> None:
        """Fetches the pending metrics, which synchronises the device, and writes them."""
        fetched = jax.device_get(self._pending)
        for number, values in enumerate(fetched, start=self.done - len(fetched) + 1):
            self._metrics.add(number, values)
        if self._bar is not None and fetched:
            self._bar.advance(len(fetched), fetched[-1])
        self._pending.clear()
        self._metrics.flush()

    def evaluate(self, evaluate: _Evaluate[State], best: str | None) -> bool:
        """Evaluates the state and returns whether its metric `best` is lower than ever before."""
        results = evaluate(self.state)
        both = sorted(results.keys() & self._metric_names)
        if both:
            raise ValueError(
                f"`evaluate` and `step` must return metrics of different names, but both return "
                f"{', '.join(both)}. Rename one."
            )
        if best is not None and best not in results:
            raise ValueError(
                f"`best` must be a metric of `evaluate`, but got best={best!r} and the metrics "
                f"{sorted(results)}."
            )
        self._metrics.add(self.done, results)
        if self._bar is not None:
            self._bar.write(self.done, results)
        if best is None or not math.isfinite(results[best]):
            return False
        self._score = float(results[best])
        return self._score < min(self._checkpoints.scores.values(), default=math.inf)

    def save(self) -> None:
        """Writes a checkpoint of the state."""
        self._metrics.flush()
        self._checkpoints.save(self.done, self.state, score=self._score)
        self._saved = self.done

    def save_or_warn(self) -> None:
        """Writes a checkpoint, or warns if it cannot be written."""
        try:
            self.save()
        except CheckpointWriteError as error:
            warnings.warn(f"{error} Training continues.", stacklevel=3)

    def rescue(self) -> None:
        """Writes a checkpoint after an error, if the state is intact, and raises nothing."""
        if self._intact and self._saved != self.done:
            with contextlib.suppress(Exception):
                self.log()
                self.save()

    def close(self) -> None:
        """Closes the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def finish(self) -> None:
        """Writes the last checkpoint.

        **Raises:** `CheckpointWriteError`, which carries the state, if it cannot be written.
        """
        if self._saved != self.done:
            try:
                self.save()
            except CheckpointWriteError as error:
                error.state, error.step = self.state, self.done
                raise
        self._metrics.flush()
