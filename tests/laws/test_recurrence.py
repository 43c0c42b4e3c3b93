"""`scan` and `step` compute one function, whatever the state, `reset` and `length`."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.support.cases import (
    assert_close,
    fixed_case,
    fold,
    make_case,
    plans,
    precision,
    scan,
)
from tests.support.laws import all_layers, mixers_in_all_dtypes, mixers_in_float64
from tests.support.registry import LANGUAGE_MODELS, MIXERS, SIZES, Sizes


pytestmark = pytest.mark.usefixtures("compile_fast")


@mixers_in_all_dtypes
@given(data=st.data())
def test_recurrence(name: str, dtype: str, data: Any):
    """`scan` equals `step` folded over the sequence, in outputs and state, from any state."""
    with precision(dtype):
        # The mathematics is the same in all dtypes, and float64 reveals the smallest mistakes.
        sizes = SIZES if name in MIXERS and dtype == "float64" else None
        case = make_case(name, data.draw(plans(name, sizes)), dtype)
        assert_close(
            scan(case.layer, case.x, case.state), fold(case.layer, case.x, case.state), dtype
        )


@mixers_in_float64
@given(data=st.data())
def test_splitting(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` of two pieces, the second from the first one's state, equals `scan` of both joined."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, sizes)), dtype)
        y1, middle = scan(case.layer, case.x[: case.cut], case.state, case.reset[: case.cut])
        y2, end = scan(case.layer, case.x[case.cut :], middle, case.reset[case.cut :])
        y = np.concatenate([np.asarray(y1), np.asarray(y2)])
        assert_close((y, end), scan(case.layer, case.x, case.state, case.reset), dtype)


@all_layers
@given(data=st.data())
def test_causality(name: str, data: Any):
    """A token influences no output before it, bit by bit.

    With a mixture of experts it may influence the rounding: the number of tokens of an expert
    decides in which blocks their product is computed.
    """
    case = make_case(name, data.draw(plans(name)))
    other = case.x.copy()
    other[case.cut :] = 1 - case.x[case.cut :]
    y, changed = scan(case.layer, case.x, case.state)[0], scan(case.layer, other, case.state)[0]
    if "mixture" in name:
        assert_close(y[: case.cut], changed[: case.cut], "float32")
    else:
        np.testing.assert_array_equal(y[: case.cut], changed[: case.cut])


@mixers_in_float64
@given(data=st.data())
def test_reset(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` with `reset` equals separate runs of the segments, the first from the given state."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, sizes)), dtype)
        want = fold(case.layer, case.x, case.state, case.reset)
        assert_close(scan(case.layer, case.x, case.state, case.reset), want, dtype)


@all_layers
def test_reset_forgets_nan(name: str):
    """NaN in the state does not survive a reset."""
    layer, x = fixed_case(name, 4)
    reset = np.array([True, False, False, False])
    empty = layer.init_state(max_len=128)
    # A counter cannot be NaN, so it counts some tokens.
    state = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 5), empty
    )
    assert_close(scan(layer, x, state, reset), scan(layer, x, empty, reset), "float32")


@mixers_in_float64
@given(data=st.data())
def test_length(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` with `length` equals `scan` of the real tokens, even if padding has NaN or resets."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, sizes)), dtype)
        n = case.cut
        want = scan(case.layer, case.x[:n], case.state, case.reset[:n])
        x = case.x.copy()
        if name not in LANGUAGE_MODELS:
            x[n:] = np.nan
        y, end = scan(case.layer, x, case.state, case.reset, n)
        assert_close((y[:n], end), want, dtype)
