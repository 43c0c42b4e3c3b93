"""`fit` resumes, evaluates, saves and loses nothing. The runs are as small as possible."""

import errno
import os
import signal
import threading
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.runs import checkpoints, content


DATA = [np.float32(i) for i in range(100)]


@jax.jit
def jitted(state, x):
    return {"sum": state["sum"] + x, "key": jr.split(state["key"])[0]}, {"x": x}


def make():
    return {"sum": jnp.float32(0), "key": jr.key(0)}


def run(folder, *, step: Any = jitted, data: Any = DATA, steps=20, **options):
    options = {"checkpoint_every": 6, "log_every": 4, "progress": False} | options
    return training.fit(step, make(), data, steps=steps, folder=folder, **options)


def steps_of(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def logged(folder, name="x"):
    return training.read_metrics(folder)[name][0].tolist()


def test_resumes_from_checkpoint(tmp_path):
    out = run(tmp_path)
    assert (out.step, out.interrupted) == (20, False)
    assert float(out.state["sum"]) == sum(range(20))
    assert steps_of(tmp_path) == [18, 20]
    steps, values = training.read_metrics(tmp_path)["x"]
    assert steps.tolist() == list(range(1, 21))
    assert values.tolist() == list(range(20))
    # A complete run makes no more steps; with more `steps` it resumes.
    again = run(tmp_path, step=fail_at(0))
    assert (again.step, float(again.state["sum"])) == (20, sum(range(20)))
    assert float(run(tmp_path, steps=33).state["sum"]) == sum(range(33))
    assert logged(tmp_path) == list(range(1, 34))
    with pytest.raises(mbx.CheckpointError, match="with seed=None, but this run has seed=2"):
        run(tmp_path, config={"seed": 2})


@pytest.fixture
def handlers():
    """Installs the default handlers, because a shell may let background jobs ignore Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_checkpoint_and_stops(tmp_path, number, handlers, capfd):
    def step(state, x):
        if x == 8:
            os.kill(os.getpid(), number)
        return jitted(state, x)

    out = run(tmp_path, step=step)
    assert (out.step, out.interrupted) == (9, True)
    assert steps_of(tmp_path) == [6, 9]
    assert logged(tmp_path) == list(range(1, 10))
    assert "Finishing this step and saving a checkpoint." in capfd.readouterr().err
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert float(run(tmp_path).state["sum"]) == sum(range(20))
    assert logged(tmp_path) == list(range(1, 21))


@pytest.mark.usefixtures("handlers")
def test_second_signal_interrupts_immediately(tmp_path):
    def step(state, x):
        if x == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return jitted(state, x)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, step=step)
    assert steps_of(tmp_path) == [6]


def test_runs_in_another_thread_without_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].step == 20


def test_evaluates_and_keeps_best_checkpoint(tmp_path):
    scores = {5: 3.0, 10: 1.0, 15: float("nan"), 20: 1.0, 22: 2.0}
    calls = []

    def evaluate(state):
        calls.append(float(state["sum"]))
        return {"score": jnp.float32(scores[len(calls) * 5 if len(calls) < 5 else 22])}

    options = {"checkpoint_every": 100, "keep": 10}
    run(tmp_path, steps=22, evaluate=evaluate, evaluate_every=5, best="score", **options)
    assert calls == [sum(range(step)) for step in scores]
    assert steps_of(tmp_path) == [5, 10, 22]
    kept = training.Checkpoints(tmp_path / "checkpoints")
    assert kept.best == 10
    steps, values = training.read_metrics(tmp_path)["score"]
    assert steps.tolist() == list(scores)
    np.testing.assert_array_equal(values, list(scores.values()))
    # Without `best`, `evaluate` is still called.
    run(tmp_path / "plain", steps=3, evaluate=lambda _: {"score": 1.0})
    assert logged(tmp_path / "plain", "score") == [3]


def test_only_checkpoints_of_finite_evaluations_have_a_score(tmp_path):
    """A checkpoint of a later step has no score, nor has one whose evaluation is not finite."""
    scores = iter([3.0, 2.0, float("nan")])
    options: dict[str, Any] = {"evaluate_every": 4, "best": "score", "keep": 10}
    run(tmp_path, steps=12, evaluate=lambda _: {"score": next(scores)}, **options)
    assert steps_of(tmp_path) == [4, 6, 8, 12]
    assert training.Checkpoints(tmp_path / "checkpoints").scores == {4: 3.0, 8: 2.0}


def fail_at(step_that_fails):
    def step(state, x):
        if x == step_that_fails:
            raise RuntimeError("broken")
        return jitted(state, x)

    return step


class Broken:
    def __getitem__(self, i):
        return DATA[i] if i != 8 else 1 / 0


def test_error_outside_step_saves_checkpoint(tmp_path):
    def evaluate(state):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path / "a", evaluate=evaluate, evaluate_every=8)
    assert steps_of(tmp_path / "a") == [6, 8]
    assert logged(tmp_path / "a") == list(range(1, 9))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "b", data=Broken())
    assert steps_of(tmp_path / "b") == [6, 8]
    # A failed step may have donated its state, so that state is not saved.
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path / "c", step=fail_at(8))
    assert steps_of(tmp_path / "c") == [6]
    assert float(run(tmp_path / "c").state["sum"]) == sum(range(20))
    assert logged(tmp_path / "c") == list(range(1, 21))


@pytest.mark.slow
def test_full_disk_warns_then_raises_with_state(tmp_path, monkeypatch):
    """The run warns while it trains, raises at the end, and resumes when there is space again."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def step(state, x):
        if x == 7:
            patch.setattr("mamba_eqx.training._checkpoints.write_safetensors", full)
            patch.setattr("os.fsync", full)
        return jitted(state, x)

    with (
        monkeypatch.context() as patch,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        with pytest.raises(training.CheckpointWriteError, match="checkpoint of step 20") as caught:
            run(tmp_path, step=step)
    messages = [str(warning.message) for warning in warned]
    assert [m for m in messages if "Could not write metrics to" in m]
    for step_lost in (12, 18):
        (message,) = [
            m for m in messages if f"Could not write the checkpoint of step {step_lost}" in m
        ]
        assert "the newest complete checkpoint is" in message
        assert "step-000000006" in message
    assert steps_of(tmp_path) == [6]
    assert caught.value.step == 20
    assert caught.value.errno == errno.ENOSPC
    assert float(caught.value.state["sum"]) == sum(range(20))
    assert logged(tmp_path) == list(range(1, 7))
    # If the disk is full only for a while, nothing is missing at the end.
    free = iter([False, True, True])
    write = mbx.training._checkpoints.write_safetensors
    monkeypatch.setattr(
        "mamba_eqx.training._checkpoints.write_safetensors",
        lambda *args: write(*args) if next(free) else full(),
    )
    with pytest.warns(UserWarning, match=r"checkpoint of step 12.*Training continues"):
        assert float(run(tmp_path).state["sum"]) == sum(range(20))
    assert logged(tmp_path) == list(range(1, 21))
    assert steps_of(tmp_path) == [18, 20]


def test_metrics_are_fetched_every_log_every_steps(tmp_path, monkeypatch):
    """In between, the device is not synchronised."""
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or get(tree))
    run(tmp_path, steps=20, checkpoint_every=100, log_every=8)
    assert fetched[:3] == [8, 8, 4]


@pytest.mark.slow
def test_train_step_resumes_bit_for_bit(tmp_path):
    """`TrainStep` donates its state before `fit` fetches the metrics of the step."""

    def loss(model, batch, carry, key):
        x, y = batch
        noise = 0.1 * jr.normal(key, x.shape)
        error = jax.vmap(model)(x + noise) - y
        return jnp.mean(error**2), training.LossAux(jnp.float32(1), carry)

    rng = np.random.default_rng(0)
    data = [tuple(rng.standard_normal((2, 4, 3)).astype(np.float32)) for _ in range(12)]
    step = training.TrainStep(optax.adam(1e-2), loss)
    new = step.init(eqx.nn.Linear(3, 3, key=jr.key(0)), key=jr.key(1))
    options: Any = {"log_every": 5, "progress": False}
    ends = []
    for name, steps in [("twice", 7), ("twice", 12), ("once", 12)]:
        copy = jax.tree.map(jnp.copy, new)
        out = training.fit(step, copy, data, steps=steps, folder=tmp_path / name, **options)
        ends.append((jr.key_data(out.state.key), eqx.tree_at(lambda s: s.key, out.state, 0)))
    assert eqx.tree_equal(*ends[1:])
    once, twice = (content(tmp_path / name)["metrics.jsonl"] for name in ("once", "twice"))
    assert once == twice
    assert logged(tmp_path / "once", "loss") == list(range(1, 13))


def test_metrics_are_truncated_when_resuming(tmp_path):
    run(tmp_path, steps=6)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for rest in (b'{"step": 7, "x": 1}\n{"step": 8, "x', b'{"st', b'{"step": 7, "x": 1}'):
        (tmp_path / "metrics.jsonl").write_bytes(whole + rest)
        training.read_metrics(tmp_path)
        run(tmp_path, steps=6)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    # Without a checkpoint the run starts from the beginning.
    for path in checkpoints(tmp_path):
        path.rename(path.with_name("elsewhere-" + path.name))
    run(tmp_path, steps=6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_second_run_in_same_folder_raises(tmp_path):
    def step(state, x):
        with pytest.raises(ValueError, match="Another process is training in"):
            run(tmp_path)
        return jitted(state, x)

    run(tmp_path, step=step, steps=1)
    run(tmp_path, steps=2)


def test_progress_bar_counts_tokens(tmp_path, capfd):
    tokens = np.zeros(100, np.uint8)
    data = training.Streams(tokens, batch=2, length=5)

    def step(state, batch):
        return state, {"loss": jnp.float32(batch.tokens.sum() + 0.25)}

    run(tmp_path, step=step, data=data, steps=20, progress=True)
    err = capfd.readouterr().err
    assert "200/200" in err
    assert "tok/s" in err
    assert "loss=0.25" in err
    run(tmp_path / "plain", progress=True)
    assert "20.0/20.0" in capfd.readouterr().err


def test_invalid_arguments_raise(tmp_path):
    for name in ("steps", "checkpoint_every", "evaluate_every", "log_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, but got 0"):
            run(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match="`best` requires `evaluate`, but got best='score'"):
        run(tmp_path, best="score")
    for message, results in {
        "`evaluate` and `step` must return .* both return x": {"x": 1.0},
        r"`best` must be .*, but got best='score' and the metrics \['y'\]": {"y": 1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(tmp_path / str(results), steps=3, evaluate=lambda _, r=results: r, best="score")
    with pytest.raises(ValueError, match=r"The metric x must be a scalar, but got .* shape \(2,\)"):
        run(tmp_path / "a", step=lambda state, x: (state, {"x": jnp.zeros(2)}))
    (tmp_path / "file").write_text("")
    with pytest.raises(training.CheckpointWriteError, match="Could not create"):
        run(tmp_path / "file")
    (tmp_path / "full" / ".lock").mkdir(parents=True)
    with pytest.raises(training.CheckpointWriteError, match=r"Could not write to .*full"):
        run(tmp_path / "full")
