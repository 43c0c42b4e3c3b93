"""The op of Mamba-2 without the layer around it, and the gated norm.

Its methods agree with each other, with a plain loop and with the official reference.
"""

from collections.abc import Iterator, Sequence
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
from tests.support.ops import (
    CASES,
    GOLDEN,
    Case,
    ScanOptions,
    assert_close,
    assert_finite,
    assert_methods_agree,
    largest_array,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


Method = Literal["chunked", "sequential"]
METHODS: list[Method] = ["chunked", "sequential"]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs(
    seq: int,
    *,
    ngroups: int = 2,
    heads: int = 3,
    headdim: int = 4,
    d_state: int = 5,
    per_channel: bool = False,
    dtype: str = "float64",
) -> list[jax.Array]:
    """Returns `x`, `dt`, `A`, `B`, `C`, `D` and a state."""
    rng, nheads = np.random.default_rng(seq), ngroups * heads

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return [
        normal(seq, nheads, headdim),
        jax.nn.softplus(normal(seq, nheads)),
        -jnp.exp(normal(nheads)),
        normal(seq, ngroups, d_state),
        normal(seq, ngroups, d_state),
        normal(nheads, headdim) if per_channel else normal(nheads),
        normal(d_state, nheads, headdim),
    ]


def loop(
    arrays: list[jax.Array], state: jax.Array, reset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the equations in the docstring, one number at a time."""
    x, dt, A, B, C, D, h = (np.array(a) for a in (*arrays, state))
    nheads, headdim = x.shape[1:]
    y = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(nheads):
            group = i // (nheads // B.shape[1])
            for p in range(headdim):
                for n in range(len(h)):
                    past = 0 if reset[t] else np.exp(dt[t, i] * A[i]) * h[n, i, p]
                    h[n, i, p] = past + dt[t, i] * B[t, group, n] * x[t, i, p]
                    y[t, i, p] += C[t, group, n] * h[n, i, p]
                y[t, i, p] += (D[i] if D.ndim == 1 else D[i, p]) * x[t, i, p]
    return y, h


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("ngroups", "heads"), [(1, 1), (2, 3), (3, 1)])
def test_matches_equations(method: Method, per_channel: bool, ngroups: int, heads: int):
    *arrays, state = inputs(9, ngroups=ngroups, heads=heads, per_channel=per_channel)
    reset = np.isin(np.arange(9), [4, 7])
    got = ops.ssd(*arrays, state=state, reset=jnp.asarray(reset), method=method, chunk_size=4)
    assert_close(got, loop(arrays, state, reset), 1e-14)


@pytest.mark.parametrize(
    ("method", "chunk_size"), [("chunked", 4), ("chunked", 5), ("chunked", None), ("sequential", 1)]
)
def test_matches_official_reference(method: Method, chunk_size: int | None):
    """The reference is `ssd_minimal_discrete`, with groups and an initial state. The official tests
    compare their kernels to it. It has no skip connection."""
    golden = load_file(GOLDEN / "ssd_minimal" / "golden.safetensors")
    names = ["x", "dt", "A", "B", "C", "state"]

    def objective(*inputs: jax.Array) -> tuple[jax.Array, PyTree]:
        *arrays, state = inputs
        y, end = ops.ssd(*arrays, None, state=state, method=method, chunk_size=chunk_size)
        value = jnp.sum(golden["weight.y"] * y) + jnp.sum(golden["weight.end"] * end)
        return value, (y, end)

    inputs = [jnp.asarray(golden[name]) for name in names]
    (value, out), grads = jax.value_and_grad(objective, argnums=range(6), has_aux=True)(*inputs)
    assert_close((value, *out), (golden["objective"], golden["y"], golden["end"]), 1e-14)
    assert_close(grads, tuple(golden[f"grad.{name}"] for name in names), 1e-13)


@pytest.mark.slow
@given(CASES, st.booleans())
def test_methods_agree(case: Case, per_channel: bool):
    """Outputs, final state and all gradients agree for every chunk size and with NaN as padding."""
    *arrays, state = inputs(case.seq, per_channel=per_channel)

    def scan(arrays: list[jax.Array], state: jax.Array, options: ScanOptions) -> PyTree:
        return ops.ssd(*arrays, state=state, **options._asdict())

    # The gradient of D is NaN, because the skip connection multiplies D by the padding.
    assert_methods_agree(scan, arrays, state, case, per_token=(0, 1, 3, 4), not_finite=(5,))


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_match_finite_differences(method: Method):
    """Forward and reverse mode."""
    reset = jnp.arange(5) == 3

    @jax.jit
    def run(*arrays: jax.Array) -> PyTree:
        *inputs, state = arrays
        return ops.ssd(*inputs, state=state, reset=reset, method=method, chunk_size=2)

    jax.test_util.check_grads(run, inputs(5), order=1, modes=["fwd", "rev"])


@pytest.mark.slow
def test_second_derivatives_match_finite_differences():
    *arrays, state = inputs(5)

    def loss(x: jax.Array, dt: jax.Array) -> jax.Array:
        y, _ = ops.ssd(x, dt, *arrays[2:], state=state, chunk_size=2)
        return jnp.sum(y**2)

    jax.test_util.check_grads(jax.grad(loss, argnums=(0, 1)), arrays[:2], order=1, modes=["rev"])


def value_and_gradients(arrays: Sequence[jax.Array], **options: Any) -> PyTree:
    def loss(*arrays: jax.Array) -> tuple[jax.Array, PyTree]:
        *inputs, state = arrays
        y, state = ops.ssd(*inputs, state=state, **options)
        return jnp.sum(y) + jnp.sum(state), (y, state)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7)), has_aux=True))(*arrays)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "rate", [1e30, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (1e-30, 1e3))]
)
def test_extreme_rates_give_finite_gradients(rate: float, dtype: str):
    """Rates are so large that every decay underflows, or so small that nothing decays."""
    arrays = inputs(70, dtype=dtype)
    arrays[2] = arrays[2] * 0 - rate
    arrays[1] = arrays[1].at[40:].mul(0).at[10:15].mul(1e-3)
    got = value_and_gradients(arrays)
    assert_finite(got)
    assert_close(
        got,
        value_and_gradients(arrays, method="sequential"),
        {"float32": 1e-5, "float64": 1e-13}[dtype],
    )


def test_strong_decay_in_long_chunks_gives_finite_gradients():
    """The rate is -1e3, in chunks of 256 with resets on and beside their borders."""
    arrays = inputs(300, dtype="float32")
    arrays[2] = jnp.full_like(arrays[2], -1e3)
    options: Any = {"reset": jnp.isin(jnp.arange(300), jnp.array([0, 100, 255, 256, 299]))}
    got = value_and_gradients(arrays, chunk_size=256, **options)
    assert_finite(got)
    assert_close(got, value_and_gradients(arrays, method="sequential", **options), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_infinite_decay_forgets_everything(method: Method):
    """`dt * A` may overflow to minus infinity, of which a difference would be NaN."""
    x = jnp.ones((4, 1, 1))
    dt = jnp.array([1.0, 1e200, 1.0, 1.0])[:, None]
    B = jnp.array([2.0, 0.0, 0.0, 3.0])[:, None, None]
    y, state = ops.ssd(x, dt, -jnp.full(1, 1e200), B, jnp.ones_like(B), None, method=method)
    np.testing.assert_array_equal(y.ravel(), [2.0, 0.0, 0.0, 3.0])
    np.testing.assert_array_equal(state.ravel(), [3.0])


def test_strong_decay_keeps_later_decays_exact():
    """A difference of cumulative sums would lose a step of 0.1 after one of 1e9."""
    arrays = inputs(20, dtype="float32")
    arrays[2] = jnp.full_like(arrays[2], -1)
    arrays[1] = jnp.full_like(arrays[1], 0.1).at[3].set(1e9)
    want = ops.ssd(*arrays[:6], state=arrays[6], method="sequential")
    got = ops.ssd(*arrays[:6], state=arrays[6])
    assert_close((got[0] * 1e-9, got[1] * 1e-9), (want[0] * 1e-9, want[1] * 1e-9), 1e-6)
    arrays[0] = arrays[0].at[3].set(0)
    want = ops.ssd(*arrays[:6], state=arrays[6], method="sequential")
    assert_close(ops.ssd(*arrays[:6], state=arrays[6]), want, 1e-6)


@pytest.mark.parametrize("at", [0, 3, 4, 6])
def test_reset_forgets_non_finite_state(at: int):
    """Outputs after the reset, the final state and the gradients of later inputs are finite."""
    arrays = inputs(8)
    arrays[6] = jnp.full_like(arrays[6], jnp.nan)
    clean = [*arrays[:6], jnp.zeros_like(arrays[6])]
    reset = jnp.arange(8) == at

    def run(arrays: list[jax.Array]) -> PyTree:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, PyTree]:
            *inputs, state = arrays
            y, state = ops.ssd(*inputs, state=state, reset=reset, chunk_size=4)
            return jnp.sum(jnp.cos(y[at:])) + jnp.sum(jnp.sin(state)), (y[at:], state)

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4, 5, 6), has_aux=True)(
            *arrays
        )
        x, dt, A, B, C, D, state = grads
        # If tokens before the reset decay the NaN state, the gradient of A is NaN in every method.
        return out, x[at:], dt[at:], A if at == 0 else None, B[at:], C[at:], D, state

    got = run(arrays)
    assert_finite(got)
    assert_close(got, run(clean))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_outputs_keep_dtype_and_state_is_float32(dtype: str):
    *arrays, state = inputs(5, dtype=dtype)
    y, end = jax.eval_shape(lambda *a: ops.ssd(*a, state=state), *arrays)
    assert (y.dtype, end.dtype) == (dtype, jnp.float32)
    y, end = jax.eval_shape(
        lambda *a: ops.ssd_step(*a, state=state),
        *[a[0] for a in arrays[:2]],
        arrays[2],
        *[a[0] for a in arrays[3:5]],
        arrays[5],
    )
    assert (y.dtype, end.dtype) == (dtype, jnp.float32)


def test_default_method_holds_nothing_larger_than_x():
    """Neither pass holds the state or the attention of every token."""
    seq, heads, headdim, d_state = 512, 2, 8, 16
    arrays = inputs(seq, ngroups=1, heads=heads, headdim=headdim, d_state=d_state)

    def largest(method: Method) -> int:
        jaxpr = jax.make_jaxpr(lambda *a: value_and_gradients(a, method=method, chunk_size=32))
        return largest_array(jaxpr(*arrays).jaxpr)

    assert largest("chunked") <= seq * heads * headdim
    assert largest("sequential") >= seq * heads * headdim * d_state  # The test would notice.


@pytest.mark.slow
def test_reverse_pass_stores_one_state_per_chunk():
    """Each token adds its share of its chunk's state, its inputs and its gradients to the memory.

    No token adds a state or a row of the attention, both of which have 1024 numbers here.
    """
    heads, headdim, d_state, chunk_size = 8, 4, 32, 128

    def temporary(seq: int) -> int:
        shapes = jax.eval_shape(
            lambda: inputs(
                seq, ngroups=1, heads=heads, headdim=headdim, d_state=d_state, dtype="float32"
            )
        )
        run = jax.jit(lambda *arrays: value_and_gradients(arrays, chunk_size=chunk_size))
        analysis = run.lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert (temporary(1024) - temporary(512)) / 512 < 4 * 1024 / 3


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("ngroups", [1, 3])
def test_gated_norm_matches_numpy(norm_before_gate: bool, ngroups: int):
    rng = np.random.default_rng(0)
    x, z, weight = rng.standard_normal((2, 12)), rng.standard_normal((2, 12)), rng.random(12)
    gate = z / (1 + np.exp(-z))
    v = x if norm_before_gate else x * gate
    want = np.empty_like(x)
    for t in range(2):
        for c in range(12):
            group = v[t].reshape(ngroups, -1)[c // (12 // ngroups)]
            want[t, c] = v[t, c] / np.sqrt(np.sum(group**2) / len(group) + 0.1) * weight[c]
    want = want * gate if norm_before_gate else want
    options: dict[str, Any] = {"ngroups": ngroups, "eps": 0.1, "norm_before_gate": norm_before_gate}
    x, z, weight = jnp.asarray(x), jnp.asarray(z), jnp.asarray(weight)
    np.testing.assert_allclose(ops.gated_rms_norm(x, z, weight, **options), want, rtol=1e-14)
    np.testing.assert_allclose(
        ops.gated_rms_norm(x[0], z[0], weight, **options), want[0], rtol=1e-14
    )
