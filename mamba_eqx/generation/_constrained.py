"""Constraints within the compiled loop, and the choice between the two kinds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._sampling import Sampling, dense_bias
from .constraints import AbstractConstraint, Matching


class Constrained(NamedTuple):
    """The state of a constraint, and the tokens that it allows next.

    For a constraint of the host, the state is `None`, and the host writes `allowed` before each
    token.
    """

    state: PyTree
    allowed: Bool[Array, "*batch vocab"]

    @property
    def over(self) -> Bool[Array, "*batch"]:
        """Whether no token may follow."""
        return ~jnp.any(self.allowed, axis=-1)


def constrained(
    constraint: AbstractConstraint, state: PyTree, bias: Float[Array, " vocab"] | None
) -> Constrained:
    """Returns the tokens that a constraint allows in a state, except those that the bias bans."""
    allowed = constraint.allowed(state)
    return Constrained(state, allowed if bias is None else allowed & (bias > -jnp.inf))


def advance(
    constraint: AbstractConstraint,
    now: Constrained,
    token: Int[Array, ""],
    bias: Float[Array, " vocab"] | None,
) -> Constrained:
    """Returns what a constraint allows after another token."""
    return constrained(constraint, constraint.advance(now.state, token), bias)


def begin(
    constraint: AbstractConstraint | None,
    bias: Float[Array, "*batch vocab"] | None,
    rows: int | None,
) -> Constrained | None:
    """Returns what a constraint allows first, with an axis of rows for a batch."""
    if constraint is None:
        return None
    start = lambda bias: constrained(constraint, constraint.init(), bias)
    return start(bias) if rows is None else jax.vmap(start, axis_size=rows)(bias)


def compiled_constraint(
    function: str, sampling: Sampling, vocab_size: int
) -> AbstractConstraint | None:
    """Validates a constraint for the compiled loop of `function` (a name).

    **Raises:** `ValueError` for a constraint of the host, or one for another vocabulary.
    """
    found = sampling.constraint
    if found is None:
        return None
    if not isinstance(found, AbstractConstraint):
        raise ValueError(
            f"`{function}` runs one compiled loop, which cannot ask a `{type(found).__name__}` "
            "before each token. Use `stream` or an `Engine`, or an `AbstractConstraint`."
        )
    allowed = jax.eval_shape(lambda: found.allowed(found.init()))
    if allowed.shape != (vocab_size,) or allowed.dtype != jnp.bool_:
        raise ValueError(
            "`constraint` must allow or forbid each token of the model, as booleans of shape "
            f"({vocab_size},), but gives {allowed.dtype} of shape {allowed.shape}. Make it for "
            "this model."
        )
    return found


def matching_for(sampling: Sampling, vocab_size: int) -> Matching | None:
    """Starts a constraint of either kind on the host, for one text."""
    if sampling.constraint is None:
        return None
    banned = None
    if sampling.logit_bias is not None:
        banned = dense_bias(sampling.logit_bias, vocab_size) == -np.inf
    return Matching(sampling.constraint, vocab_size, banned)
