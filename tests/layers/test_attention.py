"""Attention: the op against its formula, and the capacity of the cache. (`tests/laws` checks what
all layers have in common.)"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import mamba_eqx as mbx
from mamba_eqx import ops
from tests.support.cases import quick
from tests.support.generation import naive, row


pytestmark = pytest.mark.usefixtures("compile_fast")


def inputs(seq, nheads=6, nheads_kv=2, headdim=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = (nheads, nheads_kv, nheads_kv)
    return [jnp.asarray(rng.standard_normal((seq, heads, headdim))) for heads in sizes]


def formula(q, k, v, seen, scale):
    y = np.zeros(q.shape)
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        scores = np.where(seen, scale * q[:, h] @ k[:, g].T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        y[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, g]
    return y


@pytest.mark.parametrize("block_size", [None, 7])
@pytest.mark.parametrize(
    "window", [None, 4, *(pytest.param(window, marks=pytest.mark.slow) for window in (1, 60))]
)
def test_op_equals_formula(window, block_size):
    """The op equals the formula, also in blocks of queries that attend to earlier blocks or to the
    state."""
    with jax.enable_x64(True):
        q, k, v = inputs(47)
        index = np.arange(47)
        reset = np.isin(index, [11, 40])
        document = np.cumsum(reset)
        seen = (document[:, None] == document) & (index[:, None] >= index)
        if window is not None:
            seen &= index[:, None] - index < window
        want = formula(q, k, v, seen, scale=0.7)

        @quick
        def run(q, k, v, reset, state=None):
            options = {"scale": 0.7, "window": window, "block_size": block_size}
            return ops.attention(q, k, v, reset=reset, state=state, **options)

        np.testing.assert_allclose(run(q, k, v, reset)[0], want, rtol=0, atol=1e-14)
        empty = jnp.zeros((2, 50 if window is None else window, 3))
        state, got = (empty, empty, jnp.zeros((), jnp.int32)), []
        for piece in (slice(0, 9), slice(9, 36), slice(36, 47)):
            y, state = run(q[piece], k[piece], v[piece], reset[piece], state)
            got.append(y)
        np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=1e-14)


def test_gradients_do_not_depend_on_block_size():
    with jax.enable_x64(True):
        q, k, v = inputs(30)

        def gradients(**options):
            loss = lambda *qkv: jnp.sum(jnp.sin(ops.attention(*qkv, **options)[0]))
            return quick(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

        for window in (None, 5):
            got, want = gradients(window=window, block_size=8), gradients(window=window)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


def test_memory_is_linear():
    """No pass stores a matrix of queries times keys."""
    q, k, v = (jax.ShapeDtypeStruct((4096, 4, 8), jnp.float32) for _ in range(3))

    def loss(q, k, v):
        return jnp.sum(ops.attention(q, k, v)[0])

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 4096 * 4096 * 4 / 4


def test_rotary_embedding_is_relative():
    with jax.enable_x64(True):
        q, k, _ = inputs(1, nheads=1, nheads_kv=1, headdim=8)

        def score(at, to, dim=6):
            options = {"dim": dim, "base": 30.0, "interleaved": False}
            q_t, k_t = (
                ops.rotary_embedding(x, jnp.array([t]), **options) for x, t in ((q, at), (k, to))
            )
            return float(jnp.sum(q_t * k_t))

        np.testing.assert_allclose(score(9, 4), score(5, 0))
        assert abs(score(9, 4) - score(8, 4)) > 1e-3
        # The expected values for the second of three rates are computed by hand.
        x = jnp.zeros((1, 1, 8)).at[0, 0, 1].set(1.0)
        rotated = ops.rotary_embedding(x, jnp.array([7]), dim=6, base=30.0, interleaved=False)
        angle = 7 * 30.0 ** (-2 / 6)
        want = np.zeros(8)
        want[[1, 4]] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(rotated[0, 0], want, rtol=0, atol=1e-15)


# Capacity of the cache.

LAYER = mbx.Attention(4, nheads=2, rotary_emb_dim=2, d_conv=2, key=jr.key(0))
X = jr.normal(jr.key(1), (6, 4))


def scan(x, state, **options):
    return eqx.filter_jit(LAYER.scan)(x, state, **options)


def test_cache_can_be_filled_to_capacity():
    want, _ = LAYER.scan(X)
    y, state = scan(X, LAYER.init_state(max_len=6))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)
    assert int(state.length) == 6
    state = LAYER.init_state(max_len=6)
    for t in range(6):
        y_t, state = eqx.filter_jit(LAYER.step)(X[t], state)
        np.testing.assert_allclose(y_t, want[t], rtol=0, atol=1e-6)


def test_exceeding_capacity_raises():
    state = LAYER.init_state(max_len=5)
    for run in (LAYER.scan, scan):  # The shapes show it.
        with pytest.raises(ValueError, match=r"room for 5 tokens, but got 6 more.*init_state\(max"):
            run(X, state)
        with pytest.raises(ValueError, match="room for 5 tokens, but got 6 more"):
            run(X, state, length=6)
    full = scan(X[:5], state)[1]
    _, almost = scan(X[:4], state)
    for run in (
        lambda: LAYER.step(X[0], full),
        lambda: LAYER.scan(X[:2], almost),
        lambda: LAYER.scan(X, state, length=jnp.array(6)),
        lambda: LAYER.scan(X[:2], full, reset=jnp.array([False, True])),
    ):
        with pytest.raises(ValueError, match="room for 5 tokens since the last reset"):
            run()


@pytest.mark.filterwarnings("ignore")  # `vmap` of a method.
def test_exceeding_capacity_in_compiled_code_is_nan():
    step = eqx.filter_jit(LAYER.step)
    state = LAYER.init_state(max_len=5)
    full = scan(X[:5], state)[1]
    _, almost = scan(X[:4], state)
    y, lost = step(X[0], full)
    assert np.isnan(y).all()
    for later in (lost, mbx.layers.with_room(lost, 9), scan(X[:2], almost)[1]):
        assert np.isnan(step(X[0], later)[0]).all()
        larger = mbx.layers.with_room(later, 9)
        assert np.isnan(scan(X[:2], larger)[0]).all()
        # A reset forgets the dropped token too.
        y, state_after = scan(X[:2], larger, reset=jnp.array([True, False]))
        np.testing.assert_allclose(y, LAYER.scan(X[:2])[0], rtol=0, atol=1e-6)
        assert np.isfinite(state_after.k).all()
    y, _ = scan(X[:2], almost)
    assert np.isnan(y).all(axis=1).tolist() == [False, True]
    y, _ = scan(X, state, length=jnp.array(6))
    assert np.isnan(y[5]).all()
    y, _ = scan(X[:2], full, reset=jnp.array([False, True]))
    assert np.isnan(y).all(axis=1).tolist() == [True, False]
    y, _ = eqx.filter_jit(jax.vmap(LAYER.step))(X[:2], pair(almost, full))
    assert np.isnan(y).all(axis=1).tolist() == [False, True]
    assert np.isnan(eqx.filter_jit(many_steps)(state, 6).k[:, -1]).all()


@pytest.mark.parametrize("window", [None, 3])
def test_lost_tokens_do_not_outlive_a_reset(window):
    """NaN in the past reaches the outputs of its document, and no others."""
    options = {"rotary_emb_dim": 2, "d_conv": 2, "window": window}
    layer = mbx.Attention(4, nheads=2, **options, key=jr.key(0))
    run = eqx.filter_jit(layer.scan)
    _, state = run(X[:4], layer.init_state(max_len=4))
    bad = jax.tree.map(lambda leaf: leaf.at[:, 0].set(jnp.nan), (state.k, state.v))
    bad = eqx.tree_at(lambda s: (s.k, s.v), state, bad)
    reset = jnp.array([False, False, True, False])
    for past in [bad] if window else [bad, run(X[:2], state)[1]]:
        y, after = run(X[:4], past, reset=reset)
        assert np.isnan(y).all(axis=1).tolist() == [True, True, False, False]
        np.testing.assert_allclose(y[2:], layer.scan(X[2:4])[0], rtol=0, atol=1e-6)
        assert all(np.isfinite(part).all() for part in (after.k, after.v))

        def loss(qkv, past=past):
            cache = (past.k, past.v, past.length)
            return jnp.sum(ops.attention(*qkv, state=cache, reset=reset, window=window)[0][2:] ** 2)

        qkv = [jnp.ones((4, 2, 2))] * 3
        assert all(np.isfinite(leaf).all() for leaf in quick(jax.grad(loss))(qkv))
    if window:  # The query sees two earlier tokens, so the third sees no NaN.
        y, _ = run(X[:4], bad)
        assert np.isnan(y).all(axis=1).tolist() == [True, True, False, False]


def test_cache_without_room_drops_all_tokens():
    state = LAYER.init_state(max_len=0)
    y, stepped = eqx.filter_jit(LAYER.step)(X[0], state)
    assert np.isnan(y).all()
    y, scanned = scan(X[:3], state, reset=jnp.zeros(3, jnp.bool_))
    assert np.isnan(y).all()
    for lost in (stepped, scanned, pair(scanned, state)):
        assert np.all(lost.overflowed == (lost.length > 0))
        larger = mbx.layers.with_room(lost, 8)
        missing = np.arange(8) < np.asarray(lost.length)[..., None]
        np.testing.assert_array_equal(np.isnan(larger.k).all(axis=(-3, -1)), missing)
    for lost in (stepped, scanned):
        larger = mbx.layers.with_room(lost, 8)
        assert np.isnan(scan(X[:2], larger)[0]).all()
        assert np.isnan(eqx.filter_jit(LAYER.step)(X[0], larger)[0]).all()


def test_rolling_cache_never_overflows():
    layer = mbx.Attention(4, nheads=2, window=2, key=jr.key(0))
    assert not layer.scan(X)[1].overflowed


def pair(*states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def many_steps(state, n):
    """Decodes in a loop as `generate` does, but without a batch."""
    body = lambda carry: (carry[0] + 1, LAYER.step(X[0], carry[1])[1])
    return lax.while_loop(lambda carry: carry[0] < n, body, (0, state))[1]


def test_padding_and_tokens_before_a_reset_need_no_capacity():
    state = LAYER.init_state(max_len=5)
    _, almost = scan(X[:4], state)
    assert int(scan(X, almost, length=jnp.array(1))[1].length) == 5
    assert int(scan(X, state, length=5)[1].length) == 5
    reset = jnp.arange(6) == 1
    y, end = scan(X, almost, reset=reset)
    assert int(end.length) == 5
    np.testing.assert_allclose(y[1:], LAYER.scan(X[1:])[0], rtol=0, atol=1e-6)
    assert eqx.filter_jit(many_steps)(state, 5).length == 5


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("max_len", [-1, 1.5, True, "4"])
def test_invalid_capacity_raises(max_len: Any):
    layer = mbx.Attention(4, nheads=2, key=jr.key(0))
    message = f"`max_len` must be an integer of at least 0 .*max_len={max_len!r}"
    with pytest.raises(ValueError, match=message):
        layer.init_state(max_len=max_len)
    with pytest.raises(ValueError, match=message):
        mbx.layers.with_room(layer.init_state(max_len=2), max_len)


def test_full_cache_can_be_enlarged():
    want, _ = LAYER.scan(X)
    _, full = scan(X[:5], None)
    for state in (full, pair(full, full)):
        larger = mbx.layers.with_room(state, 8)
        assert larger.k.shape[-2:] == (8, 2)
        assert mbx.layers.with_room(larger, 3) is larger
    y, _ = eqx.filter_jit(LAYER.step)(X[5], mbx.layers.with_room(full, 6))
    np.testing.assert_allclose(y, want[5], rtol=0, atol=1e-6)


def test_op_returns_nan_beyond_capacity():
    q, k, v = inputs(4)
    empty = jnp.zeros((2, 3, 3))
    state = (empty, empty, jnp.zeros((), jnp.int32))
    y, full = ops.attention(q, k, v, state=state)
    assert np.isnan(y).all(axis=(1, 2)).tolist() == [False, False, False, True]
    y, _ = ops.attention_step(q[0], k[0], v[0], state=(*full[:2], jnp.array(3)))
    assert np.isnan(y).all()


def test_window_needs_no_max_len():
    layer = mbx.Attention(4, nheads=2, window=3, key=jr.key(0))
    y, state = jnp.zeros(0), layer.init_state()
    assert state.k.shape == layer.init_state(max_len=100).k.shape == (2, 3, 2)
    assert mbx.layers.with_room(state, 10) is state
    for _ in range(3):
        y, state = eqx.filter_jit(layer.scan)(X, state)
    assert int(state.length) == 18
    np.testing.assert_allclose(y, layer.scan(jnp.tile(X, (3, 1)))[0][12:], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("as_users_run")
def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"maximum number of tokens.*init_state\(max_len=...\)"):
        LAYER.init_state()
    with pytest.raises(ValueError, match=r"must be a KVCache.*but got tuple"):
        LAYER.step(X[0], (1, 2))  # pyright: ignore[reportArgumentType]
    state = LAYER.init_state(max_len=3)
    wrong = eqx.tree_at(lambda s: s.v, state, state.v[:, :2])
    with pytest.raises(ValueError, match=r"state.v.*shape \(2, 3, 2\), but got .*\(2, 2, 2\)"):
        LAYER.step(X[0], wrong)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"nheads": 3}, "`nheads` must divide `d_model`.*nheads=3 and d_model=4"),
        ({"nheads": 4, "nheads_kv": 3}, "`nheads_kv` must divide `nheads`.*3 and nheads=4"),
        ({"nheads": 2, "rotary_emb_dim": 4}, "even and at most `headdim`.*dim=4 and headdim=2"),
        ({"nheads": 1, "rotary_emb_dim": 3}, "must be even"),
        ({"nheads": 1, "d_conv": -1}, "`d_conv` must be an integer of at least 1"),
        ({"nheads": 1, "window": 0}, "window=0"),
        ({"nheads": 0}, "nheads=0"),
    ]
    for options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            mbx.Attention(4, key=jr.key(0), **options)
    with pytest.raises(ValueError, match=r"`softmax_scale` must be a positive number.*-1"):
        mbx.AttentionConfig(4, 2, softmax_scale=-1.0)
    with pytest.raises(ValueError, match="state must have room for 4 tokens, but has room for 3"):
        ops.attention(*inputs(2), state=(state.k, state.v, state.length), window=4)
    with pytest.raises(ValueError, match="must divide the number of query heads, but got 2 and 3"):
        ops.attention(*inputs(2, nheads=3))


# Generation.


@pytest.mark.slow
def test_hybrids_generate():
    """Ragged prompts, continued from the returned state, whose caches are full."""
    rotary = mbx.AttentionConfig(6, nheads=4, nheads_kv=2, headdim=4, rotary_emb_dim=2, d_conv=3)
    mixers = [mbx.Mamba2Config(6, headdim=4, d_state=4), rotary]
    blocks = [mbx.BlockConfig(mixer) for mixer in mixers]
    model = mbx.LanguageModelConfig(11, tuple(blocks)).build(key=jr.key(0))
    model = jax.tree.map(lambda leaf: 3 * leaf, model)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], [0, 1, 2] * 4]
    first = mbx.generate(model, prompts, 4)
    assert first.state.layers[1].k.shape[-2] == 16
    second = mbx.generate(model, [[], [9], []], 14, state=first.state)
    for i, added in enumerate([[], [9], []]):
        tokens, _ = naive(model, prompts[i], 4)
        assert row(first, i) == tokens
        tokens, _ = naive(model, prompts[i] + tokens + added, 14)
        assert row(second, i) == tokens
