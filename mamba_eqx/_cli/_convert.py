"""`mamba-eqx convert`."""

import argparse
import shutil
from pathlib import Path

import jax

from ..pretrained import (
    LAYOUTS,
    TOKENIZER_FILES,
    check_dtype,
    load,
    open_source,
    read_checkpoint,
    save_pretrained,
)
from ._terminal import Commands, add_source, hub_of, write


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="save a checkpoint in another layout, dtype or number of files",
        description="Loads a checkpoint of any layout and saves it as safetensors in another one. "
        "The new one appears when it is complete. Its tokenizer, if it has one, goes with it.",
    )
    add_source(convert)
    convert.add_argument("dest", metavar="DEST", type=Path, help="the folder to save it in")
    convert.add_argument(
        "--layout", choices=list(LAYOUTS), default="transformers", help="default: %(default)s"
    )
    convert.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the parameters; those of recurrences stay at least float32 (default: as stored)",
    )
    convert.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="of tensors in one file, such as 500MB (default: %(default)s)",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is in DEST"
    )
    convert.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # Before anything is downloaded.
    if args.dest.is_dir() and any(args.dest.iterdir()) and not args.overwrite:
        raise FileExistsError(
            f"{args.dest} is not empty: give another folder, or --overwrite to replace the "
            "checkpoint in it."
        )
    dtype = None if args.dtype is None else check_dtype("The model", args.dtype)
    source = open_source(args.source, hub_of(args))
    model = load(read_checkpoint(source), dtype)
    save_pretrained(model, args.dest, layout=args.layout, max_shard_size=args.max_shard_size)
    for name in TOKENIZER_FILES:
        path = source.find(name)
        if path is not None and path.resolve() != (args.dest / name).resolve():
            shutil.copyfile(path, args.dest / name)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    write(f"{args.dest}: {count:,} parameters in the layout of {args.layout}\n")
