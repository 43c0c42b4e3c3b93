"""The figure of `compare.py`: the speed of every contestant relative to mamba_eqx in float32."""

import io
from pathlib import Path
from typing import Any

from _record import Record, speeds
from _works import ENTRIES, OURS, REFERENCE


_COLORS = {
    OURS: "#009e73",
    "transformers": "#e69f00",
    "mamba.py": "#cc79a7",
    "llama.cpp": "#2f86c9",
    "jax-linear-attention": "#d55e00",
}
_MARKERS = {"float32": "o", "bfloat16": "s", "8 bits": "^", "4 bits": "D"}
_FORMS = {"Q8_0": "8 bits", "Q4_0": "4 bits"}

# matplotlib writes colours as numbers. These stand for those that a style sheet in the file
# chooses, by whether the reader prefers light or dark pages.
_CARD, _INK, _GRID = "#fefefe", "#010101", "#808081"
_STYLE = """<style>
svg { --card: #ffffff; --ink: #24292f; --grid: #b8bec6 }
@media (prefers-color-scheme: dark) { svg { --card: #1e2129; --ink: #e2e4e9; --grid: #5a606b } }
</style>
"""


def plot(record: Record, path: Path) -> None:
    """Writes the figure to an SVG file. It needs matplotlib."""
    from matplotlib import rc_context

    options: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mamba_eqx",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
    }
    with rc_context(options):
        figure = _draw(record)
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor=_CARD, metadata={"Date": None})
    text = out.getvalue()
    for color, name in ((_CARD, "card"), (_INK, "ink"), (_GRID, "grid")):
        text = text.replace(color, f"var(--{name})")
    head, mark, rest = text.partition("<defs>")
    path.write_text(head + _STYLE + mark + rest, "utf-8")


def _draw(record: Record) -> Any:
    # Four inches are as wide as a phone, and the figure is not wider on other screens.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    height = 0.33 * len(record) + 1.9
    figure = Figure(figsize=(4, height))
    axes = figure.add_axes((0.04, 1.5 / height, 0.92, 0.33 * len(record) / height))
    libraries: set[str] = set()
    forms: set[str] = set()
    for row, work in enumerate(record.values()):
        found = speeds(work)
        base = found[REFERENCE.name].median
        axes.axhline(row, color=_GRID, linewidth=0.5, zorder=0)
        axes.annotate(
            work["title"],
            (0, row),
            (0, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            va="bottom",
        )
        for entry in ENTRIES:
            form = _FORMS.get(entry.form, entry.form)
            if entry.name not in found or form not in _MARKERS:
                continue
            libraries.add(entry.library)
            forms.add(form)
            axes.plot(
                found[entry.name].median / base,
                row,
                _MARKERS[form],
                color=_COLORS[entry.library],
                markersize=6,
                markeredgecolor=_CARD,
                markeredgewidth=0.6,
                clip_on=False,
            )
    axes.set_xscale("log")
    axes.set_ylim(len(record) - 0.4, -0.9)
    axes.axvline(1, color=_COLORS[OURS], linewidth=1, zorder=0)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("speed relative to mamba_eqx in float32 (right: faster)")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=color, label=library)
        for library, color in _COLORS.items()
        if library in libraries
    ] + [
        Line2D([], [], linestyle="", marker=marker, color=_INK, label=form)
        for form, marker in _MARKERS.items()
        if form in forms
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=1,
    )
    return figure
