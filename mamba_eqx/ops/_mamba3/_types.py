from typing import NamedTuple

from jaxtyping import Array, Float


# Subscripts: h heads, r ranks, p channels of a head, n state dimensions.

# What a token leaves behind: the angle, the hidden state, the key and `x`. With the heads first and
# the dimensions that are summed last, a step takes a fraction of the time of the ssd's layout.
State = tuple[
    Float[Array, "nheads pairs"],
    Float[Array, "nheads headdim d_state"],
    Float[Array, "rank nheads d_state"],
    Float[Array, "nheads headdim"],
]


class Tokens(NamedTuple):
    """One token, or a sequence of them."""

    x: Float[Array, "*seq nheads headdim"]
    dt: Float[Array, "*seq nheads"]
    A: Float[Array, "*seq nheads"]
    B: Float[Array, "*seq rank ngroups d_state"]
    C: Float[Array, "*seq rank ngroups d_state"]
    trap: Float[Array, "*seq nheads"]
    angles: Float[Array, "*seq pairs"]


class Parameters(NamedTuple):
    """What is the same for all tokens."""

    D: Float[Array, " nheads"] | None
    B_bias: Float[Array, "nheads rank d_state"]
    C_bias: Float[Array, "nheads rank d_state"]
    mimo_x: Float[Array, "nheads rank headdim"] | None
