"""Draws the figures of docs/looking-inside.md from the bundled model.

pip install ".[plot]"
python docs/figures.py
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import mamba_eqx as mbx
from mamba_eqx import inspection


TEXT = "KING RICHARD: My horse, my horse!"
FOLDER = Path(__file__).parent
# The same file in every run.
SVG = {"metadata": {"Date": None, "Creator": None}, "bbox_inches": "tight"}


def main() -> None:
    matplotlib.rcParams.update(
        {"svg.hashsalt": "mamba_eqx", "font.size": 8, "font.family": "DejaVu Sans Mono"}
    )
    model = mbx.from_pretrained(mbx.SHIPPED, dtype=jnp.float32)
    tokens = jnp.asarray(mbx.ByteTokenizer().encode(TEXT))
    found = inspection.mixer_inputs(model, tokens)
    draw_tokens(found)
    draw_matrices(found)
    draw_half_lives(found)


def draw_tokens(found: tuple[inspection.MixerInput, ...]) -> None:
    """Draws step sizes and norms of states over the tokens, one row for each layer."""
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 4), sharex=True, layout="constrained")
    rows = {
        "step size, mean over channels": lambda m, x: inspection.step_sizes(m, x).mean(1),
        "norm of the state": lambda m, x: jnp.linalg.norm(inspection.state_norms(m, x), axis=1),
    }
    for axis, (title, compute) in zip(axes, rows.items(), strict=True):
        values = np.stack([compute(mixer, x) for _, mixer, x in found])
        # Layers differ by more than tokens do, so every layer has a scale of its own.
        axis.imshow(values / values.max(1, keepdims=True), aspect="auto", cmap="viridis", vmin=0)
        axis.set_title(f"{title}, relative to the largest of the layer", fontsize=8)
        axis.set_ylabel("layer")
        axis.set_yticks(range(len(found)))
    axes[-1].set_xticks(range(len(TEXT)), [c if c != " " else "␣" for c in TEXT])
    figure.savefig(FOLDER / "inside-tokens.svg", **SVG)


def draw_matrices(found: tuple[inspection.MixerInput, ...]) -> None:
    """Draws which past tokens every layer hears, as the mean size over its channels."""
    figure, axes = plt.subplots(2, 3, figsize=(7.5, 5.2), layout="constrained")
    for i, (axis, (_, mixer, x)) in enumerate(zip(axes.flat, found, strict=True)):
        size = jnp.abs(inspection.mixing_matrices(mixer, x)).mean(0)
        # The diagonal, which contains D, would be much brighter than all else.
        size = jnp.tril(size, -1)
        axis.imshow(size / size.max(), cmap="magma")
        axis.set_title(f"layer {i}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel("heard token", fontsize=8)
    figure.supylabel("output", fontsize=8)
    figure.savefig(FOLDER / "inside-matrices.svg", **SVG)


def draw_half_lives(found: tuple[inspection.MixerInput, ...]) -> None:
    """Draws the distribution of half-lives in every layer."""
    figure, axis = plt.subplots(figsize=(7.5, 2.4), layout="constrained")
    values = [np.log10(inspection.half_lives(mixer, x)).ravel() for _, mixer, x in found]
    axis.boxplot(values, orientation="horizontal", whis=(1, 99), showfliers=False)
    axis.set_yticks(range(1, len(found) + 1), [f"layer {i}" for i in range(len(found))])
    powers = range(int(min(v.min() for v in values)), 4)
    axis.set_xticks(list(powers), [f"{10.0**p:g}" for p in powers])
    axis.set_xlabel("half-life in tokens: quartiles, and 1 % and 99 % of channels and dimensions")
    figure.savefig(FOLDER / "inside-half-lives.svg", **SVG)


if __name__ == "__main__":
    main()
