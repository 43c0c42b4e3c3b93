"""The metrics of a training run: one line of JSON for each step and each evaluation."""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from .._atomic import atomic_file
from ._write_error import write_error


METRICS_FILE = "metrics.jsonl"
_MAX_LINE = 2**24
Scalar = jax.Array | np.ndarray | np.number | np.bool_ | int | float


class MetricsFile:
    """A metrics file that lines are appended to.

    The lines of steps after the one that the run resumes from are removed first, because these
    steps are repeated, and no step is to be recorded twice. A file with damaged lines is copied
    before they are removed, and so is a file with more such steps than a killed run repeats.
    """

    def __init__(self, folder: Path, step: int, repeated: int):
        """**Arguments:**

        - `folder`: the folder of the run.
        - `step`: the step that the run resumes from.
        - `repeated`: the greatest number of steps that a killed run repeats.

        **Raises:** `CheckpointWriteError` if the file cannot be read or changed.
        """
        self._path = folder / METRICS_FILE
        self._pending = ""
        self._size = 0
        try:
            if self._path.exists():
                self._prepare(step, repeated)
        except OSError as error:
            raise write_error(error, f"Could not read and change {self._path}") from error

    def _prepare(self, step: int, repeated: int) -> None:
        """Removes what does not belong to the steps so far."""
        if not self._path.is_file():
            aside = self._aside()
            os.rename(self._path, aside)
            warnings.warn(
                f"{self._path} is not a file. It was renamed to {aside.name}, and a new one is "
                "begun.",
                stacklevel=4,
            )
            return
        damaged = last = latest = 0
        in_order = True
        for line in _lines(self._path):
            if isinstance(line, _Unreadable):
                # A killed process leaves an incomplete last line, of a step that is repeated.
                damaged += line.complete or last < step
                continue
            latest = max(latest, line.step)
            if line.step <= step:
                in_order &= latest <= step and not damaged
                last = max(last, line.step)
                self._size += len(line.text)
        faults = [f"{damaged} damaged line{'s' * (damaged > 1)}"] * (damaged > 0)
        if latest - step > repeated:
            faults.append(f"{latest - step} steps more than the newest checkpoint")
        if faults:
            aside = self._aside()
            shutil.copyfile(self._path, aside)
            warnings.warn(
                f"{self._path} has {' and '.join(faults)}. It was copied to {aside.name}, and the "
                f"readable lines of the first {step} steps are kept.",
                stacklevel=4,
            )
        if in_order:
            os.truncate(self._path, self._size)
            return
        with atomic_file(self._path) as temporary, open(temporary, "wb") as file:
            for line in _lines(self._path):
                if isinstance(line, _Line) and line.step <= step:
                    file.write(line.text)

    def _aside(self) -> Path:
        """Returns a new name for a file that is set aside."""
        return self._path.with_name(f"damaged-{secrets.token_hex(4)}-{self._path.name}")

    def add(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Adds a line, which `flush` writes.

        **Raises:** `ValueError` if a value is not a scalar, or is named "step".
        """
        if "step" in values:
            raise ValueError(
                "A metric must not be named step, which is the number of completed steps. Rename "
                "it."
            )
        for name, value in values.items():
            if np.ndim(value) != 0:
                raise ValueError(
                    f"The metric {name} must be a scalar, but got an array of shape "
                    f"{np.shape(value)}. Return its mean."
                )
        # JSON has neither NaN nor infinity.
        plain = {name: float(value) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._pending += json.dumps({"step": step} | plain) + "\n"

    def flush(self) -> None:
        """Writes the lines added so far.

        If writing fails, for instance on a full disk, the lines are kept, and the next call tries
        again.
        """
        if not self._pending:
            return
        try:
            with open(self._path, "ab") as file:
                file.write(self._pending.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._size)
            warnings.warn(
                f"Could not write metrics to {self._path} ({error}). They are kept in memory until "
                "the next attempt.",
                stacklevel=2,
            )
        else:
            self._size += len(self._pending.encode())
            self._pending = ""


def read_metrics(
    folder: str | os.PathLike[str],
) -> dict[str, tuple[Int[np.ndarray, " point"], Float[np.ndarray, " point"]]]:
    """Reads the metrics that [`mamba_eqx.training.fit`][] has written to a folder.

    **Arguments:**

    - `folder`: the `folder` given to `fit`.

    **Returns:**

    For each name, the steps and the values at them, with NaN for values that were not
    finite. Damaged lines are left out, with a warning.

    **Raises:** `FileNotFoundError` if the folder has no `metrics.jsonl`; another `OSError` if the
    file cannot be read.
    """
    path = Path(folder) / METRICS_FILE
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    damaged = 0
    for line in _lines(path):
        if isinstance(line, _Unreadable):
            # An incomplete last line is left by a killed process, or is still being written.
            damaged += line.complete
            continue
        for name, value in line.values.items():
            steps.setdefault(name, []).append(line.step)
            values.setdefault(name, []).append(math.nan if value is None else value)
    if damaged:
        lines = (
            "1 damaged line, which is" if damaged == 1 else f"{damaged} damaged lines, which are"
        )
        warnings.warn(f"{path} has {lines} left out.", stacklevel=2)
    return {name: (np.array(steps[name]), np.array(values[name], float)) for name in sorted(steps)}


class _Line(NamedTuple):
    """A line of the file."""

    text: bytes
    """The whole line, newline included."""

    step: int
    values: dict[str, float | None]


class _Unreadable(NamedTuple):
    """A line that is no metrics."""

    complete: bool
    """Whether the line ends in a newline."""


def _lines(path: Path) -> Iterator[_Line | _Unreadable]:
    """Yields the lines of a file.

    A line longer than any that is written is yielded as several unreadable ones, so that memory
    does not grow with the size of a file without newlines.

    **Raises:** `OSError` if the file cannot be read, or is not a regular file.
    """
    if path.exists() and not path.is_file():
        # Opening a named pipe would wait for a writer.
        raise OSError(errno.EINVAL, "It is not a regular file", str(path))
    with open(path, "rb") as file:
        while text := file.readline(_MAX_LINE):
            yield _parse(text) or _Unreadable(text.endswith(b"\n") or len(text) == _MAX_LINE)


def _parse(text: bytes) -> _Line | None:
    """Returns a line, or `None` if it is damaged or incomplete."""
    if not text.endswith(b"\n"):
        return None
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError):  # A deeply nested line raises a `RecursionError`.
        return None
    if not isinstance(values, dict):
        return None
    step = values.pop("step", None)
    if type(step) is not int or not 0 <= step < 2**63:
        return None
    for value in values.values():
        is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if not (value is None or is_number):
            return None
    return _Line(text, step, values)
