"""The metrics of a training: a line of JSON a step, and curves of them."""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int


FILE = "metrics.jsonl"


class MetricsFile:
    """Lines that are appended; on resuming it is cut back to the step that is resumed from."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / FILE
        self._pending = ""
        self._size = 0
        if self._path.exists():
            with open(self._path, "rb") as file:
                self._size = sum(len(line) for line, _ in _lines(file, until=step))
            os.truncate(self._path, self._size)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """A line, which `flush` writes."""
        for name, value in values.items():
            if np.ndim(value) != 0:
                raise ValueError(
                    f"The metric {name} must be one number, but has shape {np.shape(value)}: take "
                    "its mean."
                )
        # JSON has no NaN and no infinity.
        plain = {name: float(value) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._pending += json.dumps({"step": step} | plain) + "\n"

    def flush(self) -> None:
        """Writes the lines. If that fails, as on a full disk, they wait for the next time."""
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
            warnings.warn(f"Metrics wait to be written to {self._path}: {error}.", stacklevel=2)
        else:
            self._size += len(self._pending.encode())
            self._pending = ""


def _lines(file: Iterable[bytes], until: int | None = None) -> Iterable[tuple[bytes, dict]]:
    """The whole lines up to a step; the last one may have been cut by a kill."""
    for line in file:
        try:
            values = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or (until is not None and values["step"] > until):
            return
        yield line, values


def read_metrics(
    folder: str | os.PathLike[str],
) -> dict[str, tuple[Int[np.ndarray, " point"], Float[np.ndarray, " point"]]]:
    """The metrics that [`mamba_eqx.training.fit`][] has written to a folder.

    **Returns:** for each name the steps and the values, NaN where one was not finite.
    """
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    with open(Path(folder) / FILE, "rb") as file:
        for _, line in _lines(file):
            for name in line.keys() - {"step"}:
                steps.setdefault(name, []).append(line["step"])
                values.setdefault(name, []).append(math.nan if line[name] is None else line[name])
    return {name: (np.array(steps[name]), np.array(values[name])) for name in sorted(steps)}


def plot_metrics(folder: str | os.PathLike[str]) -> Path:
    """Draws the curves of a training into `metrics.png` in its folder, one below another.

    A curve of more than 200 points is drawn pale, with means of neighbouring points over it.

    **Returns:** the path of the picture.

    **Raises:** `ImportError` if matplotlib is missing, which the extra `plot` installs.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Curves are drawn by matplotlib, which is not installed: "
            "`pip install 'mamba_eqx[plot]'`."
        ) from None
    curves = read_metrics(folder)
    if not curves:
        raise ValueError(f"There are no metrics in {Path(folder) / FILE} to draw.")
    figure = Figure(figsize=(8, 2.5 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for panel, (name, (steps, values)) in zip(panels, curves.items(), strict=True):
        many = len(values) > 200
        panel.plot(steps, values, alpha=0.3 if many else 1.0, marker="" if many else ".")
        if many:
            size = len(values) // 100
            means = [x[: len(x) // size * size].reshape(-1, size).mean(1) for x in (steps, values)]
            panel.plot(*means, color="C0")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    path = Path(folder) / "metrics.png"
    figure.savefig(path, dpi=100)
    return path
