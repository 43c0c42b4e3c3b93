"""Saving and loading the state of a generation."""

import os
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._trees import named_leaves
from ..formats import CheckpointError, open_safetensors, quote, write_safetensors
from ..layers import AbstractCache, KVCache
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

    **Raises:** [`mamba_eqx.CheckpointError`][] if the file is damaged or has other content, if the
    state belongs to a model with other parameters, or if the state has values that no generation
    with this model has, such as a token outside the vocabulary. `FileNotFoundError` if there is no
    file.
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
    if stored.keys() != names.keys() or len(rows) > 1 or 0 in rows:
        raise CheckpointError(
            f"{os.fspath(path)} does not contain the state of this model: missing are "
            f"{_few(names.keys() - stored.keys())}, unexpected are "
            f"{_few(stored.keys() - names.keys())}."
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
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    try:
        _check_values(state, model.vocab_size)
        _check_caches(state, like, longer)
    except CheckpointError as error:
        raise CheckpointError(
            f"{os.fspath(path)} is not the state of a generation with this model: {error} Save the "
            "state again."
        ) from None
    return state


def _few(names: Collection[str]) -> str:
    """Lists the first names for a message, because a file can have any number of any length."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(quote(name) for name in sorted(names)[:5]) + more if names else "none"


def _check_values(state: DecodingState, vocab_size: int) -> None:
    """Checks that tokens and positions are possible, and that hidden states are finite.

    **Raises:** `CheckpointError`, which names the leaf.
    """
    token, position = np.asarray(state.token)[..., None], np.asarray(state.position)[..., None]
    recent = np.asarray(state.recent)
    highest = vocab_size - 1
    for name, ids in (("token", token), ("recent", recent)):
        lowest = -1 if name == "recent" else 0
        wrong = ids[(ids < lowest) | (ids > highest)]
        if wrong.size:
            raise CheckpointError(
                f"`{name}` must be within {lowest}..{highest}, but got {wrong[0]}."
            )
    if position.min() < 0:
        raise CheckpointError(f"`position` must be at least 0, but got {position.min()}.")
    window = recent.shape[-1]
    if window == 0 or (recent[..., -1:] != token).any():
        raise CheckpointError("`recent` must end with `token`, but ends with another token.")
    # `position` tokens come before `token`, so this many entries are before the text.
    before = np.maximum(window - 1 - position.astype(np.int64), 0)
    if ((recent == -1) != (np.arange(window) < before)).any():
        raise CheckpointError(
            "`recent` must be -1 before the text, of which `position` + 1 tokens are known, and "
            "nowhere else."
        )
    for name, leaf in named_leaves(state.layers).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(np.asarray(leaf)).all():
            raise CheckpointError(f"`layers.{name}` must be finite, but has other values.")


def _check_caches(state: DecodingState, short: DecodingState, long: DecodingState) -> None:
    """Checks that the parts of each cache agree with each other and with the position.

    **Arguments:**

    - `state`: the state.
    - `short`, `long`: the shapes of states of one sequence with two capacities.

    **Raises:** `CheckpointError`, which names the fault.
    """
    position = np.asarray(state.position)
    for found, one, other in zip(*map(_caches, (state, short, long)), strict=True):
        capacities: set[float] = set()
        leaves = zip(*map(jax.tree.leaves, (found, one, other)), strict=True)
        for leaf, a, b in leaves:
            sizes = zip(leaf.shape[position.ndim :], a.shape, b.shape, strict=True)
            capacities |= {(size - m) / (n - m) for size, m, n in sizes if m != n}
        if len(capacities) > 1:
            raise CheckpointError("the arrays of a cache must have room for equally many tokens.")
        if not isinstance(found, KVCache):
            continue
        # A `Stacked` adds an axis of layers behind that of the rows.
        length = np.asarray(found.length)
        if length.min() < 0:
            raise CheckpointError(f"the length of a cache must be >= 0, but got {length.min()}.")
        if found.rolling:
            # A rolling cache never fills, and may begin with a past that has no position.
            continue
        consumed = position.reshape(position.shape + (1,) * (length.ndim - position.ndim))
        if (length != consumed).any() or length.max() > found.k.shape[-2]:
            raise CheckpointError(
                f"a cache with room for {found.k.shape[-2]} tokens must hold `position` tokens, "
                f"but holds {length.reshape(-1).tolist()[:8]} at position "
                f"{position.reshape(-1).tolist()[:8]}."
            )


def _caches(state: DecodingState) -> list[AbstractCache]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AbstractCache))
    return [leaf for leaf in leaves if isinstance(leaf, AbstractCache)]


def _abstract_state(model: LanguageModel, max_len: int) -> PyTree:
    """Returns the shapes and dtypes of a state of one sequence."""

    def make() -> DecodingState:
        zero = jnp.zeros((), jnp.int32)
        return DecodingState(model.init_state(max_len=max_len), zero, zero, zero[None])

    return jax.eval_shape(make)
