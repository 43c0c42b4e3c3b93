"""The layers and dtypes for which the laws in `tests/laws` are checked."""

import pytest

from tests.support.cases import DTYPES, THOROUGH
from tests.support.registry import EVERYTHING, MIXERS, SIMILAR, SIZES


def all_layers_quickly(*quick: str) -> pytest.MarkDecorator:
    """Parametrises a law by all layers that differ much. The quick run checks only those of
    `quick`."""
    slow = pytest.mark.slow
    names = [
        name if name in quick else pytest.param(name, marks=slow)
        for name in EVERYTHING
        if THOROUGH or name not in SIMILAR
    ]
    return pytest.mark.parametrize("name", names)


all_layers = pytest.mark.parametrize("name", EVERYTHING)
# The quick run checks the wider dtype of these mixers only, which compile fastest.
_QUICK_IN_FLOAT64 = {"conv", "mamba1", "mamba2"}
mixers_in_all_dtypes = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[pytest.mark.slow]
            if dtype == "bfloat16" or (dtype == "float64" and name not in _QUICK_IN_FLOAT64)
            else [],
        )
        for name in EVERYTHING
        for dtype in DTYPES
        if name in MIXERS or dtype == "float32"
    ],
)
# Once *recurrence* holds in all dtypes, one dtype is enough for the laws that concern the same
# arithmetic, and float64 reveals the smallest mistakes. Every size has to be compiled, so the quick
# run checks one.
mixers_in_float64 = pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        pytest.param(name, dtype, SIZES, id=f"{name}-{dtype}")
        for name in EVERYTHING
        for dtype in DTYPES
        if name in MIXERS or dtype == "float32"
    ]
    if THOROUGH
    else [
        pytest.param(name, dtype, SIZES[:1], id=f"{name}-{dtype}")
        for name in EVERYTHING
        for dtype in ["float64" if name in MIXERS else "float32"]
    ]
    + [
        pytest.param(
            name, "float64", SIZES[1:], id=f"{name}-float64-other_sizes", marks=pytest.mark.slow
        )
        for name in MIXERS
    ],
)
