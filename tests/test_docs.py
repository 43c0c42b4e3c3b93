"""The Python code of the README and of the docs runs, and every public name has a page."""

import re
import sys
import types
from pathlib import Path

import jax
import pytest

from tests.support.pages import BLOCK
from tests.support.public_names import public_objects


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ANY_BLOCK = re.compile(r"^ *(```|~~~)py", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removesuffix(".md")


page = pytest.mark.parametrize("path", PAGES, ids=page_id)
# The pages of docs/ train and generate, which takes minutes.
page_slow_docs = pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=page_id(path), marks=[pytest.mark.slow] if path.parent != ROOT else []
        )
        for path in PAGES
    ],
)


@page_slow_docs
def test_code_runs(path: Path, tmp_path, monkeypatch, as_users_run, compile_fast):
    """Runs the blocks of a page one after another in an empty folder.

    A block that cannot run has the comment `<!-- not run: reason -->` directly before it.
    """
    text = path.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(ANY_BLOCK.findall(text)), (
        "a code block is indented, or its fence is misspelt"
    )
    # Dataclasses look up the module that defines them, so it has to exist.
    module = types.ModuleType(f"code_of_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if block["skip"]:
            continue
        # Empty lines make the line numbers of a traceback those of the page.
        lines = text.count("\n", 0, block.start("code"))
        code = compile("\n" * lines + block["code"], str(path), "exec")
        with jax.numpy_dtype_promotion("standard"):
            exec(code, module.__dict__)


@page
def test_links_lead_to_files(path: Path):
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@page
def test_pages_have_no_todo(path: Path):
    assert "TODO" not in path.read_text("utf-8")


def test_every_public_name_has_a_page():
    documented = [
        name
        for path in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert sorted(documented) == sorted(public_objects())
