"""Shared by the papers' experiments: small models, the training loop, and results in JSON.

A task is a function from a key to one sequence, so its data is generated on the device, and the
inner loop of `train` makes many steps without returning to Python.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import mamba_eqx as mbx
from mamba_eqx import training


RUNS = Path("runs/papers")  # The default folder of results.


class Example(NamedTuple):
    """One sequence of a task. Where `weight` is zero, the target does not count."""

    tokens: Int[Array, " seq"]
    targets: Int[Array, " seq"]
    weight: Float[Array, " seq"]


Sample = Callable[[PRNGKeyArray], Example]


def mixer_config(
    kind: str, d_model: int, d_state: int, headdim: int = 16
) -> mbx.models.AbstractMixerConfig:
    """Returns the config of a mixer: `mamba1`, `mamba2`, `mamba3` or `attention`."""
    if kind == "mamba1":
        return mbx.Mamba1Config(d_model, d_state=d_state)
    if kind == "mamba2":
        return mbx.Mamba2Config(d_model, d_state=d_state, headdim=headdim)
    if kind == "mamba3":
        return mbx.Mamba3Config(d_model, d_state=d_state, headdim=headdim)
    return mbx.AttentionConfig(d_model, nheads=d_model // headdim, rotary_emb_dim=headdim)


def build(
    mixer: mbx.models.AbstractMixerConfig, vocab_size: int, layers: int, key: PRNGKeyArray
) -> mbx.LanguageModel:
    """Builds a model of equal blocks. Attention blocks have an MLP, as in a transformer."""
    mlp = 2 * mixer.d_model if isinstance(mixer, mbx.AttentionConfig) else None
    block = mbx.BlockConfig(mixer, mlp=None if mlp is None else mbx.GatedMLPConfig(mlp))
    return mbx.LanguageModelConfig(vocab_size, (block,) * layers).build(key=key)


def size(model: mbx.LanguageModel) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def make_optimiser(
    model: mbx.LanguageModel, lr: float, steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Returns AdamW with a warm-up and a cosine decay of the learning rate.

    Weight decay excludes the parameters of recurrences, norms and biases.
    """
    warm = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1), lr / 20)
    decay = training.decay_mask(model)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-12, weight_decay=weight_decay, mask=decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def loss_and_accuracy(model: mbx.LanguageModel, examples: Example) -> tuple[Array, Array]:
    """Returns the mean loss and accuracy over the targets that count."""
    logits = jax.vmap(model)(examples.tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets)
    right = jnp.argmax(logits, axis=-1) == examples.targets
    total = jnp.sum(examples.weight)
    return jnp.sum(losses * examples.weight) / total, jnp.sum(right * examples.weight) / total


def train(
    model: mbx.LanguageModel,
    stages: list[tuple[Sample, int]],
    *,
    lr: float,
    batch: int,
    key: PRNGKeyArray,
    weight_decay: float = 0.1,
    per_call: int = 100,
    label: str = "",
) -> tuple[mbx.LanguageModel, list[dict[str, float]], float]:
    """Trains on each task for its number of steps, with one learning-rate schedule.

    **Returns:** the model, a curve of means over `per_call` steps, and the minutes of training.
    """
    steps = sum(n for _, n in stages)
    optimiser = make_optimiser(model, lr, steps, weight_decay)
    opt_state = optimiser.init(model)  # pyright: ignore[reportArgumentType]
    curve, done, start = [], 0, time.perf_counter()
    for sample, stage_steps in stages:

        @jax.jit
        def run(carry: Any, keys: PRNGKeyArray, sample: Sample = sample) -> Any:
            def step(carry: Any, key: PRNGKeyArray) -> Any:
                model, opt_state = carry
                examples = jax.vmap(sample)(jr.split(key, batch))
                grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
                (loss, accuracy), grads = grad(model, examples)
                updates, opt_state = optimiser.update(grads, opt_state, model)
                return (optax.apply_updates(model, updates), opt_state), (loss, accuracy)

            return jax.lax.scan(step, carry, keys)

        for first in range(0, stage_steps, per_call):
            count = min(per_call, stage_steps - first)
            keys = jax.vmap(lambda i: jr.fold_in(key, i))(done + jnp.arange(count))
            (model, opt_state), (losses, accuracies) = run((model, opt_state), keys)
            done += count
            loss, accuracy = float(jnp.mean(losses)), float(jnp.mean(accuracies))
            curve.append({"step": done, "loss": round(loss, 4), "accuracy": round(accuracy, 4)})
            speed = done / (time.perf_counter() - start)
            print(
                f"{label} step {done}: loss {loss:.4f}, accuracy {accuracy:.4f}, "
                f"{speed:.1f} steps/s",
                flush=True,
            )
    return model, curve, round((time.perf_counter() - start) / 60, 2)


def accuracy_of(
    model: mbx.LanguageModel, sample: Sample, *, batch: int, batches: int, key: PRNGKeyArray
) -> float:
    """Returns the accuracy on fresh sequences."""

    @jax.jit
    def run(model: mbx.LanguageModel, keys: PRNGKeyArray) -> Array:
        def step(_: None, key: PRNGKeyArray) -> tuple[None, Array]:
            examples = jax.vmap(sample)(jr.split(key, batch))
            return None, loss_and_accuracy(model, examples)[1]

        return jnp.mean(jax.lax.scan(step, None, keys)[1])

    return round(float(run(model, jr.split(key, batches))), 4)


def arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Parses the options of a script: `--out`, `--smoke`, `--plot-only` and one per default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the results")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a few steps of a tiny model, as a test",
    )
    parser.add_argument("--plot-only", action="store_true", help="plot existing results only")
    for name, value in defaults.items():
        several = isinstance(value, list)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(value[0] if several else value),
            nargs="+" if several else None,
            default=value,
            help="default: " + (" ".join(map(str, value)) if several else str(value)),
        )
    args = parser.parse_args()
    mbx.use_compilation_cache()
    if args.smoke:  # Compilation would otherwise take nearly all of the time.
        jax.config.update("jax_disable_most_optimizations", True)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns the named options, for the record of a run."""
    return {name: getattr(args, name) for name in names}


def load(path: Path) -> list[dict[str, Any]]:
    """Reads the runs of a result file, one per line."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(path: Path, run: dict[str, Any], *, same: tuple[str, ...]) -> None:
    """Adds a run to a result file, replacing the run whose `same` entries are equal."""
    runs = [r for r in load(path) if any(r[name] != run[name] for name in same)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*runs, run]))


def report(path: Path, plot: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Plots all runs of a result file, and prints the paths of the results and the plot."""
    picture = path.with_suffix(".png")
    figure = plot(load(path))
    for axes in figure.axes:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(f"{path} and {picture.name}")
