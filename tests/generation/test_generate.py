"""Tests of `generate` and `stream` against a naive loop over whole sequences."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.generation import _prefill
from tests.support.generation import FILTERS, KEY, MODEL, PROMPT, SAMPLING, VOCAB, make, naive, row


pytestmark = pytest.mark.usefixtures("compile_fast")


@given(PROMPT, st.integers(1, 20), st.booleans())
def test_generate_equals_the_naive_loop(prompt, n, sampling):
    options: dict[str, Any] = {"sampling": SAMPLING, "key": KEY} if sampling else {}
    out = mbx.generate(MODEL, prompt, n, **options)
    filters: dict[str, Any] = FILTERS | {"key": KEY} if sampling else {}
    tokens, log_probs = naive(MODEL, prompt, n, **filters)
    assert row(out) == tokens
    np.testing.assert_allclose(out.log_probs, log_probs, rtol=1e-4, atol=1e-4)


@given(PROMPT, st.integers(1, 16), st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
def test_row_ends_with_its_first_stop_token(prompt, n, stop):
    out = mbx.generate(MODEL, prompt, n, mbx.Sampling(stop_tokens=sorted(stop)))
    tokens, _ = naive(MODEL, prompt, n, stop=stop)
    assert row(out) == tokens
    assert bool(out.stopped) == (tokens[-1] in stop)


@pytest.mark.parametrize("sampling", [True, pytest.param(False, marks=pytest.mark.slow)])
@given(st.lists(PROMPT, min_size=3, max_size=3), st.integers(1, 12))
def test_rows_do_not_influence_each_other(sampling, prompts, n):
    # Rows end at different times, since token 0 is a stop token.
    options = mbx.Sampling(**FILTERS if sampling else {}, stop_tokens=[0])
    out = mbx.generate(MODEL, prompts, n, options, key=KEY)
    for i, prompt in enumerate(prompts):
        alone = mbx.generate(MODEL, prompt, n, options, key=jr.fold_in(KEY, i))
        assert row(out, i) == row(alone)
        for got, expected in zip(
            jax.tree.leaves(out.state), jax.tree.leaves(alone.state), strict=True
        ):
            np.testing.assert_allclose(got[i], expected, rtol=1e-3, atol=1e-3)


@given(PROMPT, st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_continuing_equals_generating_at_once(prompt, n, m, sampling):
    options: dict[str, Any] = {"sampling": SAMPLING, "key": KEY} if sampling else {}
    first = mbx.generate(MODEL, prompt, n, **options)
    second = mbx.generate(MODEL, None, m, state=first.state, **options)
    assert row(first) + row(second) == row(mbx.generate(MODEL, prompt, n + m, **options))
    again = mbx.generate(MODEL, [], m, state=first.state, **options)
    assert row(again) == row(second)


@given(PROMPT, PROMPT, st.integers(1, 5), st.integers(1, 5))
def test_prompt_follows_the_tokens_of_the_state(first, second, n, m):
    before = mbx.generate(MODEL, first, n)
    after = mbx.generate(MODEL, second, m, state=before.state)
    assert row(after) == row(mbx.generate(MODEL, first + row(before) + second, m))
    assert int(after.state.position) == len(first) + n + len(second) + m - 1


def test_batch_continues_from_its_state():
    prompts = [[1], [2, 3, 4]]
    first = mbx.generate(MODEL, prompts, 4)
    second = mbx.generate(MODEL, None, 5, state=first.state)
    third = mbx.generate(MODEL, [[], [7, 8]], 5, state=first.state)
    whole = mbx.generate(MODEL, prompts, 9)
    for i in range(2):
        assert row(first, i) + row(second, i) == row(whole, i)
    assert row(third, 0) == row(second, 0)
    joined = prompts[1] + row(first, 1) + [7, 8]
    assert row(third, 1) == row(mbx.generate(MODEL, joined, 5))


@settings(max_examples=5)
@given(st.integers(1, 40), st.integers(1, 40))
def test_long_prompts_run_in_chunks(a, b):
    prompts = [(list(range(VOCAB)) * 4)[:n] for n in (a, b)]
    whole = mbx.generate(MODEL, prompts, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_prefill, "_CHUNK", 16)
        chunked = mbx.generate(MODEL, prompts, 3)
    np.testing.assert_array_equal(whole.tokens, chunked.tokens)
    for got, expected in zip(
        jax.tree.leaves(chunked.state), jax.tree.leaves(whole.state), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_caches_grow_when_a_state_is_continued():
    """The room covers the tokens of the state as well as those of the prompt."""
    mixers = mbx.AttentionConfig(6, nheads=2), mbx.Mamba1Config(6, d_state=4)
    blocks = tuple(mbx.BlockConfig(mixer) for mixer in mixers)
    model = mbx.LanguageModelConfig(VOCAB, blocks).build(key=KEY)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    first = mbx.generate(model, prompt, 5)
    second = mbx.generate(model, [3, 2, 1], 5, state=first.state)
    assert row(second) == row(mbx.generate(model, prompt + row(first) + [3, 2, 1], 5))


def test_prompts_can_be_arrays():
    expected = mbx.generate(MODEL, [1, 2, 3], 4).tokens
    for prompt in [np.array([1, 2, 3], np.uint8), jnp.array([1, 2, 3])]:
        np.testing.assert_array_equal(mbx.generate(MODEL, prompt, 4).tokens, expected)
    for prompts in [np.array([[1, 2, 3]] * 2), [[1, 2, 3], np.array([1, 2, 3])]]:
        np.testing.assert_array_equal(mbx.generate(MODEL, prompts, 4).tokens, [expected] * 2)


def test_stacked_layers_generate_the_same_tokens():
    prompts = [[1], [2, 3, 4, 5]]
    expected = mbx.generate(MODEL, prompts, 6)
    out = mbx.generate(make(stacked=True), prompts, 6)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    logits = MODEL(jnp.array([1, 2, 3]))
    assert (jnp.argmax(logits, axis=-1) >= VOCAB).any()
    out = mbx.generate(
        MODEL, [[i] for i in range(VOCAB)], 16, mbx.Sampling(temperature=5.0), key=KEY
    )
    assert out.tokens.min() >= 0
    assert out.tokens.max() < VOCAB
    exact = mbx.generate(make(padded=VOCAB), [1, 2, 3], 1)
    assert exact.log_probs.shape == (1,)


def test_tokens_depend_on_the_key_only():
    one, two = (mbx.generate(MODEL, [[1], [1]], 12, SAMPLING, key=KEY) for _ in range(2))
    assert eqx.tree_equal(one, two)
    assert row(one, 0) != row(one, 1)
    other = mbx.generate(MODEL, [[1], [1]], 12, SAMPLING, key=jr.key(6))
    assert row(one, 0) != row(other, 0)


def test_raw_keys_work():
    raw = mbx.generate(MODEL, [1], 8, mbx.Sampling(temperature=1.0), key=jr.key_data(KEY))
    assert row(raw) == row(mbx.generate(MODEL, [1], 8, mbx.Sampling(temperature=1.0), key=KEY))


def test_bfloat16_models_generate():
    out = mbx.generate(mbx.cast(MODEL, jnp.bfloat16), [[1, 2], [3]], 5)
    assert out.log_probs.dtype == jnp.float32
    assert out.length.tolist() == [5, 5]


@given(PROMPT, st.integers(1, 30), st.sampled_from([1, 8]), st.booleans())
def test_stream_yields_the_tokens_of_generate(prompt, n, block, sampling):
    options: dict[str, Any] = {
        "sampling": mbx.Sampling(**FILTERS if sampling else {}, stop_tokens=[4]),
        "key": KEY,
    }
    tokens = list(mbx.stream(MODEL, prompt, n, block=block, **options))
    assert all(type(token) is int for token in tokens)
    assert tokens == row(mbx.generate(MODEL, prompt, n, **options))


@given(PROMPT, st.integers(0, 12), st.booleans())
def test_interrupted_stream_continues_from_its_state(prompt, taken, sampling):
    options: dict[str, Any] = {"sampling": SAMPLING, "key": KEY} if sampling else {}
    whole = row(mbx.generate(MODEL, prompt, 12, **options))
    tokens = mbx.stream(MODEL, prompt, 12, block=8, **options)
    first = [next(tokens) for _ in range(taken)]
    assert tokens.finish == (mbx.generation.FinishReason.LENGTH if taken == 12 else None)
    if taken < 12:
        rest = mbx.generate(MODEL, None, 12 - taken, state=tokens.state, **options)
        assert first + row(rest) == whole
    # Reading the state does not change the stream.
    assert first + list(tokens) == whole
    assert int(tokens.state.position) == len(prompt) + 11


def test_stream_continues_from_a_state():
    first = mbx.generate(MODEL, [1, 2], 3)
    tokens = list(mbx.stream(MODEL, None, 4, state=first.state))
    assert row(first) + tokens == row(mbx.generate(MODEL, [1, 2], 7))


class Counting(mbx.AbstractSequenceLayer):
    """A layer that counts how often its methods are traced."""

    layer: mbx.Mamba1
    d_model: int = eqx.field(static=True)

    def init_state(self, *, max_len=None):
        MAX_LENS.append(max_len)
        return self.layer.init_state()

    def scan(self, x, state=None, *, reset=None, length=None):
        TRACES["scan"] += 1
        return self.layer.scan(x, state, reset=reset, length=length)

    def step(self, x, state):
        TRACES["step"] += 1
        return self.layer.step(x, state)


TRACES = {"scan": 0, "step": 0}
MAX_LENS: list[Any] = []


def counted():
    TRACES.update(scan=0, step=0)
    MAX_LENS.clear()
    layer = Counting(layer=mbx.Mamba1(4, key=jr.key(0)), d_model=4)
    return mbx.LanguageModel(mbx.Unrolled([layer]), vocab_size=VOCAB, key=jr.key(1))


def compilations(run):
    """Returns how often each method was traced. (JAX traces the body of a loop more than once.)"""
    before = dict(TRACES)
    run()
    return {verb: TRACES[verb] - before[verb] for verb in TRACES}


NOTHING = {"scan": 0, "step": 0}


def test_new_lengths_and_values_do_not_recompile():
    model = counted()
    options: dict[str, Any] = {
        "sampling": mbx.Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1),
        "key": KEY,
    }
    first = compilations(lambda: mbx.generate(model, [1] * 18, 5, **options))
    assert min(first.values()) > 0
    for length, n in [(30, 9), (33, 16), (18, 5)]:
        assert compilations(lambda: mbx.generate(model, [2] * length, n, **options)) == NOTHING  # noqa: B023
    others: dict[str, Any] = {
        "sampling": mbx.Sampling(temperature=0.9, top_k=5, top_p=0.9, min_p=0.2),
        "key": jr.key(9),
    }
    assert compilations(lambda: mbx.generate(model, [1] * 20, 7, **others)) == NOTHING
    # The next compiled size of a prompt compiles another prefill, but not another loop.
    assert compilations(lambda: mbx.generate(model, [1] * 34, 5, **options)) == {
        "scan": first["scan"],
        "step": 0,
    }
    # The capacity of caches covers the prompt and the generated tokens.
    assert all(max_len >= 32 for max_len in MAX_LENS)


def test_stream_compiles_once_for_all_blocks_and_calls():
    model = counted()
    whole = compilations(lambda: mbx.generate(model, [1], 40))
    first = compilations(lambda: list(mbx.stream(model, [1], 40)))
    assert first == whole
    assert first["step"] > 0
    assert compilations(lambda: list(mbx.stream(model, [2], 23))) == NOTHING


def test_stream_yields_before_all_is_decoded():
    tokens = mbx.stream(MODEL, [1], 2**31 - 1)
    assert [next(tokens) for _ in range(5)] == row(mbx.generate(MODEL, [1], 5))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([1, VOCAB], {}, r"within 0\.\.10, but got prompts\[1\]=11"),
        ([[1], [2, -1]], {}, r"within 0\.\.10, but got prompts\[1\]\[1\]=-1"),
        ([2**40], {}, "1099511627776"),
        ([], {}, "`prompts` must not be empty without a `state`"),
        ([[1], []], {}, r"`prompts\[1\]` must not be empty"),
        (None, {}, "needs a `state` to continue from"),
        ("ROMEO", {}, "Tokenize text first"),
        (["ROMEO"], {}, "Tokenize text first"),
        ([1.0, 2.0], {}, "must be a sequence of integers"),
        ([True], {}, "must be a sequence of integers"),
        ([[1], 2], {}, r"`prompts\[1\]` must be a sequence of integers, but got 2"),
        ([[[1]]], {}, "must be a sequence of integers"),
        (3, {}, "must be a sequence of token ids"),
        (np.array(3), {}, "must be a sequence of token ids"),
        ({1, 2}, {}, "must be a sequence of token ids"),
        ([1], {"max_new_tokens": 0}, "at least 1 and below .*max_new_tokens=0"),
        ([1], {"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ([1], {"max_new_tokens": True}, "max_new_tokens=True"),
        ([1], {"max_new_tokens": 2**31}, "below 2"),
        ([1], {"temperature": 0.5}, "temperature=0.5 needs a key. .* or `temperature=0`"),
        ([1], {"temperature": 0.5, "key": 0}, "must be one key"),
        ([1], {"temperature": 0.5, "key": jr.split(KEY)}, "must be one key"),
        ([1], {"temperature": -1, "key": KEY}, "temperature=-1"),
        ([1], {"temperature": "0", "key": KEY}, "temperature='0'"),
        ([1], {"top_k": -1}, "top_k=-1"),
        ([1], {"top_p": 2}, "top_p=2"),
        ([1], {"min_p": -1}, "min_p=-1"),
        ([1], {"stop_tokens": [99]}, r"stop_tokens\[0\]=99"),
        ([1], {"stop_tokens": 3}, "`stop_tokens` must be a sequence of integers, but got 3"),
        ([1], {"state": ()}, "must be a `DecodingState`, but got tuple"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(prompts: Any, options: dict[str, Any], message: str):
    others = {name: options.pop(name) for name in ("state", "key") if name in options}
    n = options.pop("max_new_tokens", 4)
    with pytest.raises(ValueError, match=message):
        mbx.generate(MODEL, prompts, n, mbx.Sampling(**options), **others)
    if not (isinstance(prompts, list) and isinstance(prompts[:1], list)):
        with pytest.raises(ValueError, match=message):
            mbx.stream(MODEL, prompts, n, mbx.Sampling(**options), **others)


@pytest.mark.usefixtures("as_users_run")
def test_mismatched_states_and_invalid_streams_raise():
    single, batch = mbx.generate(MODEL, [1], 1), mbx.generate(MODEL, [[1], [2]], 1)
    with pytest.raises(ValueError, match="prompts of 2 rows and a state of one seq"):
        mbx.generate(MODEL, [[1], [2]], 1, state=single.state)
    with pytest.raises(ValueError, match="prompts of one sequence and a state of 2 rows"):
        mbx.generate(MODEL, [1], 1, state=batch.state)
    with pytest.raises(ValueError, match="prompts of 3 rows and a state of 2 rows"):
        mbx.generate(MODEL, [[1]] * 3, 1, state=batch.state)
    with pytest.raises(ValueError, match="takes one prompt, but got 2"):
        mbx.stream(MODEL, [[1], [2]], 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"at least 1 .*block=0"):
        mbx.stream(MODEL, [1], 1, block=0)
