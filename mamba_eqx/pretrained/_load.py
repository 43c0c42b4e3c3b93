"""From a checkpoint to a model."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from .._trees import path_name
from ..formats import CheckpointError, StoredTensor
from ..layers import recurrence_mask
from ..models import LanguageModel
from ._arrays import check_dtype, check_tied_head, one_dtype, to_jax
from ._checkpoint import Checkpoint, open_checkpoint
from ._hub import Hub
from .layouts import Slot, group_by_leaf, match, skeleton


_ShardingOf = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
    sharding: Sharding | _ShardingOf | None = None,
) -> LanguageModel:
    """Loads a checkpoint, in the layout of transformers, of the official repository or of Mistral.

    ```python
    model = mbx.from_pretrained("state-spaces/mamba-130m", dtype=jnp.bfloat16)
    ```

    All is checked before anything is loaded: first the config, whose every field must be known,
    then the names, shapes and dtypes of all tensors. Only weights are read: neither code nor
    pickled objects of a checkpoint are ever run. Tensors are read one by one, straight into the
    dtype and onto the devices asked for.

    **Arguments:**

    - `name_or_path`: a local folder, or else the name of a repository on the Hugging Face Hub. It
        holds `config.json`, and the weights as `model.safetensors` or `pytorch_model.bin`, in one
        file or with an index in several. A local folder may hold Mistral's `params.json` and
        `consolidated.safetensors` instead.
    - `dtype`: of the parameters; those of recurrences stay at least float32 (see
        [`mamba_eqx.cast`][]). By default each parameter keeps the dtype it is stored in.
    - `revision`: a branch, tag or commit on the Hub. It is resolved once, so that all files are
        of the same commit.
    - `token`: the Hub's; by default the one that you logged in with. `False` for none.
    - `cache_dir`: where downloads are kept; by default the Hub's usual cache.
    - `local_files_only`: whether to leave the Hub alone and take only what is in the cache.
    - `force_download`: whether to download again what is in the cache.
    - `endpoint`: the address of another Hub, by default `HF_ENDPOINT` or the public one.
    - `sharding`: where the parameters go: one sharding for all, or a function from the path of a
        parameter (such as `"layers.layers.0.mixer.in_proj.weight"`) and its shape and dtype to a
        sharding. Each device reads no more than its own part. By default they go to JAX's default
        device.

    **Returns:**

    The model, its layers in an [`mamba_eqx.Unrolled`][].

    **Raises:** [`mamba_eqx.CheckpointError`][] for a checkpoint that is incomplete, damaged, of an
    unsupported architecture or not to be had from the Hub; `FileNotFoundError` for a path at which
    there is no folder.
    """
    if dtype is not None:
        dtype = check_dtype("The model", dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"`dtype` must be a floating-point dtype, but got {dtype}.")
    hub = Hub(revision, token, cache_dir, local_files_only, force_download, endpoint)
    return load(open_checkpoint(name_or_path, hub), dtype, sharding)


def load(
    checkpoint: Checkpoint,
    dtype: np.dtype | None = None,
    sharding: Sharding | _ShardingOf | None = None,
) -> LanguageModel:
    """The model of an open checkpoint; the arguments are those of `from_pretrained`."""
    layout, config, tensors = checkpoint.layout, checkpoint.config, checkpoint.tensors
    model = skeleton(config)
    leaves: list[Any]
    leaves, structure = jax.tree.flatten(model)
    recurrence = jax.tree.leaves(recurrence_mask(model))
    paths = [path for path, _ in jax.tree.leaves_with_path(model)]
    index_of = {path_name(path): index for index, path in enumerate(paths)}
    try:
        grouped = group_by_leaf(match(layout, config, model, tensors, floating=True))
        found = {index_of[path]: parts for path, parts in grouped.items()}
        targets = {
            index: loaded_dtype([tensor for _, tensor in parts], dtype, recurrence[index])
            for index, parts in found.items()
        }
        places = {
            index: _sharding(sharding, paths[index], leaves[index].shape, target)
            for index, target in targets.items()
        }
        check_tied_head(layout, config, tensors, lambda tensor: tensor.read())
        for index, parts in found.items():
            arrays = [slot.from_file(tensor.read()) for slot, tensor in parts]
            leaf = to_jax(_names(parts), arrays, targets[index], places[index])
            # One by one, or what is on its way to a device piles up in memory.
            leaves[index] = jax.block_until_ready(leaf)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    return jax.tree.unflatten(structure, leaves)


def loaded_dtype(tensors: list[StoredTensor], dtype: np.dtype | None, recurrence: bool) -> np.dtype:
    """The dtype that the tensors of a leaf are loaded in: as `mbx.cast` has it, or their own."""
    own = {tensor.name: tensor.dtype for tensor in tensors}
    target = one_dtype(own) if dtype is None else dtype
    if recurrence and target != np.float64:
        target = np.dtype(np.float32)
    return check_dtype(tensors[0].name, target)


def _names(parts: list[tuple[Slot, StoredTensor]]) -> str:
    return ", ".join(tensor.name for _, tensor in parts)


def _sharding(
    sharding: Sharding | _ShardingOf | None,
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Sharding | None:
    """The sharding of one parameter, if it can be one of that shape."""
    if sharding is None:
        return None
    name = path_name(path)
    chosen = sharding
    if not isinstance(chosen, Sharding):
        chosen = chosen(name, jax.ShapeDtypeStruct(shape, dtype))
    if not isinstance(chosen, Sharding):
        raise ValueError(
            f"`sharding` must give a `jax.sharding.Sharding` for each parameter, but for {name!r} "
            f"gave {chosen!r}."
        )
    try:
        chosen.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"`sharding` does not fit {name!r} of shape {shape}: {' '.join(str(error).split())} "
            "Give a function that chooses for each parameter."
        ) from None
    return chosen
