import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..sampling import shorten
from ._protocols import AbstractConstraint


class TokenAutomaton(AbstractConstraint):
    """A finite automaton over tokens, as a constraint of the compiled loop.

    The automaton begins in state 0. In state `s`, token `t` is allowed if `table[s, t]` is not
    negative, and leads to the state of this number. A text ends in a state that allows no token.

    ```python
    # Digits, of which the first is not 0.
    table = np.full((2, 256), -1)
    table[0, ord("1") : ord("9") + 1] = table[1, ord("0") : ord("9") + 1] = 1
    digits = mbx.generation.TokenAutomaton(table)
    out = mbx.generate(model, prompt, 5, mbx.Sampling(constraint=digits))
    ```

    The table takes `4 * states * vocab_size` bytes on the device.
    """

    table: Int[Array, "states vocab"]

    def __init__(self, table: Int[np.ndarray, "states vocab"] | Int[Array, "states vocab"]):
        """**Arguments:**

        - `table`: the transitions, integers of shape `(states, vocab_size)`, below `states`.

        **Raises:** `ValueError` if `table` has another shape or dtype, or a number of no state.
        """
        given = np.asarray(table)
        if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer) or given.size == 0:
            raise ValueError(
                "`table` must be integers of shape (states, vocab_size), but got "
                f"{given.dtype} of shape {given.shape}. Give a row for each state."
            )
        if given.max() >= len(given):
            raise ValueError(
                f"`table` must have states within 0..{len(given) - 1}, or -1 for a token that is "
                f"not allowed, but got {shorten(int(given.max()))}. Add rows for the other states."
            )
        self.table = jnp.asarray(given, jnp.int32)

    def init(self) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def allowed(self, state: Int[Array, ""]) -> Bool[Array, " vocab"]:
        return self.table[state] >= 0

    def advance(self, state: Int[Array, ""], token: Int[Array, ""]) -> Int[Array, ""]:
        return self.table[state, token]
