"""Text that is spelled like special tokens, and ids against transformers, for tokenizers at
random."""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st


tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

import mamba_eqx as mbx  # noqa: E402
from tests.support.random_tokenizers import (  # noqa: E402
    UNKNOWN,
    RandomTokenizer,
    random_tokenizers,
    texts,
)


def _theirs(drawn: RandomTokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(drawn.file), **drawn.config
    )


def _check(drawn: RandomTokenizer, text: str) -> None:
    ours, theirs = mbx.TextTokenizer(drawn.file, drawn.config), _theirs(drawn)
    assert ours.special_tokens == {s: theirs.convert_tokens_to_ids(s) for s in ours.special_tokens}
    assert set(drawn.special) <= set(ours.special_tokens)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    special = set(ours.special_tokens.values())
    unknown = {theirs.get_vocab().get(UNKNOWN)}
    piece = ours.encode_piece(text)
    assert not set(piece) & (special - unknown)
    normalizer = theirs.backend_tokenizer.normalizer
    normalize = str if normalizer is None else normalizer.normalize_str
    spelled = f"{text}\0{normalize(text)}"
    spellings = {*drawn.special, *map(normalize, drawn.special)}
    if not drawn.in_vocabulary:
        assert piece == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not any(content in spelled for content in spellings):
        assert piece == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == theirs.encode(text)


@settings(max_examples=20)
@given(data=st.data())
def test_text_has_the_ids_of_transformers(data: st.DataObject):
    drawn = data.draw(random_tokenizers())
    _check(drawn, data.draw(texts(drawn.special)))


@pytest.mark.slow
@settings(max_examples=400)
@given(data=st.data())
def test_text_has_the_ids_of_transformers_for_many_tokenizers(data: st.DataObject):
    drawn = data.draw(random_tokenizers())
    _check(drawn, data.draw(texts(drawn.special)))


def _check_chat(drawn: RandomTokenizer, parts: list[str], contents: list[str]) -> None:
    """Compares a chat whose template writes special tokens between the messages, which contain none
    of their letters."""
    flags = [token for token in json.loads(drawn.file)["added_tokens"] if token["special"]]
    assume(not any(token["normalized"] for token in flags))
    assume(not (drawn.in_vocabulary and any(token["single_word"] for token in flags)))
    messages = [{"role": "user", "content": content} for content in contents]
    fields = [f"{{{{ messages[{i}]['content'] }}}}" for i in range(len(contents))]
    texts = ["".join(f"{{{{ {json.dumps(part)} }}}}" for part in parts), *fields, ""]
    template = "{{ 'zz' }}".join(texts) + "".join(f"{{{{ {json.dumps(part)} }}}}" for part in parts)
    ours = mbx.TextTokenizer(drawn.file, {**drawn.config, "chat_template": template})
    theirs = _theirs(drawn)
    want = theirs.apply_chat_template(messages, chat_template=template, return_dict=False)
    assert ours.encode_chat(messages, add_generation_prompt=False) == want


_HARMLESS = st.lists(st.text("z▁ qあ", max_size=4), min_size=1, max_size=3)


@given(data=st.data())
def test_chats_have_the_ids_of_transformers(data: st.DataObject):
    drawn = data.draw(random_tokenizers())
    parts = data.draw(st.lists(st.sampled_from([*drawn.special, "z", " "]), max_size=5))
    _check_chat(drawn, parts, data.draw(_HARMLESS))


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_chats_have_the_ids_of_transformers_for_many_tokenizers(data: st.DataObject):
    drawn = data.draw(random_tokenizers())
    parts = data.draw(st.lists(st.sampled_from([*drawn.special, "z", " "]), max_size=5))
    _check_chat(drawn, parts, data.draw(_HARMLESS))


def test_normalized_tokens_are_found_after_the_others():
    """The two spaces begin before the special token, but are looked for in what is left of it."""
    added = [
        {"id": 3, "content": " s", "special": True, "normalized": False},
        {"id": 4, "content": "  ", "special": False, "normalized": True},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    file = {
        "version": "1.0",
        "added_tokens": [flags | token for token in added],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "vocab": {" ": 0, "s": 1, "z": 2}, "merges": []},
    }
    config: dict[str, object] = {"eos_token": " s", "chat_template": "{{ '  s' }}"}
    drawn = RandomTokenizer(json.dumps(file), config, [" s"], False)
    messages = [{"role": "user", "content": "z"}]
    ids = mbx.TextTokenizer(drawn.file, drawn.config).encode_chat(messages)
    assert ids == _theirs(drawn).apply_chat_template(messages, return_dict=False) == [0, 3]
