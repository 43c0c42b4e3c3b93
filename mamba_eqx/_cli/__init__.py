"""The command `mamba-eqx`, also `python -m mamba_eqx`. Each subcommand has a file."""

import warnings
from collections.abc import Sequence

import jax

from .._version import VERSION
from ._arguments import Parser
from ._chat import add_chat
from ._completion import add_completion
from ._convert import add_convert
from ._generate import add_generate
from ._inspect import add_inspect
from ._messages import print_error, print_warning
from ._score import add_score
from ._serve import add_serve
from ._terminal import end_line, flush, silence
from ._train import add_train


_ERROR = 2  # the exit code of argparse
_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    **Arguments:**

    - `argv`: the command-line arguments; `None` takes those of the process.

    **Returns:**

    The exit code: 0 for success, 2 if the command cannot be carried out (an invalid argument, a
    missing or damaged checkpoint, a full disk), which one line on standard error explains, 130 if
    interrupted, 141 if the reader of the output is gone.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    if args.run is None:
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            args.run(args)
        flush()
    except KeyboardInterrupt:
        end_line()
        return _INTERRUPTED
    except BrokenPipeError:
        silence()
        return _BROKEN_PIPE
    except (ValueError, ArithmeticError, OSError, ImportError, MemoryError) as error:
        print_error(error)
        flush()
        return _ERROR
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print_error(error)
        return _ERROR
    return 0


def _parser() -> Parser:
    parser = Parser(prog="mamba-eqx", description="The Mamba family of state-space models in JAX.")
    parser.add_argument("--version", action="version", version=f"mamba-eqx {VERSION}")
    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    added = (add_generate, add_chat, add_score, add_serve, add_train, add_inspect, add_convert)
    for add in added:
        add(commands)
    add_completion(commands, parser)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser
