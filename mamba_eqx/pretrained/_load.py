"""Loading a model from a checkpoint."""

import os
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from ..formats import CheckpointError, StoredTensor
from ..models import LanguageModel
from ._arrays import check_dtype, common_dtype, to_jax
from ._assign import Assignment, assign
from ._checkpoint import Checkpoint, open_checkpoint
from ._hub import Hub
from .layouts import check_tied_head, listing, skeleton


_Shardings: TypeAlias = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]


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
    sharding: _Shardings | None = None,
) -> LanguageModel:
    """Loads a checkpoint in the layout of transformers, of the official repository or of Mistral.

    ```python
    model = mbx.from_pretrained("state-spaces/mamba-130m", dtype=jnp.bfloat16)
    ```

    Everything is checked before any weight is loaded: first the config, whose every field must be
    known, then the names, shapes and dtypes of all tensors. No code and no pickled objects of a
    checkpoint are ever run. Tensors are read one by one, straight into the requested dtype and onto
    the requested devices.

    **Arguments:**

    - `name_or_path`: a local folder, or else the name of a repository on the Hugging Face Hub, with
        `config.json`, and the weights as `model.safetensors` or `pytorch_model.bin`, in one file or
        in several with an index. Mistral's `params.json` and `consolidated.safetensors` may take
        their places.
    - `dtype`: the dtype of the parameters. Parameters of recurrences stay at least float32 (see
        [`mamba_eqx.cast`][]). By default each parameter keeps the dtype it is stored in.
    - `revision`: a branch, tag or commit on the Hub. The revision is resolved once, so that all
        files belong to the same commit.
    - `token`: an access token of the Hub, around which white space is removed. By default the token
        that you are logged in with; `False` for none.
    - `cache_dir`: the folder for downloads. By default the usual cache of the Hub.
    - `local_files_only`: whether to use only files in the cache, without any network access.
    - `force_download`: whether to download files again that are in the cache.
    - `endpoint`: the address of another Hub, which may contain a name and a password. By default
        `HF_ENDPOINT` or the public one.
    - `sharding`: the placement of the parameters: one sharding for all, or a function from the path
        of a parameter (such as `"layers.layers.0.mixer.in_proj.weight"`) and its
        `jax.ShapeDtypeStruct` to a sharding. Each device reads only its own part. By default
        parameters are placed on JAX's default device.

    **Returns:**

    The model, with its layers in an [`mamba_eqx.Unrolled`][].

    **Raises:** [`mamba_eqx.CheckpointError`][] for a checkpoint that is incomplete, damaged, of an
    unsupported architecture or cannot be downloaded; `FileNotFoundError` for a path at which there
    is no folder; `ValueError` for a `dtype` that is not floating-point, a `token`, `revision` or
    `endpoint` that cannot be one, or a `sharding` that does not fit a parameter.
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
    sharding: _Shardings | None = None,
) -> LanguageModel:
    """Loads the model of an open checkpoint. For the arguments see `from_pretrained`."""
    layout, config, tensors = checkpoint.layout, checkpoint.config, checkpoint.tensors
    shapes = skeleton(config)
    try:
        assignments = assign(layout, config, shapes, tensors, floating=True)
        targets = [_target(assignment, dtype, sharding) for assignment in assignments]
        check_tied_head(layout, config, tensors, lambda tensor: tensor.read())
        leaves = [_read(*pair) for pair in zip(assignments, targets, strict=True)]
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def loaded_dtype(assignment: Assignment[StoredTensor], dtype: np.dtype | None) -> np.dtype:
    """Returns the dtype in which a leaf is loaded.

    **Arguments:**

    - `assignment`: the leaf and its tensors.
    - `dtype`: the requested dtype; the dtype of the tensors if `None`. As with `mbx.cast`, the
        parameters of recurrences are float32 unless this is float64.

    **Raises:** `CheckpointError` if the tensors have different dtypes and none is requested, or the
    dtype needs JAX's 64-bit mode.
    """
    own = {tensor.name: tensor.dtype for _, tensor in assignment.parts}
    target = common_dtype(own) if dtype is None else dtype
    if assignment.recurrence and target != np.float64:
        target = np.dtype(np.float32)
    return check_dtype(next(iter(own)), target)


def _target(
    assignment: Assignment[StoredTensor], dtype: np.dtype | None, sharding: _Shardings | None
) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of a leaf, after checking that they are possible."""
    shape = assignment.leaf.shape
    target = jax.ShapeDtypeStruct(shape, loaded_dtype(assignment, dtype))
    if sharding is None:
        return target
    chosen = sharding
    if not isinstance(chosen, Sharding):
        chosen = chosen(assignment.path, target)
    if not isinstance(chosen, Sharding):
        raise ValueError(
            "`sharding` must return a `jax.sharding.Sharding` for each parameter, but for "
            f"{assignment.path!r} returned {chosen!r}."
        )
    try:
        chosen.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"`sharding` does not fit {assignment.path!r} of shape {shape}: "
            f"{' '.join(str(error).split())} Give a function that chooses for each parameter."
        ) from None
    return jax.ShapeDtypeStruct(shape, target.dtype, sharding=chosen)


def _read(assignment: Assignment[StoredTensor], target: jax.ShapeDtypeStruct) -> jax.Array:
    arrays = [slot.from_file(tensor.read()) for slot, tensor in assignment.parts]
    names = listing([tensor.name for _, tensor in assignment.parts])
    leaf = to_jax(names, arrays, target.shape, target.dtype, target.sharding)
    # Without waiting, transfers to a device would pile up in memory.
    return jax.block_until_ready(leaf)
