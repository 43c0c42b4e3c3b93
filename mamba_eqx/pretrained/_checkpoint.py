"""A checkpoint whose config and tensor headers have been read and validated."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..formats import CheckpointError, StoredTensor, read_config
from ..models import LanguageModel, LanguageModelConfig, Quantization
from ._hub import Hub
from ._quantized import shapes_of, split_quantization
from ._source import CONFIG, CONFIGS, Source, open_source
from ._state_dict import get_layout
from ._weights import open_weights
from .layouts import MISTRAL, Layout, renamed, transformers_layout


# Where fewer tensors are missing, they are listed by name.
_LISTED_AT_MOST = 1000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a validated config and tensor headers. Tensor values are not read.

    - `where`: how messages refer to the checkpoint.
    - `layout`: the layout that its config is written in.
    - `config`: the config of the model.
    - `tensors`: the tensors under their names in the layout; their values are still on disk.
    - `quantization`: how the weights are quantised; `None` if they are not.
    """

    where: str
    layout: Layout
    config: LanguageModelConfig
    tensors: dict[str, StoredTensor]
    quantization: Quantization | None = None

    def shapes(self) -> LanguageModel:
        """Returns the model with shapes in place of arrays, and its layers `Unrolled`.

        **Raises:** `CheckpointError` if weights should be quantised, but none is.
        """
        return shapes_of(self.layout, self.config, self.tensors, self.quantization)


def open_checkpoint(
    name_or_path: str | os.PathLike[str], hub: Hub, *, header_folder: Path | None = None
) -> Checkpoint:
    """Finds a checkpoint and reads its config and tensor headers.

    **Arguments:**

    - `name_or_path`: a local folder, or else the name of a repository on the Hub.
    - `hub`: the options for access to the Hub.
    - `header_folder`: a folder. If given, only the headers of safetensors files are downloaded, to
        this folder, and the values of their tensors must not be read; see `open_repository`.

    **Raises:** `FileNotFoundError` if a path does not exist; `CheckpointError` if the checkpoint
    cannot be found or read, or its config is not valid.
    """
    return read_checkpoint(open_source(name_or_path, hub, header_folder=header_folder))


def read_checkpoint(source: Source) -> Checkpoint:
    """Reads the config and the tensor headers of a checkpoint.

    **Raises:** `CheckpointError` if files are missing or damaged, or the config is not valid.
    """
    path = next(filter(None, map(source.find, CONFIGS)), None)
    if path is None:
        raise CheckpointError(f"{source.where} has no {CONFIG}: give the folder of a checkpoint.")
    values = read_config(path)
    try:
        values, quantization = split_quantization(values)
        layout = _layout_of(path.name, values)
        config = layout.read_config(values)
    except ValueError as error:  # From a config class, or a `CheckpointError`.
        raise CheckpointError(f"{path}: {error}") from None
    tensors = renamed(layout, config, open_weights(source, layout.weights_file))
    if len(config.layers) > len(tensors):
        # Checked here because a config of a billion layers would fill the memory with names.
        raise CheckpointError(
            f"{source.where}: the config has {len(config.layers)} layers, but the weights have "
            f"only {len(tensors)} tensors. Take the config and the weights of the same model."
        )
    needed = layout.number_of_slots(config)
    if needed > 2 * len(tensors) + _LISTED_AT_MOST:
        # Hundreds of layers with a thousand experts each have millions of names to compare.
        raise CheckpointError(
            f"{source.where}: the config needs {needed:,} tensors, but the weights have only "
            f"{len(tensors):,}. Take the config and the weights of the same model."
        )
    return Checkpoint(source.where, layout, config, tensors, quantization)


def _layout_of(file: str, values: object) -> Layout:
    """Returns the layout of a config file by its name and keys."""
    if file == MISTRAL.config_file:
        return MISTRAL
    keys = values.keys() if isinstance(values, dict) else set[str]()
    # Mistral's `model_type` is transformers' name for Mamba-1, but no other layout has a `dim`.
    if "dim" in keys and "hidden_size" not in keys:
        return MISTRAL
    # Official keys cannot decide: configs written by transformers may contain them as well.
    return transformers_layout(values) if "model_type" in keys else get_layout("state-spaces")
