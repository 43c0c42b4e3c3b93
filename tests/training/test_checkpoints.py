"""Checkpoints are restored bit for bit or refused with a reason; failures lose none."""

import errno
import json
import resource
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from mamba_eqx.training import Checkpoints


class Net(eqx.Module):
    """A model with leaves that are not arrays."""

    linear: eqx.nn.Linear
    activation: eqx.nn.Lambda
    dropout: eqx.nn.Dropout

    def __init__(self, width, key, p=0.1):
        self.linear = eqx.nn.Linear(2, width, key=key)
        self.activation = eqx.nn.Lambda(jax.nn.silu)
        self.dropout = eqx.nn.Dropout(p)


def make(seed=0, width=3, p=0.1, impl=None):
    key = jr.key(seed, impl=impl)
    net = Net(width, key, p)
    arrays = eqx.filter(net, eqx.is_array)
    return {
        "model": net,
        "optimiser": optax.adamw(0.1).init(arrays),
        "carry": (jnp.full((2, 3), seed, jnp.bfloat16), jnp.array([True, False])),
        "host": np.arange(3, dtype=">i8") + seed,
        "scalar": np.float32(seed),
        "keys": jr.split(key, 2),
        "nothing": None,
    }


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if eqx.is_array(a) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jr.key_data(a), jr.key_data(b)
        assert type(a) is type(b)
        assert eqx.tree_equal(a, b)


def restore(checkpoints, like: Any, step=None) -> Any:
    found = checkpoints.restore(like, step=step)
    assert found is not None
    return found


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_restores_state_bit_for_bit(tmp_path, impl):
    checkpoints = Checkpoints(tmp_path / "a" / "b", config={"lr": 0.1, "layers": (1, 2)})
    assert checkpoints.restore(make(impl=impl)) is None
    state = make(7, impl=impl)
    checkpoints.save(12, state)
    got, step = restore(
        Checkpoints(tmp_path / "a/b", config={"lr": 0.1, "layers": [1, 2]}), make(impl=impl)
    )
    assert step == 12
    assert_same(got, state)
    assert got["carry"][0].dtype == ml_dtypes.bfloat16
    got["host"] += 1  # The array is writable: it is not the file's memory.
    # `like` may be a skeleton, and restored arrays do not depend on the file.
    arrays = {name: state[name] for name in ("carry", "keys", "scalar")}
    checkpoints.save(13, arrays)
    skeleton = jax.eval_shape(lambda: arrays)
    got, _ = restore(checkpoints, skeleton)
    (checkpoints.path(13) / "state.safetensors").write_bytes(bytes(1000))
    assert_same(got, {**arrays, "scalar": jnp.float32(7)})
    record = json.loads((checkpoints.path(12) / "checkpoint.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["config"] == {"lr": 0.1, "layers": [1, 2]}


def test_restores_arrays_to_their_devices(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jnp.arange(3))
    placed = jax.device_put(jnp.zeros(3, jnp.int32), jax.devices()[0])
    for like in (placed, jnp.zeros(3, jnp.int32)):
        got, _ = restore(checkpoints, like)
        assert got.tolist() == [0, 1, 2]
        assert got.committed == like.committed


def test_keeps_newest_and_best_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.best is None
    for step, score in [(10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 1.0)]:
        checkpoints.save(step, jnp.full(2, step), score=score)
    assert checkpoints.steps == [20, 40, 50]
    assert checkpoints.best == 20
    assert restore(checkpoints, jnp.zeros(2, jnp.int32), step=checkpoints.best)[0][0] == 20
    checkpoints.save(60, jnp.full(2, 60), score=0.5)
    assert checkpoints.steps == [50, 60]
    assert names(tmp_path) == ["step-000000050", "step-000000060"]
    # Saving a step again replaces its checkpoint.
    checkpoints.save(60, jnp.full(2, 61))
    got, step = restore(checkpoints, jnp.zeros(2, jnp.int32))
    assert (got[0], step) == (61, 60)
    assert names(tmp_path) == ["step-000000050", "step-000000060"]


def test_restore_removes_leftovers_of_killed_process(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jnp.ones(2))
    leftover = tmp_path / ".step-000000002.0123abcd.tmp"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.steps == [1]
    assert restore(checkpoints, jnp.zeros(2))[1] == 1
    assert names(tmp_path) == ["notes.txt", "step-000000001"]


@pytest.mark.parametrize("damage", ["cut", "no state", "no record", "bad record", "empty record"])
def test_damaged_checkpoint_is_renamed(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, jnp.full(4, 1.0))
    (tmp_path / "step-000000001").rename(tmp_path / "kept")
    checkpoints.save(2, jnp.full(4, 2.0))
    (tmp_path / "kept").rename(tmp_path / "step-000000001")
    state, record = (
        tmp_path / "step-000000002" / n for n in ("state.safetensors", "checkpoint.json")
    )
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-3])
    elif damage == "no state":
        state.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{}" if damage == "empty record" else record.read_text()[:-9])
    with pytest.warns(UserWarning, match="step-000000002 is damaged .* the checkpoint before it"):
        got, step = restore(checkpoints, jnp.zeros(4))
    assert (float(got[0]), step) == (1.0, 1)
    # A damaged checkpoint does not count towards `keep`, so the complete one is kept.
    assert checkpoints.steps == [1]
    checkpoints.save(2, jnp.full(4, 2.5))
    assert restore(checkpoints, jnp.zeros(4))[0][0] == 2.5
    (checkpoints.path(2) / "state.safetensors").write_bytes(b"x")
    with pytest.raises(mbx.CheckpointError, match=r"All 1 checkpoints .* are damaged"):
        restore(checkpoints, jnp.zeros(4))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    config = {"model": {"width": 3, "mixers": ["a"]}, "lr": 0.1}
    checkpoints = Checkpoints(tmp_path, config=config)
    checkpoints.save(5, make())
    wide, narrow = make(width=4), make()
    other = {**make(), "carry": ()}
    more = {**make(), "extra": jnp.ones(2)}
    half = {**make(), "carry": (jnp.zeros((2, 3), jnp.float16), narrow["carry"][1])}
    for message, like in [
        (
            r"model.linear.weight is float32 of shape \(3, 2\) in .*step-000000005, but float32 of "
            r"shape \(4, 2\) in this state",
            wide,
        ),
        (r"missing are none, unexpected are carry.0, carry.1", other),
        (r"missing are extra, unexpected are none", more),
        (r"carry.0 is bfloat16 of shape .* in .*, but float16 of", half),
        (r"model.dropout.p is 0.1 in .*, but 0.2 in this state", make(p=0.2)),
        (r"keys is a PRNG key in only one", {**make(), "keys": jnp.zeros((2, 2), jnp.uint32)}),
        (r"keys is a key<fry> in .*, but a key<rbg> in this state", make(impl="rbg")),
    ]:
        with pytest.raises(mbx.CheckpointError, match=message):
            restore(checkpoints, like)
    for message, changed in {
        r"with lr=0.1, but this run has lr=0.2": config | {"lr": 0.2},
        r"with model.width=3, but this run has model.width=5": config
        | {"model": {"width": 5, "mixers": ["a"]}},
        r"with model.mixers=\['a'\], but this run has model.mixers=\['b'\]": config
        | {"model": {"width": 3, "mixers": ["b"]}},
        r"with seed=None, but this run has seed=1": config | {"seed": 1},
        r"with lr=0.1, but this run has lr=None": {"model": config["model"]},
    }.items():
        with pytest.raises(mbx.CheckpointError, match=message):
            Checkpoints(tmp_path, config=changed).restore(make())
    # The checkpoint is untouched.
    assert restore(checkpoints, make())[1] == 5


def test_full_disk_keeps_earlier_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, jnp.full(10, 1.0))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(training.CheckpointWriteError) as caught:
            checkpoints.save(2, jnp.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    message = str(caught.value)
    assert "Could not write the checkpoint of step 2; the newest complete checkpoint is" in message
    assert message.count("step-000000001") == 1
    assert names(tmp_path) == ["step-000000001"]
    assert restore(checkpoints, jnp.zeros(10))[1] == 1


@pytest.mark.parametrize(
    "function", ["training._checkpoints.write_safetensors", "_atomic._sync", "_atomic.os.rename"]
)
def test_failure_of_each_write_raises(tmp_path, monkeypatch, function):
    checkpoints = Checkpoints(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"mamba_eqx.{function}", full)
        with pytest.raises(
            training.CheckpointWriteError, match="the newest complete checkpoint is none"
        ) as caught:
            checkpoints.save(1, jnp.zeros(3))
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
    assert checkpoints.restore(jnp.zeros(3)) is None


def test_removed_folder_is_created_again(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a")
    (tmp_path / "a").rmdir()
    assert checkpoints.steps == []
    checkpoints.save(1, jnp.zeros(3))
    assert checkpoints.steps == [1]


def test_invalid_arguments_raise(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(training.CheckpointWriteError, match=r"Could not create .*file"):
        Checkpoints(tmp_path / "file" / "a")
    with pytest.raises(ValueError, match="`keep` must be at least 1, but got 0"):
        Checkpoints(tmp_path, keep=0)
    for config in ({"a": jnp.zeros(2)}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="`config` must be JSON, but got"):
            Checkpoints(tmp_path, config=config)
    with pytest.raises(ValueError, match="but two have the same"):
        Checkpoints(tmp_path).save(1, {"a.b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}})
    for step in (-1, True):
        with pytest.raises(ValueError, match="`step` must be an integer of at least 0"):
            Checkpoints(tmp_path).save(step, jnp.zeros(2))
    with pytest.raises(FileNotFoundError):
        Checkpoints(tmp_path).restore(jnp.zeros(2), step=3)
