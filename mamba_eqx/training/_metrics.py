"""The metrics of a training run: one line of JSON for each step and each evaluation."""

import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int


METRICS_FILE = "metrics.jsonl"
Scalar = jax.Array | np.ndarray | np.number | np.bool_ | int | float


class MetricsFile:
    """A metrics file that lines are appended to.

    The lines of steps after the one that the run resumes from are removed first, so that no step is
    recorded twice.
    """

    def __init__(self, folder: Path, step: int):
        """**Arguments:**

        - `folder`: the folder of the run.
        - `step`: the step that the run resumes from.
        """
        self._path = folder / METRICS_FILE
        self._pending = ""
        self._size = 0
        if self._path.exists():
            with open(self._path, "rb") as file:
                kept = itertools.takewhile(lambda line: line.step <= step, _complete_lines(file))
                self._size = sum(line.size for line in kept)
            os.truncate(self._path, self._size)

    def add(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Adds a line, which `flush` writes.

        **Raises:** `ValueError` if a value is not a scalar.
        """
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
            if self._path.exists():
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
    finite.

    **Raises:** `FileNotFoundError` if the folder has no `metrics.jsonl`.
    """
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    with open(Path(folder) / METRICS_FILE, "rb") as file:
        for line in _complete_lines(file):
            for name, value in line.values.items():
                steps.setdefault(name, []).append(line.step)
                values.setdefault(name, []).append(math.nan if value is None else value)
    return {name: (np.array(steps[name]), np.array(values[name])) for name in sorted(steps)}


class _Line(NamedTuple):
    """The size and the content of a line."""

    size: int
    """The number of bytes, newline included."""

    step: int
    values: dict[str, float | None]


def _complete_lines(file: Iterable[bytes]) -> Iterator[_Line]:
    """Yields the lines before the first incomplete one, which a killed process may have left."""
    for line in file:
        try:
            values = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        yield _Line(len(line), values.pop("step"), values)
