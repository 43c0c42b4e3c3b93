"""`mamba-eqx generate`."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..generation import FinishReason, Stream
from ..text import text_until
from ._opened import Opened, add_model, add_sampling, check_sampling, open_model, stream_of, text_of
from ._terminal import Commands, read_text, write


def add_generate(commands: Commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continues a text. The prompt and its continuation go to standard output, "
        "timings to standard error.",
    )
    generate.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text to continue; - reads stdin"
    )
    generate.add_argument("--file", metavar="FILE", type=Path, help="the prompt is what it holds")
    add_model(generate)
    add_sampling(generate, max_new_tokens=400)
    generate.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text, if the model generates it; may be given several times",
    )
    generate.add_argument(
        "--json", action="store_true", help="write one object of JSON when it has ended"
    )
    generate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    if (args.prompt is None) == (args.file is None):
        raise ValueError("Give a PROMPT (- reads stdin) or a --file, one of the two.")
    check_sampling(args)
    prompt = args.prompt
    if prompt is None or prompt == "-":
        prompt = read_text(args.file)
    if not prompt:
        raise ValueError("The prompt is empty: give at least one character to start from.")
    opened = open_model(args)
    ids = opened.tokenizer.encode(prompt)
    tokens = stream_of(opened, ids, args)
    clock = _Clock(tokens)
    if args.json:
        _write_json(args, opened, prompt, ids, tokens, clock, began)
        return
    write(prompt)
    for piece in text_until(args.stop, text_of(opened, clock)):
        write(piece)
    write("\n")
    print(clock.report(began), file=sys.stderr)


def _write_json(
    args: argparse.Namespace,
    opened: Opened,
    prompt: str,
    ids: Sequence[int],
    tokens: Stream,
    clock: "_Clock",
    began: float,
) -> None:
    text, interrupted = "", False
    try:
        for piece in text_until(args.stop, text_of(opened, clock)):
            text += piece
    except KeyboardInterrupt:
        interrupted = True
    # An end within a block, or in the middle of one, is that of `--stop`.
    reason = FinishReason.STOP_STRING if tokens.finish is None else tokens.finish
    found = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": len(ids),
        "new_tokens": clock.count,
        "finish": "interrupted" if interrupted else reason.name.lower(),
        "seed": args.seed,
        "seconds_to_first_token": round(clock.first - began, 4) if clock.count else None,
        "tokens_per_second": None if clock.rate is None else round(clock.rate, 2),
    }
    write(json.dumps(found, ensure_ascii=False) + "\n")
    if interrupted:
        raise KeyboardInterrupt


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

    @property
    def rate(self) -> float | None:
        """Tokens per second, after the first."""
        return (self.count - 1) / (self.last - self.first) if self.last > self.first else None

    def report(self, began: float) -> str:
        text = f"{self.count} tokens, the first after {self.first - began:.2f} s"
        return text if self.rate is None else f"{text}, then {self.rate:.0f} tokens/s"
