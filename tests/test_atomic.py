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
    replaced_files,
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


def test_files_are_replaced_together(tmp_path):
    folder, outside = tmp_path / "some" / "folder", tmp_path / "outside"
    with replaced_files(folder) as new:
        (new / "a").write_text("old")
        assert not folder.exists()
    outside.write_text("outside")
    (folder / "b").symlink_to(outside)
    for name in ("stale", "mine"):
        (folder / name).write_text("old")
    (tmp_path / "link").symlink_to(folder)
    with replaced_files(tmp_path / "link", stale=lambda name: name == "stale") as new:
        for name in "abc":
            (new / name).write_text("new")
        assert (folder / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        **dict.fromkeys("abc", "new"),
        "mine": "old",
    }
    assert outside.read_text() == "outside"
    assert not (folder / "b").is_symlink()
    assert names(tmp_path / "some") == ["folder"]
    (tmp_path / "loop").symlink_to("loop")
    for path in (outside, tmp_path / "loop"):
        with pytest.raises(FileExistsError, match="is a file"), replaced_files(path):
            pass


def test_files_stay_if_the_block_raises(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced_files(tmp_path, stale=lambda _: True) as new:
        interrupted_write(new / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_folder_may_be_on_a_file_system_of_its_own(tmp_path, monkeypatch):
    """As a mounted one is: files are moved within the folder, and nothing is made beside it."""
    folder, rename = tmp_path / "mounted", os.replace
    folder.mkdir()
    (folder / "a").write_text("old")

    def within(source, destination):
        assert str(source).startswith(f"{folder}{os.sep}")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", within)
    with replaced_files(folder) as new:
        assert names(tmp_path) == ["mounted"]
        (new / "a").write_text("new")
    assert (folder / "a").read_text() == "new"


def test_last_files_go_first_and_come_last(tmp_path, monkeypatch):
    moves, rename = [], os.replace
    for name in "abc":
        (tmp_path / name).write_text("old")

    def noted(source, destination):
        moves.append(f"{source.parent.name} {source.name}")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", noted)
    with replaced_files(tmp_path, last=("b",)) as new:
        for name in "abc":
            (new / name).write_text("new")
    assert (moves[0], moves[-1], len(moves)) == (f"{tmp_path.name} b", "new b", 6)


def test_temporary_folder_is_removed(tmp_path):
    with temporary_folder(tmp_path / "folder") as temporary:
        assert temporary.parent == tmp_path
        (temporary / "file").touch()
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="needs the errors of POSIX")
@pytest.mark.parametrize("write", [atomic_file, atomic_folder, replaced_files])
def test_errors_name_the_path_that_was_given(write, tmp_path):
    (tmp_path / "file").touch()
    wanted = tmp_path / "file" / "x"
    with pytest.raises(NotADirectoryError) as error, write(wanted):
        pass
    assert error.value.filename == str(wanted)
    assert ".tmp" not in str(error.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error, atomic_file(tmp_path / "folder"):
        pass
    assert error.value.filename == str(tmp_path / "folder")
    assert error.value.filename2 is None
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder that is not writable")
def test_errors_name_a_folder_that_cannot_be_written():
    with pytest.raises(OSError, match=r".") as error, replaced_files("/proc/self"):
        pass
    assert error.value.filename == "/proc/self"


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
