"""Requests to a Hub, with limits to what it may answer, how much it may send, and how long it may
take.

The requests themselves are those of `huggingface_hub`, which knows the user's proxies and
certificates, and works with several HTTP libraries.
"""

import contextlib
import io
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..formats import quote
from ._hub_errors import BadAnswer, is_passing
from ._hub_options import Hub


_ANSWER_TIME = 60  # In seconds, for a whole answer without a body.
_STALL_TIME = 600  # In seconds, in which a part of a body (10 MB) has to arrive.
_WAITS = (1, 2, 4, 8, 8)  # In seconds, before a request is repeated.
_LONGEST_WAIT = 60  # In seconds, if the Hub asks for a longer one.
_WEIGHTS = (".safetensors", ".bin")
_MAX_WEIGHTS = 2**40
_MAX_OTHERS = 2**28
# A commit and a checksum become names of files in the cache. The first character is none that hides
# a file, and no name has a path in it.
IDENTIFIER = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,127}")

_T = TypeVar("_T")


class Answer(NamedTuple):
    """What a Hub says about a file.

    - `commit`: the commit that the file belongs to.
    - `etag`: the checksum of the file.
    - `size`: its size in bytes, or `None` if the Hub does not say.
    """

    commit: str
    etag: str
    size: int | None


def ask(hub: Hub, url: str, may_repeat: Callable[[Exception], bool]) -> Answer:
    """Asks a Hub about a file, without downloading it.

    **Arguments:**

    - `hub`: the options for access to the Hub.
    - `url`: the address of the file.
    - `may_repeat`: returns whether to repeat the request after an error.

    **Raises:** `BadAnswer` if the answer cannot be right, and the errors of `huggingface_hub` and
    of its HTTP library.
    """
    from huggingface_hub import get_hf_file_metadata

    def head() -> Answer:
        found = get_hf_file_metadata(url, token=False, headers=hub.headers())
        return _checked(url, found.commit_hash, found.etag, found.size)

    def in_time() -> Answer:
        answer = _in_background(head)
        if not wait([answer], _ANSWER_TIME).done:
            raise TimeoutError(f"no whole answer came within {_ANSWER_TIME} seconds")
        return answer.result()

    return _repeated(in_time, may_repeat)


def fetch(hub: Hub, url: str, target: Path, *, size: int | None) -> None:
    """Downloads a file.

    **Arguments:**

    - `hub`: the options for access to the Hub.
    - `url`: the address of the file.
    - `target`: the file to write.
    - `size`: the announced size in bytes. More is never written.

    **Raises:** `BadAnswer` if the content is longer than announced, and the errors of
    `huggingface_hub`, of its HTTP library and of the disk.
    """
    with _Limited(target, _largest(url) if size is None else size) as file:
        _get(url, file, hub.headers(), size)
        if file.is_full:
            raise BadAnswer(f"the content of {_name(url)} is longer than the Hub announced.")


def fetch_beginning(hub: Hub, url: str, target: Path, size: int) -> bytes:
    """Downloads the first `size` bytes of a file, even if the Hub would send all of it.

    **Arguments:**

    - `hub`, `url`: as for `fetch`.
    - `target`: a file that is written meanwhile.
    - `size`: the number of bytes, not more than the file has.

    **Raises:** the errors of `huggingface_hub` and of its HTTP library.
    """
    headers = hub.headers() | {"Range": f"bytes=0-{size - 1}"}
    with _Limited(target, size) as file:
        if size > 0:
            _repeated(lambda: _get(url, file, headers, size), is_passing)
    return target.read_bytes()


def _get(url: str, file: "_Limited", headers: dict[str, str], size: int | None) -> None:
    """Downloads into `file`, up to its limit."""
    from huggingface_hub.file_download import http_get

    file.seek(0)
    file.truncate()
    name = url.rsplit("/", 1)[-1]
    get = lambda: http_get(url, file, headers=headers, expected_size=size, displayed_filename=name)
    download = _in_background(get)
    arrived = -1
    while not download.done() and arrived < file.arrived:
        arrived = file.arrived
        wait([download], _STALL_TIME)
    if not download.done():
        raise TimeoutError(f"less than 10 MB of {name!r} arrived within {_STALL_TIME} seconds")
    with contextlib.suppress(_Full):
        download.result()


def _repeated(request: Callable[[], _T], may_repeat: Callable[[Exception], bool]) -> _T:
    for seconds in _WAITS:
        try:
            return request()
        except Exception as error:  # Of any type; see `is_passing`.
            if not may_repeat(error):
                raise
            time.sleep(max(seconds, min(_LONGEST_WAIT, _retry_after(error))))
    return request()


def _retry_after(error: Exception) -> int:
    """Returns the number of seconds after which the Hub asks to repeat a request."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return 0
    seconds = error.response.headers.get("Retry-After", "")
    return int(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else 0


def _checked(url: str, commit: str | None, etag: str | None, size: int | None) -> Answer:
    if commit is None or etag is None:
        header = "X-Repo-Commit" if commit is None else "ETag"
        raise BadAnswer(f"the answer for {_name(url)} has no {header}, so it is not from a Hub.")
    for value, header in ((commit, "X-Repo-Commit"), (etag, "ETag")):
        if not IDENTIFIER.fullmatch(value):
            raise BadAnswer(
                f"the {header} of {_name(url)} must be an identifier, but is {quote(value)}."
            )
    if size is not None and not 0 <= size <= _largest(url):
        raise BadAnswer(
            f"{_name(url)} must have at most {_largest(url)} bytes, but the Hub announces "
            f"{str(size)[:30]}."
        )
    return Answer(commit, etag, size)


def _largest(url: str) -> int:
    return _MAX_WEIGHTS if url.endswith(_WEIGHTS) else _MAX_OTHERS


def _name(url: str) -> str:
    return quote(url.rsplit("/", 1)[-1])


class _Full(Exception):
    """More was written to a `_Limited` than it takes."""


class _Limited(io.BufferedWriter):
    """A file that takes a limited number of bytes, and tells how many have arrived."""

    def __init__(self, path: Path, limit: int):
        super().__init__(io.FileIO(path, "w"))
        self.arrived = 0
        self.is_full = False
        self._limit = limit

    # The base class takes any buffer; the chunks of HTTP libraries are bytes.
    def write(self, data: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.arrived += len(data)
        room = self._limit - self.tell()
        if len(data) <= room:
            return super().write(data)
        super().write(data[: max(room, 0)])
        self.is_full = True
        raise _Full


def _in_background(call: Callable[[], _T]) -> Future[_T]:
    """Starts a call in another thread, for which the caller can wait a limited time.

    The time-outs of HTTP libraries are those between two packets, so that a server could take any
    time for an answer. A thread that is no longer waited for ends with its connection, and does not
    keep the process from ending.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
