"""`TextDecoder`, for all decoders of `tokenizers` and texts of several scripts."""

import functools

import pytest
from hypothesis import example, given, settings, strategies as st


tokenizers = pytest.importorskip("tokenizers")

import mamba_eqx as mbx  # noqa: E402
from tests.support.random_tokenizers import (  # noqa: E402
    DECODERS,
    SCRIPTS,
    random_tokenizers,
)


# The tests of every decoder take a second each.
_QUICK = ("llama", "metaspace", "byte_level")
_SOME = [
    name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS
]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_PIECES = [
    *SCRIPTS,
    "▁",
    "▁▁",
    "▁is",
    "is▁",
    "##ing",
    "wa",
    "is</w>",
    "\ufffd",
    "é",
    "<|end|>",
    *_BYTES,
]
_COMMON = [*range(_PIECES.index("<|end|>") + 1), 999]  # 999 is an id of no token


@functools.cache
def _tokenizer(decoder: str) -> mbx.TextTokenizer:
    """Returns a tokenizer that can decode any sequence of the pieces."""
    from tokenizers import models, pre_tokenizers

    pieces = _PIECES
    if decoder == "byte_level":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        spelled = ["".join(part for part, _ in level.pre_tokenize_str(p)) for p in SCRIPTS]
        pieces = [*spelled, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠðŁ", "ĻĤĠ", "<|end|>"]
    fast = tokenizers.Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, "wa"))
    fast.decoder = DECODERS[decoder]
    fast.add_special_tokens(["<|end|>"])
    return mbx.TextTokenizer(fast.to_str())


_IDS = st.lists(st.sampled_from(_COMMON) | st.integers(0, len(_PIECES) - 1), max_size=50)


def _thai(n: int) -> list[int]:
    """Returns a text of byte tokens, of three bytes each, without a space."""
    data = ("สวัสดีครับ" * n).encode()
    return [_PIECES.index(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("decoder", _SOME)
@given(ids=_IDS)
def test_decoded_text_is_that_of_tokenizers(decoder: str, ids: list[int]):
    """Only in runs of bytes that form no text, fewer characters become U+FFFD."""
    tokenizer = _tokenizer(decoder)
    fast = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    theirs = fast.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in theirs or decoder == "byte_level":
        assert tokenizer.decode(ids) == theirs
    else:
        assert tokenizer.decode(ids).count("\ufffd") <= theirs.count("\ufffd")


def _check(tokenizer: mbx.TextTokenizer, prompt: list[int], ids: list[int]) -> None:
    decoder = tokenizer.decoder(prompt=prompt)
    pieces = [decoder.feed([token]) for token in ids]
    text = "".join(pieces) + decoder.flush()
    before = tokenizer.decode(prompt)
    if not before.endswith("\ufffd"):
        assert before + text == tokenizer.decode([*prompt, *ids])
    assert decoder.feed(ids) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("decoder", _SOME)
@given(prompt=_IDS, ids=_IDS)
@example(prompt=[], ids=_thai(20))
@example(prompt=_thai(20), ids=_thai(2))
@example(prompt=_thai(4)[1:], ids=[0, *_thai(2)[:-1]])
@example(prompt=[_PIECES.index("▁")] * 40, ids=[_PIECES.index("▁")] * 40)
@example(prompt=[], ids=[_PIECES.index("▁")] * 90 + [0])
@example(prompt=[], ids=[_PIECES.index("<|end|>")] * 90 + [_PIECES.index("▁is")])
@example(prompt=[_PIECES.index("wa")], ids=[_PIECES.index("▁is")])
def test_streamed_text_is_the_text_of_the_whole(decoder: str, prompt: list[int], ids: list[int]):
    _check(_tokenizer(decoder), prompt, ids)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=200)
@given(prompt=_IDS, ids=_IDS)
def test_streamed_text_is_the_text_of_the_whole_for_many_ids(
    decoder: str, prompt: list[int], ids: list[int]
):
    _check(_tokenizer(decoder), prompt, ids)


_TEXTS = st.lists(st.sampled_from([*SCRIPTS, " ", "\n", "ab"]), max_size=40).map("".join)


@given(drawn=random_tokenizers(), prompt=_TEXTS, text=_TEXTS)
def test_streamed_text_joins_on_to_the_prompt(drawn, prompt: str, text: str):
    tokenizer = mbx.TextTokenizer(drawn.file, drawn.config)
    _check(tokenizer, tokenizer.encode(prompt), tokenizer.encode_piece(text))


@pytest.mark.parametrize("decoder", _SOME)
@given(ids=_IDS)
def test_token_bytes_are_the_streamed_text(decoder: str, ids: list[int]):
    tokenizer = _tokenizer(decoder)
    if decoder == "bpe":
        ids = [*ids, 0]  # The space behind a word comes with the next word.
    stream = tokenizer.decoder(prompt=[0])
    text = stream.feed(ids) + stream.flush()
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert data.decode("utf-8", errors="replace") == text


def test_streaming_holds_back_no_complete_character():
    """A run of byte tokens is not held back until it ends."""
    tokenizer = _tokenizer("llama")
    decoder = tokenizer.decoder()
    pieces = [decoder.feed([token]) for token in _thai(20)]
    assert pieces[2::3] == list("สวัสดีครับ" * 20)


@pytest.mark.parametrize("decoder", ["llama", "byte_level"])
def test_the_cost_of_a_token_does_not_grow(decoder: str, monkeypatch):
    tokenizer = _tokenizer(decoder)
    longest = 0
    decode = mbx.TextTokenizer.decode

    def counted(self, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(mbx.TextTokenizer, "decode", counted)
    last = tokenizer.vocab_size - 2
    for ids in ([last] * 200, list(range(last)), [0x80 + _PIECES.index("<0x00>")] * 200):
        tokenizer.decoder().feed([i for i in ids if i < tokenizer.vocab_size])
    assert longest <= 64
