"""Train a byte-level Mamba language model on a text, from scratch, on a laptop's CPU.

    python examples/train_lm.py --out runs/shakespeare              # the model that ships, an hour
    python examples/train_lm.py --text book.txt --steps 500 --out runs/book
    python -m mamba_eqx generate --model runs/book "It was "

Every stream of the batch reads a stretch of the text, `--length` bytes a step, and carries its
state from step to step (truncated backpropagation through time); at the end of the stretch it
starts on another one with an empty state. A zero byte in the text separates documents: the model
forgets there (`reset`). The result is a checkpoint in the transformers layout.
"""

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mamba_eqx as mbx


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"
HELD_OUT = b"TWELFTH NIGHT"  # how the work begins that is never trained on


class Batch(NamedTuple):
    tokens: np.ndarray  # (batch, length + 1): inputs, and targets one byte later
    fresh: np.ndarray  # (batch,): which streams have just begun a stretch


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and the held-out ones."""
    data = path.read_bytes()
    text = lzma.decompress(data) if path.suffix == ".xz" else data
    documents = text.split(b"\0")
    held_out = [d for d in documents if d.startswith(HELD_OUT)]
    if len(documents) == 1 or not held_out:  # any other text: its last twentieth
        cut = len(text) - len(text) // 20
        train, held_out = [text[:cut]], [text[cut:]]
    else:
        train = [d for d in documents if d not in held_out]
    return tuple(np.frombuffer(b"\0" + b"\0".join(part), np.uint8) for part in (train, held_out))


def batches(data: np.ndarray, batch: int, length: int, stretch: int, seed: int) -> Iterator[Batch]:
    """Endless stretches without replacement, cut anew every epoch; streams change at odd times."""
    rng, bag = np.random.default_rng(seed), []

    def next_stretch() -> int:
        if not bag:
            starts = np.arange(rng.integers(stretch * length), len(data) - 1, stretch * length)
            bag.extend(rng.permutation(starts))
        return int(bag.pop())

    position = np.array([next_stretch() + length * (i * stretch // batch) for i in range(batch)])
    step = 0
    while True:
        changes = (step + np.arange(batch) * stretch // batch) % stretch == 0
        fresh = changes | (step == 0)
        for i in np.flatnonzero(changes) if step else ():
            position[i] = next_stretch()
        window = (position[:, None] + np.arange(length + 1)) % len(data)
        yield Batch(data[window].astype(np.int32), fresh)
        position, step = position + length, step + 1


def losses(model: mbx.LanguageModel, tokens: Any, state: Any) -> tuple[Any, Any]:
    """The loss of every byte in nats, and the state after the last."""
    logits, state = model.scan(tokens[:-1], state, reset=tokens[:-1] == 0)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]), state


def make_optimiser(model: mbx.LanguageModel, lr: float, steps: int) -> optax.GradientTransformation:
    """The recipe of the papers: AdamW, warm-up, cosine to nothing, no decay of recurrences."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 30), steps, lr / 100)
    recurrence = mbx.recurrence_mask(model)
    decay = jax.tree.map(lambda leaf, r: leaf.ndim > 1 and not r, model, recurrence)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@eqx.filter_jit
def train_step(optimiser: Any, model: Any, opt_state: Any, state: Any, batch: Batch) -> Any:
    empty = model.init_state()

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(batch.fresh, range(1, old.ndim)), new, old)

    state = jax.tree.map(keep, state, empty)

    def mean_loss(model: mbx.LanguageModel) -> tuple[Any, Any]:
        loss, new_state = jax.vmap(losses, in_axes=(None, 0, 0))(model, batch.tokens, state)
        return jnp.mean(loss), new_state

    (loss, state), grads = jax.value_and_grad(mean_loss, has_aux=True)(model)
    updates, opt_state = optimiser.update(grads, opt_state, model)
    return optax.apply_updates(model, updates), opt_state, state, loss


def bits_per_byte(model: mbx.LanguageModel, data: np.ndarray, piece: int = 1024) -> float:
    """The whole of `data` as one sequence, by pieces, the state handed over."""
    run, state, total = jax.jit(losses), model.init_state(), 0.0
    for start in range(0, len(data) - 1, piece):
        loss, state = run(model, jnp.asarray(data[start : start + piece + 1], jnp.int32), state)
        total += float(jnp.sum(loss))
    return total / (len(data) - 1) / np.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=CORPUS, help="a text file, or one in .xz")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the checkpoint")
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-state", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="bytes per step and stream")
    parser.add_argument("--stretch", type=int, default=16, help="steps before a stream moves on")
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train, held_out = read(args.text)
    mixer = mbx.Mamba1Config(args.d_model, d_state=args.d_state)
    config = mbx.LanguageModelConfig(256, (mbx.BlockConfig(mixer),) * args.layers)
    model = config.build(key=jr.key(args.seed))
    optimiser = make_optimiser(model, args.lr, args.steps)
    opt_state = optimiser.init(model)
    states = jax.tree.map(lambda a: jnp.stack([a] * args.batch), model.init_state())
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{size:,} parameters, {len(train):,} bytes to train on, {len(held_out):,} held out")

    stream = batches(train, args.batch, args.length, args.stretch, args.seed)
    start, recent = time.perf_counter(), []
    for step, batch in zip(range(1, args.steps + 1), stream, strict=False):
        model, opt_state, states, loss = train_step(optimiser, model, opt_state, states, batch)
        recent.append(loss)
        if step % 100 == 0 or step == args.steps:
            bits = float(jnp.mean(jnp.stack(recent))) / np.log(2)
            speed = step * args.batch * args.length / (time.perf_counter() - start)
            print(f"step {step}: {bits:.3f} bits per byte, {speed:,.0f} bytes/s", flush=True)
            recent = []
        if step % 500 == 0:
            mbx.save_pretrained(mbx.cast(model, jnp.bfloat16), args.out)
            mbx.save_tokenizer(mbx.ByteTokenizer(), args.out)

    shipped = mbx.cast(model, jnp.bfloat16)
    mbx.save_pretrained(shipped, args.out)
    mbx.save_tokenizer(mbx.ByteTokenizer(), args.out)
    score = bits_per_byte(mbx.cast(shipped, jnp.float32), held_out)
    minutes = (time.perf_counter() - start) / 60
    print(f"held out: {score:.4f} bits per byte, as saved in bfloat16; {minutes:.0f} minutes")
    record = vars(args) | {
        "text": args.text.name,
        "out": args.out.name,
        "parameters": size,
        "held_out_bits_per_byte": round(score, 4),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
