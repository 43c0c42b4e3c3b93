"""`ByteTokenizer` and its decoder."""

import pytest
from hypothesis import given, strategies as st

import mamba_eqx as mbx


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = mbx.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert isinstance(tokenizer, mbx.text.Tokenizer)


@given(st.lists(st.integers(0, 255)))
def test_byte_decoder_matches_decode(ids):
    decoder = mbx.ByteTokenizer().decoder()
    pieces = [decoder.feed([i]) for i in ids] + [decoder.flush()]
    assert "".join(pieces) == mbx.ByteTokenizer().decode(ids)
    assert decoder.feed([97]) == "a"


def test_byte_decoder_holds_back_incomplete_characters():
    decoder = mbx.ByteTokenizer().decoder()
    assert [decoder.feed([byte]) for byte in "€".encode()] == ["", "", "€"]
    assert decoder.feed([0xE2]) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 256])
def test_tokens_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match=f"within 0..255, but got {bad}"):
        mbx.ByteTokenizer().decode([97, bad])
