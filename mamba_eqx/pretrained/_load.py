"""From a checkpoint to a model."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._language_model import LanguageModel
from .._protocol import recurrence_mask
from ._files import CONFIG, Find, open_weights, read_json
from ._hub import find_on_hub
from ._layout import Layout, Slot, by_leaf, match, renamed, skeleton_of
from ._mistral import MISTRAL
from ._state_dict import LAYOUTS
from ._stored import CheckpointError, StoredTensor
from ._to_jax import check_dtype, check_tied_head, one_dtype, to_jax


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LanguageModel:
    """Loads a checkpoint, in the layout of transformers, of the official repository or of Mistral.

    ```python
    model = mbx.from_pretrained("state-spaces/mamba-130m", dtype=jnp.bfloat16)
    ```

    All is checked before anything is loaded: first the config, whose every field must be known,
    then the names, shapes and dtypes of all tensors. Only weights are read: neither code nor
    pickled objects of a checkpoint are ever run.

    **Arguments:**

    - `name_or_path`: a local folder, or else the name of a repository on the Hugging Face Hub. It
        holds `config.json`, and the weights as `model.safetensors` or `pytorch_model.bin`, in one
        file or with an index in several. A local folder may hold Mistral's `params.json` and
        `consolidated.safetensors` instead.
    - `dtype`: of the parameters; those of recurrences stay at least float32 (see
        [`mamba_eqx.cast`][]). By default each parameter keeps the dtype it is stored in.
    - `revision`: a branch, tag or commit on the Hub.
    - `token`: the Hub's; by default the one that you logged in with.
    - `cache_dir`: where downloads are kept; by default the Hub's usual cache.
    - `local_files_only`: whether to leave the Hub alone and take only what is in the cache.

    **Returns:**

    The model, its layers in an [`mamba_eqx.Unrolled`][].

    **Raises:** [`mamba_eqx.CheckpointError`][] for a checkpoint that is incomplete, damaged or of
    an unsupported architecture; `FileNotFoundError` for a path at which there is no folder.
    """
    if dtype is not None:
        dtype = check_dtype("The model", dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"`dtype` must be a floating-point dtype, but got {dtype}.")
    folder = Path(name_or_path)
    where = os.fspath(name_or_path)
    if folder.is_dir() or _is_path(name_or_path):
        find = _find_in(folder)
    else:
        where = f"{where!r} on the Hugging Face Hub (or, offline, what the cache has of it)"
        find = find_on_hub(
            str(name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return _load(find, where, dtype)


def _load(find: Find, where: str, dtype: np.dtype | None) -> LanguageModel:
    path = find(CONFIG) or find(MISTRAL.config_file)
    if path is None:
        raise CheckpointError(f"{where} has no {CONFIG}: give the folder of a checkpoint.")
    values = read_json(path)
    try:
        layout = _layout_of(path.name, values)
        config = layout.read_config(values)
    except ValueError as error:  # Of a config class of ours, or a `CheckpointError`.
        raise CheckpointError(f"{path}: {error}") from None
    tensors = renamed(layout, open_weights(find, where, layout.weights_file))
    if len(config.layers) > len(tensors):
        # Before a table of names is made, be they 2**16 layers.
        raise CheckpointError(
            f"{where}: the config has {len(config.layers)} layers, but the weights have only "
            f"{len(tensors)} tensors. Take the config and the weights of one and the same model."
        )
    skeleton = skeleton_of(config)
    leaves: list[Any]
    leaves, structure = jax.tree.flatten(skeleton)
    recurrence = jax.tree.leaves(recurrence_mask(skeleton))
    try:
        found = by_leaf(match(layout, config, skeleton, tensors, floating=True))
        targets = {
            index: _target([tensor for _, tensor in parts], dtype, recurrence[index])
            for index, parts in found.items()
        }
        check_tied_head(layout, config, tensors, lambda tensor: tensor.read())
        for index, parts in found.items():
            arrays = [slot.entry.transform.from_file(tensor.read()) for slot, tensor in parts]
            leaves[index] = to_jax(_names(parts), arrays, targets[index])
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return jax.tree.unflatten(structure, leaves)


def _layout_of(file: str, values: Any) -> Layout:
    if file == MISTRAL.config_file:
        return MISTRAL
    # Its `model_type` is the one of Mamba-1 in transformers, but no other layout has a `dim`.
    if isinstance(values, dict) and "dim" in values and "hidden_size" not in values:
        return MISTRAL
    # Not by any other key: configs that transformers wrote may carry official keys as well.
    has_type = isinstance(values, dict) and "model_type" in values
    return LAYOUTS["transformers" if has_type else "state-spaces"]


def _target(tensors: list[StoredTensor], dtype: np.dtype | None, recurrence: bool) -> np.dtype:
    """The dtype that the tensors of a leaf are loaded in: as `mbx.cast` has it, or their own."""
    own = {tensor.name: tensor.dtype for tensor in tensors}
    target = one_dtype(own) if dtype is None else dtype
    if recurrence and target != np.float64:
        target = np.dtype(np.float32)
    return check_dtype(tensors[0].name, target)


def _names(parts: list[tuple[Slot, StoredTensor]]) -> str:
    return ", ".join(tensor.name for _, tensor in parts)


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
        return path if path.exists() else None

    return find
