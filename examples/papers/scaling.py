"""Loss against number of parameters, a small version of the Mamba papers' scaling figures.

    python examples/papers/scaling.py

Models of three sizes are trained on the same million bytes of Shakespeare; *Twelfth Night* is held
out, as for the bundled model. The attention model is a transformer with rotary attention and a
gated MLP in every block. All sizes are far below those in the papers.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import (
    Example,
    Sample,
    arguments,
    build,
    loss_and_accuracy,
    mixer_config,
    options,
    record,
    report,
    size,
    train,
)
from jaxtyping import PRNGKeyArray

import mamba_eqx as mbx
from mamba_eqx import training


CORPUS = Path(__file__).parents[1] / "data" / "shakespeare.txt.xz"
HELD_OUT = b"TWELFTH NIGHT"  # The same play as for the bundled model.
NAMES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "mamba3": "Mamba-3", "attention": "attention"}


def task(data: np.ndarray, length: int) -> Sample:
    """Returns a task of random pieces of the text. Few pieces contain the end of a play."""
    text = jnp.asarray(data)

    def sample(key: PRNGKeyArray) -> Example:
        start = jr.randint(key, (), 0, len(data) - length)
        piece = jax.lax.dynamic_slice(text, (start,), (length + 1,)).astype(jnp.int32)
        return Example(piece[:-1], piece[1:], jnp.ones(length))

    return sample


def bits_per_byte(model: mbx.LanguageModel, data: np.ndarray, length: int) -> float:
    """Scores a text piece by piece, each from an empty state, as attention was trained."""
    pieces = (len(data) - 1) // length
    tokens = data[: pieces * length].reshape(pieces, 1, length).astype(np.int32)
    targets = data[1 : pieces * length + 1].reshape(pieces, 1, length).astype(np.int32)

    @jax.jit
    def run(model: mbx.LanguageModel, tokens: Any, targets: Any) -> Any:
        def score(piece: tuple[Any, Any]) -> Any:
            examples = Example(piece[0], piece[1], jnp.ones((1, length)))
            return loss_and_accuracy(model, examples)[0]

        return jnp.mean(jax.lax.map(score, (tokens, targets)))

    return round(float(run(model, tokens, targets)) / np.log(2), 4)


def plot(runs: list[dict[str, Any]]) -> Any:
    """Plots the held-out loss against the number of parameters."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(5, 3.4))
    for i, (kind, label) in enumerate(NAMES.items()):
        points = sorted((r["parameters"], r["bits_per_byte"]) for r in runs if r["model"] == kind)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "-o", color=f"C{i}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="held-out bits per byte")
    ticks = np.arange(1.0, 8.0, 0.2)
    low, high = axes.get_ylim()
    axes.set_yticks(ticks[(ticks >= low) & (ticks <= high)])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def main() -> None:
    args = arguments(
        __doc__,
        models=list(NAMES),
        d_model=[32, 64, 112],
        layers=[4, 4, 5],
        seeds=[0],
        d_state=16,
        length=128,
        batch=8,
        steps=1000,
        lr=3e-3,
    )
    train_data, held_out = training.hold_out_documents(
        training.read_tokens(CORPUS), [HELD_OUT], separator=0
    )
    if args.smoke:
        args.models, args.d_model, args.layers = ["attention"], [16], [2]
        args.length, args.batch, args.steps, held_out = 16, 2, 2, held_out[:100]
    path = args.out / "scaling.jsonl"
    sizes = list(zip(args.d_model, args.layers, strict=True))
    runs = [(d, n, kind, seed) for d, n in sizes for kind in args.models for seed in args.seeds]
    for d_model, layers, kind, seed in [] if args.plot_only else runs:
        model_key, data_key = jr.split(jr.key(seed))
        # A block with an MLP has more parameters, so there is one block fewer.
        count = layers - 1 if kind == "attention" else layers
        model = build(mixer_config(kind, d_model, args.d_state), 256, count, model_key)
        label = f"{kind}, {size(model):,} parameters, seed {seed}"
        sample = task(train_data, args.length)
        model, curve, minutes = train(
            model, [(sample, args.steps)], lr=args.lr, batch=args.batch, key=data_key, label=label
        )
        score = bits_per_byte(model, held_out, args.length)
        print(f"{label}: {score:.4f} bits per byte", flush=True)
        run = {"model": kind, "seed": seed, "parameters": size(model), "bits_per_byte": score}
        run |= {"d_model": d_model, "layers": count, "minutes": minutes}
        run |= options(args, "d_state", "length", "batch", "steps", "lr")
        record(path, run | {"curve": curve}, same=("model", "seed", "d_model"))
    report(path, plot)


if __name__ == "__main__":
    main()
