"""State tracking, from the Mamba-3 paper: parity, and sums modulo five.

    python examples/papers/state_tracking.py

After each token the model must predict the sum of all tokens so far, modulo two or five. It is
trained on short sequences and tested on longer ones. A state that can only decay (Mamba-1, Mamba-2,
and Mamba-3 with its rotation set to zero) cannot count without limit; a state that rotates by an
angle that depends on the token can.
"""

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _common import Example, Sample, arguments, options, record, report, size, train
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import mamba_eqx as mbx


MODULUS = {"parity": 2, "sum mod 5": 5}
NAMES = {
    "mamba1": "Mamba-1",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "mamba3 -rotation": "Mamba-3 without rotation",
}


class WithoutRotation(mbx.AbstractSequenceLayer[mbx.Mamba3State]):
    """A `Mamba3` whose rotation angles are always zero."""

    mamba: mbx.Mamba3
    d_model: int = eqx.field(static=True)

    def __init__(self, mamba: mbx.Mamba3):
        self.mamba, self.d_model = mamba, mamba.d_model

    @property
    def unrotated(self) -> mbx.Mamba3:
        """The layer with zero rotation angles."""
        mamba = self.mamba  # The last rows of `in_proj` project to the angles.
        weight = mamba.in_proj.weight.at[-mamba.pairs :].set(0.0)
        return eqx.tree_at(lambda m: m.in_proj.weight, mamba, weight)

    def init_state(self, *, max_len: int | None = None) -> mbx.Mamba3State:
        return self.mamba.init_state()

    def scan(
        self,
        x: Float[Array, "seq d_model"],
        state: mbx.Mamba3State | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq d_model"], mbx.Mamba3State]:
        return self.unrotated.scan(x, state, reset=reset, length=length)

    def step(
        self, x: Float[Array, " d_model"], state: mbx.Mamba3State
    ) -> tuple[Float[Array, " d_model"], mbx.Mamba3State]:
        return self.unrotated.step(x, state)


def task(length: int, modulus: int) -> Sample:
    """Returns a task of random numbers and their sums modulo `modulus`."""

    def sample(key: PRNGKeyArray) -> Example:
        tokens = jr.randint(key, (length,), 0, modulus)
        return Example(tokens, jnp.cumsum(tokens) % modulus, jnp.ones(length))

    return sample


def make(name: str, args: argparse.Namespace, modulus: int, key: PRNGKeyArray) -> mbx.LanguageModel:
    sizes = {"d_state": args.d_state, "dt_min": args.dt_min, "dt_max": args.dt_max}

    def mixer(key: PRNGKeyArray) -> mbx.AbstractSequenceLayer[Any]:
        if name == "mamba1":
            return mbx.Mamba1(args.d_model, key=key, **sizes)
        if name == "mamba2":
            return mbx.Mamba2(args.d_model, headdim=16, key=key, **sizes)
        # The paper computes the decay rate with softplus.
        mamba = mbx.Mamba3(args.d_model, headdim=16, A_activation="softplus", key=key, **sizes)
        return mamba if name == "mamba3" else WithoutRotation(mamba)

    model_key, *keys = jr.split(key, 1 + args.layers)
    layers = mbx.Unrolled([mbx.Block(mixer(k)) for k in keys])
    return mbx.LanguageModel(layers, vocab_size=modulus, key=model_key)


def accuracies(
    model: mbx.LanguageModel, args: argparse.Namespace, modulus: int, key: PRNGKeyArray
) -> list[float]:
    """Returns the accuracy at each token number in `args.tests`."""
    examples = jax.vmap(task(max(args.tests), modulus))(jr.split(key, args.count))
    guesses = jnp.argmax(jax.jit(jax.vmap(model))(examples.tokens), axis=-1)
    right = jnp.mean(guesses == examples.targets, axis=0)
    return [round(float(right[n - 1]), 4) for n in args.tests]


def plot(runs: list[dict[str, Any]]) -> Any:
    """Plots the accuracy against the token number, for each task."""
    import matplotlib.pyplot as plt

    tasks = [name for name in MODULUS if any(run["task"] == name for run in runs)]
    figsize = (4 * len(tasks) + 1, 3.2)
    figure, axes = plt.subplots(1, len(tasks), figsize=figsize, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], tasks, strict=True):
        mine = [run for run in runs if run["task"] == name]
        for run in sorted(mine, key=lambda run: list(NAMES).index(run["model"])):
            label = f"{NAMES[run['model']]}, seed {run['seed']}"
            axis.plot(run["tests"], run["accuracies"], "-o", markersize=3, label=label)
            axis.axvline(max(run["lengths"]), color="grey", linewidth=0.8)
        axis.axhline(1 / MODULUS[name], color="grey", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="token number", ylabel="accuracy", ylim=(-0.03, 1.03))
    return figure


def main() -> None:
    args = arguments(
        __doc__,
        tasks=list(MODULUS),
        models=list(NAMES),
        seeds=[0],
        lengths=[8, 40, 160],
        steps=[200, 500, 2000],
        tests=[40, 80, 160, 256, 384, 512, 1024],
        count=256,
        layers=1,
        d_model=32,
        d_state=16,
        dt_min=0.1,
        dt_max=1.0,
        batch=16,
        lr=3e-3,
    )
    if args.smoke:
        args.models, args.lengths, args.steps, args.tests = ["mamba3 -rotation"], [4], [2], [4, 8]
        args.tasks, args.d_model, args.batch, args.count = ["parity"], 16, 2, 2
    path = args.out / "state_tracking.jsonl"
    runs = [(t, m, s) for t in args.tasks for s in args.seeds for m in args.models]
    for name, kind, seed in [] if args.plot_only else runs:
        modulus = MODULUS[name]
        model_key, data_key, test_key = jr.split(jr.key(seed), 3)
        model = make(kind, args, modulus, model_key)
        stages = [
            (task(n, modulus), steps) for n, steps in zip(args.lengths, args.steps, strict=True)
        ]
        label = f"{name}, {kind}, seed {seed}"
        model, curve, minutes = train(
            model,
            stages,
            lr=args.lr,
            batch=args.batch,
            key=data_key,
            weight_decay=0.0,
            label=label,
        )
        run = {"task": name, "model": kind, "seed": seed, "parameters": size(model)}
        run |= {"tests": args.tests, "accuracies": accuracies(model, args, modulus, test_key)}
        print(f"{label}: {dict(zip(args.tests, run['accuracies'], strict=True))}", flush=True)
        run |= options(args, "lengths", "steps", "layers", "d_model", "d_state")
        run |= options(args, "dt_min", "dt_max", "batch", "lr")
        run |= {"minutes": minutes, "curve": curve[::2]}
        record(path, run, same=("task", "model", "seed"))
    report(path, plot)


if __name__ == "__main__":
    main()
