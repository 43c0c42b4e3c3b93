"""`check_laws` accepts layers that hold the laws, and names the law that a broken one breaks."""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.testing import LAWS, LawError, check_laws


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")


class Average(mbx.AbstractSequenceLayer[Any]):
    """The tutorial's moving average."""

    keep: jax.Array
    d_model: int = eqx.field(static=True)

    def init_state(self, *, max_len: int | None = None) -> Any:
        return jnp.zeros(self.d_model)

    def scan(
        self, x: Any, state: Any = None, *, reset: Any = None, length: Any = None
    ) -> tuple[Any, Any]:
        clean = mbx.layers.without_padding(x, length).astype(self.keep.dtype)
        a = jnp.broadcast_to(self.keep, x.shape)
        b = (1 - a) * clean
        y, state = mbx.ops.linear_recurrence(a, b, state=state, reset=reset, length=length)
        return y.astype(x.dtype), state

    def step(self, x: Any, state: Any) -> tuple[Any, Any]:
        state = self.keep * state + (1 - self.keep) * x.astype(self.keep.dtype)
        return state.astype(x.dtype), state


class ForgetsState(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        return super().scan(x, reset=reset, length=length)


class DropsPieces(Average):
    """Returns the state before the last token."""

    def scan(self, x, state=None, *, reset=None, length=None):
        y, _ = super().scan(x, state, reset=reset, length=length)
        return y, super().scan(x[:-1], state, reset=None if reset is None else reset[:-1])[1]


class LooksAhead(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        y, state = super().scan(x, state, reset=reset, length=length)
        return y + jnp.mean(x, axis=0), state


class IgnoresReset(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        return super().scan(x, state, length=length)


class KeepsNaN(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        state = self.init_state() if state is None else state
        y, end = super().scan(x, state, reset=reset, length=length)
        return y + 0 * state, end


class IgnoresLength(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        return super().scan(x, state, reset=reset)


class NeedsToken(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        x[-1]
        return super().scan(x, state, reset=reset, length=length)


class WidensState(Average):
    def step(self, x, state):
        y, state = super().step(x, state)
        return y, state[None]


class WidensOutput(Average):
    def step(self, x, state):
        y, state = super().step(x, state)
        return y.astype(jnp.float32), state


class StopsGradient(Average):
    def scan(self, x, state=None, *, reset=None, length=None):
        return super().scan(jax.lax.stop_gradient(x), state, reset=reset, length=length)


class ReturnsParameter(Average):
    def init_state(self, *, max_len=None):
        return self.keep


class HoldsFunction(Average):
    activation: Any = jax.nn.gelu


class Counts(Average):
    """Behaves differently at every trace."""

    traces: list[int] = eqx.field(static=True, default_factory=list)

    def scan(self, x, state=None, *, reset=None, length=None):
        self.traces.append(1)
        y, state = super().scan(x, state, reset=reset, length=length)
        return y * len(self.traces), state


class AddsBatch(Average):
    def step(self, x, state):
        y, state = super().step(x, state)
        jax.pure_callback(lambda y: y, y, y)  # Has no rule for `vmap`.
        return y, state


BROKEN = {
    ForgetsState: "recurrence",
    DropsPieces: "splitting",
    LooksAhead: "causality",
    IgnoresReset: "reset",
    KeepsNaN: "reset",
    IgnoresLength: "length",
    NeedsToken: "empty",
    WidensState: "closure",
    WidensOutput: "dtype",
    StopsGradient: "gradients",
    ReturnsParameter: "donation",
    HoldsFunction: "pytree",
    Counts: "jit",
    AddsBatch: "batching",
}


def make(kind: type[Average]) -> Average:
    return kind(keep=jr.uniform(jr.key(0), (3,)), d_model=3)


def test_average_holds_all_laws():
    check_laws(make(Average), examples=3)


@pytest.mark.parametrize("kind", BROKEN)
def test_error_names_the_law(kind: type[Average]):
    law = BROKEN[kind]
    with pytest.raises(LawError, match=rf"^{kind.__name__} breaks the law \*{law}\*: ") as caught:
        check_laws(make(kind), laws=[law], examples=3)
    assert caught.value.law == law
    if kind not in (NeedsToken, AddsBatch, ReturnsParameter):
        assert isinstance(caught.value.__cause__, AssertionError)


def test_every_law_can_be_broken():
    assert set(BROKEN.values()) == set(LAWS)


def test_smallest_example_is_shown():
    with pytest.raises(LawError, match=r"example found: 4 tokens from the state.*resets at \[\]"):
        check_laws(make(ForgetsState), laws=["recurrence"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_mixers_and_models_hold_all_laws(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        conv = mbx.CausalConv1d(3, 2, dtype=dtype, key=jr.key(0))
        check_laws(conv, dtype=dtype)
        if dtype == "float32":
            block = mbx.BlockConfig(mbx.Mamba1Config(4, d_state=2))
            model = mbx.LanguageModelConfig(11, layers=(block,)).build(key=jr.key(0))
            check_laws(model)


def test_inputs_of_the_user():
    lengths = []

    def inputs(seq: int, rng: np.random.Generator) -> np.ndarray:
        lengths.append(seq)
        return rng.standard_normal((seq, 3)).astype(np.float32)

    check_laws(make(Average), laws=["dtype"], inputs=inputs)
    assert lengths


def test_wrong_options_raise(monkeypatch: pytest.MonkeyPatch):
    layer = make(Average)
    with pytest.raises(ValueError, match=r"`laws` must be .* among pytree, .*\['fairness'\]"):
        check_laws(layer, laws=["fairness"])
    with pytest.raises(ValueError, match="`laws` must be a list of names"):
        check_laws(layer, laws="reset")
    with pytest.raises(ValueError, match="`examples` must be an integer of at least 1"):
        check_laws(layer, examples=0)
    for dtype in (jnp.int32, jnp.float64):
        with pytest.raises(ValueError, match=r"`dtype` must be float32.*enable_x64"):
            check_laws(layer, dtype=dtype)
    monkeypatch.delitem(sys.modules, "mamba_eqx.testing._plans", raising=False)
    monkeypatch.delattr("mamba_eqx.testing._plans", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install 'mamba_eqx\[testing\]'"):
        check_laws(layer)
