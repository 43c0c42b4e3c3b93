"""Tests of speculation, beam search, scoring and prefill against `generate` and brute force."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from tests.support.generation import FORWARD, KEY, MODEL, PROMPT, VOCAB, make, row


pytestmark = pytest.mark.usefixtures("compile_fast")

DRAFTS: dict[str, Any] = {
    "itself": MODEL,
    "another": make(scale=20.0),
    "lookup": mbx.generation.PromptLookup(ngram=1),
}


@pytest.mark.parametrize(
    "draft",
    [*(pytest.param(draft, marks=pytest.mark.slow) for draft in ("itself", "another")), "lookup"],
)
@pytest.mark.parametrize("penalised", [False, pytest.param(True, marks=pytest.mark.slow)])
@given(PROMPT, st.integers(1, 16))
def test_greedy_speculation_equals_generate(draft, penalised, prompt, n):
    penalties = mbx.sampling.Penalties(repetition=1.4, frequency=0.2, window=6)
    sampling = mbx.Sampling(stop_tokens=[0], penalties=penalties if penalised else None)
    out = mbx.speculate(MODEL, DRAFTS[draft], prompt, n, sampling, lookahead=3)
    want = mbx.generate(MODEL, prompt, n, sampling)
    length = int(out.length)
    assert out.tokens[:length].tolist() == row(want)
    assert (out.tokens[length:] == -1).all()
    assert int(out.finish) == int(want.finish)
    np.testing.assert_allclose(out.log_probs, want.log_probs, rtol=1e-3, atol=1e-3)
    for a, b in zip(jax.tree.leaves(out.state), jax.tree.leaves(want.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert int(out.accepted) <= int(out.proposed)
    if draft == "itself":
        # All proposed tokens are accepted, so that every round gives four tokens.
        assert int(out.proposed) == 3 * -(-length // 4)


@pytest.mark.parametrize("period", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_prompt_lookup_continues_a_cycle(period):
    """The proposal continues beyond the end of the text."""
    cycle = [1, 2, 3][:period]
    others = mbx.sampling.Penalties(presence=500.0, window=period - 1) if period > 1 else None
    out = mbx.speculate(
        MODEL,
        DRAFTS["lookup"],
        2 * cycle,
        12,
        mbx.Sampling(logit_bias=dict.fromkeys(cycle, 1000.0), penalties=others),
        lookahead=3,
    )
    assert out.tokens.tolist() == (12 * cycle)[:12]
    assert int(out.accepted) == int(out.proposed) == 9


def test_speculation_continues_from_a_state():
    first = mbx.speculate(MODEL, DRAFTS["another"], [1, 2], 5)
    for draft in DRAFTS.values():
        second = mbx.speculate(MODEL, draft, [3], 6, state=first.state)
        whole = [1, 2, *first.tokens.tolist(), 3]
        assert second.tokens.tolist() == row(mbx.generate(MODEL, whole, 6))


@pytest.mark.slow
def test_sampled_speculation_has_the_distribution_of_the_model():
    """The frequencies of all pairs of first tokens are within four standard deviations."""
    sampling = mbx.Sampling(temperature=1.4, top_k=4)
    prompt, count = [1, 2, 1], 4000
    logits = FORWARD(MODEL, jnp.asarray(prompt + [0] * 61))[2, :VOCAB]
    distribution = lambda x: jax.nn.softmax(mbx.sampling.top_k(mbx.sampling.temperature(x, 1.4), 4))
    first = np.asarray(distribution(logits), np.float64)
    joint = np.zeros((VOCAB, VOCAB))
    for token in np.flatnonzero(first):
        after = FORWARD(MODEL, jnp.asarray([*prompt, int(token)] + [0] * 60))[3, :VOCAB]
        joint[token] = first[token] * np.asarray(distribution(after))
    found = np.zeros((VOCAB, VOCAB))

    def run(key):
        out = mbx.speculate(MODEL, DRAFTS["another"], prompt, 2, sampling, lookahead=2, key=key)
        return out.tokens

    # A speculation can be mapped over keys, since all else is the same.
    np.add.at(found, tuple(np.asarray(jax.vmap(run)(jr.split(KEY, count))).T), 1)
    deviation = np.sqrt(count * joint * (1 - joint))
    assert (np.abs(found - count * joint) <= 4 * deviation + 1e-9).all()


@pytest.mark.usefixtures("as_users_run")
def test_invalid_drafts_raise():
    other = mbx.LanguageModelConfig(7, (mbx.BlockConfig(mbx.Mamba1Config(4)),)).build(key=KEY)
    with pytest.raises(ValueError, match="got vocab_size=7 and vocab_size=11"):
        mbx.speculate(MODEL, other, [1], 3)
    with pytest.raises(ValueError, match="takes one prompt, but got 2"):
        mbx.speculate(MODEL, MODEL, [[1], [2]], 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`lookahead` must .*lookahead=0"):
        mbx.speculate(MODEL, MODEL, [1], 3, lookahead=0)
    with pytest.raises(ValueError, match=r"`ngram` must .*ngram=0"):
        mbx.generation.PromptLookup(ngram=0)


TINY = make(padded=VOCAB)


def brute_force(prompt, n, alpha, stop):
    """Returns all continuations with their scores, the best one first."""
    found: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(VOCAB), repeat=n):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop), n)
        found.setdefault(tokens[:end], 0.0)
    keys = sorted(found)
    batch = np.zeros((len(keys), 16), np.int32)
    for line, tokens in zip(batch, keys, strict=True):
        line[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    log_probs = jax.nn.log_softmax(jax.vmap(lambda t: TINY(t))(jnp.asarray(batch)))
    log_probs = np.asarray(log_probs)
    for i, tokens in enumerate(keys):
        at = np.arange(len(tokens)) + len(prompt) - 1
        found[tokens] = log_probs[i, at, list(tokens)].sum() / len(tokens) ** alpha
    return sorted(found.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize(
    "alpha", [1.0, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.0, 2.0))]
)
def test_beam_search_equals_brute_force(alpha):
    prompt, n, stop = [1, 2], 3, (0, 4)
    want = brute_force(prompt, n, alpha, stop)
    out = mbx.beam_search(
        TINY, prompt, n, mbx.Sampling(stop_tokens=stop), num_beams=VOCAB**2, length_penalty=alpha
    )
    for i in range(20):
        tokens, score = want[i]
        assert out.tokens[i][: out.length[i]].tolist() == list(tokens)
        np.testing.assert_allclose(out.scores[i], score, rtol=1e-4, atol=1e-4)
        ended = (
            mbx.generation.FinishReason.STOP_TOKEN
            if tokens[-1] in stop
            else mbx.generation.FinishReason.LENGTH
        )
        assert int(out.finish[i]) == ended


@settings(max_examples=5)
@given(PROMPT, st.sampled_from([1, 7]))
def test_one_beam_equals_greedy_decoding(prompt, n):
    out = mbx.beam_search(MODEL, prompt, n, num_beams=1)
    assert out.tokens[0].tolist() == row(mbx.generate(MODEL, prompt, n))
    state = mbx.prefill(MODEL, prompt)
    again = mbx.beam_search(MODEL, None, n, num_beams=3, state=state)
    assert float(again.scores[0]) >= float(out.scores[0]) - 1e-5


@given(st.lists(PROMPT, min_size=2, max_size=2), st.integers(0, 19))
def test_scores_equal_the_log_probabilities_of_the_tokens(texts: Any, cut: int):
    out = mbx.score(MODEL, texts)
    for i, text in enumerate(texts):
        padded = jnp.asarray((text + [0] * 64)[:64])
        logits = FORWARD(MODEL, padded)[:, :VOCAB]
        want = jax.nn.log_softmax(logits)[np.arange(len(text) - 1), text[1:]]
        assert out.length[i] == len(text) - 1
        assert out.log_probs[i, 0] == 0
        assert (out.log_probs[i, len(text) :] == 0).all()
        np.testing.assert_allclose(out.log_probs[i, 1 : len(text)], want, rtol=1e-3, atol=1e-3)
    # Scoring in two pieces, the second from the state of the first.
    text = texts[0] + texts[1]
    cut = min(cut, len(text) - 1) + 1
    whole, first = mbx.score(MODEL, text), mbx.score(MODEL, text[:cut])
    second = mbx.score(MODEL, text[cut:], state=first.state)
    assert second.length == len(text) - cut
    joined = np.concatenate([first.log_probs, second.log_probs])
    np.testing.assert_allclose(joined, whole.log_probs, rtol=1e-3, atol=1e-3)
    if len(text) > 1:
        mean = whole.log_probs.sum() / (len(text) - 1)
        np.testing.assert_allclose(whole.perplexity, np.exp(-mean), rtol=1e-5)


def test_generate_continues_from_prefill():
    state = mbx.prefill(MODEL, [1, 2, 3])
    assert row(mbx.generate(MODEL, None, 6, state=state)) == row(mbx.generate(MODEL, [1, 2, 3], 6))
    both = mbx.generate(MODEL, [[4], [5, 6]], 6, state=mbx.fork(state, 2))
    assert row(both, 0) == row(mbx.generate(MODEL, [1, 2, 3, 4], 6))
    assert row(both, 1) == row(mbx.generate(MODEL, [1, 2, 3, 5, 6], 6))
    with pytest.raises(ValueError, match="got a state of 2 rows"):
        mbx.fork(both.state, 2)


def test_embed_returns_the_last_features():
    texts = [[1, 2, 3], [4], [5] * 40]
    out = mbx.embed(MODEL, texts)
    features = eqx.filter_jit(lambda tokens: MODEL.backbone(tokens)[0])
    for i, text in enumerate(texts):
        want = features(jnp.asarray((text + [0] * 64)[:64]))[len(text) - 1]
        np.testing.assert_allclose(out[i], want, rtol=1e-3, atol=1e-3)
