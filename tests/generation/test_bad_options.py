"""Options, prompts and weights that cannot be used: one kind of error, which names the option."""

import fractions
import math
import random
import re
from collections import UserDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.generation import FinishReason, PromptLookup, decoding_state
from mamba_eqx.generation._options import options_for
from mamba_eqx.generation._prompts import read_prompts
from mamba_eqx.generation._sampling import check_supported
from mamba_eqx.generation._stopping import stopping_for
from tests.support.generation import KEY, MODEL, VOCAB, row


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")

# Without types, since their arguments are wrong on purpose.
Sampling: Any = mbx.Sampling
Penalties: Any = mbx.sampling.Penalties
fork: Any = mbx.fork
start_at: Any = decoding_state
generate: Any = mbx.generate
beam_search: Any = mbx.beam_search
PROMPT = [1, 2, 3]


# Weights that are not numbers.


def _with_head(value: float) -> mbx.LanguageModel:
    where = lambda model: model.lm_head.weight
    return eqx.tree_at(where, MODEL, replace_fn=lambda weight: jnp.full_like(weight, value))


def _with_embedding(token: int) -> mbx.LanguageModel:
    where = lambda model: model.embedding.weight
    return eqx.tree_at(where, MODEL, replace_fn=lambda weight: weight.at[token].set(jnp.nan))


NAN = _with_head(jnp.nan)
TOKENS = row(generate(MODEL, PROMPT, 12))
# A token that the model generates after others, and whose embedding can be made NaN.
LATE = next(i for i, t in enumerate(TOKENS) if t not in TOKENS[:i] + PROMPT and i > 1)
BAD_LATE = _with_embedding(TOKENS[LATE])


def test_logits_that_are_not_finite_raise():
    for model in (NAN, _with_head(jnp.inf)):
        with pytest.raises(ValueError, match=r"^The logits must be finite, but those after 3 tok"):
            generate(model, PROMPT, 12)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=3)])
def test_rows_whose_logits_are_not_finite_raise(sampling):
    with pytest.raises(ValueError, match=r"those of row 0 after 1 tokens .* Check the weights"):
        generate(NAN, [[1], [2, 3]], 4, sampling, key=KEY)


def test_one_infinite_logit_raises():
    """Sampling can choose a token with a finite logit, whose log-probability is not NaN."""
    last = MODEL.backbone(jnp.asarray(PROMPT))[0][-1]
    where = lambda model: model.lm_head.weight
    model = eqx.tree_at(
        where, MODEL, replace_fn=lambda weight: weight.at[4].set(3e38 * jnp.sign(last))
    )
    with pytest.raises(ValueError, match=r"^The logits must be finite, but those after 3 tok"):
        generate(model, PROMPT, 12, Sampling(temperature=1.0), key=KEY)


def test_logits_that_become_infinite_raise():
    after = len(PROMPT) + LATE + 1
    with pytest.raises(ValueError, match=f"those after {after} tokens"):
        generate(BAD_LATE, PROMPT, 12)
    assert row(generate(BAD_LATE, PROMPT, LATE + 1)) == TOKENS[: LATE + 1]


@pytest.mark.slow
def test_all_functions_that_generate_raise_for_infinite_logits():
    after = len(PROMPT) + LATE + 1
    stops = Sampling(stop_tokens=[[TOKENS[1]], []])
    with pytest.raises(ValueError, match=f"of row 1 after {after} tokens"):
        generate(BAD_LATE, [[*PROMPT, TOKENS[0]], PROMPT], 12, stops)
    with pytest.raises(ValueError, match=f"those after {after} tokens"):
        mbx.speculate(BAD_LATE, PromptLookup(), PROMPT, 12)
    with pytest.raises(ValueError, match="those of beam 0 after 3 tokens"):
        beam_search(NAN, PROMPT, 4)


def test_stream_yields_the_tokens_before_infinite_logits():
    got = []
    stream = mbx.stream(BAD_LATE, PROMPT, 12)
    for _ in range(LATE + 1):
        got.append(next(stream))
    assert got == TOKENS[: LATE + 1]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"after {len(PROMPT) + LATE + 1} tokens"):
            next(stream)


@pytest.mark.slow
def test_traced_generation_returns_the_reason():
    run: Callable[..., Any] = lambda model: generate(model, PROMPT, 12)
    out = eqx.filter_jit(run)(BAD_LATE)
    assert int(out.finish) == FinishReason.NOT_FINITE
    assert out.tokens.tolist() == TOKENS[: LATE + 1] + [-1] * (11 - LATE)
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, b]), *(eqx.filter(m, eqx.is_array) for m in (MODEL, NAN))
    )
    static = eqx.filter(MODEL, eqx.is_array, inverse=True)
    out = jax.vmap(lambda arrays: run(eqx.combine(arrays, static)))(both)
    assert out.finish.tolist() == [FinishReason.LENGTH, FinishReason.NOT_FINITE]
    assert out.tokens[0].tolist() == TOKENS
    assert out.length.tolist() == [12, 0]


# What others write.


@pytest.mark.parametrize("large", [2**31 - 1, 2**31, 2**40, 10**30])
def test_large_top_k_keeps_all_tokens(large):
    found = options_for(Sampling(temperature=2.0, top_k=large), VOCAB, None, KEY).filters.top_k
    assert found is not None
    assert int(found) == VOCAB
    rows = options_for(Sampling(temperature=1.0, top_k=[0, 3, large]), VOCAB, 3, KEY)
    assert rows.filters.top_k is not None
    assert np.asarray(rows.filters.top_k).tolist() == [VOCAB, 3, VOCAB]


@pytest.mark.parametrize("zero", [0, [0, 0], np.zeros(2, int)])
def test_top_k_of_0_is_none(zero):
    options = options_for(Sampling(temperature=1.0, top_k=zero), VOCAB, 2, KEY)
    assert options.filters.top_k is None
    check_supported("beam_search", Sampling(top_k=zero), ("top_k",))
    with pytest.raises(ValueError, match="does not support `top_k`"):
        check_supported("beam_search", Sampling(top_k=[0, 1]), ("top_k",))


def _finish(sampling: mbx.Sampling, tokens: list[int]) -> list[int]:
    """Returns the reasons to end after each of the tokens."""
    stopping = stopping_for(sampling, VOCAB, None)
    state, reasons = stopping.start(()), []
    for token in tokens:
        state, finish = stopping.advance(state, jnp.asarray(token))
        reasons.append(int(finish))
    return reasons


class _Digits(mbx.ByteTokenizer):
    """A tokenizer of the digits 0 to 5, that knows nothing of token 3 and of those above."""

    @property
    def vocab_size(self) -> int:
        return 6

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == 3 else b"%d" % token


def test_stop_token_that_completes_a_stop_string_is_a_stop_token():
    string = {"stop_strings": ["45"], "tokenizer": _Digits()}
    assert _finish(Sampling(stop_tokens=[5], **string), [4, 5]) == [0, FinishReason.STOP_TOKEN]
    assert _finish(Sampling(stop_tokens=[2], **string), [4, 5]) == [0, FinishReason.STOP_STRING]


def test_vocabulary_may_be_larger_than_that_of_the_tokenizer():
    """Ids above those of the tokenizer have no text, and can be banned and stopped at."""
    last, tokenizer = VOCAB - 1, _Digits()
    string = Sampling(stop_strings=["45"], tokenizer=tokenizer)
    assert _finish(string, [4, 3, 5]) == [0, 0, FinishReason.STOP_STRING]
    assert _finish(string, [4, last, 5, 4, 5]) == [0, 0, 0, 0, FinishReason.STOP_STRING]
    stop = Sampling(stop_tokens=[last], stop_strings=["45"], tokenizer=tokenizer)
    assert _finish(stop, [4, last]) == [0, FinishReason.STOP_TOKEN]
    bias = options_for(Sampling(logit_bias={last: -math.inf}), VOCAB, None, None).bias
    assert bias is not None
    assert bias.tolist() == [0.0] * last + [-math.inf]
    with pytest.raises(ValueError, match=r"keys of `logit_bias` must be tokens within 0..10"):
        options_for(Sampling(logit_bias={VOCAB: 1.0}), VOCAB, None, None)


def test_stop_tokens_may_be_none_or_sets():
    def read(stops: Any, rows: int | None = None) -> list[Any]:
        return np.asarray(stopping_for(Sampling(stop_tokens=stops), VOCAB, rows).tokens).tolist()

    for stops in ({7}, frozenset({7}), (7,), np.array([7]), {7: None}.keys(), jnp.array([7])):
        assert read(stops) == [7]
    assert sorted(read({3, 4})) == [3, 4]
    assert read(None) == read(set()) == []
    assert read([{7}, set()], 2) == read([[7], ()], 2) == [[7], [-1]]


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, jnp.asarray])
def test_results_of_tokenizers_are_prompts(convert):
    """`BatchEncoding` of transformers is such a `UserDict`."""

    def read(result: Any) -> Any:
        rows = read_prompts(VOCAB, UserDict(result), None, None)
        tokens = [row.tolist() for row in rows.tokens]
        return tokens if rows.batched else tokens[0]

    pad = VOCAB + 7
    left = {"input_ids": [[1, 2, 3], [pad, pad, 4]], "attention_mask": [[1, 1, 1], [0, 0, 1]]}
    right = {"input_ids": [[1, 2, 3], [4, pad, pad]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    for result in (left, right):
        assert read({name: convert(rows) for name, rows in result.items()}) == [[1, 2, 3], [4]]
    one = {"input_ids": convert(PROMPT), "attention_mask": convert([1, 1, 1])}
    assert read(one) == read(one | {"token_type_ids": [0]}) == PROMPT
    assert read({"input_ids": convert(PROMPT)}) == PROMPT
    assert read({"input_ids": convert([PROMPT])}) == [PROMPT]
    ragged = {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]}
    assert read(ragged) == read({"input_ids": [[1, 2, 3], [4]]}) == [[1, 2, 3], [4]]
    assert row(generate(MODEL, one, 12)) == TOKENS
    assert [*mbx.stream(MODEL, one, 12)] == TOKENS


@pytest.mark.parametrize(
    ("prompts", "mask", "words"),
    [
        ({"ids": [1]}, None, r"`prompts` must have `input_ids`.*\['ids'\]"),
        ({"input_ids": [[1]]}, np.ones((1, 1), bool), "`mask` must be left out"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, None, "`mask` must be boolean"),
        ({"input_ids": [[1, 2]], "attention_mask": [1]}, None, "`mask` must be"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, None, "padding between real"),
        ({"input_ids": "text"}, None, "`prompts` must be a sequence of token ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, None, "must not be empty"),
    ],
)
def test_wrong_results_of_tokenizers_raise(prompts, mask, words):
    with pytest.raises(ValueError, match=words):
        generate(MODEL, prompts, 4, mask=mask)


# Any values.

VALUES: list[Any] = [
    *(
        None,
        True,
        np.True_,
        "x",
        "",
        "0.5",
        b"x",
        -1,
        0,
        1,
        2,
        2**31,
        10**400,
        -(10**400),
        0.5,
        1.5,
    ),
    *(1e-46, 1e39, 1e300, -0.0, float("nan"), float("inf"), -float("inf"), 1j, object(), int),
    *(
        [],
        [[]],
        [1],
        [0.5, 2],
        [[1], [2, 3]],
        [None],
        ["a"],
        ["\ud800"],
        [""],
        (1, "x"),
        {1},
        {None},
    ),
    *(
        {},
        {1: 2.0},
        {1: None},
        {"a": 1},
        {-1: 0.0},
        {99: 1.0},
        {0: 10**400},
        fractions.Fraction(1, 3),
    ),
    *(np.float32(0.5), np.int64(3), np.float64("nan"), np.zeros(0), np.ones((2, 2)), np.array("x")),
    *(jnp.ones(VOCAB), jnp.float32(0.5), jnp.full(VOCAB, -jnp.inf), jnp.ones(3, bool), range(3)),
    *(
        lambda: 1,
        mbx.ByteTokenizer(),
        Penalties(),
        jr.key(0),
        jr.split(jr.key(0)),
        [True],
        [[0], ()],
    ),
]
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "penalties", "logit_bias")
OPTIONS += ("stop_tokens", "stop_strings", "tokenizer")
OF_PENALTIES = ("repetition", "presence", "frequency", "window")


def _call(rng: random.Random) -> Callable[[], object]:
    """Returns a call that validates random arguments as those functions do that use them."""
    pick = lambda: rng.choice(VALUES)
    kind = rng.choice(["sampling", "sampling", "penalties", "generate", "beams", "score", "state"])
    given: dict[str, Any] = {}
    match kind:
        case "sampling":
            given = {name: pick() for name in rng.sample(OPTIONS, rng.randint(1, 2))}
            rows = rng.choice([None, 1, 3])
            call = lambda: options_for(Sampling(**given), VOCAB, rows, KEY)
        case "penalties":
            given = {name: pick() for name in rng.sample(OF_PENALTIES, rng.randint(1, 2))}
            call = lambda: options_for(Sampling(penalties=Penalties(**given)), VOCAB, None, KEY)
        case "generate":
            given = {name: pick() for name in rng.sample(["max_new_tokens", "sampling"], 1)}
            given |= {name: pick() for name in rng.sample(["prompts", "mask", "state", "key"], 2)}
            # Without weights nothing can run, so that only the validation is reached.
            full = {"prompts": ["x"], "max_new_tokens": 1} | given
            call = lambda: generate(MODEL, **full)
        case "beams":
            given = {name: pick() for name in ("num_beams", "length_penalty")}
            call = lambda: beam_search(MODEL, ["x"], 2, **given)
        case "score":
            given = {"texts": pick(), "mask": pick()}
            call = lambda: mbx.score(MODEL, **given)
        case _:
            given = {rng.choice(["rows", "token"]): pick()}
            state = mbx.prefill(MODEL, PROMPT)
            call = lambda: (
                fork(state, **given)
                if "rows" in given and not isinstance(given["rows"], int)
                else start_at(MODEL, MODEL.init_state(), given.get("token", 1))
            )
    return call


WORDS = {"max_new_tokens", "prompts", "mask", "state", "key", "sampling", "num_beams", "rows"}
WORDS |= {"length_penalty", "texts", "token", "Token ids", *OPTIONS, *OF_PENALTIES}


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize(
    "seeds",
    [range(150), pytest.param(range(150, 5000), marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_any_options_are_used_or_named(seeds):
    refused = 0
    for seed in seeds:
        call = _call(random.Random(seed))
        try:
            call()
        except ValueError as error:
            refused += 1
            message = str(error)
            assert len(message) < 600, (seed, message)
            assert any(f"`{name}" in message or name in message for name in WORDS), (seed, message)
            assert re.search("but got|key|ban|empty", message), (seed, message)
    assert refused > len(seeds) / 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampling(temperature=-1), "`temperature` must be 0 .*or positive and finite"),
        (lambda: Sampling(top_k=-1), "`top_k` must be a positive integer, or 0 or `None`"),
        (lambda: Sampling(top_k=1.5), "`top_k` must be a positive integer"),
        (lambda: Sampling(stop_tokens="ab"), "`stop_tokens` must be a sequence of integers"),
        (lambda: Sampling(stop_tokens=[{"a"}]), r"`stop_tokens\[0\]` must be"),
        (lambda: Sampling(stop_strings=5), "`stop_strings` must be a list"),
        (
            lambda: Sampling(stop_strings=["\ud800"], tokenizer=mbx.ByteTokenizer()),
            "lone surrogate",
        ),
        (lambda: Sampling(stop_strings=["a"], tokenizer=1), "`tokenizer` must be a tokenizer"),
        (lambda: Sampling(penalties=1.1), "`penalties` must be a `Penalties`"),
        (lambda: Sampling(logit_bias="x"), "`logit_bias` must be finite numbers"),
        (lambda: Penalties(window=1.5), "`window` must be an integer .* window=1.5"),
        (lambda: Penalties(window=True), "`window` must be an integer"),
        (lambda: Penalties(window=2**31), "`window` must be an integer"),
        (lambda: Penalties(repetition="x"), "`repetition` must be one number"),
        (lambda: Penalties(presence=None), "`presence` must be one number"),
        (lambda: fork(mbx.prefill(MODEL, [1]), 0), "`rows` must be an integer of at least 1"),
        (lambda: fork(mbx.prefill(MODEL, [1]), 2.0), "`rows` must be an integer"),
        (lambda: start_at(MODEL, MODEL.init_state(), np.int64(VOCAB)), "within 0..10"),
        (lambda: start_at(MODEL, MODEL.init_state(), jnp.asarray(-1)), "within 0..10"),
        (lambda: start_at(MODEL, MODEL.init_state(), jnp.ones(2, int)), "one token id"),
        (lambda: start_at(MODEL, MODEL.init_state(), 1.0), "one token id"),
        (lambda: beam_search(MODEL, [1], 2, length_penalty="x"), "`length_penalty` must be"),
    ],
)
def test_messages_name_the_option(make, words):
    with pytest.raises(ValueError, match=words):
        make()
