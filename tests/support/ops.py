"""Helpers that the tests of several ops share."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.extend import core
from jaxtyping import PyTree


GOLDEN = Path(__file__).parents[1] / "golden"


def assert_close(got: PyTree, want: PyTree, rtol: float = 1e-12) -> None:
    """Checks that two trees agree, up to `rtol` times the largest entry of each array or 1."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max(initial=0)))


def assert_finite(tree: PyTree) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def largest_array(jaxpr: core.Jaxpr) -> int:
    """Returns the size of the largest array that a computation produces, inner jaxprs included."""
    return max(int(np.prod(shape)) for shape in _shapes(jaxpr))


def _shapes(jaxpr: core.Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)
