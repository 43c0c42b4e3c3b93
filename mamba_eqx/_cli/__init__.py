"""The command `mamba-eqx`, also `python -m mamba_eqx`. Each subcommand has a file."""

import argparse
import sys
from collections.abc import Sequence

from ..formats import CheckpointError
from ._chat import add_chat
from ._convert import add_convert
from ._generate import add_generate
from ._inspect import add_inspect
from ._score import add_score
from ._terminal import end_line, silence


_FAILURE = 1
_USAGE_ERROR = 2  # the exit code of argparse
_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    **Arguments:**

    - `argv`: the command-line arguments; `None` takes those of the process.

    **Returns:**

    The exit code: 0 for success, 1 for a failure (a missing or damaged checkpoint, a
    full disk), 2 for invalid arguments, 130 if interrupted, 141 if the reader of the output is
    gone.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        end_line()
        return _INTERRUPTED
    except BrokenPipeError:
        silence()
        return _BROKEN_PIPE
    except (CheckpointError, OSError, ImportError) as error:
        _print_error(error)
        return _FAILURE
    except ValueError as error:
        _print_error(error)
        return _USAGE_ERROR
    return 0


def _print_error(error: Exception) -> None:
    message = " ".join(str(error).split())
    print(f"mamba-eqx: error: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mamba-eqx", description="The Mamba family of state-space models in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    add_chat(commands)
    add_score(commands)
    add_inspect(commands)
    add_convert(commands)
    return parser
