from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._checks import check_count
from .._trees import named_leaves
from ..layers import AbstractSequenceLayer
from ..models import LanguageModel
from . import _laws as laws_of
from ._running import CAPACITY, TOLERANCE, fold, is_float


if TYPE_CHECKING:
    from ._plans import Plan

Inputs = Callable[[int, np.random.Generator], Any]

# What each law says, and where to look if a layer breaks it.
_TABLE = {
    "pytree": (
        "`jax.jit`, `jax.grad`, `jax.tree.map` and serialisation work on the layer.",
        "All leaves must be arrays: mark other fields by `eqx.field(static=True)`.",
    ),
    "closure": (
        "`init_state`, `scan` and `step` return states of one structure, shape and dtype.",
        "`init_state` must have the dtypes of the state that `scan` and `step` compute, also when "
        "`state`, `reset` or `length` is `None`.",
    ),
    "dtype": (
        "`y.dtype == x.dtype`, for float32 and bfloat16.",
        "Compute in the dtype of the parameters, and end with `y.astype(x.dtype)`.",
    ),
    "recurrence": (
        "`scan(x, s)` equals `step` folded over `x`, in outputs and final state.",
        "Compare `scan` of one token with `step`. A difference only when the past is not empty "
        "means that `scan` leaves out `state`.",
    ),
    "splitting": (
        "`scan` of two pieces, the second from the state of the first, equals `scan` of both.",
        "`scan` must start from `state` and return all that later tokens need, for pieces shorter "
        "than a convolution as well.",
    ),
    "causality": (
        "Changing `x[t:]` does not change `y[:t]`.",
        "Look for sums, norms or convolutions over time that reach later tokens.",
    ),
    "reset": (
        "`scan(x, s, reset=r)` equals separate runs of the segments that begin where `r` is true.",
        "Pass `reset` to every part with a memory, convolutions included. A state that is only "
        "multiplied by zero would keep NaN: use `jnp.where`.",
    ),
    "length": (
        "`scan(x, s, length=n)` equals `scan(x[:n], s)`, in the first `n` outputs, in the state "
        "and in the gradients, even if the padding is NaN.",
        "Begin `scan` with `x = mamba_eqx.layers.without_padding(x, length)`, and pass `length` to "
        "every part with a memory.",
    ),
    "empty": (
        "A sequence without tokens has no outputs and leaves the state as it is.",
        "Look for reductions and indices such as `x[-1]` that need a token.",
    ),
    "batching": (
        "`jax.vmap` of `scan` and of `step` equals a loop over the batch.",
        "Look for axes counted from the front of a batched array, and for random or host calls.",
    ),
    "donation": (
        "A state, the initial one included, can be donated to `step` and `scan`.",
        "`init_state` must return new arrays, each of them once: no parameter, no shared array.",
    ),
    "gradients": (
        "The gradients of `scan` equal those of `step` folded, for inputs, parameters and state.",
        "Look for `jax.lax.stop_gradient`, custom derivatives, and `jnp.where` around a division "
        "or a root that is not finite on the side not taken.",
    ),
    "jit": (
        "Every method gives the same under `jit`, and a second call does not compile again.",
        "Look for static fields that hold arrays or change between calls, and for global state.",
    ),
}
LAWS = tuple(_TABLE)


class LawError(AssertionError):
    """The error of [`mamba_eqx.testing.check_laws`][] for a layer that breaks a law.

    The message has the law, the difference, the smallest example that was found, and a hint.
    """

    law: str
    """The name of the law."""

    def __init__(self, law: str, message: str):
        """**Arguments:**

        - `law`: the name of the law.
        - `message`: the whole message.
        """
        super().__init__(message)
        self.law = law


def check_laws(
    layer: AbstractSequenceLayer | LanguageModel,
    *,
    laws: Sequence[str] = LAWS,
    inputs: Inputs | None = None,
    dtype: DTypeLike = jnp.float32,
    examples: int = 10,
) -> None:
    """Checks that a layer is a causal map with three ways to run it.

    The [laws](../api/protocol.md#the-laws) are those that the tests of this library check for its
    own layers, except for `stack`, `config`, `export` and `sharding`. Hypothesis chooses lengths,
    splits, resets and states, the same ones in every run. The package `hypothesis` is required:
    `pip install "mamba_eqx[testing]"`.

    ```python
    import jax.random as jr
    import mamba_eqx as mbx

    mbx.testing.check_laws(mbx.CausalConv1d(3, 2, key=jr.key(0)), laws=["recurrence", "length"])
    ```

    **Arguments:**

    - `layer`: the layer. Make it small, because many programs are compiled, and give it random
        parameters: zeros and ones hide mistakes.
    - `laws`: the names of the laws to check, in this order; all of `mamba_eqx.testing.LAWS` by
        default.
    - `inputs`: a function of a number of tokens and a generator of NumPy that returns a sequence of
        so many tokens. By default these are normal random numbers of shape `(seq, d_model)`, and
        random token ids for a language model.
    - `dtype`: the dtype of the default inputs, whose rounding decides which differences are
        allowed. float64 reveals the smallest mistakes, but requires JAX's 64-bit mode
        (`jax.enable_x64(True)`) and a layer made in float64.
    - `examples`: the number of examples for each of the laws `recurrence`, `splitting`,
        `causality`, `reset` and `length`.

    **Raises:** [`mamba_eqx.testing.LawError`][] if the layer breaks a law; `ImportError` if
    Hypothesis is not installed; `ValueError` if `laws` has an unknown name, or if `dtype` or
    `examples` is not usable.
    """
    unknown = [name for name in laws if name not in _TABLE]
    if isinstance(laws, str) or unknown:
        raise ValueError(
            f"`laws` must be a list of names among {', '.join(LAWS)}, but got {laws!r}."
        )
    check_count("examples", examples)
    name = jnp.dtype(dtype).name
    if name not in TOLERANCE or (name == "float64" and not jax.config.read("jax_enable_x64")):
        raise ValueError(
            f"`dtype` must be float32, bfloat16 or float16, or float64 in JAX's 64-bit mode, but "
            f"got {name}. Switch this mode on for float64 by "
            '`jax.config.update("jax_enable_x64", True)`.'
        )
    try:
        from . import _plans as plans
    except ImportError:
        raise ImportError(
            "`check_laws` requires Hypothesis, which is not installed. Install it by "
            "`pip install 'mamba_eqx[testing]'`."
        ) from None

    make = _Sequences(layer, inputs, name)
    shown: list[Plan] = []
    for law in laws:
        shown.clear()
        try:
            if law == "pytree":
                _check_leaves(layer)
            if law in _ON_CASES:

                def check(plan: "Plan", law: str = law) -> None:
                    shown[:] = [plan]
                    _ON_CASES[law](plans.make_case(layer, make, plan), name)

                plans.check_examples(check, examples)
            if law in _FIXED:
                shown.clear()
                _FIXED[law](layer, make, name)
        except Exception as error:
            raise LawError(law, _message(layer, law, error, shown)) from error


class _Sequences:
    """Makes the input sequences, from a length and a seed."""

    def __init__(self, layer: Any, inputs: Inputs | None, dtype: str):
        self.layer = layer
        self.inputs = inputs
        self.dtype = dtype

    def __call__(self, seq: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if self.inputs is not None:
            return np.asarray(self.inputs(seq, rng))
        if isinstance(self.layer, LanguageModel):
            return rng.integers(0, self.layer.vocab_size, seq, np.int32)
        return rng.standard_normal((seq, self.layer.d_model)).astype(jnp.dtype(self.dtype))


def _check_leaves(layer: Any) -> None:
    for path, leaf in named_leaves(layer).items():
        if not eqx.is_array(leaf):
            raise AssertionError(f"The leaf `{path}` is no array, but {leaf!r}.")


def _check_pytree(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.pytree(layer, jax.tree.map(jnp.zeros_like, layer), make(4, 0), dtype)


def _check_closure(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.closure(layer, make(3, 0))
    laws_of.closure_under_lax_scan(layer, make(4, 0), dtype)


def _check_dtype(layer: Any, make: _Sequences, dtype: str) -> None:
    if not is_float(make(1, 0)):
        return
    for other in dict.fromkeys((dtype, "float32", "bfloat16")):
        laws_of.dtype(layer, make(3, 0).astype(jnp.dtype(other)), other)


def _check_reset(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.reset_forgets_nan(layer, make(4, 0), dtype)


def _check_length(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.length_of_any_integer_dtype(layer, make(3, 0), ("int8", "uint16", "int32"))
    x = make(7, 0)
    if is_float(x):
        x[4:] = np.nan
    laws_of.length_in_gradients(layer, x, 4, dtype, factor=_FOR_GRADIENTS)


def _check_empty(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.empty(layer, make(1, 0))


def _check_batching(layer: Any, make: _Sequences, dtype: str) -> None:
    empty = layer.init_state(max_len=CAPACITY)
    pasts = [fold(layer, make(5, seed), empty)[1] for seed in range(3)]
    x = np.stack([make(4, 10 + seed) for seed in range(3)])
    laws_of.batching(layer, x, pasts, np.random.default_rng(0).random((3, 4)) < 0.3, dtype)


def _check_donation(layer: Any, make: _Sequences, dtype: str) -> None:
    laws_of.donation(layer, make(4, 0), dtype)


def _check_gradients(layer: Any, make: _Sequences, dtype: str) -> None:
    state = fold(layer, make(5, 1), layer.init_state(max_len=CAPACITY))[1]
    laws_of.gradients(layer, state, make(9, 0), dtype, factor=_FOR_GRADIENTS)


def _check_jit(layer: Any, make: _Sequences, dtype: str) -> None:
    other = jax.tree.map(lambda leaf: leaf + jnp.zeros_like(leaf), layer)
    laws_of.jit(layer, other, make(7, 0), dtype, run_step=layer.step)


# Gradients sum over tokens, so their rounding is larger.
_FOR_GRADIENTS = 10.0

_ON_CASES: dict[str, Callable[[laws_of.Case, str], None]] = {
    "recurrence": laws_of.recurrence,
    "splitting": laws_of.splitting,
    "causality": lambda case, dtype: laws_of.causality(case, dtype, exactly=False),
    "reset": laws_of.reset,
    "length": laws_of.length,
}
_FIXED: dict[str, Callable[[Any, _Sequences, str], None]] = {
    "pytree": _check_pytree,
    "closure": _check_closure,
    "dtype": _check_dtype,
    "reset": _check_reset,
    "length": _check_length,
    "empty": _check_empty,
    "batching": _check_batching,
    "donation": _check_donation,
    "gradients": _check_gradients,
    "jit": _check_jit,
}


def _message(layer: Any, law: str, error: Exception, shown: "list[Plan]") -> str:
    statement, hint = _TABLE[law]
    found = str(error).strip()
    if not isinstance(error, AssertionError):
        found = f"It raises {type(error).__name__}: {found}"
    lines = [f"{type(layer).__name__} breaks the law *{law}*: {statement}", found]
    if shown:
        plan = shown[0]
        past = "the empty past" if plan.fresh else "the state after five other tokens"
        lines.append(
            f"The smallest example found: {plan.seq} tokens from {past}, cut after {plan.cut}, "
            f"resets at {sorted(plan.resets)}, seed {plan.seed}."
        )
    return "\n".join([*lines, hint])
