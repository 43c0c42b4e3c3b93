"""The command `mamba-eqx`, also `python -m mamba_eqx`: one file for each of its commands."""

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


_FAILED = 1
_MISTAKE = 2  # as argparse has it
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    **Arguments:**

    - `argv`: its arguments; those of the process if `None`.

    **Returns:** the exit code: 0, 1 if it failed (there is no such checkpoint, or it is damaged,
    or the disk is full), 2 for a mistake in the arguments, 130 if interrupted, 141 if whoever read
    the output went away.
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
        _complain(error)
        return _FAILED
    except ValueError as error:
        _complain(error)
        return _MISTAKE
    return 0


def _complain(error: Exception) -> None:
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
