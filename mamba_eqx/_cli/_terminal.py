"""Reading standard input and files, and writing standard output."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TypeAlias

from ._arguments import Parser


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
_MAX_TEXT = 2**28  # bytes of a text that is read as a whole


def write(text: str) -> None:
    """Writes a text to standard output and flushes it.

    A character that the encoding of the terminal lacks becomes a question mark.
    """
    if text and sys.stdout is not None:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def write_json(value: object) -> None:
    """Writes a value as one line of JSON in ASCII, which every encoding of a terminal has."""
    write(json.dumps(value, allow_nan=False) + "\n")


def end_line() -> None:
    """Writes a newline to standard output, even if its reader is gone."""
    try:
        write("\n")
    except OSError:
        silence()


def flush() -> None:
    """Flushes standard output, and gives it up if that fails.

    Python would otherwise try once more at exit, and print a traceback.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        silence()


def silence() -> None:
    """Redirects standard output to the null device after its reader is gone.

    Python flushes standard output once more at exit, which would otherwise print an error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_file(path: Path) -> None:
    """Checks the path of a text.

    **Raises:** `ValueError` if there is no file, or a folder.
    """
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give a file in it.")


def read_text(path: Path | None) -> str:
    """Reads the whole text of a file, or of standard input if `path` is `None`.

    A byte order mark at the beginning is not part of the text.

    **Raises:** `ValueError` if there is no file, or its text is not UTF-8, or too long to be held
    in memory.
    """
    name = "Standard input" if path is None else str(path)
    if path is None:
        data = b"" if sys.stdin is None else sys.stdin.buffer.read(_MAX_TEXT + 1)
    else:
        check_file(path)
        with open(path, "rb") as file:
            data = file.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise ValueError(f"{name} must have at most {_MAX_TEXT:,} bytes. Give a part of the text.")
    return decode(name, data)


def decode(name: str, data: bytes) -> str:
    """Decodes UTF-8, without a byte order mark at the beginning.

    **Raises:** `ValueError` that names the source, if the text is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(name) from error


def not_utf8(name: str) -> ValueError:
    """Returns the error for a text that is not UTF-8."""
    return ValueError(f"{name} is not UTF-8 text. Convert the text to UTF-8.")
