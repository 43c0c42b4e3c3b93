"""`mamba-eqx score`."""

import argparse
import codecs
import io
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from ..generation import DecodingState, score
from ._arguments import utf8_text
from ._messages import print_error
from ._opened import Opened, add_model, open_model
from ._terminal import Commands, check_file, not_utf8, write, write_json


_READ = 2**16  # bytes of a file that are tokenized at a time
_PIECE = 2**13  # tokens that are scored at a time
_Read: TypeAlias = Callable[[int], bytes]


def add_score(commands: Commands) -> None:
    """Adds the `score` command."""
    score = commands.add_parser(
        "score",
        help="score texts by their log-probability",
        description="Score texts by their log-probability under a model, with bits per byte and "
        "perplexity per token. The first token is scored only if the tokenizer adds a token "
        "before it. Files of any length are read in pieces, in constant memory: text is split "
        "between lines, every 64 KB, before it is tokenized.",
    )
    score.add_argument(
        "text",
        metavar="TEXT",
        nargs="?",
        type=utf8_text,
        help="text to score; - reads standard input",
    )
    score.add_argument(
        "--file",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="score the content of FILE; may be repeated",
    )
    # Prefill is faster in 16 bits on some processors, and decoding on none.
    add_model(score, dtype="auto")
    score.add_argument("--json", action="store_true", help="print JSON, one object per line")
    score.set_defaults(run=_run)


@dataclass
class _Totals:
    """Sums over the scored tokens.

    - `tokens`: their number.
    - `bytes`: the size of their text in UTF-8.
    - `log_prob`: the sum of their log-probabilities, in nats.
    """

    tokens: int = 0
    bytes: int = 0
    log_prob: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        return -self.log_prob / math.log(2) / self.bytes if self.bytes else math.inf

    @property
    def perplexity(self) -> float:
        nats = -self.log_prob / self.tokens
        return math.inf if nats > 700 else math.exp(nats)

    def to_json(self, name: str) -> dict[str, str | int | float | None]:
        return {
            "source": name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "log_prob": _round(self.log_prob),
            "bits_per_byte": _round(self.bits_per_byte),
            "perplexity": _round(self.perplexity),
        }


def _round(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _run(args: argparse.Namespace) -> None:
    if args.text is None and not args.file:
        raise ValueError("Give a TEXT (- reads standard input) or --file.")
    for path in args.file:
        check_file(path)
    opened = open_model(args)
    if not args.json:
        write(f"{'tokens':>10} {'log prob':>14} {'bits/byte':>10} {'perplexity':>11}  source\n")
    faults: list[Exception] = []
    for name, open_text in _texts(args):
        try:
            with open_text() as file:
                _report(args, opened, name, file.read)
        except BrokenPipeError:
            raise
        except (ValueError, ArithmeticError, OSError) as error:
            # The other texts are scored nevertheless.
            print_error(error)
            faults.append(error)
    if faults:
        raise SystemExit(2)


def _texts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yields the name of each text, and a function that opens it."""
    if args.text == "-":
        yield "standard input", lambda: io.BytesIO() if sys.stdin is None else sys.stdin.buffer
    elif args.text is not None:
        yield "text", lambda: io.BytesIO(args.text.encode("utf-8"))
    for path in args.file:
        yield str(path), lambda: open(path, "rb")  # noqa: B023, SIM115


def _report(args: argparse.Namespace, opened: Opened, name: str, read: _Read) -> None:
    total = _Totals()
    for _ in _scored(opened, _tokens(opened, _lines(name, read)), total):
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"\r{total.tokens:,} tokens", end="\r", file=sys.stderr, flush=True)
    if total.tokens == 0:
        raise ValueError(f"{name} is too short: scoring needs at least two tokens.")
    if args.json:
        write_json(total.to_json(name))
        return
    values = f"{total.log_prob:14.2f} {total.bits_per_byte:10.4f} {total.perplexity:11.4f}"
    write(f"{total.tokens:10} {values}  {name}\n")


def _lines(name: str, read: _Read) -> Iterator[str]:
    """Yields a text in pieces that end at the end of a line, unless a line is very long.

    A byte order mark at the beginning is not part of the text.

    **Raises:** `ValueError` if the text is not UTF-8.
    """
    decoder, held = codecs.getincrementaldecoder("utf-8-sig")(), ""
    data = b"."
    while data:
        data = read(_READ)
        try:
            held += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(name) from error
        end = held.rfind("\n") + 1 if len(held) < 4 * _READ else len(held)
        if not data:
            end = len(held)
        if end:
            yield held[:end]
        held = held[end:]


def _tokens(opened: Opened, texts: Iterator[str]) -> Iterator[list[int]]:
    """Yields the tokens of a text in pieces of equal length, except for the last piece."""
    held: list[int] = []
    encode = opened.tokenizer.encode  # Only the first piece gets the tokens that begin a text.
    for text in texts:
        held += encode(text)
        encode = opened.encode_piece
        while len(held) > _PIECE:
            yield held[:_PIECE]
            held = held[_PIECE:]
    if held:
        yield held


def _scored(opened: Opened, pieces: Iterator[list[int]], total: _Totals) -> Iterator[None]:
    """Adds the scores of a text to `total`, and yields after each piece."""
    state: DecodingState | None = None
    for ids in pieces:
        out = score(opened.model, ids, state=state)
        counted = ids[len(ids) - int(out.length) :]
        total.tokens += len(counted)
        total.bytes += sum(len(opened.tokenizer.token_bytes(token)) for token in counted)
        total.log_prob += float(out.log_probs.sum(dtype="float64"))
        state = out.state
        yield
