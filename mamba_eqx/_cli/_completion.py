"""`mamba-eqx completion`."""

import argparse
from pathlib import Path

from ._arguments import Parser
from ._terminal import Commands, write


SHELLS = ("bash", "zsh", "tcsh")


def add_completion(commands: Commands, parser: Parser) -> None:
    """Adds the `completion` command, given the parser of all commands."""
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options",
        description="Print a script by which a shell completes commands, options and file names at "
        "the Tab key. It is static, so that Tab starts no Python. Print it again after an update.",
        epilog="bash: mamba-eqx completion bash > "
        "~/.local/share/bash-completion/completions/mamba-eqx",
    )
    completion.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help=f"shell: {', '.join(SHELLS)}"
    )
    completion.set_defaults(run=lambda args: write(_script(parser, args.shell)))


def _script(parser: Parser, shell: str) -> str:
    """Returns the script of a shell.

    **Raises:** `ImportError` if shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise ImportError(
            "Completion requires the package shtab, which is not installed. Install it by "
            "`pip install 'mamba_eqx[completion]'`."
        ) from None
    _complete_paths(parser, shtab.FILE, shtab.DIRECTORY)
    return shtab.complete(parser, shell) + "\n"


def _complete_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Marks the arguments that name files and folders, for shtab."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, file, folder)
        elif action.metavar in ("SOURCE", "DIR", "DEST"):
            setattr(action, "complete", folder)  # noqa: B010 (shtab's own attribute)
        elif action.type is Path:
            setattr(action, "complete", file)  # noqa: B010
