"""Sequences whose pieces lie on different devices, and what crosses between the devices.

Inside `jax.shard_map`, a sequence that varies over the mesh axis `context` is a piece of a longer
sequence, in the order of the devices. `reset` and `length` are those of the piece; all pieces
before the last one with real tokens are full. A state is that before the whole sequence.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._trees import varying_axes


CONTEXT_AXIS = "context"
"""The mesh axis over which sequences are cut."""

Tree = TypeVar("Tree")


def is_piece(x: Array) -> bool:
    """Returns whether `x` is a piece of a sequence that lies on several devices."""
    return CONTEXT_AXIS in varying_axes(x)


def refuse_piece(op: str, x: Array) -> None:
    """Raises an error for an op that cannot run over pieces.

    **Raises:** `ValueError` if `x` is a piece of a sequence.
    """
    if is_piece(x):
        raise ValueError(
            f"`{op}` must get a whole sequence, but got a piece that varies over the mesh axis "
            f"{CONTEXT_AXIS!r}. Use a mesh without this axis."
        )


def of_all_pieces(tree: Tree) -> Tree:
    """Returns the arrays of all devices, along a new first axis. They are the same everywhere."""
    own = jnp.arange(lax.axis_size(CONTEXT_AXIS)) == lax.axis_index(CONTEXT_AXIS)

    def gather(leaf: Array) -> Array:
        whole = leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf
        mask = own.reshape(-1, *(1,) * leaf.ndim)
        placed = jnp.where(mask, whole, jnp.zeros_like(whole))
        return lax.psum(placed, CONTEXT_AXIS).astype(leaf.dtype)

    return jax.tree.map(gather, tree)


def from_first_piece(tree: Tree) -> Tree:
    """Returns arrays that are equal on all devices, in the type of arrays that do not vary.

    Code that makes arrays vary together, such as a loop over layers, hides that they are equal.
    """
    first = lax.axis_index(CONTEXT_AXIS) == 0

    def share(leaf: Array) -> Array:
        if not is_piece(leaf):
            return leaf
        return lax.psum(jnp.where(first, leaf, jnp.zeros_like(leaf)), CONTEXT_AXIS)

    return jax.tree.map(share, tree)


def at_start(states: list[Tree]) -> Tree:
    """Returns the state before the piece of this device, of the states before all pieces."""
    index = lax.axis_index(CONTEXT_AXIS)
    own = lambda *leaves: lax.dynamic_index_in_dim(jnp.stack(leaves), index, keepdims=False)
    return jax.tree.map(own, *states)


def forgets(reset: Bool[Array, " seq"] | None) -> Bool[Array, ""]:
    """Returns whether a piece forgets everything before it."""
    return jnp.array(False) if reset is None else jnp.any(reset)


def scan_pieces(
    run: Callable[[Array], tuple[Array, Array]],
    decay: Float[Array, "*#shape"],
    state: Float[Array, "*shape"],
    reset: Bool[Array, " seq"] | None,
) -> tuple[Array, Float[Array, "*shape"]]:
    """Runs a recurrence whose state decays and is added to, $h' = a h + b$ over a piece.

    Every device runs its piece twice: from zeros, which gives $b$, and from the state before the
    piece, which follows from the $a$ and $b$ of all devices.

    **Arguments:**

    - `run`: a function of the state before the piece to the outputs and the state after it.
    - `decay`: $a$ of the piece without its resets, which broadcasts against the state.
    - `state`: the state before the whole sequence.
    - `reset`: the resets of the piece.

    **Returns:**

    The outputs of the piece, and the state after the whole sequence.
    """
    _, added = run(jnp.zeros_like(state))
    decays, added, lost = of_all_pieces((decay, added, forgets(reset)))
    states = [state]
    for a, b, forget in zip(decays, added, lost, strict=True):
        # What a reset forgets may be NaN, in the decay too.
        a = jnp.where(forget, jnp.ones_like(a), a)
        states.append(a * jnp.where(forget, jnp.zeros_like(state), states[-1]) + b)
    y, _ = run(at_start(states[:-1]))
    return y, states[-1]
