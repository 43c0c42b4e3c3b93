"""`mamba-eqx generate`."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..generation import Grammar, Stream
from ._arguments import utf8_text
from ._opened import Opened, add_model, open_model
from ._sampling_arguments import add_sampling, sampling_from_args
from ._streaming import Reply, start_stream
from ._terminal import Commands, end_line, read_text, write, write_json


def add_generate(commands: Commands) -> None:
    """Adds the `generate` command."""
    generate = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text. The prompt and its continuation are written to standard "
        "output, timings to standard error.",
    )
    generate.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        type=utf8_text,
        help="text to continue; - reads standard input",
    )
    generate.add_argument("--file", metavar="FILE", type=Path, help="read the prompt from FILE")
    add_model(generate)
    add_sampling(generate, max_new_tokens=400, stop="end the text before TEXT", stop_default="none")
    formats = generate.add_mutually_exclusive_group()
    formats.add_argument(
        "--json-schema",
        metavar="FILE",
        type=Path,
        help="write JSON that a schema in FILE accepts",
    )
    formats.add_argument(
        "--regex",
        metavar="PATTERN",
        type=utf8_text,
        help="write a text that the regular expression PATTERN matches",
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")
    generate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if (args.prompt is None) == (args.file is None):
        raise ValueError("Give either a PROMPT (- reads standard input) or --file.")
    prompt = args.prompt
    if prompt is None or prompt == "-":
        prompt = read_text(args.file)
    if not prompt:
        raise ValueError("The prompt is empty. Give at least one character to start from.")
    opened = open_model(args)
    ids = opened.encode(prompt)
    sampling = sampling_from_args(args, opened)
    sampling = dataclasses.replace(sampling, constraint=_format(args, opened))
    clock = _Clock(start_stream(opened, ids, args, sampling), start)
    reply = Reply(clock.tokens)
    pieces = reply.pieces(opened, args.stop, prompt=ids, tokens=clock)
    if args.json:
        _write_json(args, prompt, ids, reply, pieces, clock)
        return
    write(prompt)
    try:
        for piece in pieces:
            write(piece)
    except Exception:
        end_line()
        raise
    write("\n")
    print(clock.report(), file=sys.stderr)


def _format(args: argparse.Namespace, opened: Opened) -> Grammar | None:
    """Returns the grammar of the text, or `None` for free text."""
    if args.regex is not None:
        return Grammar.from_regex(args.regex, opened.tokenizer)
    if args.json_schema is None:
        return None
    try:
        schema = json.loads(read_text(args.json_schema))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{args.json_schema} must be a JSON schema, but {error}.") from None
    return Grammar.from_json_schema(schema, opened.tokenizer)


def _write_json(
    args: argparse.Namespace,
    prompt: str,
    ids: Sequence[int],
    reply: Reply,
    pieces: Iterator[str],
    clock: "_Clock",
) -> None:
    interrupted = False
    try:
        for _ in pieces:
            pass
    except KeyboardInterrupt:
        interrupted = True
    finish = reply.finish
    found = {
        "prompt": prompt,
        "text": reply.text,
        "prompt_tokens": len(ids),
        "new_tokens": clock.count,
        "finish": "interrupted" if finish is None else finish.name.lower(),
        "seed": args.seed,
        "seconds_to_first_token": round(clock.latency, 4) if clock.count else None,
        "tokens_per_second": None if clock.rate is None else round(clock.rate, 2),
    }
    write_json(found)
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
