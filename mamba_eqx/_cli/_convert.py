"""`mamba-eqx convert`."""

import argparse
from pathlib import Path

import jax

from ..pretrained import (
    LAYOUTS,
    check_dtype,
    load,
    open_source,
    read_checkpoint,
    read_companions,
    save_checkpoint,
)
from ._hub_arguments import add_source, hub_from_args
from ._terminal import Commands, write


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_convert(commands: Commands) -> None:
    """Adds the `convert` command."""
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint to another layout, dtype or number of files",
        description="Convert a checkpoint of any layout to safetensors in a given layout. The "
        "result appears in DEST only when it is complete. The files of the tokenizer, the ids of "
        "special tokens and generation_config.json are kept.",
    )
    add_source(convert)
    convert.add_argument("dest", metavar="DEST", type=Path, help="folder to write")
    convert.add_argument(
        "--layout",
        choices=list(LAYOUTS),
        default="transformers",
        help="layout to write (default: %(default)s)",
    )
    convert.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the parameters; recurrence parameters stay at least float32 (default: as "
        "stored)",
    )
    convert.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="maximum size of the tensors in one file, such as 500MB (default: %(default)s)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DEST")
    convert.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    # This is checked before anything is downloaded.
    if args.dest.is_dir() and any(args.dest.iterdir()) and not args.overwrite:
        raise FileExistsError(
            f"{args.dest} is not empty. Give another folder, or --overwrite to replace the "
            "checkpoint in it."
        )
    dtype = None if args.dtype is None else check_dtype("The model", args.dtype)
    source = open_source(args.source, hub_from_args(args))
    model = load(read_checkpoint(source), dtype)
    companions = read_companions(source, ids_in_config=LAYOUTS[args.layout].declares_ids)
    save_checkpoint(
        model, args.dest, companions, layout=args.layout, max_shard_size=args.max_shard_size
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    write(f"wrote {args.dest} ({args.layout} layout, {count:,} parameters)\n")
