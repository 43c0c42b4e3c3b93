"""Loading a model from a checkpoint."""

import os
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ..formats import CheckpointError, StoredTensor
from ..layers import Linear, QuantizedLinear
from ..models import HEAD, LanguageModel, Quantization, linear_maps, with_head
from ..ops import QuantizedWeight, quantize_weight
from ._arrays import check_dtype, common_dtype, to_jax
from ._assign import Assignment, assign
from ._checkpoint import Checkpoint, open_checkpoint
from ._hub import Hub
from .layouts import check_tied_head, listing


# The head of a classifier, which a language model does not have.
SCORE = "score.weight"

_EMBEDDING = "embedding.weight"

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
    quantize: Quantization | Literal[8, 4] | None = None,
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
    - `quantize`: the number of bits, 8 or 4, or a [`mamba_eqx.Quantization`][], for weights that
        are quantised as they are loaded, with the result of [`mamba_eqx.quantize`][]. Only one
        weight at a time is in memory in its own dtype. A checkpoint that is quantised already is
        loaded without this option.

    **Returns:**

    The model, with its layers in an [`mamba_eqx.Unrolled`][].

    **Raises:** [`mamba_eqx.CheckpointError`][] for a checkpoint that is incomplete, damaged, of an
    unsupported architecture or cannot be downloaded; `FileNotFoundError` for a path at which there
    is no folder; `ValueError` for a `dtype` that is not floating-point, a `token`, `revision` or
    `endpoint` that cannot be one, a `sharding` that does not fit a parameter, or an invalid
    `quantize`, including one for a checkpoint that is quantised already, or with a `sharding`.
    """
    if dtype is not None:
        dtype = check_dtype("The model", dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"`dtype` must be a floating-point dtype, but got {dtype}.")
    if quantize is not None and not isinstance(quantize, Quantization):
        quantize = Quantization(quantize)
    if quantize is not None and sharding is not None:
        raise ValueError(
            "`quantize` and `sharding` cannot be used together. Save the quantised model, and load "
            "it with `sharding`."
        )
    hub = Hub(revision, token, cache_dir, local_files_only, force_download, endpoint)
    return load(open_checkpoint(name_or_path, hub), dtype, sharding, quantize=quantize)


def load(
    checkpoint: Checkpoint,
    dtype: np.dtype | None = None,
    sharding: _Shardings | None = None,
    *,
    quantize: Quantization | None = None,
) -> LanguageModel:
    """Loads the model of an open checkpoint. For the arguments see `from_pretrained`."""
    layout, config, tensors = checkpoint.layout, checkpoint.config, checkpoint.tensors
    if SCORE in tensors:
        raise CheckpointError(
            f"{checkpoint.where} has a {SCORE}, so that it is no language model but a sequence "
            "classifier. Load it with `mamba_eqx.load_classifier`."
        )
    try:
        shapes = checkpoint.shapes()
        groups = {} if quantize is None else _groups(checkpoint, shapes, quantize)
        assignments = assign(layout, config, shapes, tensors, floating=True)
        targets = [_target(assignment, dtype, sharding) for assignment in assignments]
        check_tied_head(layout, config, tensors, lambda tensor: tensor.read())
        leaves: list[Array | QuantizedWeight] = []
        head: QuantizedWeight | None = None
        for assignment, target in zip(assignments, targets, strict=True):
            leaf = _read(assignment, target)
            if quantize is None:
                leaves.append(leaf)
                continue
            if assignment.path == _EMBEDDING and config.tie_embeddings and HEAD in groups:
                head = _quantized(leaf, quantize, groups[HEAD])
            group = groups.get(assignment.path.removesuffix(".weight"))
            leaves.append(leaf if group is None else _quantized(leaf, quantize, group))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    if quantize is None:
        return model
    if head is not None:
        model = with_head(model, QuantizedLinear(*head))

    # The structure is that of linear maps, some of which have a quantised weight by now.
    def convert(node: PyTree) -> PyTree:
        if isinstance(node, Linear) and isinstance(node.weight, QuantizedWeight):
            return QuantizedLinear(*node.weight, node.bias)
        return node

    return jax.tree.map(convert, model, is_leaf=lambda node: isinstance(node, Linear))


def _groups(
    checkpoint: Checkpoint, shapes: LanguageModel, quantize: Quantization
) -> dict[str, int]:
    """Returns the sizes of the groups of the linear maps that are quantised, by path."""
    if checkpoint.quantization is not None:
        raise ValueError(
            f"{checkpoint.where} must not be quantised already, but has weights of "
            f"{checkpoint.quantization.bits} bits. Load it without quantising, or quantise the "
            "checkpoint that it was made from."
        )
    sizes = {path: linear.weight.shape[-1] for path, linear in linear_maps(shapes).items()}
    return quantize.select(sizes | {HEAD: shapes.d_model})


def _quantized(leaf: Array, quantize: Quantization, group: int) -> QuantizedWeight:
    return jax.block_until_ready(quantize_weight(leaf, bits=quantize.bits, group=group))


def loaded_dtype(assignment: Assignment[StoredTensor], dtype: np.dtype | None) -> np.dtype:
    """Returns the dtype in which a leaf is loaded.

    **Arguments:**

    - `assignment`: the leaf and its tensors.
    - `dtype`: the requested dtype; the dtype of the tensors if `None`. As with `mbx.cast`, the
        parameters of recurrences and of routers are float32 unless this is float64, and the
        integers of quantised weights keep their dtype.

    **Raises:** `CheckpointError` if the tensors have different dtypes and none is requested, or the
    dtype needs JAX's 64-bit mode.
    """
    own = {tensor.name: tensor.dtype for _, tensor in assignment.parts}
    if jnp.issubdtype(assignment.leaf.dtype, jnp.integer):
        return np.dtype(assignment.leaf.dtype)
    target = common_dtype(own) if dtype is None else dtype
    if assignment.stays_wide and target != np.float64:
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
