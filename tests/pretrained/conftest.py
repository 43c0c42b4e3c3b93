from pathlib import Path

import pytest

from mamba_eqx.pretrained import Hub as Options, open_source
from tests.support.hostile_hub import FILES, NAME
from tests.support.hub_server import Hub


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a cache in it, and files around it that nobody may touch."""
    (tmp_path / "cache").mkdir()
    for name in ("a" * 40, "b" * 64, "x"):
        (tmp_path / name).write_text("precious")
    return tmp_path


@pytest.fixture
def find(hub: Hub, root: Path):
    """Finds a file like the functions that load, and checks that nothing outside was touched."""
    hub.add(NAME, FILES)
    hub.sent = 0

    def call(*names: str, headers: Path | None = None, **options) -> list[bytes]:
        options = {"endpoint": hub.endpoint, "cache_dir": root / "cache"} | options
        before = _outside(root)
        try:
            source = open_source(NAME, Options(**options), header_folder=headers)
            paths = [source.find(name) for name in names]
            return [path.read_bytes() for path in paths if path is not None]
        finally:
            assert _outside(root) == before

    return call


def _outside(root: Path) -> dict[str, str]:
    files = {path for path in root.rglob("*") if path.is_file()}
    cached = {path for path in files if path.is_relative_to(root / "cache")}
    assert all("precious" not in path.read_bytes().decode("latin-1") for path in cached)
    return {str(path): path.read_text() for path in files - cached if "headers" not in path.parts}
