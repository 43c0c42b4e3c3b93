"""The Python code of the README and of the docs runs, and the docs name all that is public."""

import re
import sys
import types
from pathlib import Path

import jax
import pytest

import mamba_eqx as mbx


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n+)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
ANY_BLOCK = re.compile(r"^ *(```|~~~)py", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")

page = pytest.mark.parametrize(
    "path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix().removesuffix(".md")
)


@page
def test_code_runs(path: Path, tmp_path, monkeypatch, as_users_run, compile_fast):
    """The blocks of a page, one after another, in an empty folder. A block that cannot run has the
    comment `<!-- not run: reason -->` directly before it."""
    text = path.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(ANY_BLOCK.findall(text)), "a code block is indented or misspelt"
    # A module, because dataclasses look theirs up.
    module = types.ModuleType(f"code_of_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if block["skip"]:
            continue
        # Lines are counted as in the page.
        lines = text.count("\n", 0, block.start("code"))
        code = compile("\n" * lines + block["code"], str(path), "exec")
        with jax.numpy_dtype_promotion("standard"):
            exec(code, module.__dict__)


@page
def test_links_lead_to_files(path: Path):
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@page
def test_nothing_is_left_to_fill_in(path: Path):
    assert "TODO" not in path.read_text("utf-8")


def test_the_api_is_documented():
    documented = {
        name
        for path in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", path.read_text("utf-8"), re.MULTILINE)
    }
    public = {f"mamba_eqx.{name}" for name in vars(mbx) if is_public(mbx, name)}
    for space in ("ops", "training"):
        part = getattr(mbx, space)
        public |= {f"mamba_eqx.{space}.{name}" for name in vars(part) if is_public(part, name)}
    for space in ("generation", "layers", "models", "sampling", "text"):
        names = set(getattr(mbx, space).__all__) - set(vars(mbx))
        public |= {f"mamba_eqx.{space}.{name}" for name in names}
    assert documented == public


def is_public(module: types.ModuleType, name: str) -> bool:
    return not (name.startswith("_") or isinstance(getattr(module, name), types.ModuleType))
