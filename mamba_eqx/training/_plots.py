"""Curves of the metrics of a training run."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ._metrics import METRICS_FILE, read_metrics


_Curve = tuple[np.ndarray, np.ndarray]
# These say how a step was made, and not how the training goes.
_HIDDEN = ("weight",)


def plot_metrics(folder: str | os.PathLike[str]) -> Path:
    """Plots the metrics of a training run against the step and saves the plot as `metrics.png`.

    Metrics of the same quantity share a panel: the losses on held-out text, if they are named for
    example `held_out_loss`, are drawn beside `loss`. Each other metric has a panel of its own, with
    a logarithmic axis if its values span more than two orders of magnitude. Metrics that are
    constant, such as the number of skipped steps while no step was skipped, and the number of
    targets (`weight`) have no panel. With [`mamba_eqx.training.TrainStep`][] there are three
    panels: the loss, the norm of the gradient, and the learning rate.

    Curves of more than 200 points are drawn pale, with the means of neighbouring points on top.

    **Arguments:**

    - `folder`: the `folder` given to [`mamba_eqx.training.fit`][]. The plot is saved there.

    **Returns:**

    The path of the image.

    **Raises:** `ImportError` if matplotlib is not installed (the extra `plot` installs it);
    `ValueError` if the folder has no metrics yet.
    """
    try:
        import matplotlib as mpl
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
    groups = _panels(curves)
    heights = [2.6, *[1.3] * (len(groups) - 1)]
    with mpl.rc_context(
        {
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "font.size": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.2,
        }
    ):
        figure = Figure(figsize=(6, 0.5 + sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)
        for panel, (name, members) in zip(panels[:, 0], groups.items(), strict=True):
            for number, member in enumerate(members):
                label = member.removesuffix(f"_{name}").replace("_", " ")
                label = "training" if member == name else label
                steps, values = curves[member]
                color = f"C{number}"
                smooth = _means(steps, values)
                if smooth is None:
                    panel.plot(steps, values, color=color, label=label, marker=".", markersize=4)
                else:
                    panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
                    panel.plot(*smooth, color=color, label=label)
            if len(members) > 1:
                panel.legend(loc="best")
            drawn = np.concatenate([curves[member][1] for member in members])
            drawn = drawn[np.isfinite(drawn)]
            if drawn.size and 0 < 100 * drawn.min() < drawn.max():
                panel.set_yscale("log")
            panel.set_ylabel(name.replace("_", " "))
            panel.grid(alpha=0.25, linewidth=0.5)
        figure.align_ylabels(panels[:, 0])
        panels[-1, 0].set_xlabel("step")
        panels[-1, 0].margins(x=0.01)
        path = Path(folder) / "metrics.png"
        figure.savefig(path, dpi=200)
    return path


def _panels(curves: Mapping[str, _Curve]) -> dict[str, list[str]]:
    """Returns the metrics of each panel, under the name of their quantity, the loss first."""
    shown = [
        name
        for name, (_, values) in curves.items()
        if name not in _HIDDEN and (values.size == 1 or np.unique(values).size > 1)
    ]
    # Something is drawn even if all metrics are constant.
    shown = shown or list(curves)
    groups: dict[str, list[str]] = {}
    for name in sorted(shown, key=len):
        quantity = next((known for known in groups if name.endswith(f"_{known}")), name)
        groups.setdefault(quantity, []).append(name)
    # The quantity that is measured in several ways is what the run is about.
    order = sorted(groups, key=lambda name: (-len(groups[name]), "loss" not in name, name))
    return {name: groups[name] for name in order}


def _means(steps: np.ndarray, values: np.ndarray) -> _Curve | None:
    """Returns the means of neighbouring points, or `None` if all points can be told apart."""
    if len(values) <= 200:
        return None
    finite = np.isfinite(values)
    cuts = np.linspace(0, finite.sum(), 101).astype(int)[1:-1]
    parts = [np.split(array[finite], cuts) for array in (steps, values)]
    x, y = ([part.mean() for part in side if part.size] for side in parts)
    return np.array(x), np.array(y)
