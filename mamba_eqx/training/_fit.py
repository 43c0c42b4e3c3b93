"""The loop around a step: it resumes, and loses nothing."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
from tqdm import tqdm

from ._checkpoints import Checkpoints, CheckpointWriteError, write_error
from ._metrics import MetricsFile
from .data import Batch


State = TypeVar("State")


@runtime_checkable
class Data(Protocol):
    """A batch for each step, always the same one: [`mamba_eqx.training.Streams`][], or a list."""

    def __getitem__(self, step: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Fit(Generic[State]):
    """What [`mamba_eqx.training.fit`][] returns."""

    state: State
    """The state after the last step."""

    step: int
    """How many steps it has behind it."""

    interrupted: bool
    """Whether Ctrl-C or SIGTERM ended the training."""


def fit(
    step: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    state: State,
    data: Data,
    *,
    steps: int,
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    evaluate_every: int = 500,
    best: str | None = None,
    log_every: int = 20,
    progress: bool = True,
) -> Fit[State]:
    """Trains, and goes on where it was if the folder has checkpoints.

    ```python
    state = training.fit(step, state, data, steps=5000, folder="runs/mine").state
    ```

    It knows nothing of models: `step` and `state` may be anybody's. A training that was killed, at
    any moment, and started again gives bit for bit what one without interruption gives, the
    metrics included, if `step` and `data` are pure functions and the machine is the same.

    In the folder are `checkpoints/` ([`mamba_eqx.training.Checkpoints`][]) and `metrics.jsonl`, one
    line a step and one for each evaluation. Ctrl-C and SIGTERM end the step that is running and
    write a checkpoint; a second one interrupts at once. If a checkpoint cannot be written, there
    is a warning, and the training goes on.

    **Arguments:**

    - `step`: from a state and a batch to the next state and a dictionary of numbers, usually
        jitted. The state handed to it is not used again: it may be donated.
    - `state`: what a new training begins with, a pytree of arrays: all that changes, such as the
        model, the optimiser's state, the recurrent state that is carried, PRNG keys.
    - `data`: `data[i]` is the batch of step `i`, from 0.
    - `steps`: how many steps there are in all, those of earlier runs included.
    - `folder`: where to write.
    - `config`: what distinguishes this training from others, as JSON. To resume with another one
        is an error.
    - `checkpoint_every`, `keep`: how often to write a checkpoint, and how many to keep.
    - `evaluate`, `evaluate_every`: from a state to a dictionary of numbers, and how often it is
        called; also at the end.
    - `best`: the name of a result of `evaluate`. Whenever it is lower than ever before, a
        checkpoint is written, and it is kept.
    - `log_every`: how often the numbers of steps are waited for. Between, the device is never
        waited for.
    - `progress`: whether to show a bar on stderr, with tokens a second and the time left.

    **Returns:** a [`mamba_eqx.training.Fit`][].

    **Raises:** [`mamba_eqx.CheckpointError`][] if the checkpoints are those of another training;
    [`mamba_eqx.training.CheckpointWriteError`][], with the state, if the last one cannot be
    written.
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
        raise ValueError(f"`best` is {best!r}, but there is no `evaluate` that could return it.")
    folder = Path(folder)
    checkpoints = Checkpoints(folder / "checkpoints", config=config, keep=keep)
    with _alone(folder), _interruption() as stop:
        state, done = checkpoints.restore(state) or (state, 0)
        metrics = MetricsFile(folder, done)
        bar = _bar(data[done], done, steps) if progress and done < steps else None
        unread: list[Mapping[str, Any]] = []
        saved, score = done, None

        def read() -> None:
            """Waits for the numbers of the steps since the last time."""
            numbers = jax.device_get(unread)
            for number, values in enumerate(numbers, start=done - len(numbers) + 1):
                metrics.add(number, values)
            if bar is not None and numbers:
                bar.set_postfix({k: f"{v:.4g}" for k, v in numbers[-1].items()}, refresh=False)
                bar.update(len(numbers) * bar.tokens)
            unread.clear()
            metrics.flush()

        def save() -> None:
            metrics.flush()
            checkpoints.save(done, state, score=score)

        usable = True  # what `step` has been given is not, until it returns
        try:
            while done < steps and not stop.requested:
                batch = data[done]
                usable = False
                state, numbers = step(state, batch)
                usable = True
                done, score = done + 1, None
                unread.append(numbers)
                last = done == steps
                saving = done % checkpoint_every == 0
                evaluating = evaluate is not None and (last or done % evaluate_every == 0)
                if last or saving or evaluating or done % log_every == 0:
                    read()
                if evaluate is not None and evaluating:
                    results = evaluate(state)
                    _check_names(results, numbers, best)
                    metrics.add(done, results)
                    if best is not None and math.isfinite(results[best]):
                        score = float(results[best])
                        saving |= score < min(checkpoints.scores.values(), default=math.inf)
                if saving and not last:
                    try:
                        save()
                        saved = done
                    except CheckpointWriteError as error:
                        warnings.warn(f"{error} The training goes on.", stacklevel=2)
            read()
        except Exception:
            if usable and saved != done:
                with contextlib.suppress(Exception):
                    read()
                    save()
            raise
        finally:
            if bar is not None:
                bar.close()
        if saved != done:
            try:
                save()
            except CheckpointWriteError as error:
                error.state, error.step = state, done
                raise
        metrics.flush()
    return Fit(state, done, stop.requested)


def _check_names(results: Mapping[str, Any], numbers: Mapping[str, Any], best: str | None) -> None:
    both = sorted(results.keys() & numbers.keys())
    if both:
        raise ValueError(f"`evaluate` and `step` both return {', '.join(both)}: rename one.")
    if best is not None and best not in results:
        raise ValueError(f"`best` is {best!r}, but `evaluate` returns only {sorted(results)}.")


class _Bar(tqdm):
    """A bar that counts tokens."""

    tokens: int


def _bar(batch: Any, done: int, steps: int) -> "_Bar":
    tokens = batch.tokens.size if isinstance(batch, Batch) else 1
    # In a log a line now and then, rather than ten a second.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    bar = _Bar(
        total=steps * tokens,
        initial=done * tokens,
        unit="tok" if isinstance(batch, Batch) else "step",
        unit_scale=True,
        mininterval=interval,
        miniters=1,
    )
    bar.tokens = tokens
    return bar


class _Stop:
    requested = False


@contextlib.contextmanager
def _interruption() -> Iterator[_Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request; the second does what it always does."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield stop
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, _: Any) -> None:
        stop.requested = True
        restore()
        # Not `print`, which may be running just now.
        os.write(2, b"\nThis step is the last, then a checkpoint is written. Once more: at once.\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes that train in one folder would undo each other's work. The lock goes with the
    process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise write_error(error, f"Nothing can be written to {folder}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is training in {folder}: wait for it, or choose another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
