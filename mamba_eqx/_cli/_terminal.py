"""What the commands share."""

import argparse
import os
import sys
from pathlib import Path
from typing import TypeAlias

from ..pretrained import Hub


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def write(text: str) -> None:
    """To standard output, at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def end_line() -> None:
    try:
        write("\n")
    except OSError:
        silence()


def silence() -> None:
    """For when whoever read the output went away: Python flushes it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a checkpoint, here or on the Hub."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the folder of a checkpoint, or a repository on the Hugging Face Hub",
    )
    add_hub(parser)


def add_hub(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how to get at the Hub."""
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit on the Hub")
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=Path, help="where downloads are kept (default: as usual)"
    )
    parser.add_argument(
        "--local-files-only", action="store_true", help="take only what is in the cache"
    )
    parser.add_argument("--endpoint", metavar="URL", help="the address of another Hub")


def read_text(path: Path | None) -> str:
    """All of a file, or of standard input."""
    name = "Standard input" if path is None else str(path)
    data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}.") from error


def hub_of(args: argparse.Namespace) -> Hub:
    # Not the token: whoever lists processes could read it. HF_TOKEN or a login does.
    return Hub(
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        endpoint=args.endpoint,
    )
