"""A training run of `mamba-eqx train`, on a byte-level model.

Each row of a batch reads a stretch of the text and carries its state from step to step (truncated
backpropagation through time). At the end of the stretch it starts another one with an empty state.
A zero byte separates documents, and resets the state.
"""

import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, UInt8

from .. import training
from ..generation import Sampling, generate
from ..layers import cast
from ..models import LanguageModel
from ..pretrained import layouts_for, save_pretrained, save_tokenizer
from ..text import ByteTokenizer
from ._terminal import check_file, write
from ._train_settings import Settings, config_of, option


_SEPARATOR = 0
_HELD_OUT = 0.05  # the share of a text whose documents are not named
_ROWS = 16  # that the held-out text is scored in during training
_SCORE = "held_out_bits_per_byte"

_next_token_loss = jax.jit(training.next_token_loss)


class Run(NamedTuple):
    """What the options of the command ask for.

    - `text`: the file of the text.
    - `hold_out`: the beginnings of the documents that are held out; the end of the text if empty.
    - `out`: the folder of the run.
    - `settings`: the settings.
    - `every`: the number of steps between checkpoints.
    - `prompt`: the beginning of the sample.
    """

    text: Path
    hold_out: tuple[str, ...]
    out: Path
    settings: Settings
    every: int
    prompt: str


class _Text(NamedTuple):
    train: UInt8[np.ndarray, " train"]
    held_out: UInt8[np.ndarray, " held_out"]


def run(asked: Run) -> None:
    """Trains a model, or resumes where an earlier run stopped, and saves it.

    **Raises:** `ValueError` if the text is too short or the folder holds another run; `OSError` if
    a file cannot be read or written.
    """
    settings, tokenizer = asked.settings, ByteTokenizer()
    text = _read(asked)
    config = config_of(settings)
    # A run resumes only if all of these are the same. The number of steps may grow.
    record = {option(name): value for name, value in dataclasses.asdict(settings).items()}
    del record["--steps"]
    record |= {
        "TEXT": _digest(text.train.data, text.held_out.data),
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "model": _digest(config.to_json().encode()),
    }
    model = config.build(key=jr.key(settings.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    write(
        f"{size:,} parameters, {len(text.train):,} bytes to train on, {len(text.held_out):,} "
        "held out\n"
    )
    fitted = _fit(asked, text, model, record)
    if fitted.interrupted:
        write(f"stopped after step {fitted.step}; run the same command again to resume\n")
        return
    small = cast(fitted.state.model, jnp.bfloat16)
    save_pretrained(small, asked.out, layout=layouts_for(small)[0], tokenizer=tokenizer)
    model = cast(small, jnp.float32)
    bits = _bits_per_byte(model, text.held_out, rows=1)
    about = {"text": asked.text.name} | dataclasses.asdict(settings)
    about |= {"steps": fitted.step, "text_digest": record["TEXT"]}
    about |= {"parameters": size, _SCORE: round(bits, 4)}
    (asked.out / "training.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    _report(asked, model, tokenizer, bits)


def _read(asked: Run) -> _Text:
    """Returns the bytes to train on, and the held-out ones."""
    check_file(asked.text)
    tokens = training.read_tokens(asked.text)
    if asked.text.suffix == ".npy" and tokens.dtype != np.uint8:
        raise ValueError(f"TEXT must contain bytes, but {asked.text} has {tokens.dtype} tokens.")
    least = asked.settings.length * asked.settings.stretch
    if len(tokens) * (1 - _HELD_OUT) < least:
        raise ValueError(
            f"{asked.text} must have at least {math.ceil(least / (1 - _HELD_OUT)):,} bytes with "
            f"--length {asked.settings.length} and --stretch {asked.settings.stretch}, but has "
            f"{len(tokens):,}. Use a longer text, or smaller values."
        )
    if not asked.hold_out:
        text = _Text(*training.hold_out_end(tokens, _HELD_OUT))
    else:
        try:
            names = [name.encode() for name in asked.hold_out]
            text = _Text(*training.hold_out_documents(tokens, names, separator=_SEPARATOR))
        except ValueError as error:
            raise ValueError(str(error).replace("`names`", "--hold-out")) from None
    if len(text.train) < least:
        raise ValueError(
            f"--hold-out must leave at least {least:,} bytes to train on, but leaves "
            f"{len(text.train):,}. Hold out fewer documents."
        )
    if len(text.held_out) < 2:
        raise ValueError("--hold-out must name a text of at least 2 bytes. Name another document.")
    return text


def _fit(
    asked: Run, text: _Text, model: LanguageModel, record: dict[str, str | int | float]
) -> training.Fit[training.TrainState]:
    settings = asked.settings
    data = training.Streams(
        text.train,
        batch=settings.batch,
        length=settings.length,
        stretch=settings.stretch,
        separator=_SEPARATOR,
        seed=settings.seed,
    )
    optimiser = training.recipe(
        model,
        learning_rate=settings.lr,
        steps=settings.steps,
        warmup=settings.steps // 30,
        final=settings.lr / 100,
    )
    train_step = training.TrainStep(optimiser)

    def step(
        state: training.TrainState, batch: training.Batch
    ) -> tuple[training.TrainState, dict[str, Array]]:
        state, metrics = train_step(state, batch)
        return state, {"bits_per_byte": metrics.pop("loss") / math.log(2)} | metrics

    def evaluate(state: training.TrainState) -> dict[str, float]:
        return {_SCORE: _bits_per_byte(state.model, text.held_out, rows=_ROWS)}

    earlier = training.Checkpoints(asked.out / "checkpoints").steps
    write(f"resuming from step {earlier[-1]}\n" if earlier else "starting a new run\n")
    return training.fit(
        step,
        train_step.init(model, rows=settings.batch, key=jr.key(settings.seed + 1)),
        data,
        steps=settings.steps,
        folder=asked.out,
        config=record,
        checkpoint_every=asked.every,
        evaluate_every=asked.every,
        evaluate=evaluate,
    )


def _bits_per_byte(
    model: LanguageModel, text: UInt8[np.ndarray, " text"], *, rows: int, piece: int = 512
) -> float:
    """Scores a text as `rows` parallel sequences, piece by piece, with the state carried over."""
    rows = min(rows, len(text) - 1)
    length = (len(text) - 1) // rows
    starts = np.arange(rows)[:, None] * length
    carry, total = training.empty_carry(model, rows), 0.0
    for begin in range(0, length, piece):
        at = starts + np.arange(begin, min(begin + piece, length))
        tokens, targets = text[at].astype(np.int32), text[at + 1].astype(np.int32)
        resets = tokens == _SEPARATOR
        batch = training.Batch(tokens, targets, resets, np.ones_like(resets))
        loss, (weight, carry) = _next_token_loss(model, batch, carry)
        total += float(loss) * int(weight)
    return total / (rows * length) / math.log(2)


def _report(asked: Run, model: LanguageModel, tokenizer: ByteTokenizer, bits: float) -> None:
    """Writes the scores over time, a sample, and how to go on."""
    steps, scores = training.read_metrics(asked.out)[_SCORE]
    write("\n    step  held-out bits per byte\n")
    for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, 10)}):
        bar = "#" * round(5 * float(scores[i]))
        write(f"{int(steps[i]):8,}  {float(scores[i]):.3f} {bar}\n")
    write(f"held out: {bits:.4f} bits per byte, as saved in bfloat16\n\n")
    sampling = Sampling(temperature=0.8, top_p=0.95)
    ids = tokenizer.encode(asked.prompt)
    sample = generate(model, ids, 200, sampling, key=jr.key(0))
    write(asked.prompt + tokenizer.decode(np.asarray(sample.tokens).tolist()) + "\n\n")
    try:
        write(f"curves: {training.plot_metrics(asked.out)}\n")
    except ImportError as error:
        write(f"curves: not drawn ({error})\n")
    write(f"model: {asked.out}\nmamba-eqx generate --model {asked.out} PROMPT\n")


def _digest(*parts: bytes | memoryview) -> str:
    """Returns the beginning of a checksum, which tells texts and settings apart."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return f"sha256 {found.hexdigest()[:16]}"


def _digest_of_tokenizer(tokenizer: ByteTokenizer) -> str:
    """Returns a digest of the files of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        files = sorted(Path(folder).iterdir())
        parts = (part for file in files for part in (file.name.encode(), file.read_bytes()))
        return _digest(*parts)
