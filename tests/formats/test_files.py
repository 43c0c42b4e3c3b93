"""Opening files: what is not a regular file is refused at once."""

import os
import stat

import pytest

from mamba_eqx.formats import CheckpointError, open_regular, read_bytes
from tests.support.bounded import bounded


def irregular(folder, what):
    path = folder / "x"
    match what:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
    return path


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes and links")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("folder", "a folder"),
        ("link to itself", "a link to itself"),
    ],
)
def test_irregular_file_raises(tmp_path, what, message):
    path = irregular(tmp_path, what)
    with bounded(), pytest.raises(CheckpointError, match=f"it is {message}: replace it"):
        open_regular(path)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_pipe_that_takes_the_place_of_a_file_meanwhile_raises(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"a")
    regular = os.stat(tmp_path / "file")
    assert stat.S_ISREG(regular.st_mode)
    pipe = irregular(tmp_path, "pipe")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: regular)
        with pytest.raises(CheckpointError, match="not a regular"):
            open_regular(pipe)


def test_larger_file_than_allowed_raises(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError, match="it has 5 bytes, but at most 4 are read"):
        read_bytes(tmp_path / "x", 4)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_bytes(tmp_path / "nothing", 5)
