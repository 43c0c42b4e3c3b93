"""The page of `mamba-eqx serve` in a real browser: texts, conversations, keyboard, phone and dark.

`SCREENSHOT=file.png pytest -m "" tests/serving/test_browser.py -k picture` takes the picture in the
docs.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import mamba_eqx as mbx
from tests.support.commands import byte_model
from tests.support.serving import in_process, serving


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
browsers = pytest.importorskip("tests.support.browser")
BROWSER = browsers.find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compile_fast", "as_users_run"),
    pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: {', '.join(browsers.NAMES)}"),
]

MARKUP = "<img src=x onerror='document.title=1'><script>document.title=1</script>&amp;"
TEXTS = "[...document.querySelectorAll('article .text')].map(e => e.textContent)"
STATS = "[...document.querySelectorAll('article.assistant .stats')].map(e => e.textContent)"
TITLES = "[...document.querySelectorAll('#list .open')].map(e => e.textContent)"
IDLE = "document.getElementById('send').textContent === 'Send'"


@contextlib.asynccontextmanager
async def opened(port: int) -> AsyncIterator[Any]:
    """Opens the page, which must not complain about anything by the end."""
    async with browsers.Browser(BROWSER) as page:
        await page.set_size(1366, 768)
        await page.open(f"http://127.0.0.1:{port}/")
        yield page
        assert page.errors == []


def drive(port: int, use: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(port) as page:
            await use(page)

    asyncio.run(main())


async def send(page: Any, text: str) -> None:
    """Writes text into the field that has the focus, and waits for the answer."""
    await page.write(text)
    await page.press("Enter")
    await page.wait(IDLE)


async def choose(page: Any, **options: object) -> None:
    """Writes options into their fields."""
    for name, value in options.items():
        field = f"document.getElementById('option-{name}')"
        await page.evaluate(f"{field}.value = {str(value)!r}")
    await page.evaluate("document.getElementById('fields').oninput()")


def test_texts_are_generated_stopped_edited_and_kept():
    async def use(page: Any) -> None:
        await page.wait("document.activeElement.id === 'prompt'")
        await choose(page, max_tokens=20, seed=3)
        # Markup is text, and Shift+Enter is a line break.
        await page.write(MARKUP)
        await page.press("Enter", shift=True)
        await send(page, "x")
        prompt, first = await page.evaluate(TEXTS)
        assert prompt == f"{MARKUP}\nx"
        assert (await page.evaluate("document.title")).startswith("tiny")
        (stats,) = await page.evaluate(STATS)
        assert stats.startswith("20 tokens, ")
        assert "tokens/s" in stats
        assert stats.endswith("ended at the limit of tokens")
        assert await page.evaluate("document.querySelectorAll('#layers canvas').length") == 1
        size = await page.evaluate("document.getElementById('bytes').textContent")
        assert re.fullmatch("[0-9]+ B, at any length", size)
        # The same seed gives the same text again.
        await page.click("article.assistant .bar button")
        await page.wait(IDLE)
        assert (await page.evaluate(TEXTS))[1] == first
        # Escape stops a long text, and what there is of it stays.
        await choose(page, max_tokens=3900)
        await page.evaluate("document.getElementById('prompt').focus()")
        await page.write("y")
        await page.press("Enter")
        await page.wait(f"{TEXTS}.length === 4 && {TEXTS}[3].length > 0")
        await page.press("Escape")
        await page.wait(IDLE)
        stopped = (await page.evaluate(TEXTS))[3]
        assert 0 < len(stopped) < 3900
        stats = (await page.evaluate(STATS))[1]
        assert stats.endswith("stopped")
        assert "of" in stats
        assert "prompt tokens cached" in stats
        # The whole conversation is there after a reload.
        texts = await page.evaluate(TEXTS)
        await page.open(await page.evaluate("location.href"))
        await page.wait(f"{TEXTS}.length === 4")
        assert await page.evaluate(TEXTS) == texts
        assert await page.evaluate("document.getElementById('option-max_tokens').value") == "3900"
        # An edited prompt replaces what followed it.
        await choose(page, max_tokens=20)
        await page.click("article.user .bar button")
        await page.evaluate("document.querySelector('.editor textarea').select()")
        await send(page, "an edit")
        await page.wait(f"{TEXTS}.length === 2 && {IDLE}")
        assert (await page.evaluate(TEXTS))[0] == "an edit"
        # A fork is another conversation.
        await page.click("article.assistant .bar button:last-child")
        await page.wait(f"{TITLES}.length === 2")
        await send(page, "z")
        assert len(await page.evaluate(TEXTS)) == 4
        await page.click("#list li:last-child .open")
        assert len(await page.evaluate(TEXTS)) == 2
        # A deleted conversation can be brought back.
        await page.click("#list li:last-child .quiet")
        assert len(await page.evaluate(TITLES)) == 1
        await page.click("#status button")
        assert len(await page.evaluate(TITLES)) == 2
        # A mistake is said, and nothing is lost.
        await choose(page, top_p=7)
        await page.evaluate("document.getElementById('prompt').focus()")
        await send(page, "more")
        assert "Top p" in await page.evaluate("document.getElementById('error').textContent")
        assert await page.evaluate("document.getElementById('prompt').value") == "more"
        assert len(await page.evaluate(TEXTS)) == 2

    with in_process(byte_model(), slots=2, max_len=4096) as port:
        drive(port, use)


def test_conversations_are_bounded_and_damage_is_no_fault():
    async def use(page: Any) -> None:
        await page.wait("document.activeElement.id === 'prompt'")
        await page.evaluate(
            """const put = (id, text) => localStorage.setItem(`mamba_eqx:conversation:${id}`, text);
            for (let i = 0; i < 60; i++) put(i, JSON.stringify(
            {id: `${i}`, model: "tiny", time: i, turns: [{role: "user", text: `t${i}`}]}));
            ['{', 'null', '[]', '{"id": 3}', '{"turns": 3}', '"x"'].forEach((bad, i) =>
            put(`bad${i}`, bad));
            localStorage.setItem("mamba_eqx:options", "[1");"""
        )
        await page.open(await page.evaluate("location.href"))
        await page.wait(f"{TITLES}.length === 60")
        await choose(page, max_tokens=2)
        await page.click("#new")
        await send(page, "new")
        titles = await page.evaluate(TITLES)
        assert len(titles) == 50
        assert titles[0].startswith("new")
        assert titles[1] == "t59"
        # The oldest make room where the browser has none.
        await page.evaluate(
            """for (let size = 2 ** 24, text = ""; size > 100; size /= 2) try {
            const more = text + "x".repeat(size);
            localStorage.setItem("mamba_eqx:conversation:11", JSON.stringify({id: "11",
            model: "tiny", time: 11, turns: [{role: "user", text: more}]}));
            text = more;
            } catch (error) { if (error.name !== "QuotaExceededError") throw error; }"""
        )
        await page.evaluate("document.getElementById('prompt').focus()")
        await send(page, "y" * 2000)
        await page.wait(f"{IDLE} && {STATS}.length === 2")
        assert await page.evaluate("document.getElementById('error').textContent") == ""
        assert "mamba_eqx:conversation:11" not in await page.evaluate("Object.keys(localStorage)")

    with in_process(byte_model(), slots=2, max_len=4096) as port:
        drive(port, use)


def test_chats_with_a_key():
    tokenizers = pytest.importorskip("tests.support.tokenizers", reason="needs the extra `text`")
    tokenizer = mbx.TextTokenizer(tokenizers.FILES["byte_level"], tokenizers.CONFIG)

    async def use(page: Any) -> None:
        await page.wait("document.getElementById('ask').open")
        await page.write("wrong")
        await page.press("Enter")
        await page.wait("document.getElementById('key').value === ''")
        await page.write("secret")
        await page.click("button[value=ok]")
        await page.wait("document.getElementById('mode').textContent === 'chat'")
        # The browser logs the two refusals, as it should.
        refusals = await page.hear(2)
        assert len(refusals) == 2
        assert all("401" in error for error in refusals)
        await choose(page, max_tokens=9, system="Be brief.")
        await page.evaluate("document.getElementById('prompt').focus()")
        # This template refuses a system message. What the user wrote comes back.
        await send(page, "To be?")
        assert "no system" in await page.evaluate("document.getElementById('error').textContent")
        assert await page.evaluate(TEXTS) == []
        assert await page.evaluate(TITLES) == []
        assert await page.evaluate("document.getElementById('prompt').value") == "To be?"
        await page.wait("document.getElementById('error').textContent !== ''")
        (refusal,) = await page.hear(1)
        assert "400" in refusal
        await choose(page, system="")
        await page.evaluate("document.getElementById('prompt').focus()")
        for text in ("", "And?"):
            await send(page, text)
        assert (await page.evaluate(TEXTS))[::2] == ["To be?", "And?"]
        assert await page.evaluate("document.getElementById('error').textContent") == ""
        assert "cached" in (await page.evaluate(STATS))[1]

    model = byte_model(tokenizer.vocab_size)
    with in_process(model, tokenizer, key="secret", slots=2, max_len=256) as port:
        drive(port, use)


def test_page_fits_a_phone_and_has_names_for_all_controls():
    async def use(page: Any) -> None:
        await page.wait("document.activeElement.id === 'prompt'")
        await choose(page, max_tokens=30)
        await send(page, "a" * 300 + " " + MARKUP)
        for width, height in ((390, 844), (768, 1024), (1366, 768)):
            for dark in (False, True):
                await page.set_size(width, height)
                await page.set_dark(dark)
                await page.evaluate(
                    "document.querySelectorAll('details').forEach(d => d.open = true)"
                )
                wide = "document.documentElement.scrollWidth, document.body.scrollWidth"
                assert await page.evaluate(f"Math.max({wide}) <= innerWidth"), width
                colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (colour == "rgb(23, 25, 24)") == dark
        unnamed = await page.evaluate(
            """[...document.querySelectorAll("button, input, textarea, canvas")].filter((e) =>
            !e.textContent.trim() && !e.labels?.length && !e.getAttribute("aria-label")
            && !e.getAttribute("aria-labelledby")).map((e) => e.outerHTML)"""
        )
        assert unnamed == []
        # Tab goes from the prompt to the button beside it.
        await page.evaluate("document.getElementById('prompt').focus()")
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.id") == "send"

    with in_process(byte_model(), slots=2, max_len=4096) as port:
        drive(port, use)


@pytest.mark.skipif("SCREENSHOT" not in os.environ, reason="needs SCREENSHOT: a file for a picture")
def test_picture_for_the_docs(tmp_path: Path):
    async def use(page: Any) -> None:
        await page.set_size(1200, 720)
        await page.wait("document.activeElement.id === 'prompt'")
        await choose(page, max_tokens=120, seed=1)
        await send(page, "ROMEO:")
        await send(page, "\n\nJULIET:\nO Romeo,")
        await page.picture(Path(os.environ["SCREENSHOT"]))

    with serving(tmp_path, "--slots", 1) as server:
        drive(server.port, use)
