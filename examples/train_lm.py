"""Train a byte-level Mamba language model on a text, from scratch, on a laptop's CPU.

    python examples/train_lm.py --out runs/shakespeare              # the model that ships, an hour
    python examples/train_lm.py --text book.txt --preset small --out runs/book
    python -m mamba_eqx generate --model runs/book "It was "

Run the same command again after Ctrl-C, a kill or a crash, and it goes on where it was. Every row
of the batch reads a stretch of the text, `--length` bytes a step, and carries its state from step
to step (truncated backpropagation through time); at the end of the stretch it starts on another one
with an empty state. A zero byte in the text separates documents: the model forgets there. The
result is a checkpoint in the layout of transformers (of the official code for Mamba-3, which
transformers lacks) with its tokenizer, curves of the training, and a record of the settings.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mamba_eqx as mbx
from mamba_eqx import training


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"
HELD_OUT = b"TWELFTH NIGHT"  # how the work begins that is never trained on


@dataclasses.dataclass(frozen=True)
class Settings:
    mixer: str = "mamba1"
    d_model: int = 192
    layers: int = 6
    d_state: int = 8
    steps: int = 5500
    batch: int = 16
    length: int = 128
    stretch: int = 16
    lr: float = 3e-3
    seed: int = 0


HELP = {
    "mixer": "mamba1, mamba2 or mamba3",
    "length": "bytes a step and row",
    "stretch": "steps before a row moves on",
    "lr": "the peak learning rate",
}
PRESETS = {
    "shipped": Settings(),
    "small": Settings(d_model=64, layers=2, steps=1000, batch=8),
}


def config_of(settings: Settings) -> mbx.LanguageModelConfig:
    d_model, d_state = settings.d_model, settings.d_state
    headdim = min(64, 2 * d_model)
    mixer = {
        "mamba1": lambda: mbx.Mamba1Config(d_model, d_state=d_state),
        "mamba2": lambda: mbx.Mamba2Config(d_model, d_state=d_state, headdim=headdim),
        "mamba3": lambda: mbx.Mamba3Config(d_model, d_state=d_state, headdim=headdim),
    }[settings.mixer]()
    return mbx.LanguageModelConfig(256, (mbx.BlockConfig(mixer),) * settings.layers)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and the held-out ones: a work of the corpus, or a text's last part."""
    tokens = training.read_tokens(path)
    if path.resolve() == CORPUS.resolve():
        return training.hold_out_documents(tokens, [HELD_OUT], separator=0)
    return training.hold_out_end(tokens, 0.05)


def make_optimiser(model: mbx.LanguageModel, lr: float, steps: int) -> optax.GradientTransformation:
    """The recipe of the papers: AdamW, warm-up, cosine to nothing, no decay of recurrences."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 30), steps, lr / 100)
    recurrence = mbx.recurrence_mask(model)
    decay = jax.tree.map(lambda leaf, r: leaf.ndim > 1 and not r, model, recurrence)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def losses(model: mbx.LanguageModel, batch: training.Batch, carry: Any) -> tuple[Any, Any]:
    """The loss of every byte of one row in nats, and the state after the last."""
    logits, carry = model.scan(batch.tokens, carry, reset=batch.reset)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.where(batch.mask, loss, 0.0), carry


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(optimiser: Any, state: Any, batch: training.Batch) -> tuple[Any, Any]:
    def mean_loss(model: mbx.LanguageModel) -> tuple[Any, Any]:
        loss, carry = jax.vmap(losses, in_axes=(None, 0, 0))(model, batch, state["carry"])
        return loss.sum() / batch.mask.sum(), carry

    (loss, carry), grads = jax.value_and_grad(mean_loss, has_aux=True)(state["model"])
    updates, moments = optimiser.update(grads, state["optimiser"], state["model"])
    model = optax.apply_updates(state["model"], updates)
    return {"model": model, "optimiser": moments, "carry": carry}, {"bits": loss / np.log(2)}


def bits_per_byte(model: mbx.LanguageModel, text: np.ndarray, rows: int, piece: int = 512) -> float:
    """The text as `rows` sequences side by side, by pieces, the state handed over."""
    length = (len(text) - 1) // rows
    starts = np.arange(rows)[:, None] * length
    carry = batched(model.init_state(), rows)
    total = 0.0
    for begin in range(0, length, piece):
        at = starts + np.arange(begin, min(begin + piece, length))
        tokens, targets = text[at].astype(np.int32), text[at + 1].astype(np.int32)
        batch = training.Batch(tokens, targets, tokens == 0, np.ones_like(tokens, np.bool_))
        loss, carry = score(model, batch, carry)
        total += float(loss)
    return total / (rows * length) / np.log(2)


@jax.jit
def score(model: mbx.LanguageModel, batch: training.Batch, carry: Any) -> tuple[Any, Any]:
    loss, carry = jax.vmap(losses, in_axes=(None, 0, 0))(model, batch, carry)
    return loss.sum(), carry


def batched(state: Any, rows: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * rows), state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=CORPUS, help="a text file, or one in .xz")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--preset", choices=PRESETS, default="shipped")
    parser.add_argument("--prompt", default="ROMEO:", help="of the sample")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    for field in dataclasses.fields(Settings):
        name, kind = field.name.replace("_", "-"), type(field.default)
        parser.add_argument(f"--{name}", type=kind, help=HELP.get(field.name))
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    settings = dataclasses.replace(
        PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None}
    )
    record = {"text": args.text.name} | dataclasses.asdict(settings)

    train, held_out = read(args.text)
    s = settings
    data = training.Streams(
        train, batch=s.batch, length=s.length, stretch=s.stretch, separator=0, seed=s.seed
    )
    model = config_of(settings).build(key=jr.key(settings.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{size:,} parameters, {len(train):,} bytes to train on, {len(held_out):,} held out")
    earlier = training.Checkpoints(args.out / "checkpoints").steps
    print(f"going on from step {earlier[-1]}" if earlier else "from the beginning")
    optimiser = make_optimiser(model, s.lr, s.steps)
    state = {
        "model": model,
        "optimiser": optimiser.init(model),
        "carry": batched(model.init_state(), s.batch),
    }
    fitted = training.fit(
        functools.partial(train_step, optimiser),
        state,
        data,
        steps=s.steps,
        folder=args.out,
        config=record,
        checkpoint_every=args.every,
        evaluate_every=args.every,
        evaluate=lambda state: {"held_out_bits": bits_per_byte(state["model"], held_out, rows=16)},
    )
    if fitted.interrupted:
        print(f"stopped after step {fitted.step}; the same command goes on from there")
        return

    shipped = mbx.cast(fitted.state["model"], jnp.bfloat16)
    layout = "state-spaces" if settings.mixer == "mamba3" else "transformers"
    mbx.save_pretrained(shipped, args.out, layout=layout)
    mbx.save_tokenizer(mbx.ByteTokenizer(), args.out)
    model = mbx.cast(shipped, jnp.float32)
    bits = bits_per_byte(model, held_out, rows=1)
    print(f"held out: {bits:.4f} bits per byte, as saved in bfloat16")
    record |= {"parameters": size, "held_out_bits_per_byte": round(bits, 4)}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    tokenizer = mbx.ByteTokenizer()
    sample = mbx.generate(
        model, tokenizer.encode(args.prompt), 200, temperature=0.8, top_p=0.95, key=jr.key(0)
    )
    print(args.prompt + tokenizer.decode(np.asarray(sample.tokens).tolist()))
    try:
        print(f"curves: {training.plot_metrics(args.out)}")
    except ImportError as error:
        print(f"no curves: {error}")


if __name__ == "__main__":
    main()
