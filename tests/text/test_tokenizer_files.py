"""Damaged, hostile and unusual files of tokenizers."""

import importlib.metadata
import json
import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings, strategies as st


tokenizers = pytest.importorskip("tokenizers")

import mamba_eqx as mbx  # noqa: E402
from mamba_eqx.text import stop_table  # noqa: E402
from tests.support.tokenizers import CONFIG, FILES  # noqa: E402


def _added(content: str, number: int, **flags: bool) -> dict[str, object]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": content, **{name: flags.get(name, False) for name in names}}


def _word_level(vocab: Mapping[str, object], **entries: object) -> str:
    """Returns a tokenizer of words between spaces."""
    names = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    empty = dict.fromkeys(names) | {"version": "1.0", "added_tokens": []}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": next(iter(vocab))}
    split = {"type": "WhitespaceSplit"}
    return json.dumps(empty | {"pre_tokenizer": split, "model": model} | entries)


_LETTERS = ["</s>", "[UNK]", "▁", "<", "/", "s", ">", "##/", "##s", "##>", "▁<", "</", "s>"]
_VOCAB = {token: i for i, token in enumerate(_LETTERS)}
_MERGES = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "<")]
_MODELS: dict[str, dict[str, object]] = {
    "unigram": {"type": "Unigram", "unk_id": 1, "vocab": [[t, -1.0] for t in _LETTERS]},
    "bpe": {"type": "BPE", "vocab": _VOCAB, "merges": _MERGES},
    "bpe_old": {"vocab": _VOCAB, "merges": [" ".join(merge) for merge in _MERGES]},
    "bpe_whole": {"type": "BPE", "vocab": _VOCAB, "merges": [], "ignore_merges": True},
    "word_piece": {
        "type": "WordPiece",
        "vocab": _VOCAB,
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "word_level": {"type": "WordLevel", "vocab": _VOCAB, "unk_token": "[UNK]"},
}


@pytest.mark.parametrize("name", _MODELS)
def test_the_vocabulary_makes_no_special_tokens(name: str):
    """Here the model of the tokenizer itself makes the token, not the search for added tokens."""
    added = [_added("</s>", 0, special=True)]
    file = json.loads(_word_level({"a": 0}, added_tokens=added, model=_MODELS[name]))
    original = tokenizers.Tokenizer.from_str(json.dumps(file))
    original.encode_special_tokens = True
    assert original.encode("</s>").ids == [0]
    tokenizer = mbx.TextTokenizer(json.dumps(file))
    ids = tokenizer.encode("</s>")
    assert tokenizer.special_tokens == {"</s>": 0}
    assert ids
    assert 0 not in ids
    if name == "word_level":
        assert ids == [1]
    else:
        spelled = "".join(_LETTERS[i].removeprefix("##") for i in ids)
        assert spelled == "</s>"


def test_private_spellings_are_renewed_if_a_text_contains_them(monkeypatch):
    nonces = iter(["1" * 32, "1" * 32, "2" * 32])
    monkeypatch.setattr("secrets.token_hex", lambda n: next(nonces))
    added = [_added("</s>", 1, special=True)]
    tokenizer = mbx.TextTokenizer(_word_level({"a": 0, "</s>": 1}, added_tokens=added))
    assert tokenizer.encode(f"a <{'1' * 32}00000000>") == [0, 0]
    assert next(nonces, None) is None


def test_truncation_and_padding_have_no_effect():
    fast = tokenizers.Tokenizer.from_str(FILES["byte_level"])
    whole = fast.encode("hello world, this is long").ids
    fast.enable_truncation(4)
    fast.enable_padding(length=20_000_000)
    tokenizer = mbx.TextTokenizer(fast.to_str())
    assert tokenizer.encode("hello world, this is long") == whole
    assert json.loads(tokenizer.to_json())["truncation"]["max_length"] == 4


def test_the_file_is_saved_as_it_was_loaded():
    for file in FILES.values():
        assert mbx.TextTokenizer(file, CONFIG).to_json() == file


def test_vocabularies_may_have_gaps():
    tokenizer = mbx.TextTokenizer(_word_level({"a": 0, "b": 1, "c": 2, "END": 9}))
    assert tokenizer.vocab_size == 10
    assert tokenizer.token_ids == {0, 1, 2, 9}
    assert tokenizer.token_bytes(5) == tokenizer.token_bytes(10) == b""
    assert tokenizer.decode([0, 5, 10, 9, 2**32 - 1]) == "a END"
    table = stop_table(tokenizer, ["END"])
    assert table.shape == (4, 10)
    assert table[0, 9] == 3
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="Token ids must be within"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match="Token ids must be within"):
            tokenizer.decoder().feed([bad])


@pytest.mark.parametrize("number", [2**20, 4_000_000_000, 2**32, 10**30])
def test_ids_are_bounded(number: int):
    with pytest.raises(ValueError, match=f"must be below {2**20} for 2 tokens, but got {number}"):
        mbx.TextTokenizer(_word_level({"a": 0, "b": number}))
    assert mbx.TextTokenizer(_word_level({"a": 0, "b": 2**20 - 1})).vocab_size == 2**20


def _replace(old: str, new: str, kind: str = "String") -> dict[str, object]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


# There are few steps, so that the growth would take no memory if it were not noticed.
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("normalizer", [_replace("a", "aa")] * 16),
        ("normalizer", [_replace("a", "bb"), _replace("b", "aa")] * 8),
        ("normalizer", [_replace("a", "AA"), {"type": "Lowercase"}] * 16),
        ("normalizer", [_replace("", "a")] * 16),
        ("normalizer", [_replace("(?=.)", "a", "Regex")] * 16),
        ("normalizer", [_replace("a*", "a", "Regex")] * 16),
        ("normalizer", [{"type": "ByteLevel"}] * 16),
        ("pre_tokenizer", [{"type": "Sequence", "pretokenizers": [_BYTE_LEVEL] * 8}] * 2),
        ("decoder", [_replace("a", "aa")] * 16),
        (
            "decoder",
            [{"type": "CTC", "pad_token": "p", "word_delimiter_token": "", "cleanup": True}] * 16,
        ),
    ],
)
def test_the_growth_of_texts_is_bounded(name: str, steps: list[object]):
    inside = {"pre_tokenizer": "pretokenizers"}.get(name, f"{name}s")
    entry = {"type": "Sequence", inside: steps}
    with pytest.raises(ValueError, match=f"its `{name}` must not make a text more than 10,000"):
        mbx.TextTokenizer(_word_level({"a": 0}, **{name: entry}))


def test_many_replacements_of_different_texts_are_allowed():
    letters = [_replace(char, "oe") for char in "äöüéèêâîôûàùçñ"]
    spaces = [_replace(r"\s+", " ", "Regex"), _replace("[\u201c\u201d]", '"', "Regex")] * 20
    steps = [{"type": "NFKC"}, *letters, *spaces, _replace("a", "b" * 50)]
    file = _word_level({"oe": 0}, normalizer={"type": "Sequence", "normalizers": steps})
    assert mbx.TextTokenizer(file).encode("ö") == [0]


@pytest.mark.parametrize(
    "file",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '"\ud800"',
        _word_level({"a": 0}, model=None),
        _word_level({"a": 0}, model={"vocab": 3}),
        _word_level({"a": 0}, added_tokens=[3]),
        _word_level({"a": 0}, added_tokens={}),
        _word_level({"a": 0}, added_tokens=[{"content": ["x"]}]),
        _word_level({"a": "0"}),
        _word_level({"a": 1.5}),
        _word_level({"\ud800": 0}),
        _word_level({"a": 0}, decoder={"type": "Unknown"}),
        json.dumps({"model": {"type": "Unigram", "vocab": [["a"], 3], "unk_id": 9}}),
    ],
)
def test_other_files_are_refused(file: str):
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json"):
        mbx.TextTokenizer(file)


@pytest.mark.parametrize(
    ("prefix", "part"), [(".", "\u00e9"), ("..", "b"), ("....", "b"), ("\u00e9", "b\u00e9")]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_prefixes_that_end_within_a_character_are_refused(prefix: str, part: str, as_text: bool):
    """`tokenizers` cuts strings at bytes, and aborted the process."""
    model = {
        "type": "BPE",
        "vocab": {"a": 0, part: 1, f"a{part}": 2},
        "merges": [f"a {part}" if as_text else ["a", part]],
        "continuing_subword_prefix": prefix,
    }
    with pytest.raises(ValueError, match="must begin with the `continuing_subword_prefix`, but"):
        mbx.TextTokenizer(_word_level({"a": 0}, model=model))


def test_templates_that_name_an_unknown_token_are_refused(capfd):
    special = {"SpecialToken": {"id": "a", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    entry = {"type": "TemplateProcessing", "single": [special, sequence], "pair": [sequence]}
    entry["special_tokens"] = {"a": {"id": "a", "ids": [0], "tokens": ["a"]}}
    mbx.TextTokenizer(_word_level({"a": 0}, post_processor=entry))
    entry["special_tokens"] = {}
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json"):
        mbx.TextTokenizer(_word_level({"a": 0}, post_processor=entry))
    capfd.readouterr()  # Rust writes a trace.


@pytest.mark.skipif(
    importlib.metadata.version("tokenizers") < "0.23", reason="cut prefixes at characters"
)
def test_prefixes_of_several_bytes():
    vocab = {"a": 0, "\u00e9b": 1, "ab": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "\u00e9b"]]}
    model["continuing_subword_prefix"] = "\u00e9"
    assert mbx.TextTokenizer(_word_level({"a": 0}, model=model)).encode("ab") == [2]
    # Special tokens have no merges.
    added = [_added("ab", 2, special=True)]
    special = mbx.TextTokenizer(_word_level({"a": 0}, model=model, added_tokens=added))
    assert special.encode("ab") == [0, 1]


@pytest.mark.parametrize("text", ["x" * 100_000, "\u202e\u2028\x1b"])
def test_errors_quote_a_file_in_few_printable_characters(text: str):
    """`tokenizers` quotes what it refuses as it is."""
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json") as error:
        mbx.TextTokenizer(_word_level({"a": 0}, version=text))
    assert text not in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_panics_are_value_errors(capfd):
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 1}
    tokenizer = mbx.TextTokenizer(_word_level({"a": 0, " ": 1}, decoder=strip))
    with pytest.raises(ValueError, match="cannot be decoded: "):
        tokenizer.decode([1])
    capfd.readouterr()  # Rust writes a trace.
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    with pytest.raises(ValueError, match="This text cannot be encoded: "):
        mbx.TextTokenizer(_word_level({"a": 0}, model=words)).encode("b")


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": ["x"]},
        {"eos_token": {}},
        {"eos_token": 3},
        {"eos_token": {"content": "a", "lstrip": "no"}},
        {"chat_template": ["x"]},
        {"chat_template": 3},
        {"chat_template": [{"name": "default", "template": 3}]},
        {"added_tokens_decoder": ["a"]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": 3}},
        {"extra_special_tokens": "a"},
        {"extra_special_tokens": [3]},
        {"additional_special_tokens": [{"content": 3}]},
    ],
)
def test_config_entries_of_wrong_types_are_refused(config: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(config)).replace("additional", "extra")):
        mbx.TextTokenizer(FILES["byte_level"], config)


def test_lone_surrogates_are_refused():
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG)
    for each in (mbx.ByteTokenizer(), tokenizer):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at index 2"):
            each.encode("ab\ud83d")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\udc00"}])


_SOURCES = {
    "text": {"eos_token": "<|im_end|>"},
    "object": {"eos_token": {"content": "<|im_end|>", "normalized": False, "special": True}},
    "numbered": {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True}},
    },
    "extra": {"extra_special_tokens": ["<|im_end|>"]},
    "additional": {"additional_special_tokens": ["<|im_end|>"]},
    "named": {"extra_special_tokens": {"end_token": "<|im_end|>"}},
    "variable": {"end_token": "<|im_end|>"},
}


@pytest.mark.parametrize("in_vocabulary", [True, False])
@pytest.mark.parametrize("source", _SOURCES)
def test_special_tokens_are_declared_in_configs(source: str, in_vocabulary: bool):
    pytest.importorskip("jinja2")
    vocab = {"[UNK]": 0, "a": 1} | ({"<|im_end|>": 2} if in_vocabulary else {})
    template = "{{ messages[0]['content'] }} <|im_end|>{{ end_token }}{{ eos_token }}"
    config = _SOURCES[source] | {"chat_template": template}
    tokenizer = mbx.TextTokenizer(_word_level(vocab), config)
    assert tokenizer.special_tokens == {"<|im_end|>": 2}
    named = "eos_token" in config
    assert tokenizer.eos_token_id == (2 if named else None)
    assert tokenizer.stop_tokens == tokenizer.ids.eos == ((2,) if named else ())
    messages = [{"role": "user", "content": "a <|im_end|>"}]
    ids = tokenizer.encode_chat(messages)
    assert ids.count(2) == 1 + (named or source in ("named", "variable"))
    assert tokenizer.decode(ids) == "a [UNK]"
    transformers = pytest.importorskip("transformers")
    config = {
        k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in config.items()
    }
    config.pop("added_tokens_decoder", None)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_word_level(vocab)), **config
    )
    honest = [{"role": "user", "content": "a"}]
    want = theirs.apply_chat_template(honest, return_dict=False)
    assert tokenizer.encode_chat(honest) == want


def test_given_ids_come_first():
    ids = mbx.text.SpecialIds(eos=(1, 0), pad=1)
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG, ids=ids)
    assert tokenizer.ids == mbx.text.SpecialIds(bos=0, eos=(1, 0), pad=1)
    assert tokenizer.stop_tokens == (1, 0)
    assert tokenizer.eos_token_id == 0, "the token that the config names"
    plain = mbx.TextTokenizer(FILES["byte_level"], ids=ids)
    assert plain.eos_token_id == 1
    tokenizer = mbx.ByteTokenizer(ids=ids)
    assert tokenizer.stop_tokens == (1, 0)
    assert tokenizer.ids == ids
    assert mbx.ByteTokenizer().ids == mbx.text.SpecialIds()


def test_tokenizers_describe_themselves():
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG)
    assert re.fullmatch(
        r"<TextTokenizer: BPE, \d+ tokens, 3 of them special, with a chat template>",
        repr(tokenizer),
    )
    assert repr(mbx.ByteTokenizer()) == "<ByteTokenizer: 256 tokens>"


def _damage(data: st.DataObject, value: object) -> object:
    """Replaces an entry somewhere in a parsed file."""
    junk = [
        None,
        -1,
        2**31,
        2**64,
        1e308,
        "",
        "x",
        "\ud800",
        [],
        {},
        True,
        ["x"],
        {"type": "Strip"},
    ]
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if data.draw(st.integers(0, 9)):
            copy[key] = _damage(data, copy[key])
        else:
            del copy[key]
        return copy
    return data.draw(st.sampled_from(junk))


def _check_damaged(data: st.DataObject) -> None:
    file = json.loads(data.draw(st.sampled_from(sorted(FILES.values()))))
    config: object = json.loads(json.dumps(CONFIG))
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            file = _damage(data, file)
        else:
            config = _damage(data, config)
    if not isinstance(config, dict):
        config = {}
    try:
        tokenizer = mbx.TextTokenizer(json.dumps(file), config)
        ids = tokenizer.encode("To be <|user|> \n漢")
        assert tokenizer.vocab_size <= 2**20 + 100
        tokenizer.decode(ids)
        tokenizer.encode_chat([{"role": "user", "content": "be"}])
    except ValueError:
        pass


@given(data=st.data())
def test_damaged_files_are_value_errors(data: st.DataObject):
    _check_damaged(data)


@pytest.mark.slow
@settings(max_examples=400)
@given(data=st.data())
def test_damaged_files_are_value_errors_many_times(data: st.DataObject):
    _check_damaged(data)
