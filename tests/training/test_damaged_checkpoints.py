"""Damaged checkpoints are noticed, and set aside in favour of the one before."""

import errno
import json
import os
import shutil
import warnings
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.training import Checkpoints
from tests.support.runs import mutate


def restore(checkpoints, like: Any, step=None) -> Any:
    found = checkpoints.restore(like, step=step)
    assert found is not None
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def saved_twice(folder, config=None):
    """Returns checkpoints of steps 1 and 2, whose states contain their step."""
    checkpoints = Checkpoints(folder, config=config)
    for step in (1, 2):
        state = {"x": jnp.full(4, float(step)), "key": jr.key(step), "rate": 0.5}
        checkpoints.save(step, state, score=float(step))
    return checkpoints


LIKE = {"x": jnp.zeros(4), "key": jr.key(0), "rate": 0.5}


def make_old(path, **changes):
    """Turns a checkpoint into that of an earlier version, without checksums."""
    record = json.loads((path / "checkpoint.json").read_text())
    del record["sha256"], record["state_sha256"]
    (path / "checkpoint.json").write_text(json.dumps(record | changes))


def test_changed_values_are_noticed_by_the_checksum(tmp_path):
    checkpoints = saved_twice(tmp_path)
    file = checkpoints.path(2) / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-16:] = bytes(16)
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"damaged \(.*state.safetensors does not have the checks"):
        got, step = restore(checkpoints, LIKE)
    assert (got["x"].tolist(), step) == ([1.0] * 4, 1)
    assert len([*tmp_path.glob("damaged-step-000000002-*")]) == 1


def test_changed_record_is_noticed_by_its_checksum(tmp_path):
    checkpoints = saved_twice(tmp_path, {"lr": 0.125})
    file = checkpoints.path(2) / "checkpoint.json"
    file.write_text(file.read_text().replace('"lr": 0.125', '"lr": 0.126'))
    assert checkpoints.scores == {1: 1.0}
    with pytest.warns(UserWarning, match="is damaged"):
        assert restore(checkpoints, LIKE)[1] == 1


def test_checkpoints_of_earlier_versions_are_restored(tmp_path):
    checkpoints = saved_twice(tmp_path)
    make_old(checkpoints.path(2))
    got, step = restore(checkpoints, LIKE)
    assert (got["x"].tolist(), step) == ([2.0] * 4, 2)
    assert checkpoints.scores == {1: 1.0, 2: 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": {"key": "nonsense"}}, {"keys": [1]}, {"keys": {"key": 3}}, {"step": "2"},
        {"step": 3}, {"step": True}, {"score": "low"}, {"score": True}, {"score": 10**400},
        {"constants": 3}, {"constants": {"rate": 0.5}}, {"versions": []}, {"more": 1},
        {"config": [[[[0]]]] * 2}, {"state_sha256": 7},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_record_without_checksum(tmp_path, changes):
    checkpoints = saved_twice(tmp_path)
    make_old(checkpoints.path(2), **changes)
    if "config" in changes:
        with pytest.raises(mbx.CheckpointError, match="was written by a run with"):
            restore(checkpoints, LIKE)
        return
    with pytest.warns(UserWarning, match="step-000000002 is damaged"):
        assert restore(checkpoints, LIKE)[1] == 1
    assert checkpoints.scores == {1: 1.0}
    checkpoints.save(3, LIKE, score=0.5)
    assert checkpoints.best == 3


@pytest.mark.parametrize("content", ["[]", "7", "null", "{}", "[" * 3000, '{"a":' * 200 + "1", ""])
def test_record_that_is_no_record(tmp_path, content):
    checkpoints = saved_twice(tmp_path)
    (checkpoints.path(2) / "checkpoint.json").write_text(content)
    with pytest.warns(UserWarning, match="step-000000002 is damaged"):
        assert restore(checkpoints, LIKE)[1] == 1


@pytest.mark.parametrize("name", ["", "checkpoint.json", "state.safetensors"])
@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "loop"])
def test_files_and_folders_in_the_place_of_others(tmp_path, name, kind):
    checkpoints = saved_twice(tmp_path)
    path = checkpoints.path(2) / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.warns(UserWarning, match="step-000000002 is damaged"):
        assert restore(checkpoints, LIKE)[1] == 1
    assert checkpoints.steps == [1]


def test_damaged_checkpoints_keep_their_names_if_none_is_left(tmp_path):
    """Otherwise the next start would begin a new run, and remove the metrics."""
    checkpoints = saved_twice(tmp_path)
    for step in (1, 2):
        (checkpoints.path(step) / "checkpoint.json").unlink()
    for _ in range(2):
        with pytest.raises(mbx.CheckpointError, match=r"All 2 .* damaged \(.*step-000000002"):
            restore(checkpoints, LIKE)
    assert names(tmp_path) == ["step-000000001", "step-000000002"]
    with pytest.raises(mbx.CheckpointError, match=r"step-000000001.checkpoint.json"):
        restore(checkpoints, LIKE, step=1)


def test_names_that_are_no_steps_are_ignored(tmp_path):
    checkpoints = saved_twice(tmp_path)
    for name in ("step-0000000003", "step-00000000٤", "step-3", "damaged-step-000000004-00"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps == [1, 2]
    assert restore(checkpoints, LIKE)[1] == 2


def test_unreadable_checkpoint_is_not_called_damaged(tmp_path, monkeypatch):
    """Too many open files, for example, say nothing about the checkpoint."""
    checkpoints = saved_twice(tmp_path)

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("mamba_eqx.training._checkpoints.open_safetensors", fail)
    with pytest.raises(OSError, match="Too many open files"):
        restore(checkpoints, LIKE)
    assert checkpoints.steps == [1, 2]


def test_config_that_no_record_holds_is_refused(tmp_path):
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    for config in ({"text": "x" * 2**23}, {"deep": deep}):
        with pytest.raises(ValueError, match="`config` must have at most"):
            Checkpoints(tmp_path, config=config)
    # The encoding of infinity in configs of models is an entry like any other.
    config = {"limit": {"__float__": "Infinity"}}
    Checkpoints(tmp_path, config=config).save(1, LIKE)
    assert restore(Checkpoints(tmp_path, config=config), LIKE)[1] == 1
    for score in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`score` must be finite"):
            Checkpoints(tmp_path).save(2, LIKE, score=score)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
def test_mutated_checkpoints(tmp_path, seed):
    """Whatever happens to the newest one, the restored state is one that was saved."""
    rng = np.random.default_rng(seed)
    for i in range(25 if seed else 5):
        folder = tmp_path / str(i)
        checkpoints = saved_twice(folder, {"lr": 0.1, "layers": [1, {"width": 2}]})
        for _ in range(rng.integers(1, 3)):
            mutate(checkpoints.path(2), rng)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            got, step = restore(checkpoints, LIKE)
        assert got["x"].tolist() == [float(step)] * 4
        assert jr.key_data(got["key"]).tolist() == jr.key_data(jr.key(step)).tolist()
        # A mutant of step 2 is restored only if its files have the content that they had.
        assert [str(w.message) for w in warned if "is damaged" not in str(w.message)] == []
        assert len(warned) == (step == 1)
        checkpoints.save(3, LIKE, score=3.0)
        assert restore(checkpoints, LIKE)[1] == 3


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
def test_mutated_checkpoints_without_checksums(tmp_path, seed):
    """A structure that does not fit is a `CheckpointError`."""
    rng = np.random.default_rng(seed)
    for i in range(25 if seed else 5):
        checkpoints = saved_twice(tmp_path / str(i), {"lr": 0.1, "layers": [1, {"width": 2}]})
        make_old(checkpoints.path(2))
        mutate(checkpoints.path(2), rng)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                _, step = restore(checkpoints, LIKE)
            except mbx.CheckpointError:
                pass
            else:
                assert len(warned) == (step == 1)
