"""Constraints: the tokens that they allow, in the compiled loop, in streams and in the engine."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.generation import FinishReason, TokenAutomaton
from tests.support.generation import MODEL, VOCAB, row


pytestmark = pytest.mark.usefixtures("compile_fast")

PROMPTS = [[1, 2, 3], [4], [5, 6]]
STATES = 4
FREE = mbx.Sampling(temperature=1.2)


def automaton(seed: int, share: float = 0.3) -> TokenAutomaton:
    """Returns a random automaton, some states of which may allow no token."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, STATES, (STATES, VOCAB))
    return TokenAutomaton(np.where(rng.random(table.shape) < share, table, -1))


def follow(constraint: TokenAutomaton, tokens: list[int]) -> list[int]:
    """Returns the tokens that may follow, and fails if one of `tokens` may not."""
    table, state = np.asarray(constraint.table), 0
    for token in tokens:
        state = table[state, token]
        assert state >= 0
    return np.flatnonzero(table[state] >= 0).tolist()


class Host:
    """A constraint of the host, which follows an automaton."""

    def __init__(self, constraint: TokenAutomaton, fails_after: int | None = None):
        self.table, self.fails_after = np.asarray(constraint.table), fails_after

    def start(self) -> "Host":
        new = Host.__new__(Host)
        new.table, new.fails_after = self.table, self.fails_after
        new.state, new.count = 0, 0
        return new

    def allowed(self) -> np.ndarray:
        return self.table[self.state] >= 0

    def advance(self, token: int) -> None:
        self.state = self.table[self.state, token]
        self.count += 1
        if self.count == self.fails_after:
            raise ValueError("a fault on purpose")


@pytest.fixture(scope="module")
def engine() -> mbx.Engine:
    return mbx.Engine(MODEL, slots=4, max_len=32, block=4)


def run(engine: mbx.Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.mark.slow
@given(st.integers(0, 1000), st.sampled_from([0.0, 1.2]))
@settings(max_examples=8)
def test_every_way_gives_the_tokens_of_generate(engine: mbx.Engine, seed: int, temperature: float):
    constraint = automaton(seed)
    sampling = mbx.Sampling(temperature=temperature, constraint=constraint)
    batch = mbx.generate(MODEL, PROMPTS, 6, sampling, key=jr.key(seed))
    keys = [jr.fold_in(jr.key(seed), i) for i in range(3)]
    on_host = mbx.Sampling(temperature=temperature, constraint=Host(constraint))
    jobs = [engine.submit(p, 6, sampling, key=k) for p, k in zip(PROMPTS, keys, strict=True)]
    # A text without a constraint, beside three that have one.
    free = engine.submit([7], 6, FREE, key=jr.key(seed))
    run(engine)
    for i, (prompt, key, job) in enumerate(zip(PROMPTS, keys, jobs, strict=True)):
        tokens = row(batch, i)
        left = follow(constraint, tokens)
        finish = FinishReason(int(batch.finish[i]))
        assert finish == (FinishReason.LENGTH if left else FinishReason.NO_TOKEN)
        assert bool(left) <= (len(tokens) == 6)
        for way in (sampling, on_host):
            stream = mbx.stream(MODEL, prompt, 6, way, key=key, block=16)
            assert list(stream) == tokens
            assert stream.finish == finish
        assert job.tokens == tokens
        assert job.finish == finish
    assert free.tokens == row(mbx.generate(MODEL, [7], 6, FREE, key=jr.key(seed)))


def test_one_text_follows_an_automaton():
    constraint = automaton(4)
    sampling = mbx.Sampling(temperature=1.2, constraint=constraint)
    tokens = row(mbx.generate(MODEL, [1, 2], 6, sampling, key=jr.key(4)))
    assert tokens
    follow(constraint, tokens)
    on_host = mbx.Sampling(temperature=1.2, constraint=Host(constraint))
    assert list(mbx.stream(MODEL, [1, 2], 6, on_host, key=jr.key(4))) == tokens
    engine = mbx.Engine(MODEL, slots=1, max_len=16)
    job = engine.submit([1, 2], 6, on_host, key=jr.key(4))
    run(engine)
    assert job.tokens == tokens


@pytest.mark.slow
def test_unconstrained_tokens_are_those_without_a_constraint():
    everything = TokenAutomaton(np.zeros((1, VOCAB), int))
    sampling = mbx.Sampling(temperature=1.2, constraint=everything)
    found = mbx.generate(MODEL, PROMPTS, 6, sampling, key=jr.key(1))
    plain = mbx.generate(MODEL, PROMPTS, 6, FREE, key=jr.key(1))
    np.testing.assert_array_equal(found.tokens, plain.tokens)


@pytest.mark.slow
def test_states_after_the_end_can_be_continued():
    """The state of a row that ended is the state after its tokens, as if they were a prompt."""
    constraint = automaton(2, share=0.15)
    sampling = mbx.Sampling(temperature=1.2, constraint=constraint)
    out = mbx.generate(MODEL, PROMPTS, 6, sampling, key=jr.key(2))
    assert FinishReason.NO_TOKEN in out.finish.tolist()
    rest = mbx.generate(MODEL, None, 4, state=out.state)
    for i, prompt in enumerate(PROMPTS):
        alone = mbx.generate(MODEL, prompt + row(out, i), 4)
        assert row(rest, i) == row(alone)


@pytest.mark.slow
@pytest.mark.parametrize("ban", [False, True])
def test_texts_without_a_first_token_are_empty(engine: mbx.Engine, ban: bool):
    table = np.full((1, VOCAB), -1)
    table[0, 3] = 0 if ban else -1
    constraint = TokenAutomaton(table)
    bias = {3: -np.inf} if ban else None
    sampling = mbx.Sampling(constraint=constraint, logit_bias=bias)
    out = mbx.generate(MODEL, [1, 2], 5, sampling)
    assert int(out.length) == 0
    assert int(out.finish) == FinishReason.NO_TOKEN
    assert int(out.state.token) == 2
    on_host = mbx.Sampling(constraint=Host(constraint), logit_bias=bias)
    stream = mbx.stream(MODEL, [1, 2], 5, on_host)
    assert list(stream) == []
    assert stream.finish == FinishReason.NO_TOKEN
    job = engine.submit([1, 2], 5, sampling)
    run(engine)
    assert (job.tokens, job.finish) == ([], FinishReason.NO_TOKEN)


@pytest.mark.slow
def test_stop_tokens_and_lengths_come_before_the_end_of_a_constraint(engine: mbx.Engine):
    table = np.full((3, VOCAB), -1)
    table[0, 3], table[1, 4] = 1, 2
    constraint = TokenAutomaton(table)
    for stop, reason in (([4], FinishReason.STOP_TOKEN), ([], FinishReason.NO_TOKEN)):
        sampling = mbx.Sampling(constraint=constraint, stop_tokens=stop)
        out = mbx.generate(MODEL, [1], 2, sampling)
        assert (row(out), int(out.finish)) == ([3, 4], reason)
        job = engine.submit([1], 2, sampling)
        run(engine)
        assert (job.tokens, job.finish) == ([3, 4], reason)


@pytest.mark.slow
def test_an_error_of_a_constraint_ends_its_own_text(engine: mbx.Engine):
    bad = mbx.Sampling(constraint=Host(TokenAutomaton(np.zeros((1, VOCAB), int)), fails_after=2))
    job = engine.submit([1], 6, bad)
    other = engine.submit([7], 6, FREE, key=jr.key(3))
    run(engine)
    assert job.finish == FinishReason.CONSTRAINT_FAILED
    assert str(job.error) == "a fault on purpose"
    assert len(job.tokens) == 2
    assert other.tokens == row(mbx.generate(MODEL, [7], 6, FREE, key=jr.key(3)))
    stream = mbx.stream(MODEL, [1], 6, bad)
    with pytest.raises(ValueError, match="a fault on purpose"):
        list(stream)


@pytest.mark.slow
def test_a_model_that_excludes_all_allowed_tokens_is_refused():
    table = np.full((1, VOCAB), -1)
    table[0, 3] = 0
    assert MODEL.lm_head is not None
    weight = MODEL.lm_head.weight.at[3].set(-jnp.inf)
    model = eqx.tree_at(lambda m: m.lm_head.weight, MODEL, weight)
    with pytest.raises(ValueError, match="logits must be finite"):
        mbx.generate(model, [1], 3, mbx.Sampling(constraint=TokenAutomaton(table)))


BAD: Any = 3


class Wide(mbx.generation.AbstractConstraint):
    def init(self):
        return jnp.asarray(0)

    def allowed(self, state):
        return jnp.ones(VOCAB + 1, bool)

    def advance(self, state, token):
        return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenAutomaton(np.zeros(3, int)), "but got int64 of shape \\(3,\\)"),
        (lambda: TokenAutomaton(np.zeros((1, 3))), "but got float64 of shape"),
        (lambda: TokenAutomaton(np.full((2, 3), 2)), "states within 0..1, or -1"),
        (lambda: mbx.Sampling(constraint=BAD), "`constraint` must be a constraint"),
        (lambda: mbx.generate(MODEL, [1], 2, mbx.Sampling(constraint=Wide())), "shape \\(11,\\)"),
        (
            lambda: mbx.generate(MODEL, [1], 2, mbx.Sampling(constraint=Host(automaton(0)))),
            "cannot ask a `Host` before each token. Use `stream`",
        ),
        (
            lambda: mbx.beam_search(MODEL, [1], 2, mbx.Sampling(constraint=automaton(0))),
            "does not support `constraint`",
        ),
        (
            lambda: mbx.speculate(MODEL, MODEL, [1], 2, mbx.Sampling(constraint=automaton(0))),
            "does not support `constraint`",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_bad_constraints_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_of_the_host_are_checked(engine: mbx.Engine):
    class Numbers(Host):
        def start(self) -> Any:
            new = Host.start(self)
            vars(new)["allowed"] = lambda: np.zeros(VOCAB)
            return new

    sampling = mbx.Sampling(constraint=Numbers(automaton(0)))
    with pytest.raises(ValueError, match="booleans of shape \\(vocab_size,\\), but got float64"):
        engine.submit([1], 2, sampling)
