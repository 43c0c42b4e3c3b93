"""What the laws are tried on: layers, inputs, states, resets and places to cut, as hypothesis
chooses them; and the ways of running a layer that are compared."""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st
from jax import lax

from tests.support.registry import MIXERS, SIZES, Sizes, make_inputs, make_layer


# Relative to the largest entry of what is compared. Two ways of summing the same products differ by
# some units in the last place: 2^-24, 2^-8, 2^-53.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float64": 1e-12}
DTYPES = list(TOLERANCE)

# What is new has to be compiled, so that few lengths come from cutting.
# 1 and 3 are shorter than the convolutions; 37 and 40 are more than one chunk of the scan.
CUTS = [(1, 3), (3, 37), (37, 3), (3, 0), (0, 3)]
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those that the installed XLA has: they come and go."""
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


# Compiling costs far more than running here. (`conftest.py` leaves the fusion emitters out only
# where there are several processes.)
quick = functools.partial(
    jax.jit,
    compiler_options=_known(
        {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    ),
)


class Plan(NamedTuple):
    """What hypothesis chooses."""

    sizes: Sizes
    seed: int
    seq: int
    cut: int
    """A place in the sequence, `seq` included."""
    resets: frozenset[int]
    fresh: bool
    """Whether to start from the empty past, rather than from a state that tokens left behind."""


class Case(NamedTuple):
    layer: Any
    x: np.ndarray
    state: Any
    reset: np.ndarray
    cut: int


@st.composite
def plans(draw: st.DrawFn, name: str, dtype: str = "float32") -> Plan:
    # The mathematics is the same in all dtypes, and float64 is the sharpest eye.
    everywhere = THOROUGH or (name in MIXERS and dtype == "float64")
    sizes = draw(st.sampled_from(SIZES if everywhere else SIZES[:1]))
    if THOROUGH:
        seq = draw(st.integers(1, 80))
        cut = draw(st.integers(0, seq))
    else:
        # Several chunks in one size; the other sizes are about the sizes.
        several = CUTS if name in MIXERS else CUTS[:2]
        cut, rest = draw(st.sampled_from(several if sizes == SIZES[0] else CUTS[:1]))
        seq = cut + rest
    resets = draw(st.frozensets(st.integers(0, seq - 1), max_size=4))
    return Plan(sizes, draw(st.integers(0, 2)), seq, cut, resets, draw(st.booleans()))


def make_case(name: str, plan: Plan, dtype: str = "float32") -> Case:
    layer = make_layer(name, plan.sizes, dtype, plan.seed)
    state = layer.init_state(max_len=128)
    if not plan.fresh:
        past = make_inputs(name, plan.sizes, 5, dtype, plan.seed + 100)
        state = fold(layer, past, state)[1]
    reset = np.isin(np.arange(plan.seq), list(plan.resets))
    x = make_inputs(name, plan.sizes, plan.seq, dtype, plan.seed)
    return Case(layer, x, state, reset, plan.cut)


def simple(name: str, seq: int) -> tuple[Any, np.ndarray]:
    """Where nothing needs to be chosen."""
    return make_layer(name, SIZES[0], "float32", 0), make_inputs(name, SIZES[0], seq, "float32", 0)


def scan_plainly(layer: Any, x: Any, state: Any, reset: Any = None, length: Any = None) -> Any:
    return layer.scan(x, state, reset=reset, length=length)


scan = quick(scan_plainly)


@quick
def step(layer: Any, x: Any, state: Any) -> Any:
    return layer.step(x, state)


def fold(layer: Any, x: np.ndarray, state: Any, reset: np.ndarray | None = None) -> Any:
    """`step`, one token after another, with the empty past where `reset` is true."""
    y = []
    for t in range(len(x)):
        if reset is not None and reset[t]:
            state = layer.init_state(max_len=128)
        y_t, state = step(layer, x[t], state)
        y.append(np.asarray(y_t))
    return np.stack(y), state


def fold_in_jax(layer: Any, state: Any, x: Any) -> Any:
    """`fold` as one differentiable function."""
    state, y = lax.scan(lambda state, x_t: layer.step(x_t, state)[::-1], state, x)
    return y, state


def assert_close(got: Any, want: Any, dtype: str) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in leaves:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if jax.tree_util.keystr(path).endswith(".angle"):  # The same angle, whole turns away.
            a = a - 2 * np.pi * np.round((a - b) / (2 * np.pi))
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


def precision(dtype: str) -> Any:
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
