"""The parser of the command line, and the types of its arguments."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from ._messages import one_line


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): must", r"\1 must", message)
        choice = re.match(
            r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)$", message
        )
        if choice is not None:
            message = _unknown_choice(*choice.groups())
        if not message.endswith((".", "?")):
            message += f". `{self.prog} --help` lists the arguments."
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Reports arguments that the parser does not know, with the option closest to the first."""
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unknown argument {name}. Put a text of several words into quotes.")
        options = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, options, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        self.error(f"unknown option {name}.{hint}")


def _unknown_choice(name: str, value: str, choices: str) -> str:
    """Describes a value that is none of the `choices`, as argparse lists them."""
    known = choices.replace("'", "").split(", ")
    close = difflib.get_close_matches(value, known, 1)
    if name == "COMMAND":
        start = f"unknown command {value}."
    else:
        start = f"{name} must be one of {', '.join(known)}, but got {value}."
    if close:
        return f"{start} Did you mean {close[0]}?"
    return f"{start} The commands are {', '.join(known)}." if name == "COMMAND" else start


def integer(low: int, high: int) -> Callable[[str], int]:
    """Returns the type of an option that takes an integer within `low..high`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be an integer within {low}..{high}, but got {text}."
            )
        return value

    return convert


def number(requirement: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Returns the type of an option that takes a number, which `requirement` describes."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {requirement}, but got {text}.")
        return value

    return convert


def utf8_text(text: str) -> str:
    """The type of an argument that takes text, which Python decodes with surrogates in place of
    bytes that are not valid."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            "must be UTF-8 text, but got bytes that are not. Give the text in a file, or on "
            "standard input, in UTF-8."
        ) from None
    return text


def stop_text(text: str) -> str:
    """The type of an option that takes a text to stop at."""
    if not text:
        raise argparse.ArgumentTypeError(
            "must not be empty. Give at least one character, or omit the option."
        )
    return utf8_text(text)
