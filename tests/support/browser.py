"""A headless browser, driven over the Chrome DevTools Protocol.

One process of the browser and one tab serve all pages. Nothing is downloaded and no driver is
needed: the protocol is JSON over a WebSocket.
"""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

_ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-sandbox",  # Tests in containers run as root, where the sandbox refuses to start.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
_START_SECONDS = 60
_LOAD_SECONDS = 180
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


def find_browser() -> str | None:
    """Returns the path of an installed browser."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A tab of a browser, the errors on its console, and its requests."""

    def __init__(self, program: str):
        self._program = program
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def __aenter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [self._program, *_ARGUMENTS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = (await self._file("DevToolsActivePort")).split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
            tabs = await response.json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._socket.close()
        await self._reader  # Ends with the socket.
        await self._session.close()
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    async def _file(self, name: str) -> str:
        path = Path(self._profile.name, name)
        for _ in range(_START_SECONDS * 20):
            if path.exists() and (text := path.read_text("utf-8")).count("\n"):
                return text
            assert self._process.poll() is None, "the browser ended while it started"
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the browser did not write {name} in {_START_SECONDS} s")

    async def _read(self) -> None:
        async for message in self._socket:
            content = message.json()
            if "id" in content:
                self._answers.pop(content["id"]).set_result(content)
            elif handle := self._events().get(content["method"]):
                handle(content["params"])

    def _events(self) -> dict[str, Callable[[dict[str, Any]], None]]:
        return {
            "Page.loadEventFired": lambda _: self._loaded.set(),
            "Runtime.exceptionThrown": lambda event: self.errors.append(
                str(event["exceptionDetails"].get("exception", event["exceptionDetails"]))
            ),
            "Runtime.consoleAPICalled": lambda event: (
                self.errors.append(str(event["args"])) if event["type"] == "error" else None
            ),
            "Log.entryAdded": lambda event: (
                self.errors.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
                if event["entry"]["level"] == "error"
                else None
            ),
            "Network.requestWillBeSent": lambda event: self.requests.append(
                event["request"]["url"]
            ),
        }

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        content = await asyncio.wait_for(answer, _LOAD_SECONDS)
        assert "error" not in content, content
        return content["result"]

    async def open(self, url: str) -> None:
        """Opens a page and waits until it has loaded."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), _LOAD_SECONDS)

    async def set_size(self, width: int, height: int = 800) -> None:
        """Sets the size of the window, in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def set_dark(self, dark: bool) -> None:
        """Sets the colour scheme that the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def evaluate(self, script: str) -> Any:
        """Returns the value of a JavaScript expression, which may be a promise."""
        result = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def hear(self, count: int) -> list[str]:
        """Waits for a number of errors on the console, returns them, and forgets them."""
        end = time.monotonic() + _LOAD_SECONDS
        while len(self.errors) < count:
            assert time.monotonic() < end, self.errors
            await asyncio.sleep(0.05)
        heard, self.errors = self.errors, []
        return heard

    async def wait(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + _LOAD_SECONDS
        while not await self.evaluate(expression):
            text = await self.evaluate("document.body.innerText")
            assert time.monotonic() < end, (expression, text)
            await asyncio.sleep(0.05)

    async def click(self, selector: str) -> None:
        """Clicks the first element of a selector, which must be enabled."""
        element = f"document.querySelector({json.dumps(selector)})"
        await self.wait(f"{element} !== null && !{element}.disabled")
        await self.evaluate(f"{element}.click()")

    async def write(self, text: str) -> None:
        """Writes text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Presses a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        what = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        for kind, more in (("keyDown", text), ("keyUp", {})):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, modifiers=8 * shift, **what, **more
            )

    async def picture(self, path: Path) -> None:
        """Writes a picture of the page to a PNG file."""
        image = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(image["data"]))
