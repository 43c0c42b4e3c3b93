"""Induction heads, from the Mamba paper: section 4.1.2, table 2 and figure 3.

    python examples/papers/induction_heads.py

A sequence of random tokens contains a special token, which appears again at the end. The model must
predict the token that followed its first occurrence. Two layers are trained at length 256, after
shorter lengths, and tested on sequences of up to 2^20 tokens: in chunks, with the state passed from
one to the next, and again token by token with `step`. Memory use is that of one chunk.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from _common import (
    Example,
    Sample,
    arguments,
    build,
    mixer_config,
    options,
    record,
    report,
    size,
    train,
)
from jaxtyping import Array, Bool, Int, PRNGKeyArray

import mamba_eqx as mbx


VOCAB = 16
SPECIAL = VOCAB - 1


def token_at(key: PRNGKeyArray, length: int, index: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the token at an index of the sequence that the key determines.

    A sequence of any length can thus be generated piece by piece.
    """
    place_key, token_key = jr.split(key)
    place = jr.randint(place_key, (), 0, length - 2)
    token = jr.randint(jr.fold_in(token_key, index), (), 0, SPECIAL)
    return jnp.where((index == place) | (index == length - 1), SPECIAL, token)


def answer(key: PRNGKeyArray, length: int) -> Int[Array, ""]:
    """Returns the token after the first occurrence of the special token."""
    place = jr.randint(jr.split(key)[0], (), 0, length - 2)
    return token_at(key, length, place + 1)


def task(length: int) -> Sample:
    """Returns a task of sequences with one target, at the last token."""

    def sample(key: PRNGKeyArray) -> Example:
        index = jnp.arange(length)
        tokens = jax.vmap(token_at, in_axes=(None, None, 0))(key, length, index)
        targets = jnp.full(length, answer(key, length))
        return Example(tokens, targets, (index == length - 1).astype(jnp.float32))

    return sample


def right_by_scan(
    model: mbx.LanguageModel, key: PRNGKeyArray, length: int, chunk: int
) -> Bool[Array, ""]:
    """Returns whether the model predicts the answer when it reads in chunks.

    Only the state and one chunk are in memory at a time.
    """
    chunk = min(chunk, length)

    def read(state: Any, start: Int[Array, ""]) -> Any:
        tokens = jax.vmap(token_at, in_axes=(None, None, 0))(key, length, start + jnp.arange(chunk))
        features, state = model.backbone(tokens, state)
        return state, features[-1]

    _, last = jax.lax.scan(read, model.init_state(), jnp.arange(0, length, chunk))
    return jnp.argmax(model.logits(last[-1])) == answer(key, length)


def right_by_step(model: mbx.LanguageModel, key: PRNGKeyArray, length: int) -> Bool[Array, ""]:
    """Returns whether the model predicts the answer when it reads token by token."""

    def read(index: Any, carry: Any) -> Any:
        return model.backbone_step(token_at(key, length, index), carry[1])

    features, _ = jax.lax.fori_loop(0, length, read, (jnp.zeros(model.d_model), model.init_state()))
    return jnp.argmax(model.logits(features)) == answer(key, length)


def evaluate(
    model: mbx.LanguageModel, args: argparse.Namespace, key: PRNGKeyArray
) -> list[dict[str, Any]]:
    """Counts the correct answers for each length, by `scan` and by `step`."""
    rows = []
    for power in range(6, args.max_power + 1, args.power_stride):
        length = 2**power
        count = min(args.count, max(args.least, args.tokens // length))
        keys = jr.split(jr.fold_in(key, power), count)
        for way, batch in (("scan", min(count, 16)), ("step", min(count, args.step_count))):
            if way == "step" and power not in args.step_powers:
                continue
            start = time.perf_counter()
            if way == "scan":
                run = jax.jit(jax.vmap(lambda k, n=length: right_by_scan(model, k, n, args.chunk)))
            else:
                run = jax.jit(jax.vmap(lambda k, n=length: right_by_step(model, k, n)))
            asked = keys if way == "scan" else keys[: args.step_count]
            parts = [run(asked[i : i + batch]) for i in range(0, len(asked), batch)]
            right = int(jnp.sum(jnp.concatenate(parts)))
            row = {"length": length, "way": way, "right": right, "of": len(asked)}
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(row, flush=True)
            rows.append(row)
    return rows


def plot(runs: list[dict[str, Any]]) -> Any:
    """Plots the accuracy against the length."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4))
    for kind in dict.fromkeys(run["model"] for run in runs):
        for seed, run in enumerate(r for r in runs if r["model"] == kind):
            rows = [row for row in run["results"] if row["way"] == "scan"]
            label = f"{kind}, seed {run['seed']}"
            lengths = [row["length"] for row in rows]
            colour = "C" + str(["mamba1", "mamba2", "mamba3"].index(kind))
            style = ["-o", "--o", ":o"][seed % 3]
            shares = [row["right"] / row["of"] for row in rows]
            axes.plot(lengths, shares, style, color=colour, markersize=3, label=label)
    axes.axvline(256, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="test length (trained at 256)", ylabel="accuracy", ylim=(-0.03, 1.03))
    return figure


def main() -> None:
    args = arguments(
        __doc__,
        models=["mamba1", "mamba2", "mamba3"],
        seeds=[0],
        lengths=[16, 256],
        steps=[1000, 4000],
        d_model=64,
        d_state=16,
        batch=8,
        lr=1e-2,
        weight_decay=0.0,
        max_power=20,
        power_stride=2,
        step_powers=[10, 20],
        step_count=4,
        count=64,
        least=8,
        tokens=2**20,
        chunk=4096,
    )
    if args.smoke:
        args.lengths, args.steps, args.d_model, args.batch = [8], [2], 16, 2
        args.models, args.max_power, args.count, args.chunk = ["mamba1"], 6, 2, 32
        args.step_powers = [6]
    path = args.out / "induction_heads.jsonl"
    runs = [] if args.plot_only else [(kind, s) for kind in args.models for s in args.seeds]
    for kind, seed in runs:
        model_key, data_key, test_key = jr.split(jr.key(seed), 3)
        mixer = mixer_config(kind, args.d_model, args.d_state)
        model = build(mixer, VOCAB, 2, model_key)
        stages = [(task(n), steps) for n, steps in zip(args.lengths, args.steps, strict=True)]
        label = f"{kind}, seed {seed}"
        model, curve, minutes = train(
            model,
            stages,
            lr=args.lr,
            batch=args.batch,
            key=data_key,
            weight_decay=args.weight_decay,
            label=label,
        )
        run = {"model": kind, "seed": seed, "parameters": size(model), "minutes": minutes}
        run |= options(
            args, "lengths", "steps", "d_model", "d_state", "batch", "lr", "weight_decay"
        )
        run |= {"results": evaluate(model, args, test_key), "curve": curve[::5]}
        record(path, run, same=("model", "seed"))
    report(path, plot)


if __name__ == "__main__":
    main()
