"""The option for a LoRA, and loading it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats import CheckpointError
from ..models import LanguageModel
from ..pretrained import LAYOUTS


if TYPE_CHECKING:  # optax takes long to import, and only commands with a LoRA need it.
    from ..training import LoRA


def add_adapter(parser: argparse.ArgumentParser, *, more: str = "") -> None:
    """Adds the option for a LoRA, with the end of its help."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=Path,
        help="folder of a LoRA for the model, as `mamba_eqx.training.save_lora` and PEFT write it"
        + more,
    )


def check_adapter(args: argparse.Namespace) -> None:
    """Checks the folder of the LoRA, before anything is loaded.

    **Raises:** `ValueError` if there is none.
    """
    if args.adapter is not None and not args.adapter.is_dir():
        raise ValueError(f"--adapter must name the folder of a LoRA, but {args.adapter} is none.")


def read_adapter(path: Path, model: LanguageModel, layout: str) -> "LoRA":
    """Reads a LoRA of a model whose checkpoint is in a layout.

    A LoRA's files do not name the layout whose names they use. That of the checkpoint is tried
    first, and its error is reported if no layout fits.

    **Raises:** `CheckpointError` if the files are damaged or do not fit the model.
    """
    from ..training import load_lora

    first: CheckpointError | None = None
    for name in sorted(LAYOUTS, key=lambda name: name != layout):
        try:
            return load_lora(path, model, layout=name)
        except CheckpointError as error:
            first = first or error
    assert first is not None
    raise first
