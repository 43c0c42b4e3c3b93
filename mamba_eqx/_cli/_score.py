"""`mamba-eqx score`."""

import argparse
import codecs
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..generation import DecodingState, score
from ._opened import Opened, add_model, open_model
from ._terminal import Commands, write


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
        "text", metavar="TEXT", nargs="?", help="text to score; - reads standard input"
    )
    score.add_argument(
        "--file",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="score the content of FILE; may be repeated",
    )
    add_model(score)
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
        return math.exp(nats) if nats < 700 else math.inf

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
    missing = next((path for path in args.file if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"There is no file {missing}.")
    opened = open_model(args)
    if not args.json:
        write(f"{'tokens':>10} {'log prob':>14} {'bits/byte':>10} {'perplexity':>11}  source\n")
    if args.text == "-":
        _report(args, opened, "standard input", sys.stdin.buffer.read)
    elif args.text is not None:
        _report(args, opened, "text", io.BytesIO(args.text.encode("utf-8")).read)
    for path in args.file:
        with open(path, "rb") as file:
            _report(args, opened, str(path), file.read)


def _report(args: argparse.Namespace, opened: Opened, name: str, read: _Read) -> None:
    total = _Totals()
    for _ in _scored(opened, _tokens(opened, _lines(name, read)), total):
        if sys.stderr.isatty():
            print(f"\r{total.tokens:,} tokens", end="\r", file=sys.stderr, flush=True)
    if total.tokens == 0:
        raise ValueError(f"{name} is too short: scoring needs at least two tokens.")
    if args.json:
        write(json.dumps(total.to_json(name), ensure_ascii=False) + "\n")
        return
    values = f"{total.log_prob:14.2f} {total.bits_per_byte:10.4f} {total.perplexity:11.4f}"
    write(f"{total.tokens:10} {values}  {name}\n")


def _lines(name: str, read: _Read) -> Iterator[str]:
    """Yields a text in pieces that end at the end of a line, unless a line is very long.

    **Raises:** `ValueError` if the text is not UTF-8.
    """
    decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
    data = b"."
    while data:
        data = read(_READ)
        try:
            held += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error}.") from error
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
