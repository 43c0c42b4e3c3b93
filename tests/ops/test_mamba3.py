"""The op of Mamba-3 without the layer around it.

Its methods agree with each other and with a plain loop.
"""

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from jaxtyping import PyTree

from mamba_eqx import ops
from mamba_eqx.ops._rotary import cos_sin, wrap
from tests.support.cases import quick
from tests.support.ops import (
    CASES,
    Case,
    ScanOptions,
    assert_close,
    assert_finite,
    assert_methods_agree,
    largest_array,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


Method = Literal["chunked", "sequential"]
Arrays = dict[str, Any]
"""The arguments by name; `mimo_x` may be `None`."""
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

METHODS: list[Method] = ["chunked", "sequential"]
NAMES = ["x", "dt", "A", "B", "C", "D", "trap", "angles", "B_bias", "C_bias", "mimo_x"]
PARAMETERS = {"D", "B_bias", "C_bias", "mimo_x"}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs(
    seq: int,
    *,
    ngroups: int = 2,
    heads: int = 2,
    headdim: int = 4,
    d_state: int = 7,
    pairs: int = 2,
    rank: int | None = 3,
    dtype: str = "float64",
) -> tuple[Arrays, State]:
    """Returns the arguments by name, and a state."""
    rng, nheads, ranks = np.random.default_rng(seq), ngroups * heads, rank or 1

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = {
        "x": normal(seq, nheads, headdim),
        "dt": jax.nn.softplus(normal(seq, nheads)),
        "A": -jnp.exp(normal(seq, nheads)),
        "B": normal(seq, ranks, ngroups, d_state),
        "C": normal(seq, ranks, ngroups, d_state),
        "D": normal(nheads),
        "trap": jax.nn.sigmoid(normal(seq, nheads)),
        "angles": np.pi * jnp.tanh(normal(seq, pairs)),
        "B_bias": normal(nheads, ranks, d_state),
        "C_bias": normal(nheads, ranks, d_state),
        "mimo_x": None if rank is None else normal(nheads, ranks, headdim),
    }
    state = (
        wrap(normal(nheads, pairs)),
        normal(nheads, headdim, d_state),
        normal(ranks, nheads, d_state),
        normal(nheads, headdim),
    )
    return arrays, state


def call(arrays: Arrays, **options: Any) -> PyTree:
    positional = [arrays[name] for name in NAMES[:6]]
    return ops.mamba3(*positional, **{name: arrays[name] for name in NAMES[6:]}, **options)


def loop(arrays: Arrays, state: State, reset: np.ndarray, interleaved: bool) -> PyTree:
    """Computes the equations in the docstring one number at a time, with complex numbers for the
    pairs."""
    a = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    angle, h, k, v = (np.array(t) for t in state)
    seq, nheads, headdim = a["x"].shape
    _, ranks, ngroups, d_state = a["B"].shape
    up = a.get("mimo_x", np.ones((nheads, ranks, headdim)))
    y = np.zeros((seq, ranks, nheads, headdim))

    def rotate(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
        x = x.copy()
        for j in range(len(angle)):
            first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + d_state // 2)
            z = (x[first] + 1j * x[second]) * np.exp(1j * angle[j])
            x[first], x[second] = z.real, z.imag
        return x

    for t in range(seq):
        if reset[t]:
            angle, h, k, v = (np.zeros_like(s) for s in (angle, h, k, v))
        for i in range(nheads):
            group, dt, lam = i // (nheads // ngroups), a["dt"][t, i], a["trap"][t, i]
            alpha = np.exp(dt * a["A"][t, i])
            angle[i] += dt * a["angles"][t]
            h[i] *= alpha
            for r in range(ranks):
                h[i] += (1 - lam) * dt * alpha * np.outer(v[i] * up[i, r], k[r, i])
                k[r, i] = rotate(a["B"][t, r, group] + a["B_bias"][i, r], angle[i])
                h[i] += lam * dt * np.outer(a["x"][t, i] * up[i, r], k[r, i])
            for r in range(ranks):
                q = rotate(a["C"][t, r, group] + a["C_bias"][i, r], angle[i])
                y[t, r, i] = h[i] @ q + a["D"][i] * a["x"][t, i] * up[i, r]
            v[i] = a["x"][t, i]
    return y, (np.asarray(wrap(jnp.asarray(angle))), h, k, v)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("ngroups", "heads", "rank", "d_state", "pairs"),
    [(1, 1, None, 4, 1), (1, 2, None, 4, 0), (2, 3, 2, 7, 3), (3, 1, 1, 8, 4)],
)
def test_matches_equations(
    method: Method,
    interleaved: bool,
    ngroups: int,
    heads: int,
    rank: int | None,
    d_state: int,
    pairs: int,
):
    arrays, state = inputs(9, ngroups=ngroups, heads=heads, rank=rank, d_state=d_state, pairs=pairs)
    reset = np.isin(np.arange(9), [4, 7])
    options: Any = {"state": state, "reset": jnp.asarray(reset), "interleaved": interleaved}
    got = call(arrays, **options, method=method, chunk_size=4)
    assert_close(got, loop(arrays, state, reset, interleaved), 1e-14)


@pytest.mark.slow
@given(CASES, st.sampled_from([None, 2]))
@example(case=Case(seq=10, chunk_size=4, resets=(3, 8, 9), length=5), rank=2)
def test_methods_agree(case: Case, rank: int | None):
    """Outputs, final state and all gradients agree for every chunk size and with NaN as padding."""
    arrays, state = inputs(case.seq, rank=rank)

    def scan(arrays: Arrays, state: State, options: ScanOptions) -> PyTree:
        return call(arrays, state=state, interleaved=rank is None, **options._asdict())

    per_token = ("x", "dt", "A", "B", "C", "trap", "angles")
    assert_methods_agree(scan, arrays, state, case, per_token=per_token)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_derivatives_match_finite_differences(rank: int | None):
    """Forward mode, reverse mode and, for one rank, second derivatives."""
    arrays, state = inputs(5, rank=rank, ngroups=1, headdim=2, d_state=4)
    reset = jnp.arange(5) == 3

    @jax.jit
    def run(arrays: Arrays, state: State) -> PyTree:
        return call(arrays, state=state, reset=reset, chunk_size=2, interleaved=rank is None)

    jax.test_util.check_grads(run, (arrays, state), order=1, modes=["fwd", "rev"])

    if rank is not None:
        return

    def loss(dt: jax.Array, angles: jax.Array) -> jax.Array:
        return jnp.sum(run(arrays | {"dt": dt, "angles": angles}, state)[0] ** 2)

    both = (arrays["dt"], arrays["angles"])
    jax.test_util.check_grads(jax.jit(jax.grad(loss, (0, 1))), both, order=1, modes=["rev"])


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-30, 1e30])
def test_extreme_rates_give_finite_gradients(rate: float):
    """Rates are so large that every decay underflows, or so small that nothing decays."""
    arrays, state = inputs(40, dtype="float32", ngroups=1, rank=None)
    arrays["A"] = arrays["A"] * 0 - rate
    arrays["dt"] = arrays["dt"].at[30:].mul(0).at[10:15].mul(1e10)

    def run(method: Method) -> PyTree:
        def loss(arrays: Arrays, state: State) -> tuple[jax.Array, PyTree]:
            y, state = call(arrays, state=state, method=method, interleaved=True)
            return jnp.sum(y) * 1e-10 + sum(jnp.sum(t) for t in state) * 1e-10, (y, state)

        return quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, state)

    assert_finite(run("chunked"))
    # After 1e10 rotations an angle is noise in every method.
    arrays["dt"] = arrays["dt"].at[10:15].mul(1e-10)
    assert_close(run("chunked")[0][1], run("sequential")[0][1], 1e-5)


@pytest.mark.parametrize("at", [0, 4, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 6))])
def test_reset_forgets_non_finite_state(at: int):
    """Outputs after the reset, the final state and the gradients of later inputs are finite."""
    arrays, state = inputs(8)
    reset = jnp.arange(8) == at

    def run(state: State) -> PyTree:
        def loss(arrays: Arrays, state: State) -> tuple[jax.Array, PyTree]:
            y, end = call(arrays, state=state, reset=reset, chunk_size=4, interleaved=True)
            return jnp.sum(jnp.cos(y[at:])) + sum(jnp.sum(jnp.sin(t)) for t in end), (y, end)

        grad = quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, end)), (of_arrays, of_state) = grad(arrays, state)
        after = [of_arrays[n][at:] for n in ("x", "dt", "A", "B", "C", "trap", "angles")]
        return (y[at:], end, after, of_state), y[:at]

    lost = jax.tree.map(lambda t: jnp.full_like(t, jnp.nan), state)
    (got, before), (want, _) = run(lost), run(jax.tree.map(jnp.zeros_like, state))
    assert_finite(got)
    assert_close(got[:3], want[:3])
    assert np.isnan(before).all()
    if at != 6:
        return
    # A NaN in one leaf of one head leaves the other heads finite.
    for i, leaf in enumerate(state):
        spoiled = leaf.at[(1, 0, 2) if i == 1 else (..., 1, 0)].set(jnp.nan)
        states = (*state[:i], spoiled, *state[i + 1 :])
        y, _ = quick(lambda s: call(arrays, state=s, reset=reset, interleaved=True))(states)
        assert np.isnan(y[:at, :, 1]).any(-1).all()
        assert np.isfinite(y[at:]).all()
        assert np.isfinite(y[:, :, 0]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_outputs_keep_dtype_and_state_is_float32(dtype: str):
    arrays, state = inputs(5, dtype=dtype)

    def run(arrays: Arrays, state: State) -> PyTree:
        return call(arrays, state=state, interleaved=True)

    y, end = jax.eval_shape(run, arrays, state)
    assert (y.dtype, {t.dtype for t in end}) == (dtype, {jnp.dtype("float32")})


@pytest.mark.slow
def test_default_method_holds_nothing_larger_than_x():
    """Neither pass holds the states or the attention of all tokens, or the keys of all heads."""
    seq, heads, headdim, d_state = 512, 2, 8, 16
    arrays, state = inputs(
        seq, ngroups=1, heads=heads, headdim=headdim, d_state=d_state, pairs=4, rank=None
    )

    def largest(method: Method) -> int:
        def loss(arrays: Arrays) -> jax.Array:
            y, end = call(arrays, state=state, method=method, interleaved=True)
            return jnp.sum(y) + jnp.sum(end[1])

        jaxpr = jax.make_jaxpr(jax.grad(loss))(arrays)
        return largest_array(jaxpr.jaxpr)

    assert largest("chunked") <= seq * heads * headdim
    assert largest("sequential") >= seq * heads * headdim * d_state  # The test would notice.


@pytest.mark.slow
def test_angles_stay_accurate_over_long_sequences():
    """A plain sum would lose four of seven digits."""
    seq, dtype = 4096, "float32"
    arrays, _ = inputs(seq, ngroups=1, heads=1, pairs=1, rank=None, dtype=dtype)
    arrays["angles"] = jnp.full_like(arrays["angles"], 3.1)
    arrays["dt"] = jnp.full_like(arrays["dt"], 0.7)
    _, (angle, *_) = call(arrays, interleaved=True)
    turns = seq * float(np.float32(0.7)) * float(np.float32(3.1))
    assert abs(float(wrap(jnp.float64(angle[0, 0]) - turns))) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_cos_sin_matches_numpy(dtype: str):
    angle = jnp.linspace(-np.pi, np.pi, 1001).astype(dtype)
    tolerance = {"float32": 2e-7, "float64": 4e-16}[dtype]
    for got, want in zip(cos_sin(angle), (np.cos(angle), np.sin(angle)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    jax.test_util.check_grads(jax.jit(cos_sin), (angle.astype("float64"),), order=2)


def test_invalid_arguments_raise(as_users_run: None):
    arrays, state = inputs(3)
    with pytest.raises(ValueError, match="ngroups=3 and nheads=4"):
        call(arrays | {"B": jnp.ones((3, 3, 3, 7))}, interleaved=True)
    one = {name: a if name in PARAMETERS else a[0] for name, a in arrays.items()}
    one["B"] = jnp.ones((3, 3, 7))
    named = {name: one[name] for name in NAMES[6:]}
    with pytest.raises(ValueError, match="ngroups=3 and nheads=4"):
        ops.mamba3_step(*[one[n] for n in NAMES[:6]], **named, interleaved=True, state=state)
    with pytest.raises(ValueError, match=r'`method` must be "chunked".*fast'):
        call(arrays, interleaved=True, method="fast")
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        call(arrays, interleaved=True, chunk_size=0)
    with pytest.raises(ValueError, match="4 angles rotate 8 features, but the array has 7"):
        call(arrays | {"angles": jnp.ones((3, 4))}, interleaved=True)
