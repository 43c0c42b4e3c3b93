"""`mamba-eqx generate`."""

import argparse
import importlib.resources
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr

from .. import _generate
from .._text import ByteTokenizer
from ..pretrained import from_pretrained
from ._common import Commands, write


_SHIPPED = ("models", "shakespeare")


def add_generate(commands: Commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continues a text with a byte-level model. The prompt and its continuation go "
        "to standard output, timings to standard error.",
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    generate.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        help="a checkpoint of a byte-level model (default: the Shakespeare model of this package)",
    )
    generate.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=400, help="default: %(default)s"
    )
    generate.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.8,
        help="0 always takes the most likely token (default: %(default)s)",
    )
    generate.add_argument(
        "--top-k", metavar="K", type=int, help="sample from the K most likely tokens"
    )
    generate.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="sample from the most likely tokens of total probability P",
    )
    generate.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        help="sample from the tokens at least P times as likely as the most likely one",
    )
    generate.add_argument(
        "--seed", metavar="SEED", type=int, default=0, help="default: %(default)s"
    )
    generate.add_argument(
        "--stop", metavar="TEXT", help="end before this text, if the model generates it"
    )
    generate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("The prompt is empty: give at least one character to start from.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be within 0..{2**32 - 1}, but got {args.seed}.")
    if args.stop == "":
        raise ValueError("--stop must not be empty: leave it out for no such end.")
    path = _shipped_model() if args.model is None else args.model
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}.")

    tokenizer = ByteTokenizer()
    model = from_pretrained(path, dtype=jnp.float32)
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"This command is for byte-level models, with a vocabulary of {tokenizer.vocab_size}, "
            f"but the model at {path} has one of {model.vocab_size}."
        )
    tokens = _generate.stream(
        model,
        tokenizer.encode(prompt),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        key=jr.key(args.seed),
    )
    clock = _Clock(tokens)
    decoder = tokenizer.decoder()
    write(prompt)
    pieces = (decoder.feed([token]) for token in clock)
    for piece in until(args.stop, pieces):
        write(piece)
    write(decoder.end() + "\n")
    print(clock.report(began), file=sys.stderr)


class _Clock:
    """Passes tokens on and notes when they came."""

    def __init__(self, tokens: Iterator[int]):
        self.tokens = tokens
        self.count = 0
        self.first = self.last = 0.0

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.last = time.perf_counter()
            self.count += 1
            if self.count == 1:
                self.first = self.last
            yield token

    def report(self, began: float) -> str:
        text = f"{self.count} tokens, the first after {self.first - began:.2f} s"
        if self.last > self.first:
            text += f", then {(self.count - 1) / (self.last - self.first):.0f} tokens/s"
        return text


def until(stop: str | None, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a text up to where `stop` begins in it. What may turn out to be the beginning
    of `stop` is held back until it is known not to be."""
    held = ""
    for piece in pieces:
        if stop is None:
            yield piece
            continue
        held += piece
        at = held.find(stop)
        if at >= 0:
            yield held[:at]
            return
        keep = next(
            (n for n in range(min(len(stop) - 1, len(held)), 0, -1) if stop.startswith(held[-n:])),
            0,
        )
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    if held:
        yield held


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"Standard input is not UTF-8 text: {e}.") from e


def _shipped_model() -> Path:
    # The package is a directory, not an archive: its files have paths.
    path = Path(str(importlib.resources.files("mamba_eqx").joinpath(*_SHIPPED)))
    if not path.exists():
        raise FileNotFoundError(
            f"This installation has no model of its own (looked at {path}): give one by --model."
        )
    return path
