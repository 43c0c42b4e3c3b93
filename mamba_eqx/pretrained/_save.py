"""Saving a model as a checkpoint."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._atomic import replaced_files
from ..formats import CheckpointError, decode_numbers, write_safetensors
from ..layers import float32_mask
from ..models import LanguageModel
from ..text import ByteTokenizer, TextTokenizer
from ._card import CARD, model_card
from ._companions import Companions, companions_of
from ._folder import is_replaced, is_torch_weights, shard_name
from ._load import SCORE
from ._quantized import quantization_fields, quantization_of, shapes_of
from ._source import CONFIG
from ._state_dict import get_layout, state_dict
from ._token_ids import ids_to_json
from ._weights import SAFETENSORS, SAFETENSORS_INDEX
from .layouts import Layout, config_from, match


def save_pretrained(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    layout: str = "transformers",
    max_shard_size: int | str | None = "5GB",
    tokenizer: TextTokenizer | ByteTokenizer | None = None,
) -> None:
    """Saves a model as a checkpoint that `from_pretrained` loads, and transformers if the layout is
    its own.

    The checkpoint appears at `path` when it is complete. An existing checkpoint is replaced as a
    whole, and is untouched if anything goes wrong. Other files in the folder are left alone. A
    model card, `README.md`, is written if there is none.

    **Arguments:**

    - `model`: the model, with its layers `Unrolled` or `Stacked`. Each array keeps its dtype. A
        model of [`mamba_eqx.quantize`][] is saved as it is, for this library only: the config has a
        `quantization_config` at which transformers refuses the checkpoint.
    - `path`: the folder, which is created if necessary.
    - `layout`: `"transformers"`; `"state-spaces"` for the official layout, which can store more
        models (MLPs, LayerNorm); or `"mistral"` for that of Codestral, which can store fewer.
    - `max_shard_size`: the maximum number of bytes of tensors in one file, or a text such as
        `"500MB"`. `None` writes a single file. A larger tensor gets its own file.
    - `tokenizer`: the tokenizer of the model. Its files, and the ids of its special tokens in
        `generation_config.json` and transformers' `config.json`, replace those in the folder. By
        default a tokenizer in the folder is left alone, and the config declares no ids.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot store the model, or `path`
    holds other weights that a reader might load instead; `FileExistsError` if `path` is a file;
    `ValueError` if `max_shard_size` is not valid, or `tokenizer` is not one of this package.
    """
    companions = Companions() if tokenizer is None else companions_of(tokenizer)
    save_checkpoint(model, path, companions, layout=layout, max_shard_size=max_shard_size)


@dataclass(frozen=True)
class ClassifierHead:
    """The head of a sequence classifier.

    - `weight`: the weight, of shape `(n_classes, d_model)`.
    - `labels`: the names of the classes.
    """

    weight: Array
    labels: tuple[str, ...]

    def fields(self, of_model: dict[str, object]) -> dict[str, object]:
        """Returns the fields of transformers' config that differ from those of a language model."""
        names = of_model["architectures"]
        assert isinstance(names, list)
        return {
            "architectures": [str(names[0]).replace("ForCausalLM", "ForSequenceClassification")],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }


def save_checkpoint(
    model: LanguageModel,
    path: str | os.PathLike[str],
    companions: Companions,
    *,
    layout: str,
    max_shard_size: int | str | None,
    head: ClassifierHead | None = None,
) -> None:
    """Saves a model and its companions.

    **Arguments:**

    - `head`: the head of a classifier, whose backbone `model` is; `None` for a language model.

    For the other arguments see `save_pretrained`.
    """
    shard_size = _parse_size(max_shard_size)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give the path of a folder, existing or not.")
    torch_files = sorted(filter(is_torch_weights, os.listdir(path))) if path.exists() else []
    if torch_files:
        raise CheckpointError(
            f"{path} holds the weights of another checkpoint, {torch_files[0]}, which some readers "
            "would load instead of the saved ones. Remove them, or choose another folder."
        )
    chosen, config = get_layout(layout), config_from(model)
    tensors = state_dict(model, layout=layout)
    if chosen.weights_file != SAFETENSORS and len(_shards(tensors, shard_size)) > 1:
        raise CheckpointError(
            f"The {layout!r} layout has one file for all weights: give `max_shard_size=None`."
        )
    # A part of a model, or an ensemble, could not be loaded again, and is therefore not saved.
    quantization = quantization_of(model)
    match(chosen, config, shapes_of(chosen, config, tensors, quantization), tensors, floating=True)
    fields = chosen.write_config(config, _config_dtype(model))
    _check_readable(chosen, fields)
    if quantization is not None:
        fields |= quantization_fields(quantization)
    if chosen.declares_ids:
        fields |= ids_to_json(companions.ids)
    tied = chosen.tied_head(config)
    if tied is not None and chosen.keeps_tied_head:
        tensors[tied] = tensors[chosen.embedding(config)]
    if head is not None:
        tensors[SCORE] = head.weight
        fields |= head.fields(fields)

    def stale(name: str) -> bool:
        return is_replaced(name, chosen) or name in companions.replaces

    with replaced_files(path, stale=stale, last=(CONFIG, chosen.config_file)) as new:
        _write_tensors(new, tensors, shard_size, chosen.weights_file)
        (new / chosen.config_file).write_text(
            json.dumps(fields, indent=2, allow_nan=False) + "\n", "utf-8"
        )
        companions.write(new)
        if not (path / CARD).exists():
            card = model_card(
                config,
                layout=chosen.name,
                name=path.resolve().name,
                quantized=quantization is not None,
                classifier=head is not None,
            )
            (new / CARD).write_text(card, "utf-8")


def _check_readable(layout: Layout, fields: dict[str, object]) -> None:
    """Checks that `from_pretrained` accepts a config, which it does not if sizes are absurd.

    **Raises:** `CheckpointError` if it does not.
    """
    try:
        layout.read_config(decode_numbers(fields))
    except ValueError as error:  # From a config class, or a `CheckpointError`.
        raise CheckpointError(
            f"The {layout.name!r} layout cannot store this model, because it could not be loaded "
            f"again: {error}"
        ) from None


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])B", re.IGNORECASE)


def _parse_size(size: int | str | None) -> int | None:
    """Returns `max_shard_size` as a number of bytes. Like `huggingface_hub`, 1 KB is 1000 bytes."""
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        if found is None:
            raise ValueError(
                "`max_shard_size` must be a number of bytes, or a text such as '5GB' or '500MB', "
                f"but got {size!r}."
            )
        size = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper())))
    if size is not None and size < 1:
        raise ValueError(f"`max_shard_size` must be at least 1 byte, but got {size}.")
    return size


def _write_tensors(
    folder: Path, tensors: dict[str, Array], max_shard_size: int | None, single: str
) -> None:
    shards = _shards(tensors, max_shard_size)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = single if len(shards) == 1 else shard_name(i, len(shards))
        # The shards are copied one at a time, so that only one is in the memory of the host.
        arrays = {name: np.asarray(tensors[name]) for name in names}
        # transformers refuses files without this format.
        write_safetensors(folder / file, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(tensors: dict[str, Array], max_shard_size: int | None) -> list[list[str]]:
    """Distributes the names of tensors over files of at most `max_shard_size` bytes, in order."""
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, tensor in tensors.items():
        if room is not None and max_shard_size is not None:
            if tensor.nbytes > room and shards[-1]:
                shards.append([])
                room = max_shard_size
            room -= tensor.nbytes
        shards[-1].append(name)
    return shards


def _config_dtype(model: LanguageModel) -> np.dtype:
    """Returns the dtype of the parameters that `cast` changes; if they differ, a dtype for all."""
    leaves, stay_wide = jax.tree.leaves(model), jax.tree.leaves(float32_mask(model))
    own = {
        np.dtype(leaf.dtype)
        for leaf, wide in zip(leaves, stay_wide, strict=True)
        if not wide and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if len(own) == 1:
        return own.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in own else np.float32)
