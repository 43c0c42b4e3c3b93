"""The atomic writers: all or nothing, and no leftovers."""

import os
import stat

import pytest

from mamba_eqx._atomic import (
    atomic_file,
    atomic_folder,
    leftover_of,
    remove_folder,
    rename_all,
    temporary_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted_write(path):
    path.write_text("new")
    raise KeyboardInterrupt


def test_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        assert leftover_of(temporary.name) == "file"
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        interrupted_write(temporary)
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_file_gets_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.touch(0o600)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")}
    assert len(modes) == 1


@pytest.mark.parametrize("sync", [False, True])
def test_folder_is_replaced_only_on_success(tmp_path, sync):
    path = tmp_path / "some" / "folder"
    with atomic_folder(path, sync=sync) as temporary:
        (temporary / "a").mkdir()
        (temporary / "a" / "b").write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(path, sync=sync) as temporary:
        interrupted_write(temporary / "c")
    assert (path / "a" / "b").read_text() == "old"
    with atomic_folder(path, sync=sync) as temporary:
        (temporary / "c").write_text("new")
    assert names(path) == ["c"]
    assert names(path.parent) == ["folder"]


def test_folder_is_synced_before_and_after_rename(tmp_path, monkeypatch):
    calls = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("sync"))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    with atomic_folder(tmp_path / "folder", sync=True) as temporary:
        (temporary / "file").touch()
    assert calls == ["sync", "sync", "rename", "sync"]  # the file, its folder; the folder around


def test_temporary_folder_is_removed(tmp_path):
    with temporary_folder(tmp_path / "folder") as temporary:
        assert temporary.parent == tmp_path
        (temporary / "file").touch()
    assert names(tmp_path) == []


def test_remove_folder(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_folder(tmp_path / "folder")
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == []


def test_failed_rename_undoes_the_earlier_ones(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    renames = [(tmp_path / "a", tmp_path / "d"), (tmp_path / "b", tmp_path / "e")]
    with pytest.raises(FileNotFoundError):
        rename_all([*renames, (tmp_path / "absent", tmp_path / "f")])
    assert names(tmp_path) == ["a", "b", "c"]
    # The second of these renames takes the name that the first has freed.
    chain = [(tmp_path / "b", tmp_path / "d"), (tmp_path / "a", tmp_path / "b")]
    with pytest.raises(FileNotFoundError):
        rename_all([*chain, (tmp_path / "absent", tmp_path / "f")])
    assert [(tmp_path / name).read_text() for name in "abc"] == ["a", "b", "c"]
    rename_all(renames)
    assert names(tmp_path) == ["c", "d", "e"]


def test_leftovers_are_recognised():
    assert leftover_of(".step-000000002.0123abcd.tmp") == "step-000000002"
    for name in ("step-000000002", ".hidden", ".step.0123abcd", "step.0123abcd.tmp"):
        assert leftover_of(name) is None
