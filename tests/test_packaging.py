"""The built archives are complete, and facts stated in two files agree."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mamba_eqx as mbx


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamba_eqx"
MODEL = "mamba_eqx/shipped/shakespeare"
MIB = 2**20


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel and a source archive, built by the installed hatchling."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_wheel_contains_the_package(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        size = sum(info.compress_size for info in wheel.infolist() if MODEL in info.filename)
    assert names - metadata == {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert {"mamba_eqx/py.typed", f"{MODEL}/config.json", f"{MODEL}/model.safetensors"} <= names
    assert size <= 6 * MIB


def test_source_archive_contains_nothing_else(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    assert {name.parts[0] for name in names} == {
        ".gitignore",  # hatchling always adds it
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "benchmarks",
        "docs",
        "examples",
        "mamba_eqx",
        "mkdocs.yml",
        "native",
        "pyproject.toml",
        "tests",
    }
    assert not [name for name in names if "__pycache__" in name.parts or name.suffix == ".pyc"]
    assert path.stat().st_size <= 10 * MIB


def test_version_is_in_changelog():
    version = str(Version(mbx.__version__))
    assert version == mbx.__version__
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_hooks_and_ci_use_the_same_versions():
    config = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    hooks = {
        Requirement(pin) for pin in re.findall(r'additional_dependencies: \["(.+?)"\]', config)
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    pins = {Requirement(pin) for pin in extras["project"]["optional-dependencies"]["dev"]}
    assert hooks == {pin for pin in pins if pin.name in ("ruff", "pyright")}
