"""The two kinds of constraints: one that compiled code evaluates, and one that Python does."""

import abc
from typing import Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree


class AbstractConstraint(eqx.Module):
    """A rule for which tokens may come next, which runs inside the compiled loop.

    The rule has a state for each text, a pytree of arrays of fixed shapes. A text begins with the
    state of `init`, and `advance` gives the state after each generated token. Prompts are not
    read. The methods see one text, and are traced by JAX:

    ```python
    class Alternating(mbx.generation.AbstractConstraint):
        vocab_size: int = eqx.field(static=True)

        def init(self):
            return jnp.asarray(0)

        def allowed(self, state):
            return jnp.arange(self.vocab_size) % 2 == state

        def advance(self, state, token):
            return 1 - state
    ```

    [`mamba_eqx.generation.TokenAutomaton`][] is such a rule, given as a table.
    """

    @abc.abstractmethod
    def init(self) -> PyTree:
        """Returns the state before the first generated token."""

    @abc.abstractmethod
    def allowed(self, state: PyTree) -> Bool[Array, " vocab"]:
        """Computes which tokens may come next.

        **Arguments:**

        - `state`: the state of the text.

        **Returns:**

        A boolean for each token id of the model. If none is true, the text ends.
        """

    @abc.abstractmethod
    def advance(self, state: PyTree, token: Int[Array, ""]) -> PyTree:
        """Computes the state after another token.

        **Arguments:**

        - `state`: the state before the token.
        - `token`: the token id, one that `allowed` permits.

        **Returns:**

        The state after the token, with the shapes and dtypes of `init`.
        """


@runtime_checkable
class Matcher(Protocol):
    """The progress of one text along a [`mamba_eqx.generation.HostConstraint`][]."""

    def allowed(self) -> Bool[np.ndarray, " vocab"]:
        """Computes which tokens may come next.

        **Returns:**

        A boolean for each token id. Ids of the model beyond the array are not allowed. If none is
        true, the text ends.
        """
        ...

    def advance(self, token: int) -> None:
        """Notes another token.

        **Arguments:**

        - `token`: the token id, one that `allowed` permits.
        """
        ...


@runtime_checkable
class HostConstraint(Protocol):
    """A rule for which tokens may come next, which runs in Python before every token.

    [`mamba_eqx.stream`][] and the [`mamba_eqx.Engine`][] take it; the compiled loop of
    [`mamba_eqx.generate`][] cannot call Python. [`mamba_eqx.generation.Grammar`][] is such a rule.
    """

    def start(self) -> Matcher:
        """Returns a matcher for a new text. Any thread may call this."""
        ...
