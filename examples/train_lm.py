"""Trains a byte-level Mamba language model on a text, from scratch, on a laptop's CPU.

    python examples/train_lm.py --out runs/shakespeare              # the bundled model
    python examples/train_lm.py --text book.txt --preset small --out runs/book
    python -m mamba_eqx generate --model runs/book "It was "

After Ctrl-C, a kill or a crash, run the same command again and it resumes where it left off. With
more `--steps`, a finished run is extended; its learning rate continues at the same step of the
longer schedule. The run records digests of its text, tokenizer and model, and does not resume with
others.

Each row of the batch reads a stretch of the text, `--length` bytes per step, and carries its state
from step to step (truncated backpropagation through time). At the end of a stretch it starts
another one with an empty state. A zero byte in the text separates documents, and resets the state.
The result is a checkpoint in the layout of transformers (for Mamba-3, which transformers lacks, in
the layout of the official code) with its tokenizer, curves of the metrics, and a record of the
settings. All losses are in bits per byte.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from option_types import number

import mamba_eqx as mbx
from mamba_eqx import training


CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.xz"
HELD_OUT = b"TWELFTH NIGHT"  # The opening of the play that is held out.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run. `d_state` 0 stands for the default of the mixer."""

    mixer: str = "mamba1"
    d_model: int = 192
    layers: int = 6
    d_state: int = 0
    steps: int = 11_000
    batch: int = 16
    length: int = 128
    stretch: int = 16
    lr: float = 3e-3
    seed: int = 0


HELP = {
    "d_state": "state size (default: 8 for mamba1, 32 for the others)",
    "length": "bytes per row and step",
    "stretch": "steps before a row jumps to another stretch",
    "lr": "peak learning rate",
}
D_STATE = {"mamba1": 8, "mamba2": 32, "mamba3": 32}
PRESETS = {
    "shipped": Settings(),
    "small": Settings(d_model=64, layers=2, steps=1000, batch=8),
}


def make_config(settings: Settings) -> mbx.LanguageModelConfig:
    """Returns the config of a byte-level model."""
    d_model, d_state = settings.d_model, settings.d_state
    headdim = min(64, 2 * d_model)
    mixer = {
        "mamba1": lambda: mbx.Mamba1Config(d_model, d_state=d_state),
        "mamba2": lambda: mbx.Mamba2Config(d_model, d_state=d_state, headdim=headdim),
        "mamba3": lambda: mbx.Mamba3Config(d_model, d_state=d_state, headdim=headdim),
    }[settings.mixer]()
    return mbx.LanguageModelConfig(256, (mbx.BlockConfig(mixer),) * settings.layers)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on, and the held-out ones: a play of the corpus, or the last part
    of any other text."""
    tokens = training.read_tokens(path)
    if path.resolve() == CORPUS.resolve():
        return training.hold_out_documents(tokens, [HELD_OUT], separator=0)
    return training.hold_out_end(tokens, 0.05)


def digest(*parts: bytes | memoryview) -> str:
    """Returns the beginning of a checksum, which tells texts and settings apart."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return f"sha256 {found.hexdigest()[:16]}"


def digest_of_tokenizer(tokenizer: mbx.ByteTokenizer) -> str:
    """Returns a digest of the files of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        mbx.save_tokenizer(tokenizer, folder)
        files = sorted(Path(folder).iterdir())
        return digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


score = jax.jit(training.next_token_loss)


def bits_per_byte(model: mbx.LanguageModel, text: np.ndarray, rows: int, piece: int = 512) -> float:
    """Scores a text as `rows` parallel sequences, piece by piece, with the state carried over."""
    rows = min(rows, len(text) - 1)
    length = (len(text) - 1) // rows
    starts = np.arange(rows)[:, None] * length
    carry, total = training.empty_carry(model, rows), 0.0
    for begin in range(0, length, piece):
        at = starts + np.arange(begin, min(begin + piece, length))
        tokens, targets = text[at].astype(np.int32), text[at + 1].astype(np.int32)
        batch = training.Batch(tokens, targets, tokens == 0, np.ones_like(tokens, np.bool_))
        loss, (weight, carry) = score(model, batch, carry)
        total += float(loss) * int(weight)
    return total / (rows * length) / math.log(2)


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Settings]:
    """Returns the options, and the settings of the run."""
    parser.add_argument("--text", type=Path, default=CORPUS, help="text file, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--preset", choices=PRESETS, default="shipped")
    parser.add_argument("--prompt", default="ROMEO:", help="prompt of the sample")
    parser.add_argument(
        "--every", type=number(int, 1), default=500, help="steps between checkpoints"
    )
    for field in dataclasses.fields(Settings):
        name, default = field.name.replace("_", "-"), field.default
        if isinstance(default, str):
            parser.add_argument(f"--{name}", choices=D_STATE)
            continue
        least = {"d_state": 0, "seed": 0, "lr": 1e-12}.get(field.name, 1)
        kind = number(int if isinstance(default, int) else float, least)
        parser.add_argument(f"--{name}", type=kind, help=HELP.get(field.name))
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    s = dataclasses.replace(
        PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None}
    )
    return args, s if s.d_state else dataclasses.replace(s, d_state=D_STATE[s.mixer])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    args, s = parsed(parser)
    tokenizer = mbx.ByteTokenizer()
    if not args.prompt:
        parser.error("argument --prompt: must not be empty")
    try:
        train, held_out = read(args.text)
        data = training.Streams(
            train, batch=s.batch, length=s.length, stretch=s.stretch, separator=0, seed=s.seed
        )
    except (OSError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    try:
        config = make_config(s)
    except ValueError as error:
        parser.error(f"the sizes of the model do not fit: {error}")
    # A run resumes only if all of these are the same. The number of steps may grow.
    record = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(s).items()}
    del record["--steps"]
    record |= {
        "--text": digest(train.data, held_out.data),
        "tokenizer": digest_of_tokenizer(tokenizer),
        "model": digest(config.to_json().encode()),
    }
    model = config.build(key=jr.key(s.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{size:,} parameters, {len(train):,} bytes to train on, {len(held_out):,} held out")
    optimiser = training.recipe(
        model, learning_rate=s.lr, steps=s.steps, warmup=s.steps // 30, final=s.lr / 100
    )
    train_step = training.TrainStep(optimiser)

    def step(
        state: training.TrainState, batch: training.Batch
    ) -> tuple[training.TrainState, dict[str, jax.Array]]:
        state, metrics = train_step(state, batch)
        return state, {"bits_per_byte": metrics.pop("loss") / math.log(2)} | metrics

    def evaluate(state: training.TrainState) -> dict[str, float]:
        return {"held_out_bits_per_byte": bits_per_byte(state.model, held_out, rows=16)}

    try:
        earlier = training.Checkpoints(args.out / "checkpoints").steps
        print(f"resuming from step {earlier[-1]}" if earlier else "starting a new run")
        fitted = training.fit(
            step,
            train_step.init(model, rows=s.batch, key=jr.key(s.seed + 1)),
            data,
            steps=s.steps,
            folder=args.out,
            config=record,
            checkpoint_every=args.every,
            evaluate_every=args.every,
            evaluate=evaluate,
        )
    except (ValueError, training.CheckpointWriteError) as error:
        parser.error(f"argument --out: {error}")
    if fitted.interrupted:
        print(f"stopped after step {fitted.step}; run the same command again to resume")
        return

    shipped = mbx.cast(fitted.state.model, jnp.bfloat16)
    layout = "state-spaces" if s.mixer == "mamba3" else "transformers"
    mbx.save_pretrained(shipped, args.out, layout=layout, tokenizer=tokenizer)
    model = mbx.cast(shipped, jnp.float32)
    bits = bits_per_byte(model, held_out, rows=1)
    print(f"held out: {bits:.4f} bits per byte, as saved in bfloat16")
    about = {"text": args.text.name} | dataclasses.asdict(s)
    about |= {"steps": fitted.step, "text_digest": record["--text"]}
    about |= {"parameters": size, "held_out_bits_per_byte": round(bits, 4)}
    (args.out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    sample = mbx.generate(
        model,
        tokenizer.encode(args.prompt),
        200,
        mbx.Sampling(temperature=0.8, top_p=0.95),
        key=jr.key(0),
    )
    print(args.prompt + tokenizer.decode(np.asarray(sample.tokens).tolist()))
    try:
        print(f"metrics plotted in {training.plot_metrics(args.out)}")
    except ImportError as error:
        print(f"metrics not plotted: {error}")


if __name__ == "__main__":
    main()
