"""From a model to a checkpoint."""

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ..formats import CheckpointError, write_safetensors
from ..layers import recurrence_mask
from ..models import LanguageModel
from ._card import CARD, model_card
from ._source import CONFIG, SAFETENSORS, SAFETENSORS_INDEX
from ._state_dict import layout_named, state_dict
from .layouts import Layout, config_from, match, skeleton


# What `save_pretrained` writes, and so replaces, beside the files that a layout names itself.
_OURS = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(SAFETENSORS)}|{re.escape(SAFETENSORS_INDEX)}"
    r"|model-\d{5}-of-\d{5}\.safetensors"
)
_TORCH = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")


def save_pretrained(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    layout: str = "transformers",
    max_shard_size: int | str | None = "5GB",
) -> None:
    """Saves a model so that `from_pretrained` loads it, and that transformers does.

    The checkpoint appears at `path` when it is complete: one that is there is replaced as a whole,
    and stays as it is if anything goes wrong. Other files in the folder are left alone; a model
    card, `README.md`, is written if there is none.

    **Arguments:**

    - `model`: its layers may be `Unrolled` or `Stacked`. Each array keeps its dtype.
    - `path`: a folder, which is made if need be.
    - `layout`: `"transformers"`, or `"state-spaces"` for the official one, which has room for more
        (MLPs, LayerNorm), or `"mistral"` for that of Codestral's releases, which has for less.
    - `max_shard_size`: the largest number of bytes of tensors in one file, or text such as
        `"500MB"`; `None` puts all into one. A tensor larger than this gets a file of its own.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot hold the model, or there are
    weights in `path` that a reader might take for these; `FileExistsError` if `path` is a file.
    """
    shard_size = _bytes(max_shard_size)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give the path of a folder, existing or not.")
    torch_files = sorted(filter(_TORCH.fullmatch, os.listdir(path))) if path.exists() else []
    if torch_files:
        raise CheckpointError(
            f"{path} holds the weights of another checkpoint, {torch_files[0]}, which some readers "
            "would take for the ones to be saved. Remove them, or choose another folder."
        )
    chosen, config = layout_named(layout), config_from(model)
    tensors = state_dict(model, layout=layout)
    if chosen.weights_file != SAFETENSORS and len(_shards(tensors, shard_size)) > 1:
        raise CheckpointError(
            f"The {layout!r} layout has one file for all weights: give `max_shard_size=None`."
        )
    # What could not be loaded is not saved: a part of a model, or an ensemble.
    match(chosen, config, skeleton(config), tensors, floating=True)
    fields = chosen.write_config(config, _dtype(model))
    head = chosen.tied_head(config)
    if head is not None and chosen.keeps_tied_head:
        tensors[head] = tensors[chosen.embedding(config)]

    # A link is followed here, so as to work beside the folder itself.
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir(parents=True)
        _write_tensors(new, tensors, shard_size, chosen.weights_file)
        (new / chosen.config_file).write_text(
            json.dumps(fields, indent=2, allow_nan=False) + "\n", "utf-8"
        )
        if not (target / CARD).exists():
            card = model_card(config, layout=chosen.name, name=target.name)
            (new / CARD).write_text(card, "utf-8")
        if target.exists():
            old.mkdir()
            _swap(target, new, old, chosen)
        else:
            new.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights (or their index) for some reader."""
    return name != CONFIG and bool(_OURS.fullmatch(name) or _TORCH.fullmatch(name))


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])B", re.IGNORECASE)


def _bytes(size: int | str | None) -> int | None:
    """The number of bytes that `max_shard_size` means, as `huggingface_hub` reads it."""
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        if found is None:
            raise ValueError(
                "`max_shard_size` must be a number of bytes, or text such as '5GB' or '500MB', but "
                f"got {size!r}."
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
        file = single if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        # To the host one shard at a time. transformers insists on the format.
        arrays = {name: np.asarray(tensors[name]) for name in names}
        write_safetensors(folder / file, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(tensors: dict[str, Array], max_shard_size: int | None) -> list[list[str]]:
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


def _swap(target: Path, new: Path, old: Path, layout: Layout) -> None:
    """Moves the checkpoint in `target` to `old`, and the one in `new` into its place.

    If a move fails, all are undone. The config leaves first and arrives last, so that a folder
    at which the machine was switched off lacks it, and is refused rather than misread.
    """
    configs, names = (CONFIG, layout.config_file), (layout.config_file, layout.weights_file)
    ours = [name for name in os.listdir(target) if _OURS.fullmatch(name) or name in names]
    moves = [(target / name, old / name) for name in ours]
    moves.sort(key=lambda move: move[0].name not in configs)
    arrivals = [(new / name, target / name) for name in os.listdir(new)]
    arrivals.sort(key=lambda move: move[0].name in configs)
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves + arrivals:
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def _dtype(model: LanguageModel) -> np.dtype:
    """The dtype of the parameters outside recurrences; if they differ, one that holds all."""
    leaves: list[Any] = jax.tree.leaves(model)
    recurrence = jax.tree.leaves(recurrence_mask(model))
    own = {leaf.dtype for leaf, wide in zip(leaves, recurrence, strict=True) if not wide}
    if len(own) == 1:
        return np.dtype(own.pop())
    return np.dtype(np.float64 if np.dtype(np.float64) in own else np.float32)
