"""The op of Gated DeltaNet without the layer around it: its methods agree with each other and with
a plain loop."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from jaxtyping import PyTree

from mamba_eqx import ops
from tests.support.ops import (
    CASES,
    Case,
    ScanOptions,
    assert_close,
    assert_finite,
    assert_methods_agree,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


Method = Literal["chunked", "sequential"]
METHODS: list[Method] = ["chunked", "sequential"]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs(
    seq: int, *, ngroups: int = 2, heads: int = 3, dtype: str = "float64"
) -> list[jax.Array]:
    """Returns `q`, `k`, `v`, `log_decay`, `beta` and a state."""
    rng, nheads, headdim, d_state = np.random.default_rng(seq), ngroups * heads, 4, 5

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    keys = normal(seq, ngroups, d_state)
    return [
        normal(seq, ngroups, d_state),
        keys / jnp.linalg.norm(keys, axis=-1, keepdims=True),
        normal(seq, nheads, headdim),
        -jax.nn.softplus(normal(seq, nheads)),
        jax.nn.sigmoid(normal(seq, nheads)),
        normal(nheads, d_state, headdim),
    ]


def loop(
    arrays: list[jax.Array], state: jax.Array, reset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the equations in the docstring, one head and one token at a time."""
    q, k, v, log_decay, beta, S = (np.array(a) for a in (*arrays, state))
    nheads, y = v.shape[1], np.zeros_like(v)
    for t in range(len(v)):
        for i in range(nheads):
            group = i // (nheads // k.shape[1])
            S[i] = 0 if reset[t] else np.exp(log_decay[t, i]) * S[i]
            error = v[t, i] - S[i].T @ k[t, group]
            S[i] += beta[t, i] * np.outer(k[t, group], error)
            y[t, i] = S[i].T @ q[t, group]
    return y, S


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("ngroups", "heads"), [(1, 1), (2, 3), (3, 1)])
def test_matches_equations(method: Method, ngroups: int, heads: int):
    *arrays, state = inputs(9, ngroups=ngroups, heads=heads)
    reset = np.isin(np.arange(9), [4, 7])
    got = ops.gated_delta(
        *arrays, state=state, reset=jnp.asarray(reset), method=method, chunk_size=4
    )
    assert_close(got, loop(arrays, state, reset), 1e-14)


@pytest.mark.slow
@given(CASES)
def test_methods_agree(case: Case):
    """Outputs, final state and all gradients agree for every chunk size and with NaN as padding."""
    *arrays, state = inputs(case.seq)

    def scan(arrays: list[jax.Array], state: jax.Array, options: ScanOptions) -> PyTree:
        return ops.gated_delta(*arrays, state=state, **options._asdict())

    assert_methods_agree(scan, arrays, state, case, per_token=range(5))


@pytest.mark.slow
def test_reset_forgets_non_finite_state():
    """Outputs after the reset, the final state and the gradients of later inputs are finite. Before
    the reset, only the columns of the state that are not finite spoil outputs."""
    *arrays, state = inputs(8)
    spoiled = state.at[1, 2, 3].set(jnp.nan).at[4].set(jnp.inf)

    @jax.jit
    def run(arrays: list[jax.Array], state: jax.Array, at: jax.Array) -> PyTree:
        reset = jnp.arange(8) == at

        def loss(arrays: list[jax.Array]) -> tuple[jax.Array, PyTree]:
            y, end = ops.gated_delta(*arrays, state=state, reset=reset, chunk_size=4)
            later = (jnp.arange(8) >= at)[:, None, None]
            return jnp.sum(jnp.where(later, jnp.cos(y), 0)) + jnp.sum(jnp.sin(end)), (y, end)

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        return out, grads

    lost = np.zeros((6, 4), bool)
    lost[1, 3] = lost[4] = True
    for at in (0, 3, 4, 6):
        ((y, end), grads), ((want_y, want_end), want_grads) = (
            run(arrays, start, jnp.asarray(at)) for start in (spoiled, state)
        )
        got = (y[at:], end, [grad[at:] for grad in grads])
        assert_finite(got)
        assert_close(got, (want_y[at:], want_end, [grad[at:] for grad in want_grads]))
        assert not np.isfinite(y[:at, lost]).any()
        assert_close(y[:at, ~lost], want_y[:at, ~lost])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_match_finite_differences(method: Method):
    """Forward and reverse mode."""
    reset = jnp.arange(5) == 3

    @jax.jit
    def run(*arrays: jax.Array) -> PyTree:
        *inputs, state = arrays
        return ops.gated_delta(*inputs, state=state, reset=reset, method=method, chunk_size=2)

    jax.test_util.check_grads(run, tuple(inputs(5)), order=2, modes=["fwd", "rev"])


@pytest.mark.slow
@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_replaces_values_of_equal_keys(correction: float):
    """With `beta = 1` a state returns the last value of a repeated key, and with `beta = 0` it does
    not change; the corrections of a whole chunk of equal keys are computed without loss."""
    *_, v, log_decay, beta, state = inputs(64)
    k = jnp.tile(jnp.eye(5)[3], (64, 2, 1))
    beta, log_decay = jnp.full_like(beta, correction), jnp.zeros_like(log_decay)
    y, end = ops.gated_delta(k, k, v, log_decay, beta, state=state, chunk_size=64)
    if correction:
        assert_close(y, v, 1e-14)
        assert_close(end, state.at[:, 3].set(v[-1]), 1e-14)
    else:
        assert_close((y, end), (jnp.tile(state[:, 3], (64, 1, 1)), state), 1e-14)
