"""Saving and loading the state of a generation."""

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
    """Saves the state of a generation to a safetensors file, from which any process can continue.

    **Arguments:**

    - `path`: the file to write. It appears only when it is complete, and replaces an existing file.
    - `state`: the state of one sequence, or of a batch.
    - `model`: the model that the state belongs to. A fingerprint of its parameters is stored too.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    tensors[_FINGERPRINT] = fingerprint(model)
    write_safetensors(path, tensors, {"format": "mamba_eqx.DecodingState"})


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> DecodingState:
    """Loads a state that `save_state` has written.

    **Arguments:**

    - `path`: the file.
    - `model`: the model that the state belongs to.

    **Returns:**

    The state.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the file is damaged or has other content, or
    if the state belongs to a model with other parameters. `FileNotFoundError` if there is no file.
    """
    stored = open_safetensors(path)
    if _FINGERPRINT not in stored:
        raise CheckpointError(
            f"{os.fspath(path)} is not the state of a generation: it has no {_FINGERPRINT!r}. If "
            "it is a checkpoint, load it with `from_pretrained`."
        )
    found = stored.pop(_FINGERPRINT).read()
    if not np.array_equal(found, fingerprint(model)):
        raise CheckpointError(
            f"{os.fspath(path)} is the state of another model: the parameters or their dtypes "
            "differ from those of the given model. Load the model that the state was made with."
        )
    # Caches may have any capacity, so the axis in which these two states differ is not compared.
    like, longer = (_abstract_state(model, max_len) for max_len in (16, 32))
    rows = stored["token"].shape if "token" in stored else ()
    names = named_leaves(like)
    if stored.keys() != names.keys() or len(rows) > 1:
        raise CheckpointError(
            f"{os.fspath(path)} does not contain the state of this model: missing "
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
                f"{name} in {os.fspath(path)} must be {one.dtype} of shape {one.shape} after "
                f"{len(rows)} axes of rows, but is {tensor.dtype} of shape {tensor.shape}."
            )
        leaves.append(jnp.asarray(np.array(tensor.read())))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _abstract_state(model: LanguageModel, max_len: int) -> PyTree:
    """Returns the shapes and dtypes of a state of one sequence."""

    def make() -> DecodingState:
        zero = jnp.zeros((), jnp.int32)
        return DecodingState(model.init_state(max_len=max_len), zero, zero, zero[None])

    return jax.eval_shape(make)
