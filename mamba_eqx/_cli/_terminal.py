"""Reading standard input, writing standard output, and the type of the subparsers."""

import argparse
import os
import sys
from pathlib import Path
from typing import TypeAlias


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def write(text: str) -> None:
    """Writes a text to standard output and flushes it."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def end_line() -> None:
    """Writes a newline to standard output, even if its reader is gone."""
    try:
        write("\n")
    except OSError:
        silence()


def silence() -> None:
    """Redirects standard output to the null device after its reader is gone.

    Python flushes standard output once more at exit, which would otherwise print an error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_text(path: Path | None) -> str:
    """Reads the whole text of a file, or of standard input if `path` is `None`.

    **Raises:** `ValueError` if the text is not UTF-8.
    """
    name = "Standard input" if path is None else str(path)
    data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}.") from error
