"""The laws, each a function that raises an `AssertionError` if a layer breaks the law.

`check_laws` and the tests of this library call them with their own layers and cases. `x` is a
sequence, `dtype` the dtype whose tolerance applies.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._running import (
    CAPACITY,
    assert_close,
    assert_same_structure,
    fold,
    fold_in_jax,
    is_float,
    quick,
    scan,
    scan_uncompiled,
    step,
    step_uncompiled,
)


class Case(NamedTuple):
    """A layer and a sequence with all its options."""

    layer: Any
    x: Any
    state: Any
    reset: Any
    cut: int
    """An index at which to cut the sequence, within `0..seq`."""


def recurrence(case: Case, dtype: str) -> None:
    """`scan` equals `step` folded over the sequence, in outputs and state, from any state."""
    want = fold(case.layer, case.x, case.state)
    assert np.all(np.isfinite(np.asarray(want[0], np.float64))), "The outputs are not finite."
    assert_close(scan(case.layer, case.x, case.state), want, dtype)


def splitting(case: Case, dtype: str) -> None:
    """`scan` of two pieces, the second from the first one's state, equals `scan` of both joined."""
    y1, middle = scan(case.layer, case.x[: case.cut], case.state, case.reset[: case.cut])
    y2, end = scan(case.layer, case.x[case.cut :], middle, case.reset[case.cut :])
    y = np.concatenate([np.asarray(y1), np.asarray(y2)])
    assert_close((y, end), scan(case.layer, case.x, case.state, case.reset), dtype)


def causality(case: Case, dtype: str, *, exactly: bool) -> None:
    """A token influences no output before it, bit by bit or except for rounding."""
    other = np.array(case.x)
    other[case.cut :] = 1 - other[case.cut :]
    y, changed = scan(case.layer, case.x, case.state)[0], scan(case.layer, other, case.state)[0]
    if exactly:
        np.testing.assert_array_equal(y[: case.cut], changed[: case.cut])
    else:
        assert_close(y[: case.cut], changed[: case.cut], dtype)


def reset(case: Case, dtype: str) -> None:
    """`scan` with `reset` equals separate runs of the segments, the first from the given state."""
    want = fold(case.layer, case.x, case.state, case.reset)
    assert_close(scan(case.layer, case.x, case.state, case.reset), want, dtype)


def reset_forgets_nan(layer: Any, x: Any, dtype: str) -> None:
    """NaN in the state does not survive a reset."""
    first = np.arange(len(x)) == 0
    empty = layer.init_state(max_len=CAPACITY)
    # A counter cannot be NaN, so it counts some tokens.
    state = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan if is_float(a) else 5), empty)
    assert_close(scan(layer, x, state, first), scan(layer, x, empty, first), dtype)


def length(case: Case, dtype: str) -> None:
    """`scan` with `length` equals `scan` of the real tokens, even if padding has NaN or resets."""
    n = case.cut
    want = scan(case.layer, case.x[:n], case.state, case.reset[:n])
    x = np.array(case.x)
    if is_float(x):
        x[n:] = np.nan
    y, end = scan(case.layer, x, case.state, case.reset, n)
    assert_close((y[:n], end), want, dtype)


def length_of_any_integer_dtype(layer: Any, x: Any, dtypes: tuple[str, ...]) -> None:
    """`length` may have any integer dtype."""
    state, starts = layer.init_state(max_len=CAPACITY), jnp.arange(len(x)) % 2 == 0
    for dtype in dtypes:
        n = jax.ShapeDtypeStruct((), dtype)
        jax.eval_shape(scan_uncompiled, layer, jnp.asarray(x), state, starts, n)


def length_in_gradients(layer: Any, x: Any, n: int, dtype: str, *, factor: float = 1.0) -> None:
    """The gradients of a padded sequence are those of its first `n` tokens, whatever the padding
    holds; a cache has room for these tokens only."""
    starts = jnp.isin(jnp.arange(len(x)), jnp.array([2, 5]))

    def padded(layer: Any, state: Any, x: Any) -> Any:
        y, state = layer.scan(x, state, reset=starts, length=n)
        return y[:n], state

    def alone(layer: Any, state: Any, x: Any) -> Any:
        return layer.scan(x[:n], state, reset=starts[:n])

    arguments = layer, layer.init_state(max_len=n), jnp.asarray(x)
    want = _gradients(alone, *arguments)
    assert_close(_gradients(padded, *arguments), want, dtype, factor=factor)


def empty(layer: Any, x: Any) -> None:
    """A sequence without tokens has no outputs and leaves the state as it is."""
    state = jax.tree.map(jnp.ones_like, layer.init_state(max_len=2))
    x, starts = jnp.asarray(x[:0]), jnp.zeros(0, bool)
    for options in ({}, {"reset": starts, "length": jnp.array(0)}):
        y, end = layer.scan(x, state, **options)
        assert_same_structure(y, jax.eval_shape(layer, x))
        if y.shape[0] != 0:
            raise AssertionError(f"No tokens must have no outputs, but got {y.shape[0]} outputs.")
        jax.tree.map(np.testing.assert_array_equal, end, state)


def closure(layer: Any, x: Any, *, all_options: bool = True) -> None:
    """`init_state`, `scan` and `step` return the same structure, shapes and dtypes."""
    x = jnp.asarray(x)
    state, starts = layer.init_state(max_len=CAPACITY), jnp.arange(len(x)) == 1
    like = jax.eval_shape(lambda: state)
    # Without a state, the capacity of a cache is the length of the sequence.
    alone = jax.eval_shape(lambda: layer.init_state(max_len=len(x)))
    many = itertools.product((None, state), (None, starts), (None, jnp.array(2)))
    for options in many if all_options else [(None, starts, None), (state, None, None)]:
        want = alone if options[0] is None else like
        assert_same_structure(jax.eval_shape(scan_uncompiled, layer, x, *options)[1], want)
    assert_same_structure(jax.eval_shape(step_uncompiled, layer, x[0], state)[1], like)


def closure_under_lax_scan(layer: Any, x: Any, dtype: str) -> None:
    """A state is a valid carry of `jax.lax.scan`."""
    state = layer.init_state(max_len=CAPACITY)
    assert_close(fold_in_jax(layer, state, x), scan(layer, x, state), dtype)


def dtype(layer: Any, x: Any, dtype: str) -> None:
    """The output has the dtype `dtype` of the input, whatever the dtype of the parameters."""
    x, state = jnp.asarray(x), layer.init_state(max_len=CAPACITY)
    found = (
        jax.eval_shape(layer, x).dtype,
        jax.eval_shape(step_uncompiled, layer, x[0], state)[0].dtype,
    )
    if found != (jnp.dtype(dtype), jnp.dtype(dtype)):
        raise AssertionError(
            f"For inputs of dtype {dtype}, `layer(x)` has the dtype {found[0]} and `step` "
            f"{found[1]}."
        )


def batching(layer: Any, x: Any, pasts: list[Any], reset: Any, dtype: str) -> None:
    """`vmap` of `scan` and of `step` equals a loop over the batch. `x` has three rows of four
    tokens."""
    n = np.array([4, 0, 2])

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    batched = jax.vmap(scan, in_axes=(None, 0, 0, 0, 0))
    y, states = batched(layer, x, stack(pasts), reset, n)
    for i in range(3):
        y_i, state = scan(layer, x[i], pasts[i], reset[i], n[i])
        assert_close(y[i, : n[i]], y_i[: n[i]], dtype)
        assert_close(jax.tree.map(lambda leaf: leaf[i], states), state, dtype)  # noqa: B023

    one_by_one = stack([step(layer, x[i, 0], pasts[i]) for i in range(3)])
    batched = jax.vmap(step, in_axes=(None, 0, 0))
    assert_close(batched(layer, x[:, 0], stack(pasts)), one_by_one, dtype)


def donation(layer: Any, x: Any, dtype: str) -> None:
    """The state can be donated to `step` and to `scan`, the initial one included."""
    x = jnp.asarray(x)
    donating_step = jax.jit(lambda x, state: layer.step(x, state), donate_argnums=1)
    donating_scan = jax.jit(lambda x, state: layer.scan(x, state), donate_argnums=1)
    y, state = donating_step(x[0], layer.init_state(max_len=CAPACITY))
    rest, state = donating_scan(x[1:], state)
    y_end, state = donating_step(x[0], state)
    want, past = scan(layer, x, layer.init_state(max_len=CAPACITY))
    assert_close(jnp.concatenate([y[None], rest]), want, dtype)
    assert_close((y_end, state), step(layer, x[0], past), dtype)


def pytree(layer: Any, other: Any, x: Any, dtype: str) -> None:
    """`jax.jit`, `jax.grad`, `jax.tree.map` and serialisation work on layers. `other` has the same
    structure and other parameters."""
    x = jnp.asarray(x)
    # Only the integers of quantised maps have no gradient; all other layers are `varied` whole.
    varied, fixed = eqx.partition(layer, eqx.is_inexact_array)
    loss_of = lambda varied: jnp.mean(eqx.combine(varied, fixed)(x) ** 2)
    value_and_grad = quick(jax.value_and_grad(loss_of))
    loss, grads = value_and_grad(varied)
    assert_same_structure(grads, varied)
    # NumPy needs no compilation.
    norm = np.sqrt(sum(np.square(np.asarray(g)).sum() for g in jax.tree.leaves(grads)))
    # Otherwise the change of the loss is not larger than its rounding.
    if dtype in ("float32", "float64") and norm > 0.01 * loss:
        rate = 1e-3 / norm
        moved = jax.tree.map(lambda p, g: np.asarray(p) - rate * np.asarray(g), varied, grads)
        if not value_and_grad(moved)[0] < loss:
            raise AssertionError("A small step against the gradient does not reduce a loss.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.eqx"
        eqx.tree_serialise_leaves(path, layer)
        jax.tree.map(np.testing.assert_array_equal, eqx.tree_deserialise_leaves(path, other), layer)


def jit(layer: Any, other: Any, x: Any, dtype: str, *, run_step: Callable[..., Any]) -> None:
    """Every method gives the same result under `jit`, and other values do not recompile. `x` has
    seven tokens; `other` has the structure of `layer`; `run_step` is its `step`, not compiled."""
    x, state = jnp.asarray(x), layer.init_state(max_len=CAPACITY)
    starts, n = jnp.arange(7) == 3, jnp.array(5)
    traces = []

    @jax.jit
    def run(layer: Any, x: Any, state: Any, reset: Any, length: Any) -> Any:
        traces.append(1)
        y, state = layer.scan(x, state, reset=reset, length=length)
        y_t, state = layer.step(x[0], state)
        return layer(x), y[:5], y_t, state

    y, end = scan(layer, x, state, starts, n)
    y_t, end = run_step(x[0], end)
    assert_close(run(layer, x, state, starts, n), (scan(layer, x, None)[0], y[:5], y_t, end), dtype)
    run(other, 1 - x, end, ~starts, n + 1)
    if len(traces) != 1:
        raise AssertionError("A second call with the same shapes compiles again.")


def gradients(layer: Any, state: Any, x: Any, dtype: str, *, factor: float = 1.0) -> None:
    """The gradients of `scan` equal the gradients of `step` folded: for inputs, parameters and
    initial state, through the outputs and through the final state."""
    x = jnp.asarray(x)
    want = _gradients(fold_in_jax, layer, state, x)
    for path, leaf in jax.tree.leaves_with_path(want):
        if not np.isfinite(leaf).all():
            raise AssertionError(f"The gradient of `step` is not finite at {path}.")
    got = _gradients(lambda layer, state, x: layer.scan(x, state), layer, state, x)
    assert_close(got, want, dtype, factor=factor)


def _gradients(run: Any, *arguments: Any) -> Any:
    """Returns the gradients of a random linear function of all that `run` returns, for all
    arguments. Token ids and counters have no derivative."""
    varied, fixed = eqx.partition(arguments, eqx.is_inexact_array)

    def loss(varied: Any) -> Any:
        out, rng = run(*eqx.combine(varied, fixed)), np.random.default_rng(2)
        leaves = jax.tree.leaves(eqx.filter(out, eqx.is_inexact_array))
        weights = [jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
        return sum(map(jnp.vdot, weights, leaves))

    return quick(jax.grad(loss))(varied)
