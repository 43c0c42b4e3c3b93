"""Curves of the metrics of a training run."""

import os
from pathlib import Path

from ._metrics import METRICS_FILE, read_metrics


def plot_metrics(folder: str | os.PathLike[str]) -> Path:
    """Plots each metric of a training run against the step and saves the plots as `metrics.png`.

    Curves of more than 200 points are drawn pale, with the means of neighbouring points on top.

    **Arguments:**

    - `folder`: the `folder` given to [`mamba_eqx.training.fit`][]. The plots are saved there.

    **Returns:**

    The path of the image.

    **Raises:** `ImportError` if matplotlib is not installed (the extra `plot` installs it);
    `ValueError` if the folder has no metrics yet.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "`plot_metrics` requires matplotlib, which is not installed. Install it by "
            "`pip install 'mamba_eqx[plot]'`."
        ) from None
    curves = read_metrics(folder)
    if not curves:
        raise ValueError(f"There are no metrics to plot in {Path(folder) / METRICS_FILE}.")
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
