"""`mamba-eqx train`."""

import argparse
import dataclasses
from pathlib import Path

from .._compilation_cache import use_compilation_cache
from ._arguments import integer, number, utf8_text
from ._terminal import Commands, check_file
from ._train_settings import MIXERS, PRESETS, Settings, option


_INT32 = 2**31 - 1


def add_train(commands: Commands) -> None:
    """Adds the `train` command."""
    train = commands.add_parser(
        "train",
        help="train a byte-level model on a text",
        description="Train a byte-level model on a text, from scratch, and save it in a folder "
        "that --model of the other commands reads. After Ctrl-C or a crash, the same command "
        "resumes; with more --steps, a finished run is extended. A part of the text is held out, "
        "and scored every few steps. A zero byte in the text separates documents. The default, "
        "--preset small, takes a minute or a few; --preset bundled is how the bundled model was "
        "trained, in hours.",
    )
    train.add_argument("text", metavar="TEXT", type=Path, help="text file, plain or .xz")
    train.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder of the run and of the model"
    )
    train.add_argument(
        "--hold-out",
        metavar="BEGINNING",
        type=utf8_text,
        action="append",
        default=[],
        help="hold out the document that begins so; may be repeated (default: the last 5 %% of the "
        "text)",
    )
    train.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="small",
        help="sizes and steps; the options below replace single values (default: %(default)s)",
    )
    train.add_argument("--mixer", choices=list(MIXERS), help="kind of the layers (default: mamba1)")
    counts = (
        ("d_model", 1, 2**16, "width of the model"),
        ("layers", 1, 2**12, "number of layers"),
        ("d_state", 1, 2**12, "state size (default: 8 for mamba1, 32 for the others)"),
        ("steps", 1, _INT32, "number of training steps"),
        ("batch", 1, 2**16, "rows that read the text side by side"),
        ("length", 1, 2**20, "bytes that a row reads in a step"),
        ("stretch", 1, 2**20, "steps before a row jumps to another place in the text"),
        ("seed", 0, _INT32 - 1, "seed of the initial parameters and of the order"),
    )
    small, bundled = PRESETS["small"], PRESETS["bundled"]
    for name, low, high, text in counts:
        values = [str(getattr(preset, name)) for preset in (small, bundled)]
        text += "" if name == "d_state" else f" (default: {' or '.join(dict.fromkeys(values))})"
        train.add_argument(option(name), metavar="N", type=integer(low, high), help=text)
    train.add_argument(
        "--lr",
        metavar="X",
        type=number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
        help=f"peak learning rate (default: {small.lr})",
    )
    train.add_argument(
        "--every",
        metavar="N",
        type=integer(1, _INT32),
        help="steps between checkpoints and scores (default: 100 or 500)",
    )
    train.add_argument(
        "--prompt",
        metavar="TEXT",
        type=utf8_text,
        default="The ",
        help="prompt of the sample at the end (default: %(default)r)",
    )
    train.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled programs in the user's cache folder for later runs",
    )
    train.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    check_file(args.text)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out must be a folder, but {args.out} is a file. Give another path.")
    if not args.prompt:
        raise ValueError("--prompt must not be empty. Give at least one character.")
    from ._training_run import Run, run  # optax takes long to import, and only this needs it.

    if not args.no_compilation_cache:
        use_compilation_cache()
    every = args.every or (500 if args.preset == "bundled" else 100)
    run(Run(args.text, tuple(args.hold_out), args.out, _settings(args), every, args.prompt))


def _settings(args: argparse.Namespace) -> Settings:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(PRESETS[args.preset], **chosen)
    if settings.d_state:
        return settings
    return dataclasses.replace(settings, d_state=MIXERS[settings.mixer])
