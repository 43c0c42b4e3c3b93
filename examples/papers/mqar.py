"""Multi-query associative recall, from the Mamba-2 paper: figure 8.

    python examples/papers/mqar.py

A sequence starts with pairs of a key and a value. Then the keys appear again in another order, with
gaps between them, and after each the model must predict its value. The state must store all pairs
at once, so its size matters: each kind of layer is trained with several sizes.
"""

from typing import Any

import jax.numpy as jnp
import jax.random as jr
from _common import (
    Example,
    Sample,
    accuracy_of,
    arguments,
    build,
    mixer_config,
    options,
    record,
    report,
    size,
    train,
)
from jaxtyping import PRNGKeyArray


NAMES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "mamba3": "Mamba-3", "attention": "attention"}


def task(pairs: int, length: int, keys: int) -> Sample:
    """Returns a task. Token 0 is the gap, the next `keys` tokens are keys, and then come values."""

    def sample(key: PRNGKeyArray) -> Example:
        k_key, v_key, order_key, place_key = jr.split(key, 4)
        k = 1 + jr.choice(k_key, keys, (pairs,), replace=False)
        v = 1 + keys + jr.randint(v_key, (pairs,), 0, keys)
        order = jr.permutation(order_key, pairs)
        room = length - 2 * pairs
        places = jr.choice(place_key, room, (pairs,), replace=False)
        asked = jnp.zeros(room, jnp.int32).at[places].set(k[order])
        answers = jnp.zeros(room, jnp.int32).at[places].set(v[order])
        tokens = jnp.concatenate([jnp.stack([k, v], axis=1).reshape(-1), asked])
        targets = jnp.concatenate([jnp.zeros(2 * pairs, jnp.int32), answers])
        return Example(tokens, targets, (targets > 0).astype(jnp.float32))

    return sample


def plot(runs: list[dict[str, Any]]) -> Any:
    """Plots the accuracy against the size of the state."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2))
    longest = max((sum(r["steps"]) for r in runs), default=0)
    for i, (kind, label) in enumerate(NAMES.items()):
        mine = [r for r in runs if r["model"] == kind]
        for steps, seed in sorted({(sum(r["steps"]), r["seed"]) for r in mine}, reverse=True):
            chosen = [r for r in mine if (sum(r["steps"]), r["seed"]) == (steps, seed)]
            points = sorted((r["d_state"], r["accuracy"]) for r in chosen)
            color, style = f"C{i}", "-" if steps == longest else ":"
            if kind == "attention":  # Its state has no fixed size.
                axes.axhline(points[0][1], color=color, linestyle=style, label=label)
            else:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, marker="o", color=color, label=label)
            label = None
    axes.set_xscale("log", base=2)
    axes.set(xlabel="d_state", ylabel="accuracy", ylim=(-0.03, 1.03))
    return figure


def main() -> None:
    args = arguments(
        __doc__,
        models=list(NAMES),
        states=[4, 16, 64],
        seeds=[0],
        pairs=[4, 8],
        length=32,
        keys=16,
        d_model=64,
        steps=[4000, 1500],
        batch=64,
        lr=5e-3,
    )
    if args.smoke:
        args.models, args.states, args.pairs, args.length = ["mamba2"], [4], [2], 8
        args.keys, args.d_model, args.steps, args.batch = 4, 16, [2], 2
    path = args.out / "mqar.jsonl"
    runs = [
        (kind, d_state, seed)
        for seed in args.seeds
        for kind in args.models
        for d_state in (args.states if kind != "attention" else [0])
    ]
    for kind, d_state, seed in [] if args.plot_only else runs:
        model_key, data_key, test_key = jr.split(jr.key(seed), 3)
        mixer = mixer_config(kind, args.d_model, d_state)
        model = build(mixer, 1 + 2 * args.keys, 2, model_key)
        stages = [
            (task(pairs, args.length, args.keys), steps)
            for pairs, steps in zip(args.pairs, args.steps, strict=True)
        ]
        label = f"{kind}, d_state {d_state}, seed {seed}"
        model, curve, minutes = train(
            model, stages, lr=args.lr, batch=args.batch, key=data_key, label=label
        )
        accuracy = accuracy_of(model, stages[-1][0], batch=args.batch, batches=32, key=test_key)
        print(f"{label}: {accuracy:.4f} on fresh sequences", flush=True)
        run = {"model": kind, "d_state": d_state, "seed": seed, "accuracy": accuracy}
        run |= {"parameters": size(model), "minutes": minutes}
        run |= options(args, "pairs", "length", "keys", "d_model", "steps", "batch", "lr")
        record(path, run | {"curve": curve[::2]}, same=("model", "d_state", "seed", "steps"))
    report(path, plot)


if __name__ == "__main__":
    main()
