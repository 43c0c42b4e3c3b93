"""`mamba-eqx chat`."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..formats import CheckpointError, read_config
from ..generation import DecodingState, FinishReason, load_state, prefill, save_state
from ..text import TextTokenizer, text_until
from ._opened import Opened, add_model, add_sampling, check_sampling, open_model, stream_of, text_of
from ._terminal import Commands, end_line, write


_HELP = """\
/reset      forget everything
/save FILE  save the state of the conversation
/load FILE  go on from a saved state
/quit       end the chat, as Ctrl-D does; Ctrl-C ends an answer
"""
_PLAIN_STOP = "\n\n"
_MAX_HISTORY = 2**26


def add_chat(commands: Commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation, line by line. The model keeps its state between turns, and "
        "never reads again what was said before. With the template of a conversation that its "
        "tokenizer has, or as plain text: then what you write is a line of the text, and the model "
        "continues it up to an empty line. /help tells the commands.",
    )
    add_model(chat)
    add_sampling(chat, max_new_tokens=512)
    chat.add_argument("--system", metavar="TEXT", help="the system's message, before all others")
    chat.add_argument(
        "--plain", action="store_true", help="plain text, although there is a template"
    )
    chat.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer with this text; may be given several times (default, of plain text: "
        "an empty line)",
    )
    chat.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    check_sampling(args)
    opened = open_model(args)
    tokenizer = opened.tokenizer
    has_template = isinstance(tokenizer, TextTokenizer) and tokenizer.has_template
    templated = has_template and not args.plain
    talk = _Templated(opened, args) if templated else _Plain(opened, args)
    if sys.stdin.isatty():
        print("/help tells the commands, Ctrl-D ends the chat.", file=sys.stderr)
    for line in _lines():
        if line.startswith("/"):
            try:
                if not _command(talk, line):
                    return
            except (ValueError, OSError) as error:  # A chat does not end with a mistake.
                print("error: " + " ".join(str(error).split()), file=sys.stderr)
        elif line:
            _answer(talk, line)


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (lines can be edited then)

    while True:
        try:
            yield input("> ")
        except EOFError:
            end_line()
            return


def _command(talk: "_Plain | _Templated", line: str) -> bool:
    """Whether the chat goes on."""
    name, _, rest = line.partition(" ")
    path = Path(rest.strip())
    match name:
        case "/quit":
            return False
        case "/reset":
            talk.reset()
        case "/save" | "/load" if not rest.strip():
            raise ValueError(f"{name} needs the name of a file.")
        case "/save":
            talk.save(path)
        case "/load":
            talk.load(path)
        case "/help":
            print(_HELP, end="", file=sys.stderr)
        case _:
            raise ValueError(f"There is no command {name}: /help tells which there are.")
    return True


def _answer(talk: "_Plain | _Templated", line: str) -> None:
    began = time.perf_counter()
    try:
        for piece in talk.turn(line):
            write(piece)
    except KeyboardInterrupt:
        pass  # Ends the answer, and not the chat.
    write("\n")
    if sys.stdin.isatty():
        said = len(talk.given)
        rate = said / (time.perf_counter() - began)
        print(f"[{said} tokens, {rate:.0f} tokens/s]", file=sys.stderr)


class _Plain:
    """A conversation as one text, of which some is written by the model."""

    def __init__(self, opened: Opened, args: argparse.Namespace):
        self._opened, self._args = opened, args
        self._stop = args.stop or [_PLAIN_STOP]
        self.reset()

    def reset(self) -> None:
        self._state: DecodingState | None = None
        self.given: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        opened = self._opened
        text = f"{line}\n"
        if self._state is None:
            system = self._args.system
            ids = opened.tokenizer.encode(text if system is None else f"{system}\n\n{text}")
        else:
            ids = opened.encode_piece(text)
        tokens = stream_of(opened, ids, self._args, state=self._state, stop_strings=self._stop)
        self.given = []
        try:
            yield from text_until(self._stop, text_of(opened, _noted(tokens, self.given)))
        finally:
            self._state = tokens.state

    def save(self, path: Path) -> None:
        _save(path, self._state, self._opened)

    def load(self, path: Path) -> None:
        self._state = load_state(path, self._opened.model)


class _Templated:
    """A conversation in the template of the tokenizer.

    A template lays out the whole conversation anew at each turn. Of that only what comes after
    the tokens that a state has read is read. There are two states: before the last answer and
    after it, as templates may write an answer otherwise than it was given.
    """

    def __init__(self, opened: Opened, args: argparse.Namespace):
        self._opened, self._args = opened, args
        assert isinstance(opened.tokenizer, TextTokenizer)
        self._tokenizer = opened.tokenizer
        self.reset()

    def reset(self) -> None:
        system = self._args.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._read: list[tuple[list[int], DecodingState]] = []
        self.given: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        opened = self._opened
        messages = [*self._messages, {"role": "user", "content": line}]
        ids = self._tokenizer.encode_chat(messages)
        known = [pair for pair in self._read if _begins(ids, pair[0]) and len(pair[0]) < len(ids)]
        seen, state = max(known, key=lambda pair: len(pair[0]), default=([], None))
        before = prefill(
            opened.model, ids[len(seen) :], state=state, room=self._args.max_new_tokens
        )
        tokens = stream_of(opened, [], self._args, state=before, stop_strings=self._args.stop)
        self.given = []
        try:
            yield from text_until(self._args.stop, text_of(opened, _noted(tokens, self.given)))
        finally:
            answer = self._tokenizer.decode(self.given)
            if tokens.finish == FinishReason.STOP_STRING:
                answer = "".join(text_until(self._args.stop, iter([answer])))
            self._messages = [*messages, {"role": "assistant", "content": answer}]
            self._read = [(ids, before), (ids + self.given, tokens.state)]

    def save(self, path: Path) -> None:
        _save(path, self._read[-1][1] if self._read else None, self._opened)
        found = {"messages": self._messages, "tokens": self._read[-1][0]}
        _beside(path).write_text(json.dumps(found, ensure_ascii=False) + "\n", "utf-8")

    def load(self, path: Path) -> None:
        state = load_state(path, self._opened.model)
        if not _beside(path).exists():
            raise CheckpointError(
                f"There is no {_beside(path)}, which /save writes beside the state: what was said "
                "before is not known. --plain goes on without it."
            )
        found: Any = read_config(_beside(path), _MAX_HISTORY)
        fits = isinstance(found, dict) and found.keys() == {"messages", "tokens"}
        if not fits or not all(isinstance(value, list) for value in found.values()):
            raise CheckpointError(f"{_beside(path)} is not what /save writes beside a state.")
        if len(found["tokens"]) != int(state.position) + 1:
            raise CheckpointError(f"{_beside(path)} is not that of the state {path}.")
        self._messages, self._read = found["messages"], [(found["tokens"], state)]


def _begins(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return list(ids[: len(beginning)]) == list(beginning)


def _noted(tokens: Iterator[int], given: list[int]) -> Iterator[int]:
    """The tokens as they come, which are appended to `given`."""
    for token in tokens:
        given.append(token)
        yield token


def _save(path: Path, state: DecodingState | None, opened: Opened) -> None:
    if state is None:
        raise ValueError("Nothing has been said yet: there is no state to save.")
    save_state(path, state, opened.model)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")
