"""`examples/serve.py`: streaming, refused requests, and the page in a browser."""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.page import ASK, ask, serving


aiohttp = pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with serving(tmp_path_factory.mktemp("page")) as found:
        yield found.port


def lines(port: int, **changes: object) -> list[dict[str, Any]]:
    status, text, _ = ask(port, ASK | changes)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def joined(found: list[dict[str, Any]]) -> str:
    return "".join(line["text"] for line in found)


def test_states_can_be_continued_and_forked(port: int):
    whole = lines(port, max_new_tokens=48)
    assert len(joined(whole)) == 48
    assert len(whole[0]["picture"]) == 6
    for layer in whole[0]["picture"]:
        pixels = base64.b64decode(layer["pixels"])
        assert layer["shape"] == [8, 64]
        assert len(pixels) == 8 * 64
        assert len(set(pixels)) > 100
    first = lines(port, max_new_tokens=24)
    forks = [
        joined(lines(port, prompt="", state=first[-1]["state"], max_new_tokens=24, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert joined(first) + forks[0] == joined(whole)
    assert forks[0] == forks[1] != forks[2]
    assert first[-1]["position"] == 6 + 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 4097}, "at most 4096 characters"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": 3}, "must be text"),
        ({"prompt": "\ud800"}, "surrogates"),
        ({"max_new_tokens": 1025}, "within 1..1024"),
        ({"max_new_tokens": True}, "within 1..1024"),
        ({"seed": -1}, "`seed`"),
        ({"temperature": 0}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"temperature": 1e-38}, "`temperature` must be a number within 1.2e-38..10"),
        ({"temperature": 10**400}, "`temperature`"),
        ({"state": "nonsense"}, "no such state"),
        ({"state": ["x"]}, "no such state"),
    ],
    ids=str,
)
def test_invalid_requests_are_refused(changes: dict[str, object], message: str, port: int):
    status, text, _ = ask(port, ASK | changes)
    assert status == 400
    assert message in text


def test_other_hosts_origins_and_formats_are_refused(port: int):
    assert ask(port, ASK, Host="evil.example")[0] == 403
    assert ask(port, ASK, Host=f"evil.example:{port}")[0] == 403
    assert ask(port, b"", "GET", "/", Host="evil.example")[0] == 403
    assert ask(port, ASK, Origin="http://evil.example")[0] == 403
    assert ask(port, ASK, Origin="null")[0] == 403
    assert ask(port, ASK, Content_Type="text/plain")[0] == 400
    for body in (b"[]", b"", b"{", b"\xff", b"[" * 30000, b"9" * 5000, b"null", b'"\\ud800"'):
        assert ask(port, body)[0] == 400
    for charset in ("latin-1", "nonsense", "utf-16", "utf-8; charset=x"):
        kind = f"application/json; charset={charset}"
        assert ask(port, ASK, Content_Type=kind)[0] in (200, 400)
    assert ask(port, ASK, Content_Encoding="gzip")[0] == 400
    assert ask(port, b"x" * 2**17)[0] == 413
    # The longest prompt fits, even if JSON spells each of its characters as two surrogates.
    assert ask(port, ASK | {"prompt": "\U0001f642" * 4096, "seed": -1})[0] == 400
    assert ask(port, ASK, Origin=f"http://localhost:{port}", Host=f"localhost:{port}")[0] == 200


def test_page_loads_nothing_from_other_servers(port: int):
    status, text, policy = ask(port, b"", "GET", "/")
    assert status == 200
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    nonce = re.search("'nonce-([^']+)'", policy)
    assert nonce is not None
    assert text.count(f'nonce="{nonce[1]}"') == 2
    assert not re.search("(src|href)=|https?:|innerHTML", text)


class Shown(NamedTuple):
    """What the page shows."""

    texts: list[str]
    colours: list[int]
    error: str
    position: str


async def drive(browser: str, url: str, profile: Path, picture: Path | None) -> Shown:
    """Starts, continues and forks a text with the buttons of the page. Returns what it shows."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    options += " --disable-background-networking --disable-component-update"
    options += f" --remote-debugging-port=0 --user-data-dir={profile} --window-size=1200,760"
    process = subprocess.Popen(
        [browser, *options.split(), "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        file = profile / "DevToolsActivePort"
        for _ in range(300):
            if file.exists() and file.read_text().count("\n") == 1:
                break
            await asyncio.sleep(0.1)
        debugger = f"http://127.0.0.1:{file.read_text().split()[0]}/json"
        async with aiohttp.ClientSession() as session:
            async with session.get(debugger) as answer:
                pages = await answer.json()
            page = next(page for page in pages if page["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                count = 0

                async def call(method: str, **params: object) -> Any:
                    nonlocal count
                    count += 1
                    await socket.send_json({"id": count, "method": method, "params": params})
                    while True:
                        message = await socket.receive_json(timeout=60)
                        if message.get("id") == count:
                            assert "error" not in message, message
                            return message["result"]

                async def look(expression: str) -> Any:
                    found = await call(
                        "Runtime.evaluate", expression=expression, returnByValue=True
                    )
                    return found["result"].get("value")

                async def wait(expression: str) -> None:
                    end = time.monotonic() + 60
                    while not await look(expression):
                        assert time.monotonic() < end, await look("document.body.innerText")
                        await asyncio.sleep(0.1)

                await call("Page.navigate", url=url)
                await wait("!!document.getElementById('start')")
                buttons = "document.querySelectorAll('article button')"
                ready = f"{buttons}.length == %d && ![...{buttons}].some(b => b.disabled)"
                await look("document.getElementById('start').click()")
                await wait(ready % 2)
                await look(f"{buttons}[0].click()")
                await wait(ready % 2)
                await look(f"{buttons}[1].click()")
                await wait(ready % 4)
                if picture is not None:
                    image = await call("Page.captureScreenshot", format="png")
                    picture.write_bytes(base64.b64decode(image["data"]))
                texts = "[...document.querySelectorAll('pre')].map(p => p.textContent)"
                colours = (
                    "[...document.querySelectorAll('canvas')].map(c => new Set(c.getContext('2d')"
                    ".getImageData(0, 0, c.width, c.height).data).size)"
                )
                return Shown(
                    await look(texts),
                    await look(colours),
                    await look("document.getElementById('error').textContent"),
                    await look("document.getElementById('position').textContent"),
                )
    finally:
        process.terminate()
        process.wait()


def test_page_in_a_browser(port: int, tmp_path: Path):
    """`SCREENSHOT=file.png` also takes the screenshot in the docs."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    picture = os.environ.get("SCREENSHOT")
    found = asyncio.run(
        drive(
            browser,
            f"http://127.0.0.1:{port}/",
            tmp_path,
            None if picture is None else Path(picture),
        )
    )
    assert found.error == ""
    fork, trunk = found.texts
    assert trunk.startswith("ROMEO:")
    assert len(trunk) == 6 + 2 * 160
    # The texts agree up to the fork.
    assert fork[: len(trunk)] == trunk
    assert len(fork) == len(trunk) + 160
    assert found.position == f"After {len(fork)} tokens."
    assert len(found.colours) == 6
    assert min(found.colours) > 30
