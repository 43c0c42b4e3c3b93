"""No line of the metrics is thrown away in silence, and the curves share panels by quantity."""

import json
import os
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from mamba_eqx import training
from tests.support.runs import checkpoints, mutate


def run(folder, steps, **options):
    """Counts the steps, whose metric is their number."""
    options = {"checkpoint_every": 10, "progress": False} | options
    step = lambda state, x: (state + 1, {"x": state + 1})
    return training.fit(step, jnp.zeros(()), range(1000), steps=steps, folder=folder, **options)


def logged(folder):
    steps, values = training.read_metrics(folder)["x"]
    assert steps.tolist() == values.tolist()
    return steps.tolist()


def asides(folder):
    return sorted(folder.glob("damaged-*"))


def test_damaged_byte_loses_one_line_and_the_file_is_kept(tmp_path):
    run(tmp_path, 50)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2][1:]
    damaged = b"".join(lines)
    file.write_bytes(damaged)
    with pytest.warns(UserWarning, match="has 1 damaged line, which is left out"):
        assert logged(tmp_path) == [1, 2, *range(4, 51)]
    with pytest.warns(UserWarning, match=r"metrics.jsonl has 1 damaged line. It was copied to"):
        run(tmp_path, 60)
    assert logged(tmp_path) == [1, 2, *range(4, 61)]
    assert [path.read_bytes() for path in asides(tmp_path)] == [damaged]
    run(tmp_path, 60)  # without a warning


@pytest.mark.parametrize(
    "line",
    [b"17", b"{}", b"[" * 3000, b'{"step": "3"}', b'{"step": 3, "x": [1]}', b"\x00" * 50, b"",
     b'{"step": 3, "x": ' + b"1" * 400 + b"}", b'{"step": -1}', b'{"step": 1e999}',
     b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 3, "x": NaN}', b"\xfe\xff"],
    ids=lambda line: line[:20].decode("latin-1"),
)  # fmt: skip
def test_lines_that_are_no_metrics(tmp_path, line):
    run(tmp_path, 5)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with pytest.warns(UserWarning, match="1 damaged line[., ]"):
        run(tmp_path, 5)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_metrics_that_are_no_file_are_renamed(tmp_path, kind):
    run(tmp_path, 5)
    file = tmp_path / "metrics.jsonl"
    file.unlink()
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    with pytest.raises(OSError, match="not a regular file"):
        training.read_metrics(tmp_path)
    with pytest.warns(UserWarning, match="is not a file. It was renamed to damaged-"):
        run(tmp_path, 7)
    assert logged(tmp_path) == [6, 7]


def test_lost_checkpoints_do_not_lose_the_metrics(tmp_path):
    """A killed run repeats `checkpoint_every` steps at most; more are kept aside."""
    run(tmp_path, 35)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    newest = checkpoints(tmp_path)[-1]
    newest.rename(newest.with_name("elsewhere"))
    run(tmp_path, 35)  # repeats five steps
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    for path in checkpoints(tmp_path):
        path.rename(path.with_name("elsewhere" + path.name))
    with pytest.warns(UserWarning, match="has 35 steps more than the newest checkpoint"):
        run(tmp_path, 3)
    assert [path.read_bytes() for path in asides(tmp_path)] == [whole]
    assert logged(tmp_path) == [1, 2, 3]


def test_incomplete_line_of_a_finished_step_is_damage(tmp_path):
    run(tmp_path, 5)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="has 1 damaged line. It was"):
        run(tmp_path, 5)
    assert logged(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))]
)
def test_mutated_metrics(tmp_path, seed):
    """Every line that a mutation left intact is still there."""
    rng = np.random.default_rng(seed)
    for i in range(25 if seed else 5):
        folder = tmp_path / str(i)
        run(folder, 12)
        file = folder / "metrics.jsonl"
        before = file.read_bytes().splitlines()
        mutate(file, rng)
        after = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(folder, 12)
            training.read_metrics(folder) if file.exists() else None
        found = file.read_bytes().splitlines() if file.exists() else []
        assert [line for line in before if line in after and line not in found] == []


def test_metric_named_step_raises(tmp_path):
    with pytest.raises(ValueError, match="must not be named step"):
        training.fit(
            lambda state, x: (state, {"step": 1.0}), jnp.zeros(()), [0],
            steps=1, folder=tmp_path, progress=False,
        )  # fmt: skip


def test_evaluations_are_shown(tmp_path, capfd):
    run(tmp_path, 4, progress=True, evaluate=lambda _: {"held_out_x": 0.125}, evaluate_every=2)
    err = capfd.readouterr().err
    assert "step 2: held_out_x=0.125" in err
    assert "step 4: held_out_x=0.125" in err


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """Returns the axes of a plot of lines of metrics."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def plot(lines):
        figures = []
        save = Figure.savefig

        def savefig(self, *args, **options):
            figures.append(self)
            return save(self, *args, **options)

        monkeypatch.setattr(Figure, "savefig", savefig)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        assert training.plot_metrics(tmp_path).read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes

    return plot


@pytest.mark.slow
def test_curves_of_a_training_run(panels):
    """The losses share a panel, and what does not change has none."""
    lines = [
        {"step": i, "loss": 8 / i, "gradient_norm": 1e3 / i**2, "learning_rate": 1e-3 / i,
         "weight": 64 + i, "skipped": 0}
        for i in range(1, 501)
    ]  # fmt: skip
    lines += [{"step": 250, "held_out_loss": 1.5}, {"step": 500, "held_out_loss": None}]
    loss, norm, rate = panels(lines)
    assert [panel.get_ylabel() for panel in (loss, norm, rate)] == [
        "loss", "gradient norm", "learning rate"
    ]  # fmt: skip
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "held out"]
    assert rate.get_xlabel() == "step"
    assert norm.get_yscale() == "log"
    mean = loss.lines[1]
    assert len(mean.get_xdata()) == 100
    np.testing.assert_allclose(mean.get_ydata()[-1], np.mean(8 / np.arange(496, 501)), rtol=1e-6)


@pytest.mark.slow
def test_plots_of_few_points(panels, tmp_path, monkeypatch):
    (panel,) = panels([{"step": 1, "x": 1}, {"step": 2, "x": 1}])
    assert panel.get_ylabel() == "x"
    (panel,) = panels([{"step": 1, "x": None}])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="There are no metrics to plot in"):
        training.plot_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mamba_eqx\[plot\]'"):
        training.plot_metrics(tmp_path)
