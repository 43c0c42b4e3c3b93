"""Helpers that the tests of several ops share."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.extend import core
from jaxtyping import PyTree

from tests.support.cases import quick


GOLDEN = Path(__file__).parents[1] / "golden"


def assert_close(got: PyTree, want: PyTree, rtol: float = 1e-12) -> None:
    """Checks that two trees agree, up to `rtol` times the largest entry of each array or 1."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1.0, np.abs(b).max(initial=0)))


def assert_finite(tree: PyTree) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


class ScanOptions(NamedTuple):
    """The options of a scan that has several methods."""

    method: Literal["chunked", "sequential"]
    chunk_size: int | None
    reset: jax.Array | None
    length: int | None


class Case(NamedTuple):
    """A sequence, where it is reset, how much of it is no padding, and the size of a chunk."""

    seq: int
    chunk_size: int | None
    resets: tuple[int, ...] | None
    length: int | None


CASES = st.builds(
    Case,
    seq=st.sampled_from([0, 1, 9, 10]),
    chunk_size=st.sampled_from([1, 4, 5, 64, None]),
    # On, beside and away from the borders of chunks; in a row; at both ends.
    resets=st.sampled_from([None, (), (0,), (4, 5), (3, 8, 9), tuple(range(10))]),
    length=st.sampled_from([None, 0, 4, 5, 7]),
)


def assert_methods_agree(
    scan: Callable[[Any, PyTree, ScanOptions], tuple[jax.Array, PyTree]],
    arrays: Any,
    state: PyTree,
    case: Case,
    *,
    per_token: Collection[int | str],
    not_finite: Collection[int | str] = (),
) -> None:
    """Checks that outputs, the final state and all gradients of an op's two methods agree, and that
    they are finite with NaN as padding.

    **Arguments:**

    - `scan`: runs the op. Takes the arrays, the state and the options.
    - `arrays`: the arguments of the op, a list or a dictionary.
    - `state`: the state before the sequence.
    - `case`: the sequence.
    - `per_token`: which of the arrays have an axis of tokens.
    - `not_finite`: the arrays whose gradients can be NaN.
    """
    seq, length = case.seq, None if case.length is None else min(case.length, case.seq)
    reset = None
    if case.resets is not None:
        reset = jnp.isin(jnp.arange(seq), jnp.array(case.resets, int))
    real = jnp.arange(seq) < (seq if length is None else length)
    of_tokens = lambda vector, like: vector.reshape((-1,) + (1,) * (like.ndim - 1))
    arrays = arrays.copy()
    for name in per_token:
        arrays[name] = jnp.where(of_tokens(real, arrays[name]), arrays[name], jnp.nan)

    def run(method: Literal["chunked", "sequential"]) -> PyTree:
        def loss(arrays: Any, state: PyTree) -> tuple[jax.Array, PyTree]:
            y, state = scan(arrays, state, ScanOptions(method, case.chunk_size, reset, length))
            y = jnp.where(of_tokens(real, y), y, 0.0)
            weight = of_tokens(jnp.cos(jnp.arange(float(seq))), y)
            total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))
            return jnp.sum(weight * y) + total, (y, state)

        return quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, state)

    got = run("chunked")
    assert_close(got, run("sequential"))
    (_, out), (gradients, state_gradient) = got
    for name in not_finite:
        gradients[name] = jnp.zeros(())
    assert_finite((out, gradients, state_gradient))


def largest_array(jaxpr: core.Jaxpr) -> int:
    """Returns the size of the largest array that a computation produces, inner jaxprs included."""
    return max(int(np.prod(shape)) for shape in _shapes(jaxpr))


def _shapes(jaxpr: core.Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)
