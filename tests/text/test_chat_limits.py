"""Hostile chat templates end soon, with a `ValueError`."""

import pytest


pytest.importorskip("jinja2")

from mamba_eqx.text._chat_template import Tokens, render
from mamba_eqx.text.chat import _limits
from tests.support.bounded import bounded
from tests.support.chat_templates import CHATS, TEMPLATES, VARIABLES
from tests.support.hostile_templates import ESCAPES, UNBOUNDED


# The checks of types print whole values when they fail, which has no limit.
pytestmark = pytest.mark.usefixtures("as_users_run")


def attempt(template: str) -> None:
    render(template, CHATS["turns"], {}, tokens=[Tokens(["<s>"])], add_generation_prompt=True)


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of the limits, which the quick tests use."""
    monkeypatch.setattr(_limits, "STEPS", 1000)
    monkeypatch.setattr(_limits, "STEPS_PER_MESSAGE", 0)
    monkeypatch.setattr(_limits, "MAX_CHARACTERS", 10_000)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_templates_reach_a_limit(step: int):
    with bounded(30):
        assert [template for template in UNBOUNDED[::step] if not _is_refused(template)] == []


def test_many_special_tokens_are_found_fast():
    special = [f"<|{i}|>" for i in range(20_000)]
    chat = [{"role": "user", "content": ""}]
    with bounded(5):
        pieces = render(
            "{{ '<|' * 200000 }}7|>", chat, {}, tokens=[Tokens(special)], add_generation_prompt=True
        )
    assert pieces[1:] == [("<|7|>", True)]


def _is_refused(template: str) -> bool:
    try:
        attempt(template)
    except ValueError as error:
        return "chat template" in str(error)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("template", UNBOUNDED[::5], ids=lambda text: text[:60])
def test_hostile_templates_end_soon(template: str):
    with bounded(60), pytest.raises(ValueError, match="chat template"):
        attempt(template)


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_access_only_their_arguments(template: str):
    with pytest.raises(ValueError, match="chat template failed"):
        attempt(template)


def test_limits_are_far_above_published_templates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_limits, "STEPS", 10_000)
    monkeypatch.setattr(_limits, "STEPS_PER_MESSAGE", 200)
    chat = [{"role": role, "content": "x" * 1000} for role in ("user", "assistant")] * 20
    for template in TEMPLATES.values():
        render(template, chat, VARIABLES, tokens=[Tokens(["<s>"])], add_generation_prompt=True)


@pytest.mark.usefixtures("low_limits")
def test_deep_and_endless_messages_raise():
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    endless: dict[str, object] = {}
    endless["more"] = endless
    wide: object = "x"
    for _ in range(60):
        wide = [wide, wide]
    for field in (deep, endless, wide):
        chat = [{"role": "user", "content": "x", "field": field}]
        with bounded(60), pytest.raises(ValueError, match=r"levels|steps"):
            render("", chat, {}, tokens=[Tokens([])], add_generation_prompt=True)
