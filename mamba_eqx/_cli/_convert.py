"""`mamba-eqx convert`."""

import argparse
from pathlib import Path

import jax
import numpy as np

from ..models import LanguageModel, quantize
from ..pretrained import (
    LAYOUTS,
    Checkpoint,
    check_dtype,
    config_from,
    load,
    open_source,
    read_checkpoint,
    read_companions,
    save_checkpoint,
    skeleton,
)
from ._adapter import add_adapter, check_adapter, read_adapter
from ._hub_arguments import add_source, check_folder, hub_from_args
from ._quantization import add_bits, quantization_from_args
from ._terminal import Commands, write


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_convert(commands: Commands) -> None:
    """Adds the `convert` command."""
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint to another layout, dtype, number of bits or files",
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
    add_bits(convert)
    add_adapter(convert, more="; its change is added to the weights, or see --keep-adapter")
    convert.add_argument(
        "--keep-adapter",
        metavar="DIR",
        type=Path,
        help="leave the weights as they are, and write the LoRA to DIR, under the names of the "
        "layout that is written",
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
    _check(args)
    dtype = None if args.dtype is None else check_dtype("The model", args.dtype)
    source = open_source(args.source, hub_from_args(args))
    model = _load(args, read_checkpoint(source), dtype)
    companions = read_companions(source, ids_in_config=LAYOUTS[args.layout].declares_ids)
    save_checkpoint(
        model, args.dest, companions, layout=args.layout, max_shard_size=args.max_shard_size
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(skeleton(config_from(model))))
    write(f"wrote {args.dest} ({args.layout} layout, {count:,} parameters)\n")
    if args.keep_adapter is not None:
        write(f"wrote {args.keep_adapter} (the LoRA)\n")


def _check(args: argparse.Namespace) -> None:
    """Checks the paths, before anything is downloaded.

    **Raises:** `ValueError` or `FileExistsError` if one of them cannot be used.
    """
    if args.dest.exists() and not args.dest.is_dir():
        raise FileExistsError(f"DEST must be a folder, but {args.dest} is a file.")
    if args.dest.is_dir() and any(args.dest.iterdir()) and not args.overwrite:
        raise FileExistsError(
            f"{args.dest} is not empty. Give another folder, or --overwrite to replace the "
            "checkpoint in it."
        )
    check_folder("SOURCE", args.source)
    check_adapter(args)
    kept = args.keep_adapter
    if kept is None:
        return
    if args.adapter is None:
        raise ValueError("--keep-adapter needs a LoRA to keep. Name its folder with --adapter.")
    if args.bits is not None:
        raise ValueError(
            "--keep-adapter and --bits cannot be used together, because a LoRA cannot change "
            "integers. Leave one of them out."
        )
    if kept.exists() and (not kept.is_dir() or any(kept.iterdir())):
        raise FileExistsError(f"--keep-adapter must name a new folder, but {kept} is not empty.")
    dest = args.dest.resolve()
    if dest in (kept.resolve(), *kept.resolve().parents):
        raise ValueError(
            f"--keep-adapter must name a folder outside of DEST, but {kept} is in {args.dest}."
        )


def _load(
    args: argparse.Namespace, checkpoint: Checkpoint, dtype: np.dtype | None
) -> LanguageModel:
    """Loads the model, with the change of the LoRA unless it is kept.

    A LoRA that is kept is written first, because that fails if the layout has no names for it.
    """
    if args.adapter is None:
        return load(checkpoint, dtype, quantize=quantization_from_args(args))
    model = load(checkpoint, dtype)
    lora = read_adapter(args.adapter, model, checkpoint.layout.name)
    if args.keep_adapter is not None:
        from ..training import save_lora  # optax takes long to import.

        base = str(args.dest)
        save_lora(lora, model, args.keep_adapter, layout=args.layout, base_model=base)
        return model
    # A LoRA cannot be merged into integers, so the merged model is quantised.
    model = lora.merge(model)
    return model if args.bits is None else quantize(model, bits=args.bits)
