"""The op of Mamba-2 by itself: its methods agree, with each other and with a plain loop."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, strategies as st
from safetensors.numpy import load_file

from mamba_eqx import ops
from tests.ops.test_scans import GOLDEN, close, shapes_in


pytestmark = pytest.mark.usefixtures("compile_fast")


METHODS: list[Any] = ["chunked", "sequential"]


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
) -> list[Any]:
    """x, dt, A, B, C, D and a state."""
    rng, nheads = np.random.default_rng(seq), ngroups * heads

    def normal(*shape: int) -> Any:
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


def loop(arrays: Any, state: Any, reset: Any) -> Any:
    """The equations, one number at a time."""
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
def test_the_equations(method: Any, per_channel: bool, ngroups: int, heads: int):
    *arrays, state = inputs(9, ngroups=ngroups, heads=heads, per_channel=per_channel)
    reset = np.isin(np.arange(9), [4, 7])
    got = ops.ssd(*arrays, state=state, reset=jnp.asarray(reset), method=method, chunk_size=4)
    close(got, loop(arrays, state, reset), 1e-14)


@pytest.mark.parametrize(
    ("method", "chunk_size"), [("chunked", 4), ("chunked", 5), ("chunked", None), ("sequential", 1)]
)
def test_the_official_ssd(method: Any, chunk_size: int | None):
    """`ssd_minimal_discrete`, with groups and from a state, which the official code holds against
    its kernels. It has no skip connection."""
    golden = load_file(GOLDEN / "ssd_minimal" / "golden.safetensors")
    names = ["x", "dt", "A", "B", "C", "state"]

    def objective(*inputs: Any) -> Any:
        *arrays, state = inputs
        y, end = ops.ssd(*arrays, None, state=state, method=method, chunk_size=chunk_size)
        value = jnp.sum(golden["weight.y"] * y) + jnp.sum(golden["weight.end"] * end)
        return value, (y, end)

    inputs = [jnp.asarray(golden[name]) for name in names]
    (value, out), grads = jax.value_and_grad(objective, argnums=range(6), has_aux=True)(*inputs)
    close((value, *out), (golden["objective"], golden["y"], golden["end"]), 1e-14)
    close(grads, tuple(golden[f"grad.{name}"] for name in names), 1e-13)


@given(
    seq=st.sampled_from([0, 1, 9, 10]),
    chunk_size=st.sampled_from([1, 4, 5, 64, None]),
    # On, beside and away from the borders of chunks; one after the other; at both ends.
    resets=st.sampled_from([None, (), (0,), (4, 5), (3, 8, 9), tuple(range(10))]),
    length=st.sampled_from([None, 0, 4, 5, 7]),
    per_channel=st.booleans(),
)
def test_methods(
    seq: int, chunk_size: int | None, resets: Any, length: int | None, per_channel: bool
):
    """Outputs, final state and every gradient, whatever the chunks are and the padding holds."""
    *arrays, state = inputs(seq, per_channel=per_channel)
    reset = None if resets is None else jnp.isin(jnp.arange(seq), jnp.array(resets, int))
    real = jnp.ones(seq, bool)
    if length is not None:
        length = min(length, seq)
        real = jnp.arange(seq) < length
        for i in (0, 1, 3, 4):
            mask = real.reshape((-1,) + (1,) * (arrays[i].ndim - 1))
            arrays[i] = jnp.where(mask, arrays[i], jnp.nan)

    def run(method: Any) -> Any:
        def loss(arrays: Any, state: Any) -> Any:
            y, state = ops.ssd(
                *arrays,
                state=state,
                reset=reset,
                length=length,
                method=method,
                chunk_size=chunk_size,
            )
            y = jnp.where(real[:, None, None], y, 0.0)
            weight = jnp.cos(jnp.arange(float(seq)))[:, None, None]
            return jnp.sum(weight * y) + jnp.sum(jnp.sin(state)), (y, state)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, state)

    got, want = run("chunked"), run("sequential")
    close(got, want)
    (_, out), (gradients, state_bar) = got
    # The skip connection of padding is a product with what it holds.
    gradients = [g for i, g in enumerate(gradients) if i != 5]
    for leaf in jax.tree.leaves((out, gradients, state_bar)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_derivatives(method: Any):
    """Both modes, against finite differences."""
    reset = jnp.arange(5) == 3

    @jax.jit
    def run(*arrays: Any) -> Any:
        *inputs, state = arrays
        return ops.ssd(*inputs, state=state, reset=reset, method=method, chunk_size=2)

    jax.test_util.check_grads(run, inputs(5), order=1, modes=["fwd", "rev"])


@pytest.mark.slow
def test_second_derivatives():
    *arrays, state = inputs(5)

    def loss(x: Any, dt: Any) -> Any:
        y, _ = ops.ssd(x, dt, *arrays[2:], state=state, chunk_size=2)
        return jnp.sum(y**2)

    jax.test_util.check_grads(jax.grad(loss, argnums=(0, 1)), arrays[:2], order=1, modes=["rev"])


def gradients_of(arrays: Any, **options: Any) -> Any:
    def loss(*arrays: Any) -> Any:
        *inputs, state = arrays
        y, state = ops.ssd(*inputs, state=state, **options)
        return jnp.sum(y) + jnp.sum(state), (y, state)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7)), has_aux=True))(*arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rate", [1e-30, 1e3, 1e30])
def test_extreme_rates(rate: float, dtype: str):
    """Rates so large that every decay underflows, and so small that none decays."""
    arrays = inputs(70, dtype=dtype)
    arrays[2] = arrays[2] * 0 - rate
    arrays[1] = arrays[1].at[40:].mul(0).at[10:15].mul(1e-3)
    got = gradients_of(arrays)
    for leaf in jax.tree.leaves(got):
        assert np.isfinite(leaf).all()
    close(
        got, gradients_of(arrays, method="sequential"), {"float32": 1e-5, "float64": 1e-13}[dtype]
    )


def test_long_chunks_of_strong_decay():
    """Products of -1e3 over chunks of 256, cut by resets on and beside their borders."""
    arrays = inputs(300, dtype="float32")
    arrays[2] = jnp.full_like(arrays[2], -1e3)
    options: Any = {"reset": jnp.isin(jnp.arange(300), jnp.array([0, 100, 255, 256, 299]))}
    got = gradients_of(arrays, chunk_size=256, **options)
    for leaf in jax.tree.leaves(got):
        assert np.isfinite(leaf).all()
    close(got, gradients_of(arrays, method="sequential", **options), 1e-5)


def test_a_strong_decay_does_not_blur_the_tokens_after_it():
    """As a difference of cumulative sums, 0.1 after 1e9 would be nothing."""
    arrays = inputs(20, dtype="float32")
    arrays[2] = jnp.full_like(arrays[2], -1)
    arrays[1] = jnp.full_like(arrays[1], 0.1).at[3].set(1e9)
    want = ops.ssd(*arrays[:6], state=arrays[6], method="sequential")
    got = ops.ssd(*arrays[:6], state=arrays[6])
    close((got[0] * 1e-9, got[1] * 1e-9), (want[0] * 1e-9, want[1] * 1e-9), 1e-6)
    arrays[0] = arrays[0].at[3].set(0)
    want = ops.ssd(*arrays[:6], state=arrays[6], method="sequential")
    close(ops.ssd(*arrays[:6], state=arrays[6]), want, 1e-6)


@pytest.mark.parametrize("at", [0, 3, 4, 6])
def test_a_reset_forgets_what_is_not_a_number(at: int):
    """In the outputs after it, in the state and in the gradients with respect to all after it."""
    arrays = inputs(8)
    arrays[6] = jnp.full_like(arrays[6], jnp.nan)
    clean = [*arrays[:6], jnp.zeros_like(arrays[6])]
    reset = jnp.arange(8) == at

    def run(arrays: Any) -> Any:
        def loss(*arrays: Any) -> Any:
            *inputs, state = arrays
            y, state = ops.ssd(*inputs, state=state, reset=reset, chunk_size=4)
            return jnp.sum(jnp.cos(y[at:])) + jnp.sum(jnp.sin(state)), (y[at:], state)

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4, 5, 6), has_aux=True)(
            *arrays
        )
        x, dt, A, B, C, D, state = grads
        # If tokens before it met the state, with the decay, then no method has a derivative of A.
        return out, x[at:], dt[at:], A if at == 0 else None, B[at:], C[at:], D, state

    got = run(arrays)
    for leaf in jax.tree.leaves(got):
        assert np.isfinite(leaf).all()
    close(got, run(clean))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype: str):
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


def test_nothing_of_the_full_size_exists():
    """Neither forward nor in reverse does the default hold a state, or the attention, of every
    token: nothing that is larger than `x`."""
    seq, heads, headdim, d_state = 512, 2, 8, 16
    arrays = inputs(seq, ngroups=1, heads=heads, headdim=headdim, d_state=d_state)

    def largest(method: Any) -> int:
        jaxpr = jax.make_jaxpr(lambda *a: gradients_of(a, method=method, chunk_size=32))
        return max(int(np.prod(shape)) for shape in shapes_in(jaxpr(*arrays).jaxpr))

    assert largest("chunked") <= seq * heads * headdim
    assert largest("sequential") >= seq * heads * headdim * d_state  # the test can tell


@pytest.mark.slow
def test_memory_of_the_reverse_pass():
    """A further token adds its share of the state that each chunk leaves behind (and its inputs and
    gradients): neither its own state nor its row of the attention, both of 1024 numbers here."""
    heads, headdim, d_state, chunk_size = 8, 4, 32, 128

    def temporary(seq: int) -> int:
        shapes = jax.eval_shape(
            lambda: inputs(
                seq, ngroups=1, heads=heads, headdim=headdim, d_state=d_state, dtype="float32"
            )
        )
        run = jax.jit(lambda *arrays: gradients_of(arrays, chunk_size=chunk_size))
        analysis = run.lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert (temporary(1024) - temporary(512)) / 512 < 4 * 1024 / 3


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("ngroups", [1, 3])
def test_gated_norm(norm_before_gate: bool, ngroups: int):
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
