"""The engine: the tokens of each request are those of `generate` alone, whatever others do."""

import threading
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.generation import EngineFullError, FinishReason, Job, Progress
from mamba_eqx.generation.sampling import Penalties
from tests.support.generation import MODEL, PROMPT, VOCAB, row


pytestmark = pytest.mark.usefixtures("compile_fast")

# The options that requests may have. Every combination of filters is compiled once.
SAMPLINGS = {
    "greedy": mbx.Sampling(),
    "stop": mbx.Sampling(stop_tokens=[0, 3]),
    "plain": mbx.Sampling(temperature=1.2, stop_tokens=[1]),
    "top_k": mbx.Sampling(temperature=1.1, top_k=6, min_p=0.02),
    "top_p": mbx.Sampling(temperature=0.9, top_p=0.9, stop_tokens=[2]),
    "penalties": mbx.Sampling(
        temperature=0.8, penalties=Penalties(repetition=1.4, presence=0.5, window=5)
    ),
    "bias": mbx.Sampling(logit_bias={1: -np.inf, 2: 1.5}),
}
WARM = mbx.Sampling(temperature=1.0)
REQUEST = st.tuples(PROMPT, st.integers(1, 9), st.sampled_from(list(SAMPLINGS)), st.integers(0, 3))


def run(engine: mbx.Engine) -> list[Progress]:
    progress = []
    while engine.busy:
        progress += engine.step()
    return progress


def submit(engine: mbx.Engine, request: Any, **options: Any) -> Job:
    prompt, count, name, seed = request
    return engine.submit(prompt, count, SAMPLINGS[name], key=jr.key(seed), **options)


def assert_alone(model: mbx.LanguageModel, request: Any, job: Job) -> None:
    """A job has the tokens that `generate` gives for its request alone."""
    prompt, count, name, seed = request
    alone = mbx.generate(model, prompt, count, SAMPLINGS[name], key=jr.key(seed))
    assert job.tokens == row(alone)
    assert job.finish == FinishReason(int(alone.finish))
    np.testing.assert_allclose(
        job.log_probs, alone.log_probs[: len(job.tokens)], rtol=1e-3, atol=1e-3
    )


@pytest.fixture(scope="module")
def engine() -> mbx.Engine:
    """An engine that goes on through all examples, so that each meets the traces of others."""
    return mbx.Engine(MODEL, slots=4, max_len=32, queue=32, block=4, piece=6, prefix_bytes=20_000)


@pytest.mark.slow
@given(st.lists(st.tuples(REQUEST, st.integers(0, 3)), min_size=1, max_size=9))
@settings(max_examples=20)
def test_requests_get_the_tokens_of_generate_alone(engine, requests):
    jobs = []
    for request, steps in requests:
        jobs.append(submit(engine, request))
        for _ in range(steps):
            engine.step()
    run(engine)
    for (request, _), job in zip(requests, jobs, strict=True):
        assert_alone(MODEL, request, job)


def test_requests_join_and_leave_a_running_batch():
    engine = mbx.Engine(MODEL, slots=2, max_len=32, block=2, piece=8, prefix_bytes=0)
    requests = [([1, 2, 3], 9, "greedy", 0), ([4] * 11, 3, "plain", 1), ([5], 6, "plain", 2)]
    jobs = [submit(engine, request) for request in requests]
    progress = run(engine)
    for request, job in zip(requests, jobs, strict=True):
        assert_alone(MODEL, request, job)
        mine = [p for p in progress if p.job is job]
        assert [p.finish for p in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish == job.finish
        starts = [p.start for p in mine]
        assert starts == sorted(set(starts))
        assert starts[0] == 0
    # A step generates for the first job while it runs a piece of the second prompt.
    assert engine.counts.ended == engine.counts.submitted == 3
    assert engine.counts.generated_tokens == sum(len(job.tokens) for job in jobs)


@pytest.mark.slow
def test_rows_grow_and_shrink_with_the_requests():
    engine = mbx.Engine(MODEL, slots=4, max_len=600, queue=8, block=2)
    requests = [([i + 1], 3, "greedy", 0) for i in range(5)] + [([7], 280, "greedy", 0)]
    jobs = [submit(engine, request) for request in requests]
    sizes = set()
    while engine.busy:
        engine.step()
        sizes.add(len(engine._batch._rows))  # pyright: ignore[reportPrivateUsage]
    assert sizes == {4, 2, 1}
    for request, job in zip(requests, jobs, strict=True):
        assert_alone(MODEL, request, job)


# --- Stopping, cancelling, limits ---


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stop_strings_end_a_row_at_the_token_of_generate(seed):
    tokenizer = mbx.ByteTokenizer()
    free = mbx.generate(MODEL, [1, 2], 12, mbx.Sampling(temperature=1.5), key=jr.key(seed))
    text = tokenizer.decode(row(free))
    sampling = mbx.Sampling(
        temperature=1.5, stop_strings=[text[4:6], text[7:10]], tokenizer=tokenizer
    )
    alone = mbx.generate(MODEL, [1, 2], 12, sampling, key=jr.key(seed))
    engine = mbx.Engine(MODEL, slots=1, max_len=32)
    job = engine.submit([1, 2], 12, sampling, key=jr.key(seed))
    run(engine)
    assert job.tokens == row(alone)
    assert job.finish == FinishReason.STOP_STRING
    # The state after the answer has read no token beyond it.
    again = engine.submit([1, 2, *job.tokens, 5], 4)
    run(engine)
    assert again.tokens == row(mbx.generate(MODEL, [1, 2, *job.tokens, 5], 4))


def test_cancelled_jobs_end_wherever_they_are():
    engine = mbx.Engine(MODEL, slots=1, max_len=64, block=2, piece=4)
    decoding = engine.submit([1, 2], 40)
    engine.step()
    waiting, reading = engine.submit([3], 5), engine.submit([4] * 30, 5)
    kept = engine.submit([5], 5)
    waiting.cancel()
    decoding.cancel()
    progress = engine.step()
    assert [p.job for p in progress[:2]] == [waiting, decoding]
    assert reading.finish is None
    assert engine.prefilling == 1
    reading.cancel()
    run(engine)
    for job in (decoding, waiting, reading):
        assert job.finish == FinishReason.CANCELLED
    assert 0 < len(decoding.tokens) < 40
    assert not waiting.tokens
    assert not reading.tokens
    assert_alone(MODEL, ([5], 5, "greedy", 0), kept)
    kept.cancel()
    assert not engine.step()
    assert kept.finish == FinishReason.LENGTH


def test_jobs_end_when_their_time_is_up():
    engine = mbx.Engine(MODEL, slots=1, max_len=64, block=1)
    job = engine.submit([1, 2], 50, seconds=1e-9)
    other = engine.submit([1, 2], 4)
    progress = run(engine)
    assert job.finish == FinishReason.TIME_LIMIT
    assert progress[0] == Progress(job, 0, FinishReason.TIME_LIMIT)
    assert len(other.tokens) == 4


def test_full_queue_refuses_requests():
    engine = mbx.Engine(MODEL, slots=2, max_len=16, queue=1)
    jobs = [engine.submit([1], 9) for _ in range(2)]
    engine.step()
    jobs.append(engine.submit([1], 2))
    with pytest.raises(EngineFullError, match="fewer than 1 waiting"):
        engine.submit([1], 2)
    run(engine)
    assert all(job.finish == FinishReason.LENGTH for job in jobs)
    assert engine.counts.submitted == engine.counts.ended == len(jobs)
    # A cancelled request makes room at once.
    jobs = [engine.submit([1], 2) for _ in range(3)]
    jobs[0].cancel()
    engine.submit([1], 2)
    run(engine)
    assert jobs[1].finish == FinishReason.LENGTH


@pytest.mark.slow
def test_warm_up_changes_nothing():
    engine = mbx.Engine(MODEL, slots=2, max_len=32)
    engine.warm_up(SAMPLINGS["plain"])
    assert not engine.busy
    request = ([1, 2], 20, "greedy", 0)
    job = submit(engine, request)
    engine.step()
    with pytest.raises(ValueError, match="before requests decode, but 1 do"):
        engine.warm_up()
    run(engine)
    assert_alone(MODEL, request, job)


def test_threads_may_submit_while_one_steps():
    engine = mbx.Engine(MODEL, slots=2, max_len=32, queue=100, block=2)
    jobs: list[tuple[Any, Job]] = []

    def client(i: int) -> None:
        for n in range(3):
            request = ([i + 1] * (n + 1), 5, "plain" if n else "greedy", i)
            jobs.append((request, submit(engine, request)))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy:
        engine.step()
    for request, job in jobs:
        assert_alone(MODEL, request, job)


def test_logits_that_are_not_finite_end_one_request_only():
    # Token 10 has an embedding that is not a number.
    weight = MODEL.embedding.weight.at[10].set(jnp.nan)
    model = eqx.tree_at(lambda model: model.embedding.weight, MODEL, weight)
    engine = mbx.Engine(model, slots=2, max_len=32)
    sampling = mbx.Sampling(logit_bias={10: -1e9})
    bad, good = engine.submit([1, 10], 5), engine.submit([1, 2], 5, sampling)
    run(engine)
    assert bad.finish == FinishReason.NOT_FINITE
    assert bad.tokens == []
    alone = mbx.generate(model, [1, 2], 5, sampling)
    assert good.tokens == row(alone)


def test_most_likely_tokens_come_with_each_token():
    engine = mbx.Engine(MODEL, slots=2, max_len=32)
    job, other = engine.submit([1, 2], 5, top_log_probs=True), engine.submit([1, 2], 5)
    run(engine)
    assert other.top == []
    for token, log_prob, top in zip(job.tokens, job.log_probs, job.top, strict=True):
        assert top[0] == (token, pytest.approx(log_prob, abs=1e-5))
        assert [value for _, value in top] == sorted((v for _, v in top), reverse=True)
        assert sum(np.exp(value) for _, value in top) == pytest.approx(1, abs=1e-4)
        assert len(top) == VOCAB


# --- The prefix cache ---


@pytest.mark.slow
@given(st.lists(st.tuples(PROMPT, st.booleans(), st.integers(1, 5)), min_size=2, max_size=5))
@settings(max_examples=20)
def test_prefixes_change_no_token(engine, turns):
    """A conversation, of which some turns follow the whole text and others its beginning."""
    text: list[int] = []
    for new, goes_on, count in turns:
        text = (text if goes_on else text[: len(text) // 2]) + new
        text = text[-20:]
        request = (text, count, "plain", count)
        job = submit(engine, request, keep=[len(text) // 2 + 1])
        run(engine)
        assert_alone(MODEL, request, job)
        text = text + job.tokens


def test_next_turn_runs_only_what_is_new():
    engine = mbx.Engine(MODEL, slots=1, max_len=64)
    first = engine.submit([1, 2, 3, 4], 5, keep=[2])
    run(engine)
    assert first.reused == 0
    request = ([1, 2, 3, 4, *first.tokens, 5, 6], 4, "greedy", 0)
    second = submit(engine, request)
    run(engine)
    assert second.reused == 9
    assert_alone(MODEL, request, second)
    # Another conversation with the same beginning, and the same prompt again.
    for prompt, reused in (([1, 2, 9], 2), ([1, 2, 3, 4], 4), ([2, 2], 0)):
        job = submit(engine, (prompt, 3, "plain", 1))
        run(engine)
        assert job.reused == reused
        assert_alone(MODEL, (prompt, 3, "plain", 1), job)
    counts = engine.counts
    assert (counts.lookups, counts.hits) == (5, 3)
    assert counts.reused_tokens == 15
    assert counts.prefilled_tokens + counts.reused_tokens == counts.prompt_tokens
    assert counts.saved_seconds > 0


def test_requests_with_the_same_prompt_run_it_once():
    engine = mbx.Engine(MODEL, slots=4, max_len=64, piece=3)
    requests = [([1, 2, 3, 4, 5, 6, 7, 8], 4, "plain", seed) for seed in range(4)]
    jobs = [submit(engine, request) for request in requests]
    run(engine)
    assert engine.counts.prefilled_tokens == 8
    for request, job in zip(requests, jobs, strict=True):
        assert_alone(MODEL, request, job)


def test_states_beyond_the_limit_of_bytes_are_dropped():
    engine = mbx.Engine(MODEL, slots=1, max_len=32, prefix_bytes=8_000)
    for token in range(VOCAB):
        engine.submit([token], 2)
        run(engine)
        assert engine.prefix_bytes <= 8_000
    assert 0 < engine.prefix_states < VOCAB
    last, first = engine.submit([VOCAB - 1, 1], 2), engine.submit([0, 1], 2)
    run(engine)
    assert (last.reused, first.reused) == (1, 0)
    none = mbx.Engine(MODEL, slots=1, max_len=32, prefix_bytes=0)
    none.submit([1], 2)
    run(none)
    assert none.prefix_states == none.prefix_bytes == 0


# --- Other models ---

_HYBRIDS = {
    "attention": (mbx.Mamba2Config(16, d_state=4, headdim=8), mbx.AttentionConfig(16, nheads=2)),
    "window": (mbx.Mamba1Config(16, d_state=4), mbx.AttentionConfig(16, nheads=2, window=5)),
    "stacked": (mbx.Mamba1Config(16, d_state=4), mbx.Mamba1Config(16, d_state=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_HYBRIDS))
def test_hybrids_have_room_in_every_slot(name):
    layers = tuple(mbx.BlockConfig(mixer) for mixer in _HYBRIDS[name])
    config = mbx.LanguageModelConfig(VOCAB, layers, tie_embeddings=False)
    model = config.build(stacked=name == "stacked", key=jr.key(1))
    scale = lambda model: (model.embedding.weight, model.lm_head.weight)
    model = eqx.tree_at(scale, model, replace_fn=lambda weight: 20 * weight)
    engine = mbx.Engine(model, slots=2, max_len=40, block=4, piece=8)
    requests = [
        ([1, 2, 3], 20, "greedy", 0), ([4] * 30, 10, "greedy", 1), ([5], 6, "greedy", 2),
        ([4] * 30 + [7], 9, "greedy", 0),
    ]  # fmt: skip
    jobs = [submit(engine, request) for request in requests]
    run(engine)
    # The caches of finished slots are full and then used again.
    requests.append(([1, 2, 3, *jobs[0].tokens], 5, "greedy", 0))
    jobs.append(submit(engine, requests[-1]))
    run(engine)
    assert jobs[-1].reused == 23
    for request, job in zip(requests, jobs, strict=True):
        assert_alone(model, request, job)


# --- Invalid requests ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 3}, "power of two, but got slots=3. Use 4"),
        ({"slots": 0}, "`slots`"),
        ({"max_len": 0}, "`max_len`"),
        ({"queue": -1}, "`queue`"),
        ({"block": 1.5}, "`block`"),
        ({"prefix_bytes": -1}, "`prefix_bytes`"),
        ({"penalty_window": 0}, "`penalty_window`"),
    ],
)
def test_invalid_engines_are_refused(options, message, as_users_run):
    with pytest.raises(ValueError, match=message):
        mbx.Engine(MODEL, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "must not be empty"),
        ([VOCAB], {}, "Token ids must be within"),
        ([[1], [2]], {}, "takes one prompt"),
        ([1] * 30, {}, "at most `max_len=32` tokens together, but got 30 and 3"),
        ([1], {"seconds": 0}, "`seconds`"),
        ([1], {"keep": [0]}, "`keep`"),
        ([1], {"sampling": WARM}, "needs a key"),
        ([1], {"sampling": mbx.Sampling(temperature=[1.0])}, "must be one number"),
        ([1], {"sampling": mbx.Sampling(penalties=Penalties(window=65))}, "the engine's 64"),
        ([1], {"sampling": WARM, "key": jr.key(0, impl="rbg")}, "default kind"),
    ],
)
def test_invalid_requests_are_refused(prompt, options, message, as_users_run):
    engine = mbx.Engine(MODEL, slots=1, max_len=32)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, 3, **options)
    assert not engine.busy
    assert not engine.step()


def test_state_of_a_job_is_that_of_generate():
    engine = mbx.Engine(MODEL, slots=2, max_len=32, block=4)
    job = engine.submit([1, 2, 3], 20)
    assert engine.state(job) is None
    engine.step()
    engine.step()
    state = engine.state(job)
    assert state is not None
    rest = mbx.generate(MODEL, None, 20 - len(job.tokens), state=state)
    begun = list(job.tokens)
    run(engine)
    assert begun + row(rest) == job.tokens
    # The prefix cache has the state of a job that has ended.
    state = engine.state(job)
    assert state is not None
    assert int(state.position) == 3 - 1 + 20
    after = mbx.generate(MODEL, [1, 2, 3], 24)
    assert row(after)[20:] == row(mbx.generate(MODEL, None, 4, state=state))
    cancelled = engine.submit([1, 2], 20)
    engine.step()
    cancelled.cancel()
    engine.step()
    assert engine.state(cancelled) is None


def test_old_keys_work():
    key = jr.PRNGKey(3)
    engine = mbx.Engine(MODEL, slots=1, max_len=32)
    job = engine.submit([1], 8, WARM, key=key)
    run(engine)
    assert job.tokens == row(mbx.generate(MODEL, [1], 8, WARM, key=key))
