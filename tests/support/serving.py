"""`mamba-eqx serve` as a child process, and requests to it."""

import asyncio
import contextlib
import http.client
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mamba_eqx as mbx


PATH = "/v1/completions"
ASK = {"model": "tiny", "prompt": "ROMEO:", "seed": 0, "temperature": 0.8, "max_tokens": 20}


class Serving(NamedTuple):
    """A running server, and the file with its log."""

    port: int
    log: Path


@contextlib.contextmanager
def serving(folder: Path, *args: object, key: str = "") -> Iterator[Serving]:
    """Runs the server on a free port, with its log in a folder."""
    command = [sys.executable, "-m", "mamba_eqx", "serve", "--port", "0", *map(str, args)]
    log = folder / "log"
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"MAMBA_EQX_API_KEY": key},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            found = re.search(r":(\d+)/$", process.stdout.readline().strip())
            assert found is not None, log.read_text()
            yield Serving(int(found[1]), log)
            assert process.poll() is None
        finally:
            process.terminate()


@contextlib.contextmanager
def in_process(
    model: mbx.LanguageModel,
    tokenizer: mbx.TextTokenizer | mbx.ByteTokenizer | None = None,
    *,
    key: str | None = None,
    **options: Any,
) -> Iterator[int]:
    """Runs a server in a thread of this process, and yields its port.

    **Arguments:**

    - `model`, `tokenizer`: the model, named `tiny`. The tokenizer is that of bytes by default.
    - `key`: the key of the API.
    - `options`: other fields of `Served`.
    """
    from mamba_eqx.serving import Served, Server

    served = Served(model, tokenizer or mbx.ByteTokenizer(), "tiny", **options)
    server = Server(served, key=key)
    ready: queue.Queue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def run() -> None:
        async with server.listen("127.0.0.1", 0) as url:
            end = asyncio.Event()
            port = int(url.rstrip("/").rpartition(":")[2])
            ready.put((port, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    port, loop, end = ready.get(timeout=300)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(60)
    assert not thread.is_alive()


class Answer(NamedTuple):
    status: int
    text: str
    policy: str | None
    headers: dict[str, str]


def ask(port: int, body: object, method: str = "POST", path: str = PATH, **headers: str) -> Answer:
    """Sends a request, whose body is bytes or a value for JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent = {"Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, sent)
    response = connection.getresponse()
    policy = response.getheader("Content-Security-Policy")
    answer = Answer(response.status, response.read().decode(), policy, dict(response.getheaders()))
    connection.close()
    return answer


def events(text: str) -> list[dict[str, Any]]:
    """Returns the JSON of a stream of events, which must end well."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
