"""Tests of penalties, bias, stop strings, masks and options per row."""

import dataclasses
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.text import stop_table
from tests.support.generation import FORWARD, KEY, MODEL, PROMPT, VOCAB, row


pytestmark = pytest.mark.usefixtures("compile_fast")

PENALTIES = mbx.sampling.Penalties(repetition=1.7, presence=0.4, frequency=0.3, window=5)
# No token occurs twice within three positions, so that a wrong window changes the tokens.
NO_REPEATS = mbx.sampling.Penalties(presence=1e4, window=3)


def penalised(logits, tokens, penalties=PENALTIES):
    """Applies the penalties one after the other, in NumPy."""
    logits = np.array(logits, np.float64)
    recent = list(tokens[-penalties.window :])
    factor: Any = penalties.repetition
    for token in set(recent):
        logits[token] *= 1 / factor if logits[token] > 0 else factor
        logits[token] -= penalties.presence
    for token in recent:
        logits[token] -= penalties.frequency
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("penalties", [PENALTIES, NO_REPEATS], ids=["all", "window"])
@given(prompt=PROMPT, n=st.integers(1, 12), banned=st.integers(0, VOCAB - 1))
def test_penalties_and_bias_change_the_greedy_choice(penalties, prompt, n, banned):
    bias = {banned: -math.inf, 1: 2.5}
    bias = bias if banned != 1 else {1: -math.inf}
    out = mbx.generate(MODEL, prompt, n, mbx.Sampling(penalties=penalties, logit_bias=bias))
    tokens = list(prompt)
    for _ in range(n):
        padded = jnp.asarray((tokens + [0] * 64)[:64])
        logits = penalised(FORWARD(MODEL, padded)[len(tokens) - 1, :VOCAB], tokens, penalties)
        for token, value in bias.items():
            logits[token] += value
        tokens.append(int(np.argmax(logits)))
    assert row(out) == tokens[len(prompt) :]
    assert banned not in row(out)
    # The bias as an array, and continuing from a state, which has kept the last tokens.
    dense = jnp.zeros(VOCAB).at[jnp.array(list(bias))].set(jnp.array(list(bias.values())))
    first = mbx.generate(MODEL, prompt, 1, mbx.Sampling(penalties=penalties, logit_bias=dense))
    rest = mbx.generate(
        MODEL, None, n, mbx.Sampling(penalties=penalties, logit_bias=dense), state=first.state
    )
    assert (row(first) + row(rest))[:n] == row(out)


@given(st.lists(st.integers(-1, VOCAB - 1), min_size=1, max_size=9), st.integers(0, 9))
def test_penalties_equal_their_equations(recent, seed):
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    window = jnp.asarray(recent)
    said = [token for token in recent if token >= 0]
    one = mbx.sampling.repetition_penalty(jnp.asarray(logits), window, 1.7)
    one = mbx.sampling.presence_penalty(one, window, 0.4)
    one = mbx.sampling.frequency_penalty(one, window, 0.3)
    np.testing.assert_allclose(
        one,
        penalised(logits, said, mbx.sampling.Penalties(1.7, 0.4, 0.3, 99)),
        rtol=1e-5,
        atol=1e-5,
    )


@given(st.integers(0, 99), st.floats(0.05, 1.0))
def test_typical_p_keeps_the_most_typical_tokens(seed, p):
    logits = 2 * np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)), np.float64)
    probs = np.exp(log_probs)
    distance = np.abs(-log_probs + (probs * log_probs).sum())
    order = np.argsort(distance)
    count = int((np.cumsum(probs[order]) < p - 1e-6).sum()) + 1
    got = np.isfinite(mbx.sampling.typical_p(jnp.asarray(logits), p))
    assert set(np.flatnonzero(got)) == set(order[:count].tolist())


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs transformers and torch",
)
def test_filters_and_penalties_agree_with_transformers():
    import torch
    import transformers.generation.logits_process as theirs

    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((6, 50))).astype(np.float32)
    tokens = rng.integers(0, 50, (6, 12))
    pairs: list[tuple[Any, Any]] = [
        (lambda x: mbx.sampling.temperature(x, 0.7), theirs.TemperatureLogitsWarper(0.7)),
        (lambda x: mbx.sampling.top_k(x, 7), theirs.TopKLogitsWarper(7)),
        (lambda x: mbx.sampling.top_p(x, 0.8), theirs.TopPLogitsWarper(0.8)),
        (lambda x: mbx.sampling.min_p(x, 0.1), theirs.MinPLogitsWarper(0.1)),
        (lambda x: mbx.sampling.typical_p(x, 0.6), theirs.TypicalLogitsWarper(0.6)),
    ]
    for ours, other in pairs:
        want = torch.softmax(other(torch.tensor(tokens), torch.tensor(logits)), -1).numpy()
        got = jax.nn.softmax(ours(jnp.asarray(logits)))
        np.testing.assert_allclose(got, want, atol=1e-6)
    repetition = theirs.RepetitionPenaltyLogitsProcessor(1.3)
    want = repetition(torch.LongTensor(tokens), torch.FloatTensor(logits.copy())).numpy()
    got = jax.vmap(lambda x, t: mbx.sampling.repetition_penalty(x, t, 1.3))(
        jnp.asarray(logits), jnp.asarray(tokens)
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


@given(st.lists(PROMPT, min_size=2, max_size=2), st.booleans())
def test_mask_equals_a_ragged_list(prompts, left):
    width = max(map(len, prompts)) + 1
    tokens, mask = np.full((2, width), VOCAB + 3), np.zeros((2, width), bool)
    for i, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        tokens[i, at], mask[i, at] = prompt, True
    got = mbx.generate(MODEL, tokens, 4, mask=mask)
    np.testing.assert_array_equal(got.tokens, mbx.generate(MODEL, prompts, 4).tokens)


def test_options_per_row():
    """Each row equals a call with its options alone, with greedy rows among sampled rows."""
    options: dict[str, Any] = {
        "temperature": [0.0, 1.5, 0.8],
        "top_k": [VOCAB, 3, 9],
        "min_p": [0.0, 0.2, 0.01],
    }
    prompts = [[1, 2], [3], [4, 5, 6]]
    stops = [[0], [], [1, 2]]
    out = mbx.generate(MODEL, prompts, 12, mbx.Sampling(**options, stop_tokens=stops), key=KEY)
    for i, prompt in enumerate(prompts):
        alone: dict[str, Any] = {name: values[i] for name, values in options.items()}
        sampling = mbx.Sampling(**alone, stop_tokens=stops[i])
        want = mbx.generate(MODEL, prompt, 12, sampling, key=jr.fold_in(KEY, i))
        assert row(out, i) == row(want)


class Letters:
    """A tokenizer whose tokens have several bytes, with parts of a character among them."""

    TEXTS = (b"a", b"b", b"ab", b"ba", b"aab", b"", "é".encode(), b"\xc3", b"\xa9", b"c", b"bb")
    vocab_size = len(TEXTS)

    def __repr__(self) -> str:  # Equal in all processes, since it is part of the names of tests.
        return "Letters()"

    def token_bytes(self, token: int) -> bytes:
        return self.TEXTS[token]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        raise NotImplementedError

    def decoder(self, *, prompt: Any = ()) -> Any:
        raise NotImplementedError


STRINGS = st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3)


@given(STRINGS, st.lists(st.integers(0, VOCAB - 1), max_size=30))
def test_stop_strings_are_found_across_token_boundaries(strings, tokens):
    table = stop_table(Letters(), strings)
    state, text = 0, b""
    for token in tokens:
        state, text = table[state, token], text + Letters.TEXTS[token]
        assert (state == len(table) - 1) == any(s.encode() in text for s in strings)


def test_stop_table_is_built_once_for_each_tokenizer():
    letters = Letters()
    table = stop_table(letters, ["ab", "c"])
    assert stop_table(letters, ["ab", "c"]) is table
    assert (stop_table(letters, ["ab"]) != table).any()
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


@settings(max_examples=4)  # Every new shape of the table of stop strings is compiled.
@given(PROMPT, st.integers(1, 16), STRINGS)
def test_row_ends_with_its_first_stop_string(prompt, n, strings):
    sampling = mbx.Sampling(stop_tokens=[9], stop_strings=strings, tokenizer=Letters())
    out = mbx.generate(MODEL, prompt, n, sampling)
    free, text, want = row(mbx.generate(MODEL, prompt, n)), b"", []
    reason = mbx.generation.FinishReason.LENGTH
    for token in free:
        want.append(token)
        text += Letters.TEXTS[token]
        if token == 9:
            reason = mbx.generation.FinishReason.STOP_TOKEN
        elif any(s.encode() in text for s in strings):
            reason = mbx.generation.FinishReason.STOP_STRING
        if reason != mbx.generation.FinishReason.LENGTH:
            break
    assert row(out) == want
    assert int(out.finish) == reason
    assert list(mbx.stream(MODEL, prompt, n, sampling, block=4)) == want


class Alphabet(Letters):
    TEXTS = tuple(bytes([97 + token]) for token in range(VOCAB))


def test_stop_string_can_span_the_blocks_of_a_stream():
    sampling = mbx.Sampling(temperature=1.3)
    free = row(mbx.generate(MODEL, [1, 2], 16, sampling, key=KEY))
    text = b"".join(map(Alphabet().token_bytes, free)).decode()
    for at in range(14):
        stop = text[at : at + 3]
        end = text.find(stop) + 3
        ending = dataclasses.replace(sampling, stop_strings=[stop], tokenizer=Alphabet())
        tokens = mbx.stream(MODEL, [1, 2], 16, ending, key=KEY, block=4)
        assert list(tokens) == free[:end]
        assert tokens.finish == mbx.generation.FinishReason.STOP_STRING


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"temperature": [0.5, 0.5], "key": KEY}, r"one for each of 1 rows.*shape \(2,\)"),
        ([1], {"temperature": [0.5], "key": KEY}, r"`temperature` must be one number, but"),
        ([[1], [2]], {"top_p": [0.5, 2.0], "temperature": 1.0, "key": KEY}, "top_p=2.0"),
        ([[1], [2]], {"stop_tokens": [[1]]}, "got 1 lists for 2 rows"),
        ([1], {"stop_tokens": [[1]]}, "got 1 lists for one prompt"),
        ([1], {"typical_p": 0, "temperature": 1.0, "key": KEY}, "typical_p=0"),
        ([1], {"stop_strings": ["a"]}, "must come with a `tokenizer`"),
        ([1], {"stop_strings": [""], "tokenizer": Letters()}, "non-empty"),
        (
            [1],
            {"stop_strings": "ab", "tokenizer": Letters()},
            "a list of non-empty strings, but got stop_strings='ab'",
        ),
        ([1], {"logit_bias": {VOCAB: 1.0}}, r"within 0\.\.10, but got 11"),
        ([1], {"logit_bias": {1: "2"}}, "must be numbers, but got '2'"),
        ([1], {"logit_bias": {1: math.nan}}, "must be finite"),
        ([1], {"logit_bias": np.zeros(3)}, r"shape \(11,\).* shape \(3,\)"),
        ([1], {"logit_bias": np.full(VOCAB, -math.inf)}, "bans every token"),
        (
            [[1, 2]],
            {"mask": np.ones((1, 3), bool)},
            r"\(1, 2\) and a mask of bool and shape \(1, 3",
        ),
        (np.array([[1, 2, 3]]), {"mask": np.array([[1, 0, 1]])}, "between real tokens"),
        (np.array([[1, 2]]), {"mask": np.array([[0, 0]])}, r"`prompts\[0\]` must not be empty"),
    ],
    ids=str,
)
def test_invalid_options_raise(prompts: Any, options: dict[str, Any], message: str):
    others = {name: options.pop(name) for name in ("mask", "key") if name in options}
    with pytest.raises(ValueError, match=message):
        mbx.generate(MODEL, prompts, 4, mbx.Sampling(**options), **others)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [[0.5]]}, r"`temperature` must be one number, .*shape \(1, 1\)"),
        ({"temperature": [0.5, -1.0]}, "temperature=-1.0"),
        ({"top_k": [3, -1]}, "top_k=-1"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"stop_tokens": [[1], ["a"]]}, r"`stop_tokens\[1\]` must be a sequence of integers"),
        ({"stop_strings": ["a"]}, "must come with a `tokenizer`"),
        ({"logit_bias": {"a": 1.0}}, "must be token ids, but got 'a'"),
        ({"logit_bias": [math.inf]}, "must be finite"),
    ],
    ids=str,
)
def test_sampling_validates_without_a_model(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        mbx.Sampling(**options)


@pytest.mark.usefixtures("as_users_run")
def test_unsupported_options_raise():
    """Functions refuse the options that they cannot honour."""
    stops = {"stop_strings": ["a"], "tokenizer": Letters()}
    bias, penalties = {1: 2.0}, mbx.sampling.Penalties()
    cases: list[dict[str, Any]] = [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}]
    cases += [{"min_p": 0.5}, {"typical_p": 0.5}, stops]
    cases += [{"penalties": penalties}, {"logit_bias": bias}]
    for options in cases:
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"`beam_search` does not support `{name}`"):
            mbx.beam_search(MODEL, [1], 4, mbx.Sampling(**options))
    with pytest.raises(ValueError, match="`speculate` does not support `stop_strings`"):
        mbx.speculate(MODEL, MODEL, [1], 4, mbx.Sampling(**stops))
    for function in (mbx.generate, mbx.stream, mbx.beam_search):
        with pytest.raises(ValueError, match=r"`sampling` must be a `Sampling`, but got 0\.8"):
            function(MODEL, [1], 4, 0.8)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("as_users_run")
def test_invalid_penalties_raise():
    with pytest.raises(
        ValueError, match=r"`repetition` .* positive and finite, but got repetition=0"
    ):
        mbx.sampling.Penalties(repetition=0.0)
    with pytest.raises(ValueError, match=r"`window` .* at least 1 .*, but got window=0"):
        mbx.sampling.Penalties(window=0)
    state = mbx.generate(MODEL, [1], 1).state
    with pytest.raises(ValueError, match="last 99 tokens, but the `state` given has kept 64"):
        mbx.generate(
            MODEL, None, 1, mbx.Sampling(penalties=mbx.sampling.Penalties(window=99)), state=state
        )
