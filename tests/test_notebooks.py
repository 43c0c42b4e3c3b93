"""The notebooks of the docs are those of their scripts, and their cells run."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import pytest


ROOT = Path(__file__).parents[1]
MAKE = ROOT / "docs" / "notebooks" / "make.py"


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load(MAKE)
scripts = pytest.mark.parametrize("script", make.SCRIPTS, ids=lambda path: path.stem)


@pytest.mark.parametrize(
    ("repository", "links"),
    [("https://github.com/someone/mamba_eqx", 3), ("https://example.org/mamba_eqx", 0), ("", 0)],
)
def test_page_links_to_colab_where_the_repository_is_on_github(repository, links):
    page = (ROOT / "docs" / "notebooks.md").read_text("utf-8")
    hook = load(ROOT / "docs" / "colab.py")
    shown = hook.on_page_markdown(page, config=types.SimpleNamespace(repo_url=repository))
    start = "https://colab.research.google.com/github/someone/mamba_eqx/blob/main/docs/notebooks/"
    assert shown.count(f"[open in Colab]({start}") == links


def test_there_are_three():
    assert len(make.SCRIPTS) == 3


@scripts
def test_notebook_is_that_of_its_script(script: Path):
    expected = make.notebook(script.read_text("utf-8"))
    assert script.with_suffix(".ipynb").read_text("utf-8") == expected, f"run python {MAKE.name}"


@pytest.mark.slow
@scripts
def test_cells_run(script: Path, tmp_path, monkeypatch, as_users_run, compile_fast):
    """Runs the cells of the notebook one after another, in one namespace, as Jupyter does."""
    module = types.ModuleType(f"notebook_{script.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    cells = json.loads(script.with_suffix(".ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    with jax.numpy_dtype_promotion("standard"):
        for source in sources:
            exec(compile(source, script.with_suffix(".ipynb").name, "exec"), module.__dict__)
