"""`text_until`, which cuts streamed text at a stop string."""

from hypothesis import given, strategies as st

from mamba_eqx.text import text_until


@given(st.text("ab", min_size=1, max_size=4), st.lists(st.text("ab", max_size=3), max_size=6))
def test_text_until_yields_everything_before_the_stop(stop, pieces):
    text = "".join(pieces)
    assert "".join(text_until([stop], iter(pieces))) == text.partition(stop)[0]
    ends = [text.find(end) + len(end) for end in (stop, "bab") if end in text]
    both = min(
        (text[: min(ends)].partition(end)[0] for end in (stop, "bab")) if ends else [text], key=len
    )
    assert "".join(text_until([stop, "bab"], iter(pieces))) == both
    assert list(text_until([], iter(pieces))) == pieces


def test_text_until_holds_back_only_a_possible_stop():
    assert list(text_until(["end"], iter(["a", "e", "n", "x"]))) == ["a", "", "", "enx"]


def test_text_until_ends_at_the_stop_that_is_completed_first():
    for stops in (["cd", "b"], ["b", "cd"]):
        assert "".join(text_until(stops, iter(["abcd"]))) == "a"
