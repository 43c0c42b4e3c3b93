import abc
from typing import TYPE_CHECKING, Any, Generic, TypeAlias

import equinox as eqx
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, PyTree
from typing_extensions import TypeVar


# With a default, `mbx.Block` without a type argument is complete for type checkers. From Python
# 3.13 on beartype reads the default, and cannot decorate `State | None` if that is `Any`. Strict
# type checkers take `PyTree` for unknown.
if TYPE_CHECKING:
    State = TypeVar("State", default=Any)
else:
    State = TypeVar("State", default=PyTree)

# jaxtyping binds the axes of an alias anew at every call, as if the alias were written out.
Reset: TypeAlias = Bool[Array, " seq"] | None
Length: TypeAlias = Integer[Array, ""] | int | None


class AbstractSequenceLayer(eqx.Module, Generic[State]):
    r"""A causal map over a sequence, with three ways to run it.

    $$(y_t, s_t) = f(x_t, s_{t-1})$$

    | | |
    |---|---|
    | `layer(x)` | the whole sequence from the empty past: training and scoring |
    | `layer.scan(x, state)` | a piece of a sequence, in parallel: prefill, state passing |
    | `layer.step(x, state)` | one token, in time and memory independent of the past: decoding |

    The three ways compute one function, which means that these laws hold:

    - *recurrence*: `scan` equals `step` folded over the sequence, in outputs, state and gradients;
    - *splitting*: `scan` of two pieces, the second one from the state of the first, equals `scan`
        of both joined;
    - *causality*: a token influences no output before it;
    - *reset*: `scan(x, reset=r)` equals separate runs of the segments that begin where `r` is true;
    - *length*: `scan(x, state, length=n)` equals `scan(x[:n], state)`, in the first `n` outputs,
        in the state, and in the gradients of both, whatever the padding holds;
    - *closure*: `init_state`, `scan` and `step` return states of the same structure, shapes and
        dtypes, so that a state is a valid carry of `jax.lax.scan`;
    - *dtype*: `y.dtype == x.dtype`.

    `docs/api/protocol.md` has the full table of laws, which the tests check for every layer of
    this library. [`mamba_eqx.testing.check_laws`][] checks them for a layer of your own.

    Layers are unbatched: use `jax.vmap` for batches. A state is an ordinary pytree, which can be
    copied, saved, batched with `jax.vmap` and differentiated.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init_state(self, *, max_len: int | None = None) -> State:
        """Returns the state of the empty past.

        **Arguments:**

        - `max_len`: the maximum number of tokens that will be run from this state. Layers with a
            cache need it; state-space models ignore it.
        """

    @abc.abstractmethod
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State]:
        """Runs a piece of a sequence, in parallel over time if the layer can.

        **Arguments:**

        - `x`: the piece, an array of shape `(seq, d_model)`.
        - `state`: the state after the tokens before `x`. `None` is the empty past; a layer that
            needs a `max_len` then takes the length of `x`.
        - `reset`: a boolean array of shape `(seq,)`. Where it is true, the layer forgets everything
            before that token, so that several documents can be packed into one sequence. A reset
            does not stop a NaN or an infinity that an earlier token of the same chunk holds.
        - `length`: the number of real tokens, within `0..seq`. The tokens after them are padding:
            they may hold anything, do not change the state or any gradient, and their outputs are
            meaningless.

        **Returns:**

        The outputs, an array of shape `(seq, d_model)`, and the state after the last real token.

        **Raises:** `ValueError` if `x`, `state`, `reset` or `length` has the wrong shape or dtype.
        """

    @abc.abstractmethod
    def step(
        self, x: Float[Array, " {self.d_model}"], state: State
    ) -> tuple[Float[Array, " {self.d_model}"], State]:
        """Runs one token.

        **Arguments:**

        - `x`: the token, an array of shape `(d_model,)`.
        - `state`: the state after the tokens before `x`.

        **Returns:**

        The output, an array of shape `(d_model,)`, and the state after the token.

        **Raises:** `ValueError` if `x` or `state` has the wrong shape or dtype.
        """

    def __call__(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Reset = None,
        length: Length = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.d_model}"]:
        """Runs a whole sequence from the empty past.

        **Arguments:**

        - `x`, `reset`, `length`: as for `scan`.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.

        **Returns:**

        The outputs of `scan`, an array of shape `(seq, d_model)`.

        **Raises:** `ValueError` as `scan` does.
        """
        y, _ = self.scan(x, reset=reset, length=length)
        return y
