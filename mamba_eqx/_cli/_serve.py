"""`mamba-eqx serve`."""

import argparse
import asyncio
import os
import time

from ._arguments import integer, number, utf8_text
from ._opened import add_model, open_model
from ._terminal import Commands, write


_KEY = "MAMBA_EQX_API_KEY"
_MAX_SLOTS = 1024
_INT32 = 2**31 - 1


def add_serve(commands: Commands) -> None:
    """Adds the `serve` command."""
    serve = commands.add_parser(
        "serve",
        help="serve a model by OpenAI's API",
        description="Serve a model to any number of clients at once, by OpenAI's API "
        "(/v1/completions, /v1/chat/completions) and with a page that shows the state. If the "
        f"environment has {_KEY}, clients must give this key.",
    )
    add_model(serve)
    serve.add_argument(
        "--host",
        metavar="HOST",
        type=utf8_text,
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which only this machine can reach)",
    )
    serve.add_argument(
        "--port",
        metavar="PORT",
        type=integer(0, 2**16 - 1),
        default=8000,
        help="port; 0 takes a free one (default: %(default)s)",
    )
    serve.add_argument(
        "--name",
        metavar="NAME",
        type=utf8_text,
        help="name by which clients ask for the model (default: SOURCE, or its last folder)",
    )
    counts = (
        ("--slots", 8, 1, _MAX_SLOTS, "maximum number of texts that are generated together"),
        ("--queue", 64, 0, 2**16, "maximum number of texts that wait"),
        ("--max-len", 4096, 2, _INT32, "maximum number of tokens of a text with its prompt"),
        ("--prefix-mib", 256, 0, 2**20, "size of the prefix cache in MiB"),
    )
    for name, default, low, high, text in counts:
        serve.add_argument(
            name,
            metavar="N",
            type=integer(low, high),
            default=default,
            help=f"{text} (default: %(default)s)",
        )
    serve.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=number("a number within 1..86400", lambda x: 1 <= x <= 86400),
        default=600.0,
        help="maximum time of a text (default: %(default)s)",
    )
    serve.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from .. import serving  # It needs aiohttp, which only this command does.

    key = os.environ.get(_KEY) or None
    if key is None and not serving.is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets other machines in, so that a key is needed. Set {_KEY}, or "
            "leave --host out."
        )
    if args.slots & (args.slots - 1):
        raise ValueError(f"--slots must be a power of two, but got {args.slots}.")
    opened = open_model(args)
    served = serving.Served(
        opened.model,
        opened.tokenizer,
        name=_name(args),
        slots=args.slots,
        queue=args.queue,
        max_len=args.max_len,
        prefix_bytes=args.prefix_mib * 2**20,
        seconds=args.timeout,
        created=int(time.time()),
    )
    serving.start_log()
    server = serving.Server(served, key=key)

    async def run() -> None:
        async with server.listen(args.host, args.port) as url:
            write(f"{url}\n")
            await asyncio.Event().wait()

    asyncio.run(run())


def _name(args: argparse.Namespace) -> str:
    """Returns the name of the model."""
    if args.name is not None:
        return args.name
    if args.model is None:
        return "shakespeare"
    if os.path.isdir(args.model):
        return os.path.basename(os.path.abspath(args.model)) or args.model
    return args.model
