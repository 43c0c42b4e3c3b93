"""The documentation site as readers see it: every page in a browser, on a phone and on a laptop."""

import asyncio
import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
pytest.importorskip("mkdocs", reason="needs MkDocs: the extra `docs`")

from tests.support.browser import Browser, find_browser


ROOT = Path(__file__).parents[1]
PHONE, LAPTOP = 390, 1366

# Returns what is wrong with a page, as a list of sentences.
FAULTS = (ROOT / "tests" / "support" / "page_faults.js").read_text("utf-8")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Builds the site and serves it; yields its address and the paths of its pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    # As the site is built where it is published: with a link to a repository.
    repository = {"REPOSITORY_URL": "https://github.com/someone/mamba-eqx"}
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"} | repository
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = sorted(page.relative_to(folder).as_posix() for page in folder.rglob("*.html"))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


@pytest.mark.slow
def test_pages_are_readable(site):
    """On no page does anything overflow, overlap or fade, in both widths and colour schemes."""
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium or Chrome")
    address, pages = site
    assert len(pages) > 20
    assert not asyncio.run(look_at(program, address, pages))


async def look_at(program: str, address: str, pages: list[str]) -> list[str]:
    faults = []
    async with Browser(program) as browser:
        for page in pages:
            browser.errors.clear()
            browser.requests.clear()
            await browser.open(f"{address}/{page}")
            # A page is loaded once, and then only changes its size and its colours.
            for width, is_dark in ((PHONE, False), (LAPTOP, False), (LAPTOP, True)):
                await browser.set_size(width)
                await browser.set_dark(is_dark)
                scheme = "slate" if is_dark else "default"
                script = f"({FAULTS})({width}, {scheme!r})"
                view = f"{page}, {width} pixels, {'dark' if is_dark else 'light'}"
                faults += [f"{view}: {fault}" for fault in await browser.evaluate(script)]
            # The icons of the theme are data in its style sheet. A missing favicon is no fault.
            elsewhere = [u for u in browser.requests if not u.startswith((address, "data:"))]
            faults += [f"{page}: requests {url}" for url in elsewhere]
            faults += [f"{page}: {error}" for error in browser.errors]
    return faults
