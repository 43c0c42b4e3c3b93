"""A constraint along one text, on the host."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from ._protocols import AbstractConstraint, HostConstraint, Matcher


class Matching:
    """The progress of one text along a constraint of either kind, and the tokens that may follow.

    - `allowed`: which tokens may come next, a boolean for each token id of the model.
    """

    def __init__(
        self,
        constraint: AbstractConstraint | HostConstraint,
        vocab_size: int,
        banned: Bool[np.ndarray, " vocab"] | None,
    ):
        """**Arguments:**

        - `constraint`: the constraint.
        - `vocab_size`: the number of token ids of the model.
        - `banned`: the tokens that the options ban, or `None`.

        **Raises:** the errors of the constraint; `ValueError` if its masks are no boolean arrays.
        """
        is_compiled = isinstance(constraint, AbstractConstraint)
        self._matcher: Matcher = _Compiled(constraint) if is_compiled else constraint.start()
        self._vocab_size, self._banned = vocab_size, banned
        self.allowed = self._read()

    @property
    def over(self) -> bool:
        """Whether no token may follow."""
        return not self.allowed.any()

    def advance(self, token: int) -> None:
        """Notes another token, and computes what may follow."""
        self._matcher.advance(token)
        self.allowed = self._read()

    def _read(self) -> Bool[np.ndarray, " vocab"]:
        mask = np.asarray(self._matcher.allowed())
        if mask.dtype != np.bool_ or mask.ndim != 1:
            raise ValueError(
                "`allowed` of a constraint must return booleans of shape (vocab_size,), but got "
                f"{mask.dtype} of shape {mask.shape}. Return one boolean for each token id."
            )
        allowed = np.zeros(self._vocab_size, bool)
        mask = mask[: self._vocab_size]
        allowed[: len(mask)] = mask
        return allowed if self._banned is None else allowed & ~self._banned


class _Compiled:
    """The matcher of a constraint that JAX can trace."""

    def __init__(self, constraint: AbstractConstraint):
        self._constraint, self._state = constraint, constraint.init()

    def allowed(self) -> np.ndarray:
        return np.asarray(_allowed(self._constraint, self._state))

    def advance(self, token: int) -> None:
        self._state = _advance(self._constraint, self._state, jnp.asarray(token, jnp.int32))


@eqx.filter_jit
def _allowed(constraint: AbstractConstraint, state: PyTree) -> jax.Array:
    return constraint.allowed(state)


@eqx.filter_jit
def _advance(constraint: AbstractConstraint, state: PyTree, token: jax.Array) -> PyTree:
    return constraint.advance(state, token)
