"""A checkpoint whose files have been found and read, but for the values of its tensors."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats import CheckpointError, StoredTensor, read_config
from ..models import LanguageModelConfig
from ._hub import Hub, find_on_hub
from ._source import CONFIG, Find, open_weights
from ._state_dict import LAYOUTS
from .layouts import MISTRAL, Layout, renamed


CONFIGS = (CONFIG, MISTRAL.config_file)


@dataclass(frozen=True)
class Checkpoint:
    """What there is to know before anything is loaded.

    - `where`: what to call it in messages.
    - `tensors`: by their names in the layout; their values are still on disk.
    """

    where: str
    layout: Layout
    config: LanguageModelConfig
    tensors: dict[str, StoredTensor]


def find_files(
    name_or_path: str | os.PathLike[str],
    hub: Hub,
    *,
    settled_by: Sequence[str] = CONFIGS,
    heads: Path | None = None,
) -> tuple[Find, str]:
    """A function that finds the files of a checkpoint, here or on the Hub, and what to call it.

    **Arguments:** as for `open_checkpoint`, and

    - `settled_by`: the files that may settle the commit on the Hub: see `find_on_hub`.
    """
    folder = Path(name_or_path)
    if folder.is_dir() or _is_path(name_or_path):
        return _find_in(folder), os.fspath(name_or_path)
    return find_on_hub(str(name_or_path), hub, settled_by, heads)


def open_checkpoint(
    name_or_path: str | os.PathLike[str], hub: Hub, *, heads: Path | None = None
) -> Checkpoint:
    """Finds a checkpoint and reads its config and the descriptions of its tensors.

    **Arguments:**

    - `name_or_path`: a local folder, or else the name of a repository on the Hub.
    - `hub`: how to get at the Hub.
    - `heads`: a folder for downloads of what describes tensors, if that is all that is wanted: see
        `find_on_hub`. Values read from there are wrong.
    """
    return read_checkpoint(*find_files(name_or_path, hub, heads=heads))


def read_checkpoint(find: Find, where: str) -> Checkpoint:
    """The checkpoint whose files `find` finds."""
    path = next(filter(None, map(find, CONFIGS)), None)
    if path is None:
        raise CheckpointError(f"{where} has no {CONFIG}: give the folder of a checkpoint.")
    values = read_config(path)
    try:
        layout = _layout_of(path.name, values)
        config = layout.read_config(values)
    except ValueError as error:  # Of a config class of ours, or a `CheckpointError`.
        raise CheckpointError(f"{path}: {error}") from None
    tensors = renamed(layout, open_weights(find, where, layout.weights_file))
    if len(config.layers) > len(tensors):
        # Before a table of names is made, be they a thousand layers.
        raise CheckpointError(
            f"{where}: the config has {len(config.layers)} layers, but the weights have only "
            f"{len(tensors)} tensors. Take the config and the weights of one and the same model."
        )
    return Checkpoint(where, layout, config, tensors)


def _layout_of(file: str, values: Any) -> Layout:
    if file == MISTRAL.config_file:
        return MISTRAL
    # Its `model_type` is the one of Mamba-1 in transformers, but no other layout has a `dim`.
    if isinstance(values, dict) and "dim" in values and "hidden_size" not in values:
        return MISTRAL
    # Not by any other key: configs that transformers wrote may carry official keys as well.
    has_type = isinstance(values, dict) and "model_type" in values
    return LAYOUTS["transformers" if has_type else "state-spaces"]


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this cannot be the name of a repository, which is `name` or `owner/name`."""
    if not isinstance(name_or_path, str):
        return True
    return (
        name_or_path.startswith((".", "/", "~"))
        or "\\" in name_or_path
        or name_or_path.count("/") > 1
        or Path(name_or_path).exists()
    )


def _find_in(folder: Path) -> Find:
    if not folder.exists():
        raise FileNotFoundError(
            f"There is no folder {str(folder)!r}. Give the folder of a checkpoint, or the name of "
            "a repository on the Hugging Face Hub."
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file: give the folder that holds it, with its {CONFIG}."
        )

    def find(name: str) -> Path | None:
        path = folder / name
        if not path.exists():
            return None
        if not _is_inside(path, folder):
            # A folder from elsewhere has no business with other files of this machine.
            raise CheckpointError(
                f"{path} is a link that leaves the folder: copy the file it leads to into its "
                "place, or give the folder in which that is."
            )
        return path

    return find


def _is_inside(path: Path, folder: Path) -> bool:
    roots = [folder]
    repository = folder.absolute().parent.parent
    if folder.absolute().parent.name == "snapshots" and repository.name.startswith("models--"):
        # The Hub's cache keeps the files in a folder beside, or in one for all repositories.
        roots += [repository / "blobs", repository.parent / "blobs"]
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots)
