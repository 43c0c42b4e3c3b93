"""Validation of the arguments of `scan` and `step`. Shapes and dtypes are known while tracing, so
compiled code contains none of these checks."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .. import ops
from ._protocol import AbstractSequenceLayer, Length, State


def check_layer(name: str, value: object) -> None:
    """Validates a layer that another layer is made of. Its config in place of it is easily taken
    for it, because a config of a mixer has a `d_model` too."""
    if not callable(value):
        raise ValueError(
            f"`{name}` must be a layer, but got {name}={value!r}. The `build` of a config makes "
            "its layer."
        )


def checked_sequence(
    name: str,
    d_model: int,
    x: Array,
    reset: Array | None = None,
    length: Array | int | None = None,
    *,
    verb: str = "scan",
) -> Array:
    """Validates the arguments of `scan`, or of another verb for whole sequences, of the layer
    `name`, except for the state.

    **Returns:**

    `x` without its padding; see `without_padding`.
    """
    if x.ndim == 3:
        raise ValueError(
            f"`{name}.{verb}` takes one sequence of shape (seq, {d_model}), but got a batch of "
            f"shape {x.shape}. Use `jax.vmap(layer)(x)`."
        )
    if x.ndim != 2:
        raise ValueError(
            f"`{name}.{verb}` takes a sequence of shape (seq, {d_model}), but got an array of "
            f"shape {x.shape}."
            + (" For a single token use `layer.step(x, state)`." if x.ndim == 1 else "")
        )
    check_features(f"{name}.{verb}", d_model, x)
    check_reset_and_length(name, x.shape[0], reset, length)
    return without_padding(x, length)


def without_padding(x: Float[Array, "seq d_model"], length: Length) -> Float[Array, "seq d_model"]:
    """Replaces the padding of a sequence by zeros.

    The reverse pass of a product multiplies its input by the gradient of its output. NaN in
    padding, times a gradient of zero, would make the gradients of all parameters NaN. Every layer
    calls this function where its `scan` begins; do the same in a layer of your own.

    **Arguments:**

    - `x`: the sequence, an array of shape `(seq, d_model)`.
    - `length`: the number of real tokens; `None` if there is no padding.

    **Returns:**

    `x`, with zeros after the first `length` tokens.
    """
    return ops.fill_padding(ops.real_tokens(x.shape[0], length), x, 0)


def check_token(name: str, d_model: int, x: Array) -> None:
    """Validates the token given to `step` of the layer `name`."""
    if x.ndim != 1:
        raise ValueError(
            f"`{name}.step` takes one token of shape ({d_model},), but got an array of shape "
            f"{x.shape}. For a sequence use `layer.scan(x, state)`, for a batch of tokens "
            "`jax.vmap(layer.step)(x, state)`."
        )
    check_features(f"{name}.step", d_model, x)


def check_reset_and_length(
    name: str, seq: int, reset: Array | None, length: Array | int | None
) -> None:
    """Validates `reset` and `length` for a sequence of `seq` tokens."""
    if reset is not None and (reset.shape != (seq,) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"`reset` of `{name}` must be a bool array of shape ({seq},), one value per token, "
            f"but got {reset.dtype} of shape {reset.shape}."
        )
    if length is None:
        return
    if jnp.shape(length) != () or not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(
            f"`length` of `{name}` must be one integer, but got {jnp.result_type(length)} of "
            f"shape {jnp.shape(length)}. For a batch use `jax.vmap`."
        )
    if isinstance(length, int | np.integer) and not 0 <= length <= seq:
        raise ValueError(f"`length` of `{name}` must be within 0..{seq}, but got length={length}.")


def check_features(name: str, d_model: int, x: Array) -> None:
    """Validates the last axis and the dtype of `x`."""
    if x.shape[-1] != d_model:
        raise ValueError(
            f"The last axis of the input of `{name}` must be d_model={d_model}, but got an array "
            f"of shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` takes floating-point features, but got {x.dtype}. Cast with `x.astype`."
        )


def checked_state(
    layer: AbstractSequenceLayer[State], state: State | None, *, max_len: int | None = None
) -> State:
    """Returns `state` if it has the structure, shapes and dtypes of `layer.init_state`, or the
    initial state if `state` is `None`.

    **Raises:** `ValueError` if `state` differs from the initial state.
    """
    if state is None:
        return layer.init_state(max_len=max_len)
    name = type(layer).__name__
    like = jax.eval_shape(lambda: layer.init_state(max_len=max_len))
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"The state given to `{name}` must be a {type(like).__name__} as returned by "
            f"`init_state`, but got {type(state).__name__}. Start from `layer.init_state()`."
        )
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(got) != want.shape or jnp.result_type(got) != want.dtype:
            raise ValueError(
                f"`state{jax.tree_util.keystr(path)}` given to `{name}` must be {want.dtype} of "
                f"shape {want.shape}, but got {jnp.result_type(got)} of shape {jnp.shape(got)}. "
                "Start from `layer.init_state()`."
            )
    return state


def checked_states(name: str, n_layer: int, state: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Returns `state` if it is a tuple of a state for each of the `n_layer` layers that the layer
    `name` is made of.

    **Raises:** `ValueError` if `state` is no such tuple.
    """
    if not isinstance(state, tuple) or len(state) != n_layer:
        raise ValueError(
            f"The state of `{name}` with {n_layer} layers must be a tuple of {n_layer} states, but "
            f"got {describe_state(state)}. Start from `layer.init_state()`."
        )
    return state


def describe_state(state: PyTree) -> str:
    """Describes a wrong state for messages."""
    if isinstance(state, tuple):
        return f"a tuple of {len(state)}"
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    return f"a {type(state).__name__} with leaves of shapes {shapes}"
