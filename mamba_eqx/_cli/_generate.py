"""`mamba-eqx generate`."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..generation import FinishReason, Stream
from ..text import text_until
from ._opened import Opened, add_model, open_model
from ._sampling_arguments import add_sampling, check_sampling, sampling_from_args
from ._streaming import decode_stream, start_stream
from ._terminal import Commands, read_text, write


def add_generate(commands: Commands) -> None:
    """Adds the `generate` command."""
    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text. The prompt and its continuation are written to standard "
        "output, timings to standard error.",
    )
    generate.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="text to continue; - reads standard input"
    )
    generate.add_argument("--file", metavar="FILE", type=Path, help="read the prompt from FILE")
    add_model(generate)
    add_sampling(generate, max_new_tokens=400)
    generate.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="stop before this text; may be repeated",
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")
    generate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if (args.prompt is None) == (args.file is None):
        raise ValueError("Give either a PROMPT (- reads standard input) or --file.")
    check_sampling(args)
    prompt = args.prompt
    if prompt is None or prompt == "-":
        prompt = read_text(args.file)
    if not prompt:
        raise ValueError("The prompt is empty. Give at least one character to start from.")
    opened = open_model(args)
    ids = opened.tokenizer.encode(prompt)
    # `--stop` is matched on the printed text. Stop strings of the sampling options are matched on
    # the bytes of tokens, which can differ from the printed text: SentencePiece drops the space
    # before the first token.
    tokens = start_stream(opened, ids, args, sampling_from_args(args, opened))
    clock = _Clock(tokens, start)
    if args.json:
        _write_json(args, opened, prompt, ids, clock)
        return
    write(prompt)
    for piece in text_until(args.stop, decode_stream(opened, clock)):
        write(piece)
    write("\n")
    print(clock.report(), file=sys.stderr)


def _write_json(
    args: argparse.Namespace,
    opened: Opened,
    prompt: str,
    ids: Sequence[int],
    clock: "_Clock",
) -> None:
    text, interrupted = "", False
    try:
        for piece in text_until(args.stop, decode_stream(opened, clock)):
            text += piece
    except KeyboardInterrupt:
        interrupted = True
    # Only a `--stop` text ends the output while the stream could still continue.
    finish = clock.tokens.finish
    reason = FinishReason.STOP_STRING if finish is None else finish
    found = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": len(ids),
        "new_tokens": clock.count,
        "finish": "interrupted" if interrupted else reason.name.lower(),
        "seed": args.seed,
        "seconds_to_first_token": round(clock.latency, 4) if clock.count else None,
        "tokens_per_second": None if clock.rate is None else round(clock.rate, 2),
    }
    write(json.dumps(found, ensure_ascii=False) + "\n")
    if interrupted:
        raise KeyboardInterrupt


class _Clock:
    """The tokens of a stream, with their number and their times of arrival after `start`."""

    def __init__(self, tokens: Stream, start: float):
        self.tokens = tokens
        self.count = 0
        self._start = start
        self._first = self._last = 0.0

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self._last = time.perf_counter()
            self.count += 1
            if self.count == 1:
                self._first = self._last
            yield token

    @property
    def latency(self) -> float:
        """The seconds from `start` to the first token."""
        return self._first - self._start

    @property
    def rate(self) -> float | None:
        """The tokens per second after the first token; `None` if there are none."""
        seconds = self._last - self._first
        return (self.count - 1) / seconds if seconds > 0 else None

    def report(self) -> str:
        """Returns a sentence on the speed."""
        text = f"{self.count} tokens, the first after {self.latency:.2f} s"
        return text if self.rate is None else f"{text}, then {self.rate:.0f} tokens/s"
