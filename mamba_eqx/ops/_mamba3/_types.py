from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from ..._dtypes import at_least_float32


StateTuple = tuple[
    Float[Array, "nheads pairs"],
    Float[Array, "nheads headdim d_state"],
    Float[Array, "rank nheads d_state"],
    Float[Array, "nheads headdim"],
]
"""The fields of `State` in their order, as users pass and receive them."""


class State(NamedTuple):
    """The state after a token.

    The heads come first and the summed dimensions last, with which a step takes a fraction of the
    time that it would take with the axes in the order of `ssd`'s state.
    """

    angle: Float[Array, "nheads pairs"]
    """The angle of every pair, between -pi and pi."""
    h: Float[Array, "nheads headdim d_state"]
    """The hidden state."""
    k: Float[Array, "rank nheads d_state"]
    """The key of the last token."""
    x: Float[Array, "nheads headdim"]
    """The input of the last token."""

    def as_tuple(self) -> StateTuple:
        """Returns the fields as a plain tuple, whose pytree structure differs from this class's."""
        return self.angle, self.h, self.k, self.x


class Tokens(NamedTuple):
    """One token, or a sequence of tokens."""

    x: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    A: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq rank ngroups d_state"]
    C: Float[Array, "*seq rank ngroups d_state"]
    trap: Float[Array, "*seq nheads"]
    angles: Float[Array, "*seq pairs"]


class Parameters(NamedTuple):
    """The arguments that are the same for all tokens."""

    D: Float[Array, " nheads"] | None
    B_bias: Float[Array, "nheads rank d_state"]
    C_bias: Float[Array, "nheads rank d_state"]
    mimo_x: Float[Array, "nheads rank headdim"] | None


def cast_together(
    tokens: Tokens, parameters: Parameters, state: State
) -> tuple[Tokens, Parameters, State]:
    """Casts all arrays to float32, or to float64 if any of them is float64."""
    arrays = (tokens, parameters, state)
    dtype = at_least_float32(*jax.tree.leaves(arrays))
    return jax.tree.map(lambda t: t.astype(dtype), arrays)
