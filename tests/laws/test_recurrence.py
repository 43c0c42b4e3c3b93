"""`scan` and `step` compute one function, whatever the state, `reset` and `length`."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from mamba_eqx.testing import _laws as laws
from tests.support.cases import (
    fixed_case,
    make_case,
    plans,
    precision,
)
from tests.support.laws import all_layers, mixers_in_all_dtypes, mixers_in_float64
from tests.support.registry import MIXERS, SIZES, Sizes


pytestmark = pytest.mark.usefixtures("compile_fast")


@mixers_in_all_dtypes
@given(data=st.data())
def test_recurrence(name: str, dtype: str, data: Any):
    """`scan` equals `step` folded over the sequence, in outputs and state, from any state."""
    with precision(dtype):
        # The mathematics is the same in all dtypes, and float64 reveals the smallest mistakes.
        sizes = SIZES if name in MIXERS and dtype == "float64" else None
        laws.recurrence(make_case(name, data.draw(plans(name, sizes)), dtype), dtype)


@mixers_in_float64
@given(data=st.data())
def test_splitting(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` of two pieces, the second from the first one's state, equals `scan` of both joined."""
    with precision(dtype):
        laws.splitting(make_case(name, data.draw(plans(name, sizes)), dtype), dtype)


@all_layers
@given(data=st.data())
def test_causality(name: str, data: Any):
    """A token influences no output before it, bit by bit.

    With a mixture of experts it may influence the rounding: the number of tokens of an expert
    decides in which blocks their product is computed.
    """
    case = make_case(name, data.draw(plans(name)))
    laws.causality(case, "float32", exactly="mixture" not in name)


@mixers_in_float64
@given(data=st.data())
def test_reset(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` with `reset` equals separate runs of the segments, the first from the given state."""
    with precision(dtype):
        laws.reset(make_case(name, data.draw(plans(name, sizes)), dtype), dtype)


@all_layers
def test_reset_forgets_nan(name: str):
    """NaN in the state does not survive a reset."""
    laws.reset_forgets_nan(*fixed_case(name, 4), "float32")


@mixers_in_float64
@given(data=st.data())
def test_length(name: str, dtype: str, sizes: list[Sizes], data: Any):
    """`scan` with `length` equals `scan` of the real tokens, even if padding has NaN or resets."""
    with precision(dtype):
        laws.length(make_case(name, data.draw(plans(name, sizes)), dtype), dtype)
