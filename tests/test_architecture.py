"""The shape of the code itself: imports go strictly down, files stay small."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamba_eqx"

# From the bottom to the top: a file may import from the lines above its own, and from its folder.
LEVELS = [
    ["ops"],
    ["_protocol", "_initialisers"],
    ["_linear"],
    ["_conv", "_mlp", "_norm"],
    ["mixers"],
    ["_mixer_configs"],
    ["_block", "_bidirectional"],
    ["_stack"],
    ["_language_model"],
    ["_config", "_draw"],
    ["pretrained", "_sampling", "_penalties", "_prompts", "_text", "_chat"],
    ["_tokenizers"],
    ["_choice", "_stop_strings", "_state_file", "_load_tokenizer"],
    ["_decoding"],
    ["_stream"],
    ["_generate"],
    ["_score"],
    ["_beam_search", "_speculative", "training"],
    ["_cli"],
    ["__main__"],
    ["__init__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The part of the package a file belongs to: a folder, or the file itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            names = node.module.split(".") if node.module else []
            targets = [base.joinpath(*names)] if names else [base / a.name for a in node.names]
            for target in targets:
                if target != PACKAGE:
                    found.add(unit(target))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(str(name).split(".")[0] == "mamba_eqx" for name in names), path
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path: Path):
    for other in imported_units(path) - {unit(path)}:
        assert LEVEL[other] < LEVEL[unit(path)], f"{path} imports {other}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "mixers").glob("_[a-z]*.py")), ids=str)
def test_mixers_do_not_import_each_other(path: Path):
    assert "mixers" not in imported_units(path)


@pytest.mark.parametrize(
    "path",
    [
        p
        for top in ("mamba_eqx", "tests", "examples", "benchmarks")
        for p in (ROOT / top).rglob("*.py")
    ],
    ids=str,
)
def test_files_are_small(path: Path):
    assert len(path.read_text().splitlines()) <= 420
