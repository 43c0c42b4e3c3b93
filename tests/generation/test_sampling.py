"""Tests of the filters and of drawing against their equations in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import mamba_eqx as mbx


# Few distinct values make ties common. Zeros of both signs are tied too.
VALUES = st.sampled_from([-30.0, -2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0])
LOGITS = hnp.arrays(np.float32, st.sampled_from([(1,), (2,), (5,), (3, 4)]), elements=VALUES)
# With this many tokens, thresholds lie beyond the few largest, which are searched first.
MANY = hnp.arrays(np.float32, st.sampled_from([(600,), (2, 513)]), elements=VALUES, fill=VALUES)
EXCLUDED = -np.inf


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_row(keep, logits):
    rows = [np.where(keep(row), row, EXCLUDED) for row in logits.reshape(-1, logits.shape[-1])]
    return np.reshape(rows, logits.shape)


@given(LOGITS | MANY, st.integers(1, 7) | st.integers(250, 610))
def test_top_k_keeps_tokens_with_fewer_than_k_larger_ones(logits, k):
    expected = by_row(lambda row: np.array([(row > x).sum() < k for x in row]), logits)
    np.testing.assert_array_equal(mbx.sampling.top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("k", [1, 40, 127, 128, 129, 300, 5003])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])  # float16 has many ties
def test_top_k_of_a_large_vocabulary(dtype, k):
    # With this many tokens, only the groups with the largest maxima are searched.
    logits = np.random.default_rng(k).normal(size=(3, 5003)).astype(dtype)
    # Most of the largest logits are in one group, or in the last group, which is not full.
    logits[1, 640:672] += 5
    logits[2, -11:] += 5
    expected = np.where(logits >= np.sort(logits)[:, -k, None], logits, EXCLUDED)
    np.testing.assert_array_equal(mbx.sampling.top_k(jnp.asarray(logits), k), expected)


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 5, 300])
def test_top_k_of_a_large_vocabulary_draws_kept_tokens(k):
    logits = np.random.default_rng(k).normal(size=(3, 5003)).astype(np.float32)
    logits[1, :300] = 6.0  # the largest logits are tied
    logits[2, -11:] += 5
    kept = np.isfinite(mbx.sampling.top_k(jnp.asarray(logits), k))
    keys = jr.split(jr.key(0), 400)

    @jax.jit
    def run(keys):
        return jax.lax.map(lambda key: mbx.sampling.sample(jnp.asarray(logits), key, top_k=k), keys)

    for tokens, row in zip(np.asarray(run(keys)).T, kept, strict=True):
        assert row[tokens].all()
        # All tokens are drawn if few are kept, and many of them if many are kept.
        assert len(np.unique(tokens)) >= min(row.sum(), 150)


def test_draw_does_not_depend_on_ties_in_other_rows():
    one, other = jr.normal(jr.key(0), (2, 5003))
    beside_ties = jnp.stack([one, other.at[:300].set(6.0)])

    # One key for both rows draws them together. Under `vmap` they would be drawn separately.
    for key in jr.split(jr.key(1), 10):
        token = mbx.sampling.sample(jnp.stack([one, other]), key, top_k=5)[0]
        assert mbx.sampling.sample(beside_ties, key, top_k=5)[0] == token


@given(LOGITS | MANY, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_of_at_least_p(logits, p):
    def keep(row):
        probs = softmax(row)
        # A token is kept if the more likely tokens have less than p together.
        beaten = np.array([probs[row > x].sum() for x in row])
        near.append(np.abs(beaten - p).min() < 1e-5)
        return beaten < p

    near = []
    expected = by_row(keep, logits)
    if not any(near):
        np.testing.assert_array_equal(mbx.sampling.top_p(jnp.asarray(logits), p), expected)


@given(LOGITS)
def test_top_p_of_one_keeps_all_tokens_of_positive_weight(logits):
    kept = np.isfinite(mbx.sampling.top_p(jnp.asarray(logits), 1.0))
    assert kept[softmax(logits) > 1e-6].all()


@given(LOGITS, st.floats(0, 1))
def test_min_p_compares_with_the_true_maximum(logits, p):
    probs = softmax(logits)
    threshold = p * probs.max(-1, keepdims=True)
    clear = np.abs(probs - threshold) > 1e-6
    kept = np.isfinite(mbx.sampling.min_p(jnp.asarray(logits), p))
    np.testing.assert_array_equal(kept[clear], (probs >= threshold)[clear])
    assert kept[probs == probs.max(-1, keepdims=True)].all()


@given(LOGITS, st.sampled_from([1e-30, 0.1, 0.7, 1.0, 3.0]))
def test_temperature_divides_the_logits(logits, value):
    got = softmax(np.asarray(mbx.sampling.temperature(jnp.asarray(logits), value), np.float64))
    np.testing.assert_allclose(got, softmax(logits.astype(np.float64) / value), atol=1e-6)


@given(LOGITS)
def test_greedy_is_the_first_maximum(logits):
    token = mbx.sampling.greedy(jnp.asarray(logits))
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(token, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_filters_preserve_and_agree_across_dtypes(dtype):
    logits = jnp.asarray([[0.5, -1.0, 2.0, -0.0], [-3.0, -3.5, -2.0, -8.0]], dtype)
    for name, value in [("top_k", 2), ("top_p", 0.6), ("min_p", 0.1), ("temperature", 0.5)]:
        got = getattr(mbx.sampling, name)(logits, value)
        assert got.dtype == dtype
        wide = getattr(mbx.sampling, name)(logits.astype(jnp.float32), value)
        np.testing.assert_allclose(got.astype(jnp.float32), wide, rtol=1e-2)


LOGITS_5 = np.array([1.0, -0.5, 0.0, 2.0, 0.9], np.float32)
N = 20_000


def draw(logits, **options):
    keys = jr.split(jr.key(0), N)
    run = jax.jit(jax.vmap(lambda key: mbx.sampling.sample(jnp.asarray(logits), key, **options)))
    return np.bincount(run(keys), minlength=len(logits)) / N


def distribution(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Returns the distribution after the filters, for logits without ties."""
    logits = logits.astype(np.float64) / temperature

    def only_first(order, probs, share):
        before = np.cumsum(probs[order]) - probs[order]
        logits[order[before >= share]] = EXCLUDED

    if top_k is not None:
        logits[np.argsort(-logits)[top_k:]] = EXCLUDED
    if top_p is not None:
        only_first(np.argsort(-logits), softmax(logits), top_p)
    if min_p is not None:
        logits[softmax(logits) < min_p * softmax(logits).max()] = EXCLUDED
    if typical_p is not None:
        probs = softmax(logits)
        information = np.full(len(probs), np.inf)
        information[probs > 0] = -np.log(probs[probs > 0])
        entropy = np.sum(probs[probs > 0] * information[probs > 0])
        only_first(np.argsort(np.abs(information - entropy)), probs, typical_p)
    return softmax(logits)


def assert_frequencies(got, expected):
    """Asserts that frequencies are within five standard deviations."""
    bound = 5 * np.sqrt(expected * (1 - expected) / N) + 1e-9
    np.testing.assert_array_less(np.abs(got - expected), bound)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_k": 1},
    {"top_p": 0.3},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.3},
    {"typical_p": 0.3},
    {"typical_p": 0.8},
    {"top_k": 4, "top_p": 0.8},
    {"top_k": 4, "min_p": 0.3},
    {"top_p": 0.97, "min_p": 0.3},
    {"top_k": 4, "typical_p": 0.7},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.97, "min_p": 0.3},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.97, "min_p": 0.3, "typical_p": 0.5},
]


SINGLE = [{"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}]


# Drawing takes seconds for each combination, so the quick run draws with one and with all filters.
@pytest.mark.parametrize(
    "options",
    [
        FILTERS[-1],
        FILTERS[2],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in FILTERS[:-1]
            if options != FILTERS[2]
        ),
    ],
    ids=str,
)
def test_sample_draws_from_the_filtered_distribution(options):
    expected = distribution(LOGITS_5, **options)
    rows = jnp.tile(jnp.asarray(LOGITS_5), (N, 1))
    # One key for each row, and one key for all rows.
    at_once = np.bincount(mbx.sampling.sample(rows, jr.key(1), **options), minlength=5) / N
    for got in (draw(LOGITS_5, **options), at_once):
        np.testing.assert_array_equal(got[expected == 0], 0)
        assert_frequencies(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6},
        pytest.param({"top_k": 700}, marks=pytest.mark.slow),
        pytest.param({"typical_p": 0.6}, marks=pytest.mark.slow),
        pytest.param({"top_k": 7}, marks=pytest.mark.slow),
        pytest.param({"top_p": 0.02}, marks=pytest.mark.slow),
        pytest.param({"typical_p": 0.02}, marks=pytest.mark.slow),
        pytest.param({"top_k": 700, "top_p": 0.5, "min_p": 0.4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sample_draws_kept_tokens_of_a_large_vocabulary_by_their_probabilities(options):
    # The kept tokens spread over several tiles, and many draws are rejected before one is kept.
    logits = np.random.default_rng(0).normal(size=1300).astype(np.float32)
    expected = distribution(logits, **options)
    # Rounding decides about the token at the threshold.
    kept = np.isfinite(filtered(logits, **options))
    assert (kept != (expected > 0)).sum() <= 1
    got = draw(logits, **options)
    np.testing.assert_array_equal(got[~kept], 0)
    for width in (100, 512):
        edges = np.arange(0, len(logits), width)
        assert_frequencies(np.add.reduceat(got, edges), np.add.reduceat(expected, edges))


def filtered(logits, **options):
    logits = jnp.asarray(logits)
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
        if name in options:
            logits = getattr(mbx.sampling, name)(logits, options[name])
    return logits


@pytest.mark.slow
@given(LOGITS | MANY, st.sampled_from([*SINGLE, FILTERS[-1]]), st.integers(0, 2**31 - 1))
def test_sample_draws_only_kept_tokens(logits, options, seed):
    kept = np.isfinite(filtered(logits, **options))
    tokens = np.asarray(mbx.sampling.sample(jnp.asarray(logits), jr.key(seed), **options))
    assert np.take_along_axis(kept, tokens[..., None], axis=-1).all()


@pytest.mark.parametrize("options", [{}, *SINGLE], ids=str)
def test_sampling_non_finite_logits_terminates(options):
    for value in (np.nan, np.inf, -np.inf):
        logits = np.full((2, 4500), value, np.float32)
        logits[0] = 0.0
        tokens = np.asarray(mbx.sampling.sample(jnp.asarray(logits), jr.key(0), **options))
        assert ((tokens >= 0) & (tokens < 4500)).all(), value


def test_excluded_tokens_of_a_large_vocabulary_are_never_drawn():
    for survivors in ([0], [70_000], [3, 40_000]):
        logits = np.full(70_001, EXCLUDED, np.float32)
        logits[survivors] = 0.0
        logits = jnp.asarray(logits)
        tokens = {int(mbx.sampling.sample(logits, key)) for key in jr.split(jr.key(1), 30)}
        assert tokens == set(survivors)


def test_sample_draws_a_large_vocabulary_by_its_probabilities():
    expected = np.zeros(1300)
    expected[[0, 511, 512, 1024, 1299]] = 0.3, 0.2, 0.1, 0.05, 0.35
    with np.errstate(divide="ignore"):
        got = draw(np.log(expected).astype(np.float32))
    assert_frequencies(got, expected)


def test_rows_are_drawn_independently():
    logits = jnp.tile(jnp.asarray(LOGITS_5), (50, 2, 1))
    tokens = mbx.sampling.sample(logits, jr.key(0))
    assert tokens.shape == (50, 2)
    assert (tokens[:, 0] != tokens[:, 1]).any()


def test_same_key_draws_the_same_token():
    logits = jr.normal(jr.key(0), (9,))
    assert mbx.sampling.sample(logits, jr.key(3)) == mbx.sampling.sample(logits, jr.key(3))


@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_loops_compile_once_outside_jit(options):
    logits = jr.normal(jr.key(0), (3, 1500))

    def run(seed):
        mbx.sampling.sample(logits + seed, jr.key(seed), **options)
        filtered(logits + seed, **options)

    run(1)  # compiles
    with jax.no_tracing():
        run(2)


def test_options_can_be_traced():
    logits = jnp.asarray(LOGITS_5)

    traces = []

    @jax.jit
    def run(key, t, k, p):
        traces.append(t)
        return mbx.sampling.sample(logits, key, temperature=t, top_k=k, top_p=p, min_p=p)

    for t, k, p in itertools.product([0.5, 1.5], [1, 3], [0.2, 0.9]):
        key = jr.key(7)
        expected = mbx.sampling.sample(logits, key, temperature=t, top_k=k, top_p=p, min_p=p)
        assert run(key, jnp.asarray(t), jnp.asarray(k), jnp.asarray(p)) == expected
    assert len(traces) == 1


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -1.0, "positive and finite, but got temperature=-1.0"),
        ("temperature", 0.0, "use `greedy`"),
        ("temperature", float("nan"), "temperature=nan"),
        ("temperature", float("inf"), "temperature=inf"),
        ("temperature", 1e-42, "temperature=1e-42"),
        ("temperature", "hot", "one number, but got temperature='hot'"),
        ("temperature", True, "temperature=True"),
        ("top_k", 0, "at least 1, but got top_k=0"),
        ("top_k", 2.5, "integer of at least 1, but got top_k=2.5"),
        ("top_k", [1], r"top_k=\[1\]"),
        ("top_p", 0.0, "0 < top_p <= 1, but got top_p=0.0"),
        ("top_p", 1.5, "top_p=1.5"),
        ("top_p", float("nan"), "top_p=nan"),
        ("min_p", -0.1, "0 <= min_p <= 1, but got min_p=-0.1"),
        ("min_p", 1.01, "min_p=1.01"),
    ],
)
def test_options_out_of_range_raise(name, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(mbx.sampling, name)(jnp.zeros(3), value)
    with pytest.raises(ValueError, match=message):
        mbx.sampling.sample(jnp.zeros(3), jr.key(0), **{name: value})
