"""The state of a generation as a file."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._trees import named_leaves
from ..formats import CheckpointError, open_safetensors, write_safetensors
from ..models import LanguageModel, fingerprint
from ._state import DecodingState


_FINGERPRINT = "fingerprint"


def save_state(path: str | os.PathLike[str], state: DecodingState, model: LanguageModel) -> None:
    """Saves the state of a generation to a safetensors file, from which it can go on elsewhere.

    **Arguments:**

    - `path`: of the file. It appears when it is complete; one that is there is replaced.
    - `state`: of one sequence, or of a batch.
    - `model`: whose state it is: a fingerprint of its parameters goes into the file.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    tensors[_FINGERPRINT] = fingerprint(model)
    write_safetensors(path, tensors, {"format": "mamba_eqx.DecodingState"})


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> DecodingState:
    """Loads what `save_state` has saved.

    **Arguments:**

    - `path`: of the file.
    - `model`: the model whose state it is.

    **Returns:** the state.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the file is damaged or holds something else, or
    if the state is that of a model with other parameters.
    """
    stored = open_safetensors(path)
    if _FINGERPRINT not in stored:
        raise CheckpointError(
            f"{os.fspath(path)} is not the state of a generation: it has no {_FINGERPRINT!r}. Is "
            "it a checkpoint? `from_pretrained` loads those."
        )
    found = stored.pop(_FINGERPRINT).read()
    if not np.array_equal(found, fingerprint(model)):
        raise CheckpointError(
            f"{os.fspath(path)} is the state of another model: its parameters, or their dtypes, "
            "differ from those of the model given. Load the model that it was made with."
        )
    # A cache may be of any length: its axis is the one on which these two differ.
    like, longer = (_like(model, max_len) for max_len in (16, 32))
    rows = stored["token"].shape if "token" in stored else ()
    names = named_leaves(like)
    if stored.keys() != names.keys() or len(rows) > 1:
        raise CheckpointError(
            f"{os.fspath(path)} does not hold the state of this model: missing "
            f"{sorted(names.keys() - stored.keys())}, unexpected "
            f"{sorted(stored.keys() - names.keys())}."
        )
    leaves = []
    for (name, one), other in zip(names.items(), named_leaves(longer).values(), strict=True):
        tensor = stored[name]
        free = [a != b for a, b in zip(one.shape, other.shape, strict=True)]
        if name == "recent":
            free = [True]
        fits = len(tensor.shape) == len(rows) + len(free) and tensor.shape[: len(rows)] == rows
        sizes = zip(tensor.shape[len(rows) :], one.shape, free, strict=True) if fits else []
        if not fits or tensor.dtype != one.dtype or any(a != b and not f for a, b, f in sizes):
            raise CheckpointError(
                f"{name} in {os.fspath(path)} is {tensor.dtype} of shape {tensor.shape}, which "
                f"does not fit {one.dtype} of shape {one.shape} with {len(rows)} axes of rows."
            )
        leaves.append(jnp.asarray(np.array(tensor.read())))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _like(model: LanguageModel, max_len: int) -> PyTree:
    def make() -> DecodingState:
        zero = jnp.zeros((), jnp.int32)
        return DecodingState(model.init_state(max_len=max_len), zero, zero, zero[None])

    return jax.eval_shape(make)
