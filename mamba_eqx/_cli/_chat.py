"""`mamba-eqx chat`."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..text import chat_tokenizer
from ._arguments import utf8_text
from ._conversation import Conversation, PlainConversation, TemplateConversation
from ._messages import explain
from ._opened import add_model, open_model
from ._sampling_arguments import add_sampling
from ._terminal import Commands, decode, end_line, write


_HELP = """\
/reset      forget the conversation
/save FILE  save the conversation
/load FILE  resume a saved conversation
/quit       quit, like Ctrl-D; Ctrl-C interrupts an answer
"""


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
    add_sampling(
        chat,
        max_new_tokens=512,
        stop="end an answer before TEXT",
        stop_default="an empty line in plain text, none with a template",
    )
    chat.add_argument(
        "--system",
        metavar="TEXT",
        type=utf8_text,
        help="system message that opens the conversation",
    )
    chat.add_argument("--plain", action="store_true", help="ignore the chat template")
    chat.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    opened = open_model(args)
    tokenizer = None if args.plain else chat_tokenizer(opened.tokenizer)
    if tokenizer is not None:
        conversation = TemplateConversation(opened, tokenizer, args)
    else:
        conversation = PlainConversation(opened, args)
    if _in_terminal():
        print("Type /help for commands, Ctrl-D to quit.", file=sys.stderr)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _run_command(conversation, line):
                    return
            elif line:
                _answer(conversation, line)
        except BrokenPipeError:
            raise
        except (ValueError, ArithmeticError, OSError) as error:  # A mistake must not end the chat.
            _print_mistake(error)


def _print_mistake(error: Exception) -> None:
    print(f"error: {explain(error)}", file=sys.stderr)


def _in_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """Yields the lines of standard input, with a prompt in a terminal. Lines that are not UTF-8 are
    reported and left out."""
    if sys.stdin is None:
        return
    if _in_terminal():
        import readline  # noqa: F401  (importing it makes `input` editable)
    while True:
        try:
            if _in_terminal():
                data = input("> ").encode("utf-8", "surrogateescape")
            else:
                data = sys.stdin.buffer.readline()
                if not data:
                    return
            line = decode("The line", data).rstrip("\r\n")
        except EOFError:
            end_line()
            return
        except ValueError as error:
            _print_mistake(error)
            continue
        yield line


def _run_command(conversation: Conversation, line: str) -> bool:
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
            raise ValueError(f"There is no command {name[:40]}. Type /help for commands.")
    return True


def _answer(conversation: Conversation, line: str) -> None:
    """Prints the answer to a line, and its speed in a terminal."""
    start = time.perf_counter()
    try:
        for piece in conversation.turn(line):
            write(piece)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the answer but not the chat.
    write("\n")
    if _in_terminal():
        count = len(conversation.answer_ids)
        rate = count / (time.perf_counter() - start)
        print(f"[{count} tokens, {rate:.0f} tokens/s]", file=sys.stderr)
