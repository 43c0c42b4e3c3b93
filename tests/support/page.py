"""`examples/serve.py` as a child process, and requests to it."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
ASK = {"prompt": "ROMEO:", "state": None, "seed": 0, "temperature": 0.8, "max_new_tokens": 20}


class Serving(NamedTuple):
    """A running server, and the file with its log."""

    port: int
    log: Path


@contextlib.contextmanager
def serving(folder: Path, *args: object) -> Iterator[Serving]:
    """Runs the server on a free port, with its log in a folder."""
    command = [sys.executable, str(EXAMPLE), "--port", "0", *map(str, args)]
    log = folder / "log"
    with (
        open(log, "wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            found = re.search(r":(\d+)/$", process.stdout.readline().strip())
            assert found is not None, log.read_text()
            yield Serving(int(found[1]), log)
            assert process.poll() is None
        finally:
            process.terminate()


class Answer(NamedTuple):
    status: int
    text: str
    policy: str | None


def ask(
    port: int, body: object, method: str = "POST", path: str = "/generate", **headers: str
) -> Answer:
    """Sends a request, whose body is bytes or a value for JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent = {"Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, sent)
    response = connection.getresponse()
    policy = response.getheader("Content-Security-Policy")
    answer = Answer(response.status, response.read().decode(), policy)
    connection.close()
    return answer
