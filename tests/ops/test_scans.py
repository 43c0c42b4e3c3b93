"""The selective scan, the linear recurrence and the convolution, without the layers around them.

The methods of an op agree with each other and with the official reference.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jaxtyping import PyTree
from safetensors.numpy import load_file

from mamba_eqx import ops
from tests.support.ops import GOLDEN, assert_close, assert_finite


pytestmark = pytest.mark.usefixtures("compile_fast")


Method = Literal["chunked", "associative", "sequential"]
FAST: list[Method] = ["chunked", "associative"]
METHODS: list[Method] = [*FAST, "sequential"]


def scan_inputs(
    seq: int, d_inner: int = 3, d_state: int = 2, dtype: str = "float64"
) -> list[jax.Array]:
    """Returns `x`, `dt`, `A`, `B`, `C`, `D` and a state."""
    rng = np.random.default_rng(seq)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return [
        normal(seq, d_inner),
        jax.nn.softplus(normal(seq, d_inner)),
        -jnp.exp(normal(d_inner, d_state)),
        normal(seq, d_state),
        normal(seq, d_state),
        normal(d_inner),
        normal(d_state, d_inner),
    ]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chunked", "associative"])
@given(
    seq=st.sampled_from([0, 1, 9, 10]),
    chunk_size=st.sampled_from([1, 4, 5, 64]),
    reset=st.booleans(),
    length=st.sampled_from([None, 0, 7]),
)
def test_selective_scan_methods_agree(
    method: Method, seq: int, chunk_size: int, reset: bool, length: int | None
):
    """Outputs, final state and all gradients agree for every chunk size."""
    *arrays, state = scan_inputs(seq)
    where = jnp.arange(seq) % 5 == 3 if reset else None
    weight = jnp.cos(jnp.arange(float(seq)))[:, None]
    if length is not None:
        length = min(length, seq)
        weight = jnp.where(jnp.arange(seq)[:, None] < length, weight, 0.0)

    def run(method: Method, chunk_size: int | None) -> PyTree:
        def loss(arrays: list[jax.Array], state: jax.Array) -> tuple[jax.Array, PyTree]:
            y, state = ops.selective_scan(
                *arrays,
                state=state,
                reset=where,
                length=length,
                method=method,
                chunk_size=chunk_size,
            )
            return jnp.sum(weight * y) + jnp.sum(jnp.sin(state)), (weight * y, state)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, state)

    assert_close(run(method, chunk_size), run("sequential", None))


@pytest.mark.parametrize("method", METHODS)
def test_selective_scan_matches_official_reference(method: Method):
    golden = load_file(GOLDEN / "selective_scan_ref" / "golden.safetensors")
    names = ["x", "dt", "A", "B", "C", "D"]
    inputs = [jnp.asarray(golden[name]) for name in names]

    def objective(*inputs: jax.Array) -> tuple[jax.Array, PyTree]:
        y, state = ops.selective_scan(*inputs, method=method, chunk_size=4)
        value = jnp.sum(golden["weight.y"] * y) + jnp.sum(golden["weight.state"].T * state)
        return value, (y, state.T)

    (value, out), grads = jax.value_and_grad(objective, argnums=range(6), has_aux=True)(*inputs)
    assert_close((value, *out), (golden["objective"], golden["y"], golden["state"]), 1e-13)
    assert_close(grads, tuple(golden[f"grad.{name}"] for name in names), 1e-13)


def test_selective_scan_matches_official_softplus():
    """Step sizes range from far below 0 to far above 20, where torch's softplus is the identity."""
    golden = load_file(GOLDEN / "selective_scan_ref_softplus" / "golden.safetensors")
    names = ["x", "dt_raw", "dt_bias", "A", "B", "C", "D"]

    def objective(
        x: jax.Array, dt_raw: jax.Array, dt_bias: jax.Array, *rest: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        y, state = ops.selective_scan(x, jax.nn.softplus(dt_raw + dt_bias), *rest)
        value = jnp.sum(golden["weight.y"] * y) + jnp.sum(golden["weight.state"].T * state)
        return value, (y, state.T)

    inputs = [jnp.asarray(golden[name]) for name in names]
    (_, out), grads = jax.value_and_grad(objective, argnums=range(7), has_aux=True)(*inputs)
    # Above 20 torch's softplus differs from ours by up to exp(-20) = 2e-9.
    for got, want in zip(out, (golden["y"], golden["state"]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12)
    for got, name in zip(grads, names, strict=True):
        np.testing.assert_allclose(got, golden[f"grad.{name}"], rtol=1e-8, atol=1e-30)


def test_forward_mode_equals_that_of_sequential_method():
    inputs = scan_inputs(9)
    tangents = [jnp.sin(7 * a) for a in inputs]
    reset = jnp.arange(9) == 5

    @functools.partial(jax.jit, static_argnums=0)
    def derivative(method: Method, inputs: list[jax.Array], tangents: list[jax.Array]) -> PyTree:
        def run(*inputs: jax.Array) -> PyTree:
            *arrays, state = inputs
            options = {"state": state, "reset": reset, "chunk_size": 4}
            return ops.selective_scan(*arrays, method=method, **options)

        return jax.jvp(run, inputs, tangents)

    want = derivative("sequential", inputs, tangents)
    assert_close(derivative("chunked", inputs, tangents), want)


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_equal_those_of_sequential_method(inner: Any, outer: Any):
    """All modes can be nested, for arguments that meet in products only, and under `vmap`."""
    inputs = scan_inputs(5)

    def second(method: Method, inputs: list[jax.Array]) -> PyTree:
        def loss(*inputs: jax.Array) -> jax.Array:
            *arrays, state = inputs
            y, last = ops.selective_scan(*arrays, state=state, method=method, chunk_size=2)
            return jnp.sum(y) + jnp.sum(jnp.sin(last))

        return outer(inner(loss, argnums=(0, 1, 2)), argnums=(3, 4, 6))(*inputs)

    batch = [jnp.stack([a, a / 2]) for a in inputs]
    got = jax.vmap(functools.partial(second, "chunked"))(batch)
    for i in range(2):
        want = second("sequential", [a[i] for a in batch])
        assert_close(jax.tree.map(lambda a: a[i], got), want)  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_match_finite_differences(method: Method):
    *arrays, state = scan_inputs(5)

    def loss(x: jax.Array, dt: jax.Array) -> jax.Array:
        y, _ = ops.selective_scan(x, dt, *arrays[2:], state=state, method=method, chunk_size=2)
        return jnp.sum(y**2)

    jax.test_util.check_grads(jax.grad(loss, argnums=(0, 1)), arrays[:2], order=1, modes=["rev"])


def test_default_method_never_holds_all_states():
    """Both passes together need far less memory than `seq * d_inner * d_state` numbers."""
    seq, d_inner, d_state = 2048, 8, 16
    *arrays, state = scan_inputs(seq, d_inner, d_state)

    def loss(method: Method, arrays: list[jax.Array], state: jax.Array) -> jax.Array:
        y, state = ops.selective_scan(*arrays, state=state, method=method)
        return jnp.sum(y) + jnp.sum(state)

    def memory(method: Method) -> int:
        grad = jax.jit(lambda *a: jax.grad(loss, argnums=(1, 2))(method, *a))
        analysis = grad.lower(arrays, state).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    full = seq * d_inner * d_state * arrays[0].dtype.itemsize
    assert memory("chunked") <= full // 4
    assert memory("sequential") >= full  # The test would notice.


@pytest.mark.parametrize("method", ["sequential", "associative"])
@given(reset=st.booleans(), length=st.sampled_from([None, 0, 4]), seq=st.sampled_from([0, 1, 6]))
def test_linear_recurrence_matches_loop(
    method: Literal["sequential", "associative"], reset: bool, length: int | None, seq: int
):
    rng = np.random.default_rng(seq)
    a, b, state = rng.random((seq, 2, 3)), rng.random((seq, 2, 3)), rng.random((2, 3))
    where = np.arange(seq) % 3 == 1
    n = seq if length is None else min(length, seq)
    h, hs = state, []
    for t in range(n):
        h = (0 if reset and where[t] else a[t]) * h + b[t]
        hs.append(h)
    got, last = ops.linear_recurrence(
        jnp.asarray(a),
        jnp.asarray(b),
        state=jnp.asarray(state),
        reset=jnp.asarray(where) if reset else None,
        length=None if length is None else n,
        method=method,
    )
    np.testing.assert_allclose(last, h, rtol=1e-14)
    np.testing.assert_allclose(got[:n], np.reshape(hs, (n, 2, 3)), rtol=1e-14)


@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_linear_recurrence_forgets_nan_in_the_state(
    method: Literal["sequential", "associative"],
):
    reset, state = jnp.array([False, True, False]), jnp.full(2, jnp.nan)

    def run(a: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
        return ops.linear_recurrence(a, b, state=state, reset=reset, method=method)[0][1:]

    ones = jnp.ones((3, 2))
    np.testing.assert_array_equal(run(ones, ones, state), [[1, 1], [2, 2]])
    gradient = jax.grad(lambda b: jnp.sum(run(ones, b, state)))(ones)
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 2], [1, 1]])


def test_causal_convolution_matches_numpy():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.random((9, 3)), rng.random((4, 3)), rng.random(3)
    y, state = ops.causal_conv1d(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias))
    for c in range(3):
        want = np.convolve(x[:, c], weight[::-1, c])[:9] + bias[c]
        np.testing.assert_allclose(y[:, c], want, rtol=1e-14)
    np.testing.assert_array_equal(state, x[-3:])


def test_step_of_convolution_equals_scan_bit_for_bit_in_bfloat16():
    """Both sum in float32. (In bfloat16 alone, half of the outputs would differ.)"""
    rng = np.random.default_rng(0)
    x, weight, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((3, 200), (4, 200), (200,))
    )
    state = jnp.zeros((3, 200), jnp.bfloat16)
    want, end = ops.causal_conv1d(x, weight, bias, state=state)
    for t in range(3):
        y, state = ops.causal_conv1d_step(x[t], weight, bias, state=state)
        np.testing.assert_array_equal(y, want[t])
    np.testing.assert_array_equal(state, end)


def test_extreme_step_sizes_give_finite_results():
    """Step sizes are so large that every decay underflows, or so small that nothing decays."""
    for factor in (1e-30, 1e30):
        x, dt, A, B, C, D, state = scan_inputs(70, dtype="float32")
        for method in METHODS:
            y, end = ops.selective_scan(x, dt * factor, A, B, C, D, state=state, method=method)
            assert_finite((y, end))
