import abc
from typing import Generic, TypeVar

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


State = TypeVar("State")


class AbstractSequenceLayer(eqx.Module, Generic[State]):
    r"""A causal map over a sequence, with three ways to run it.

    $$(y_t, s_t) = f(x_t, s_{t-1})$$

    | | |
    |---|---|
    | `layer(x)` | the whole sequence from the empty past: training and scoring |
    | `layer.scan(x, state)` | a piece of a sequence, in parallel: prefill, state passing |
    | `layer.step(x, state)` | one token, in time and memory independent of the past: decoding |

    The three are one function, and these laws say so (`tests/test_laws.py` holds every layer of
    this package to them; put a layer of your own into its registry and they hold it as well):

    - *recurrence*: `scan` equals `step` folded over the sequence, in outputs, state and gradients;
    - *splitting*: scanning two pieces, the state handed over, equals scanning them joined;
    - *causality*: a token influences no output before it;
    - *reset*: `scan(x, reset=r)` equals the segments that begin where `r` is true, run apart;
    - *length*: `scan(x, state, length=n)` equals `scan(x[:n], state)`, in the first `n` outputs
        and in the state;
    - *closure*: the states of `init_state`, `scan` and `step` have one structure, and the same
        shapes and dtypes, so that a state is a valid carry of `jax.lax.scan`;
    - *dtype*: `y.dtype == x.dtype`.

    A layer is unbatched: wrap it in `jax.vmap`. Its state is an ordinary pytree value: copy it,
    save it, `vmap` over it, differentiate through it.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init_state(self, *, max_len: int | None = None) -> State:
        """The state that stands for the empty past.

        **Arguments:**

        - `max_len`: the largest number of tokens that will pass, which a layer with a cache needs
            to know. State-space models have no use for it.
        """

    @abc.abstractmethod
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State]:
        """Runs a piece of a sequence, in parallel over time where the layer can.

        **Arguments:**

        - `x`: the piece.
        - `state`: what came before it; the empty past if `None`. (Layers that have to know a
            `max_len` then take that of `x`.)
        - `reset`: where true, everything before that token is forgotten, so that several
            documents can be packed into one sequence.
        - `length`: only the first `length` tokens are real, the others are padding. The state
            returned is the one after the real ones; outputs after them mean nothing.

        **Returns:**

        The outputs and the state after the last (real) token.
        """

    @abc.abstractmethod
    def step(
        self, x: Float[Array, " {self.d_model}"], state: State
    ) -> tuple[Float[Array, " {self.d_model}"], State]:
        """Runs one token.

        **Arguments:**

        - `x`: the token.
        - `state`: what came before it.

        **Returns:**

        Its output, and the state after it.
        """

    def __call__(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.d_model}"]:
        """Runs a whole sequence: the outputs of `scan` from the empty past.

        **Arguments:**

        - `x`, `reset`, `length`: as for `scan`.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.
        """
        y, _ = self.scan(x, reset=reset, length=length)
        return y
