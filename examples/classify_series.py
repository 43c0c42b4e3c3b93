"""Classifies time series of different lengths, with Mamba blocks inside an ordinary Equinox module.

    python examples/classify_series.py

A series is noise that contains three short patterns; their order, one of six, is the class. The
places and sizes of the patterns and the length of the series vary, so only a model with memory can
tell the order. Batches are padded on the right, and `length` is the number of real time steps.
"""

import argparse
import itertools
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PyTree
from option_types import number

import mamba_eqx as mbx
from mamba_eqx import training


WIDTH = 8  # The number of time steps of a pattern.
TIME = np.linspace(0, 1, WIDTH)
PATTERNS = np.stack([np.sin(2 * np.pi * TIME), np.sin(4 * np.pi * TIME), np.sin(np.pi * TIME)])
ORDERS = list(itertools.permutations(range(3)))


class Classifier(eqx.Module):
    """A model that returns the logits of the classes of one series."""

    encoder: eqx.nn.Linear
    blocks: mbx.Unrolled
    head: eqx.nn.Linear

    def __init__(self, d_model: int, n_layer: int, *, key: jax.Array):
        encoder_key, head_key, *block_keys = jr.split(key, 2 + n_layer)
        self.encoder = eqx.nn.Linear(1, d_model, key=encoder_key)
        self.blocks = mbx.Unrolled([mbx.Block(mbx.Mamba1(d_model, key=k)) for k in block_keys])
        self.head = eqx.nn.Linear(d_model, len(ORDERS), key=head_key)

    def __call__(self, series: jax.Array, length: jax.Array) -> jax.Array:
        """Returns the logits of the classes. Padding after `length` has no effect."""
        y = self.blocks(jax.vmap(self.encoder)(series), length=length)
        return self.head(y[length - 1])


def make_series(rng: np.random.Generator, count: int, longest: int) -> tuple[np.ndarray, ...]:
    """Returns padded series, their lengths and their classes."""
    shortest = max(longest // 2, 3 * WIDTH)
    lengths = rng.integers(shortest, longest + 1, size=count)
    labels = rng.integers(len(ORDERS), size=count)
    # Large padding would show in the results if it were read.
    series = np.full((count, longest, 1), 100.0, np.float32)
    for row, length, label in zip(series, lengths, labels, strict=True):
        row[:length, 0] = 0.3 * rng.normal(size=length)
        # Patterns do not overlap: the time steps left over are divided into random gaps.
        gaps = np.sort(rng.integers(length - 3 * WIDTH + 1, size=3)) + WIDTH * np.arange(3)
        for start, pattern in zip(gaps, ORDERS[label], strict=True):
            row[start : start + WIDTH, 0] += rng.uniform(1.0, 2.0) * PATTERNS[pattern]
    return series, lengths.astype(np.int32), labels.astype(np.int32)


def mean_loss(
    model: Classifier, batch: tuple[jax.Array, ...], carry: PyTree | None, key: jax.Array
) -> tuple[jax.Array, training.LossAux]:
    """Returns the mean cross-entropy of the classes, as a `training.Loss`."""
    series, lengths, labels = batch
    logits = jax.vmap(model)(series, lengths)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), training.LossAux(jnp.asarray(len(labels)), carry)


@eqx.filter_jit
def logits(model: Classifier, series: Any, lengths: Any) -> jax.Array:
    """Returns the logits of a batch of series."""
    return jax.vmap(model)(series, lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d-model", type=number(int, 1), default=16)
    parser.add_argument("--layers", type=number(int, 1), default=2)
    parser.add_argument(
        "--longest", type=number(int, 1), default=96, help="maximum time steps of a series"
    )
    parser.add_argument("--steps", type=number(int, 1), default=600)
    parser.add_argument("--batch", type=number(int, 1), default=32)
    parser.add_argument("--lr", type=number(float, 0), default=1e-2)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    mbx.use_compilation_cache()
    if args.longest < 3 * WIDTH:
        parser.error(f"--longest must be at least {3 * WIDTH}, but got {args.longest}")

    model = Classifier(args.d_model, args.layers, key=jr.key(args.seed))
    schedule = optax.cosine_decay_schedule(args.lr, args.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    train_step = training.TrainStep(optimiser, mean_loss)
    state = train_step.init(model, key=jr.key(args.seed))
    rng = np.random.default_rng(args.seed)
    start = time.process_time()
    for i in range(1, args.steps + 1):
        batch = make_series(rng, args.batch, args.longest)
        state, metrics = train_step(state, batch)
        if i % 100 == 0 or i == args.steps:
            print(f"step {i}: loss {float(metrics['loss']):.3f}", flush=True)
    model = state.model
    series, lengths, labels = make_series(np.random.default_rng(args.seed + 1), 256, args.longest)
    found = np.argmax(logits(model, series, lengths), axis=-1)
    print(f"accuracy on 256 new series: {np.mean(found == labels):.1%} (chance {1 / 6:.1%})")
    print(f"{time.process_time() - start:.0f} s of CPU time")

    # Padding has no effect: a series without padding has the same logits as in a padded batch.
    n = int(lengths[0])
    alone = logits(model, series[:1, :n], lengths[:1])
    padded = logits(model, series[:4], lengths[:4])[:1]
    print(f"with and without padding, logits differ by at most {np.abs(alone - padded).max():.1e}")


if __name__ == "__main__":
    main()
