"""Grammars: whatever the model, its text matches."""

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.generation import FinishReason, Grammar
from tests.support.bounded import bounded
from tests.support.commands import byte_model


pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")

TOKENIZER = mbx.ByteTokenizer()
MODEL = byte_model()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Romeo", "Juliet", "é"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"[a-c]{1,3}(-\d\d){0,2}/?"
LARK = 'start: "(" start ")" | "x"'
COUNT = 60


def nested(text: str) -> bool:
    depth = len(text) // 2
    return text == "(" * depth + "x" + ")" * depth


def is_json(text: str) -> bool:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: the extra `parity`")
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


# Each grammar with a witness that knows nothing of it.
GRAMMARS = {
    "schema": (Grammar.from_json_schema(SCHEMA, TOKENIZER), is_json),
    "regex": (Grammar.from_regex(REGEX, TOKENIZER), re.compile(REGEX).fullmatch),
    "lark": (Grammar(LARK, TOKENIZER), nested),
}


def assert_matches(name: str, tokens: list[int], finish: FinishReason | None) -> None:
    """A text that ended by itself matches, and another text can be continued to one that does."""
    grammar, matches = GRAMMARS[name]
    if finish == FinishReason.NO_TOKEN:
        assert matches(bytes(tokens).decode())
        return
    assert finish == FinishReason.LENGTH
    matcher = grammar.start()
    for token in tokens:
        assert matcher.allowed()[token]
        matcher.advance(token)
    assert matcher.allowed().any()


@pytest.fixture(scope="module")
def engine() -> mbx.Engine:
    return mbx.Engine(MODEL, slots=1, max_len=80)


def other_weights(seed: int, scale: float) -> mbx.LanguageModel:
    """Returns the model with other random weights, which compiles nothing anew."""
    keys = iter(jr.split(jr.key(seed), len(jax.tree.leaves(MODEL))))
    noise = lambda leaf: leaf + scale * jr.normal(next(keys), leaf.shape, leaf.dtype)
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: noise(leaf) if is_float(leaf) else leaf, MODEL)


@pytest.mark.parametrize("name", list(GRAMMARS))
def test_texts_match(engine: mbx.Engine, name: str):
    sampling = mbx.Sampling(temperature=1.0, constraint=GRAMMARS[name][0])
    for seed in range(3):
        job = engine.submit([1, 2], COUNT, sampling, key=jr.key(seed))
        while engine.busy:
            engine.step()
        assert_matches(name, job.tokens, job.finish)


@pytest.mark.slow
@given(st.sampled_from(list(GRAMMARS)), st.integers(0, 99), st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=20)
def test_texts_match_whatever_the_weights(name: str, seed: int, scale: float):
    sampling = mbx.Sampling(temperature=1.0, constraint=GRAMMARS[name][0])
    stream = mbx.stream(other_weights(seed, scale), [1, 2], COUNT, sampling, key=jr.key(seed))
    assert_matches(name, list(stream), stream.finish)


@pytest.mark.parametrize("end", [10, 300])
def test_end_tokens_are_allowed_where_the_grammar_accepts(end: int):
    ids = mbx.text.SpecialIds(eos=(end,), bos=7)
    tokenizer = mbx.ByteTokenizer(ids=ids)
    matcher = Grammar.from_regex("a[\\n-b]?", tokenizer).start()
    assert matcher.allowed().nonzero()[0].tolist() == [ord("a")]
    matcher.advance(ord("a"))
    allowed = set(matcher.allowed().nonzero()[0].tolist())
    # A byte that ends texts is no part of them.
    assert allowed == {end, *range(10, 99)}
    matcher.advance(end)
    assert not matcher.allowed().any()


def test_special_tokens_are_no_text():
    tokenizers = pytest.importorskip("tests.support.tokenizers", reason="needs the extra `text`")
    tokenizer = mbx.TextTokenizer(tokenizers.FILES["byte_level"], tokenizers.CONFIG)
    matcher = Grammar.from_regex("(.|\\n)+", tokenizer).start()
    allowed = set(matcher.allowed().nonzero()[0].tolist())
    assert allowed.isdisjoint(tokenizer.special_tokens.values())
    text = "To be, or not"
    for token in tokenizer.encode(text):
        assert matcher.allowed()[token]
        matcher.advance(token)
    ends = set(tokenizer.stop_tokens)
    assert ends
    assert ends <= set(matcher.allowed().nonzero()[0].tolist())


def test_tokenizers_without_the_characters_of_a_grammar_are_refused():
    with pytest.raises(ValueError, match="but none fits"):
        Grammar.from_regex("é", NoLetters()).start().allowed()


class NoLetters(mbx.ByteTokenizer):
    """A tokenizer without the first byte of é."""

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == 0xC3 else super().token_bytes(token)


ANY: Any = object()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.from_regex("(a", TOKENIZER), "unclosed group"),
        (lambda: Grammar.from_regex("a\\", TOKENIZER), "must not end within an escape"),
        (lambda: Grammar.from_regex("(?=a)b", TOKENIZER), "look-around"),
        (lambda: Grammar.from_regex(ANY, TOKENIZER), "`pattern` must be text"),
        (lambda: Grammar.from_json_schema({"type": "foo"}, TOKENIZER), "Invalid type: foo"),
        (lambda: Grammar.from_json_schema({"not": {}}, TOKENIZER), "Unimplemented keys"),
        (lambda: Grammar.from_json_schema(False, TOKENIZER), "Unsatisfiable"),
        (lambda: Grammar.from_json_schema(ANY, TOKENIZER), "must be a JSON schema"),
        (lambda: Grammar.from_json_schema({"a": ANY}, TOKENIZER), "must be values of JSON"),
        (lambda: Grammar.from_json_schema({"$ref": "http://127.0.0.1:9/x"}, TOKENIZER), "retriev"),
        (lambda: Grammar("start: foo", TOKENIZER), 'unknown name: "foo"'),
        (lambda: Grammar('start: "a"', ANY), "`tokenizer` must be a `TextTokenizer`"),
        (lambda: Grammar.from_regex("a" * 40_000, TOKENIZER), "at most 32768 characters"),
    ],
)
def test_bad_grammars_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def chain(count: int) -> dict[str, object]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$defs": links | {f"a{count}": {"type": "null"}}, "$ref": "#/$defs/a0"}


HOSTILE: dict[str, Any] = {
    "repeated": "(a{1000}){1000}",
    "huge": "a{1000000000}",
    "many states": "([ab]{0,50}a[ab]{30}){10}",
    "nested": "((((a{0,100}){0,100}){0,100}){0,100}){0,100}b",
    "recursive": {"$ref": "#"},
    "chain": chain(1100),
    "deep": json.loads('{"type":"array","items":' * 60 + "{}" + "}" * 60),
    "exponential": {
        "allOf": [{"anyOf": [{"pattern": f"{i}{j}"} for j in "abcdef"]} for i in "abcdefgh"]
    },
    "patterns": {"patternProperties": {f"^(a|b){{{i}}}c": {} for i in range(700)}},
    "intersections": {"allOf": [{"type": "string", "pattern": str(i)} for i in range(700)]},
    "options": {"type": "integer", "x-guidance": {"whitespace_pattern": "(a{1000}){1000}"}},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_grammars_are_bounded(name: str):
    """They are refused in one sentence, or take little time for each token."""
    source = HOSTILE[name]
    make: Any = Grammar.from_regex if isinstance(source, str) else Grammar.from_json_schema
    message = ""
    with bounded():
        try:
            matcher = make(source, TOKENIZER).start()
            for _ in range(50):
                allowed = matcher.allowed()
                if not allowed.any():
                    break
                matcher.advance(int(allowed.nonzero()[0][-1]))
        except ValueError as error:
            message = str(error)
    assert len(message) < 500
    assert "\n" not in message


def test_schemas_cannot_change_how_they_are_read():
    schema = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(ValueError, match="Unimplemented keys"):
        Grammar.from_json_schema(schema, TOKENIZER)


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r'pip install "mamba_eqx\[structured\]"'):
        Grammar.from_regex("a", TOKENIZER)
