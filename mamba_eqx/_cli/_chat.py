"""`mamba-eqx chat`."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..formats import CheckpointError, read_config
from ..generation import DecodingState, FinishReason, load_state, prefill, save_state
from ..text import TextTokenizer, text_until
from ._opened import Opened, add_model, open_model
from ._sampling_arguments import add_sampling, check_sampling, sampling_from_args
from ._streaming import decode_stream, start_stream
from ._terminal import Commands, end_line, write


_HELP = """\
/reset      forget the conversation
/save FILE  save the conversation
/load FILE  resume a saved conversation
/quit       quit, like Ctrl-D; Ctrl-C interrupts an answer
"""
_PLAIN_STOP = "\n\n"
_MAX_HISTORY = 2**26


def add_chat(commands: Commands) -> None:
    """Adds the `chat` command."""
    chat = commands.add_parser(
        "chat",
        help="chat with a model",
        description="Chat with a model, line by line. The model keeps its state between turns, so "
        "earlier turns are not read again. Conversations follow the chat template of the "
        "tokenizer. Without a template, or with --plain, each line is appended to a plain text, "
        "which the model continues up to an empty line. Type /help for commands.",
    )
    add_model(chat)
    add_sampling(chat, max_new_tokens=512)
    chat.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    chat.add_argument("--plain", action="store_true", help="ignore the chat template")
    chat.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer before this text; may be repeated (default: an empty line in plain "
        "text, none with a template)",
    )
    chat.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    check_sampling(args)
    opened = open_model(args)
    tokenizer = opened.tokenizer
    if isinstance(tokenizer, TextTokenizer) and tokenizer.has_template and not args.plain:
        conversation = _TemplateConversation(opened, tokenizer, args)
    else:
        conversation = _PlainConversation(opened, args)
    if sys.stdin.isatty():
        print("Type /help for commands, Ctrl-D to quit.", file=sys.stderr)
    for line in _lines():
        if line.startswith("/"):
            try:
                if not _run_command(conversation, line):
                    return
            except (ValueError, OSError) as error:  # A mistake must not end the chat.
                print("error: " + " ".join(str(error).split()), file=sys.stderr)
        elif line:
            _answer(conversation, line)


def _lines() -> Iterator[str]:
    """Yields the lines of standard input, with a prompt in a terminal."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (importing it makes `input` editable)

    while True:
        try:
            yield input("> ")
        except EOFError:
            end_line()
            return


def _run_command(conversation: "_Conversation", line: str) -> bool:
    """Runs a command line that begins with a slash, and returns whether the chat continues."""
    name, _, rest = line.partition(" ")
    path = Path(rest.strip())
    match name:
        case "/quit":
            return False
        case "/reset":
            conversation.reset()
        case "/save" | "/load" if not rest.strip():
            raise ValueError(f"{name} needs the name of a file.")
        case "/save":
            conversation.save(path)
        case "/load":
            conversation.load(path)
        case "/help":
            print(_HELP, end="", file=sys.stderr)
        case _:
            raise ValueError(f"There is no command {name}. Type /help for commands.")
    return True


def _answer(conversation: "_Conversation", line: str) -> None:
    """Prints the answer to a line, and its speed in a terminal."""
    start = time.perf_counter()
    try:
        for piece in conversation.turn(line):
            write(piece)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the answer but not the chat.
    write("\n")
    if sys.stdin.isatty():
        count = len(conversation.answer_ids)
        rate = count / (time.perf_counter() - start)
        print(f"[{count} tokens, {rate:.0f} tokens/s]", file=sys.stderr)


class _PlainConversation:
    """A conversation without a template: a text that the user and the model append to in turn."""

    def __init__(self, opened: Opened, args: argparse.Namespace):
        self._opened, self._args = opened, args
        self._stop = args.stop or [_PLAIN_STOP]
        self._sampling = sampling_from_args(args, opened, stop_strings=self._stop)
        self.reset()

    def reset(self) -> None:
        self._state: DecodingState | None = None
        self.answer_ids: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        """Yields the answer to a line."""
        opened = self._opened
        text = f"{line}\n"
        if self._state is None:
            system = self._args.system
            ids = opened.tokenizer.encode(text if system is None else f"{system}\n\n{text}")
        else:
            ids = opened.encode_piece(text)
        tokens = start_stream(opened, ids, self._args, self._sampling, state=self._state)
        self.answer_ids = []
        recorded = _recorded(tokens, self.answer_ids)
        try:
            yield from text_until(self._stop, decode_stream(opened, recorded))
        finally:
            self._state = tokens.state

    def save(self, path: Path) -> None:
        _save(path, self._state, self._opened)

    def load(self, path: Path) -> None:
        self._state = load_state(path, self._opened.model)


class _Snapshot(NamedTuple):
    """The tokens that a model has read, and its state after them."""

    ids: list[int]
    state: DecodingState


class _TemplateConversation:
    """A conversation in the format of the tokenizer's chat template.

    The template renders the whole conversation again for each turn, but the model reads only the
    tokens after a known prefix. Two states are kept, before and after the last answer, because a
    template may render an answer differently from the tokens that were generated.
    """

    def __init__(self, opened: Opened, tokenizer: TextTokenizer, args: argparse.Namespace):
        self._opened, self._tokenizer, self._args = opened, tokenizer, args
        self._sampling = sampling_from_args(args, opened, stop_strings=args.stop)
        self.reset()

    def reset(self) -> None:
        system = self._args.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._snapshots: list[_Snapshot] = []
        self.answer_ids: list[int] = []  # the tokens of the last answer

    def turn(self, line: str) -> Iterator[str]:
        """Yields the answer to a line."""
        opened, stop = self._opened, self._args.stop
        messages = [*self._messages, {"role": "user", "content": line}]
        ids = self._tokenizer.encode_chat(messages)
        usable = [s for s in self._snapshots if _starts_with(ids, s.ids) and len(s.ids) < len(ids)]
        longest = max(usable, key=lambda snapshot: len(snapshot.ids), default=None)
        new_ids, state = (
            (ids, None) if longest is None else (ids[len(longest.ids) :], longest.state)
        )
        before = prefill(opened.model, new_ids, state=state, room=self._args.max_new_tokens)
        tokens = start_stream(opened, [], self._args, self._sampling, state=before)
        self.answer_ids = []
        recorded = _recorded(tokens, self.answer_ids)
        try:
            yield from text_until(stop, decode_stream(opened, recorded))
        finally:
            answer = self._tokenizer.decode(self.answer_ids)
            if tokens.finish == FinishReason.STOP_STRING:
                answer = "".join(text_until(stop, iter([answer])))
            self._messages = [*messages, {"role": "assistant", "content": answer}]
            self._snapshots = [
                _Snapshot(ids, before),
                _Snapshot(ids + self.answer_ids, tokens.state),
            ]

    def save(self, path: Path) -> None:
        _save(path, self._snapshots[-1].state if self._snapshots else None, self._opened)
        history = {"messages": self._messages, "tokens": self._snapshots[-1].ids}
        _history_path(path).write_text(json.dumps(history, ensure_ascii=False) + "\n", "utf-8")

    def load(self, path: Path) -> None:
        state = load_state(path, self._opened.model)
        history_path = _history_path(path)
        if not history_path.exists():
            raise CheckpointError(
                f"There is no {history_path}, which /save writes beside the state, so the earlier "
                "messages are unknown. Restart with --plain to continue without them."
            )
        history = read_config(history_path, _MAX_HISTORY)
        match history:
            case {"messages": list(messages), "tokens": list(ids), **others} if not others:
                pass
            case _:
                raise CheckpointError(
                    f"{history_path} is not a file that /save writes beside a state. Load another "
                    "one."
                )
        if len(ids) != int(state.position) + 1:
            raise CheckpointError(
                f"{history_path} has {len(ids)} tokens, but the state {path} has "
                f"read {int(state.position) + 1}. Keep the two files of a /save together."
            )
        self._messages = messages
        self._snapshots = [_Snapshot(ids, state)]


_Conversation: TypeAlias = _PlainConversation | _TemplateConversation


def _starts_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return list(ids[: len(prefix)]) == list(prefix)


def _recorded(tokens: Iterator[int], record: list[int]) -> Iterator[int]:
    """Yields the tokens and appends each of them to `record`."""
    for token in tokens:
        record.append(token)
        yield token


def _save(path: Path, state: DecodingState | None, opened: Opened) -> None:
    if state is None:
        raise ValueError("Nothing has been said yet, so there is no state to save.")
    save_state(path, state, opened.model)


def _history_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
