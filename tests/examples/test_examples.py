"""The examples run with small sizes, and their claims of equality hold."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.checkpoints import HYBRIDS, MAMBA3
from tests.support.examples import load


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run", "promoting")


@pytest.fixture
def promoting():
    with jax.numpy_dtype_promotion("standard"):  # as users run
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example and returns its output."""

    def run_example(name: str, *args: str) -> str:
        module = load(name, monkeypatch)
        monkeypatch.setattr(sys, "argv", [name, *args])
        module.main()
        return capsys.readouterr().out

    return run_example


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.slow
def test_classify_series(run):
    out = run(
        "classify_series", "--steps", "2", "--batch", "2", "--d-model", "8", "--longest", "32"
    )
    assert 0 <= number(r"accuracy on 256 new series: ([\d.]+)%", out) <= 100
    assert number(r"logits differ by at most (\S+)", out) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "head"])
def test_classify(run, tmp_path, method):
    out = run("classify", "--smoke", "--method", method, "--out", str(tmp_path))
    assert 0 <= number(r"after 16 bytes of 3 held-out pieces, ([\d.]+)% right", out) <= 100
    model, labels = mbx.load_classifier(tmp_path)
    assert labels == ("play", "documentation", "code")
    base = mbx.from_pretrained(mbx.SHIPPED, dtype=jnp.float32)
    same = [
        bool(jnp.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(model.backbone), jax.tree.leaves(base), strict=True)
    ]
    # A LoRA changes the linear maps, which neither norms nor the embedding are.
    assert all(same) if method == "head" else any(same) and not all(same)


def test_series_are_labelled_by_the_order_of_patterns(monkeypatch):
    module = load("classify_series", monkeypatch)
    rng = np.random.default_rng(0)
    series, lengths, labels = module.make_series(rng, 50, 64)
    for row, length, label in zip(series[..., 0], lengths, labels, strict=True):
        assert np.all(row[length:] == 100)
        assert np.abs(row[:length]).max() < 10
        # Each pattern correlates best with the series where it was inserted.
        windows = np.lib.stride_tricks.sliding_window_view(row[:length], module.WIDTH)
        unit = module.PATTERNS / np.linalg.norm(module.PATTERNS, axis=1, keepdims=True)
        norms = np.linalg.norm(windows, axis=1, keepdims=True)
        places = np.argmax(windows @ unit.T * (norms > 1), axis=0)
        if len(set(places)) == 3 and np.diff(np.sort(places)).min() >= module.WIDTH:
            assert tuple(np.argsort(places)) == module.ORDERS[label]


@pytest.mark.slow
def test_encoder(run):
    out = run("encoder", "--steps", "2", "--batch", "2", "--d-model", "8", "--longest", "16")
    sizes = [found.replace(",", "") for found in re.findall(r"([\d,]+) parameters", out)]
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]  # The compared models are equally large.


def test_letters_are_tagged_first_and_last(monkeypatch):
    module = load("encoder", monkeypatch)
    letters, lengths, tags = module.make_sequences(np.random.default_rng(0), 20, 24)
    for row, length, found in zip(letters, lengths, tags, strict=True):
        text = row[:length].tolist()
        for i, letter in enumerate(text):
            tag = 1 * (letter not in text[:i]) + 2 * (letter not in text[i + 1 :])
            assert found[i] == tag


@pytest.mark.slow
def test_hybrid(run):
    out = run(
        "hybrid", "--steps", "2", "--batch", "2", "--d-model", "8", "--keys", "6", "--pairs", "3"
    )
    assert len(re.findall(r"([\d.]+)% recalled", out)) == 3


def test_asked_keys_were_given_before(monkeypatch):
    module = load("hybrid", monkeypatch)
    tokens, targets, asked = module.make_recall(np.random.default_rng(0), 20, 8, 5)
    for row, answers in zip(tokens, targets, strict=True):
        told = dict(row[:10].reshape(5, 2).tolist())
        assert len(told) == 5
        assert sorted(row[asked]) == sorted(told)
        assert [told[key] for key in row[asked]] == answers[asked].tolist()
        assert min(told.values()) >= 8 > max(told)


@pytest.mark.slow
def test_policy(run):
    out = run(
        "policy", "--updates", "2", "--agents", "3", "--steps", "30", "--longest", "5",
        "--d-model", "8",
    )  # fmt: skip
    assert number(r"log-probabilities differ by at most (\S+)", out) < 1e-4


def test_corridor_rewards(monkeypatch):
    """Turning to the side of the colour is rewarded, and the next corridor starts at once."""
    module = load("policy", monkeypatch)
    env = module.begin(jax.random.key(0), 5)
    seen, keys = [], jax.random.split(jax.random.key(1), 6)
    for key in keys[: int(env.length)]:
        seen.append(int(jnp.argmax(module.observe(env))))
        env, reward, done = module.act(env, 1 - env.colour, key, 5)
        assert not done
        assert reward == 0
    assert seen == [int(env.colour)] + [2] * (int(env.length) - 1)
    assert int(jnp.argmax(module.observe(env))) == 3
    for action, want in [(env.colour, 1), (1 - env.colour, -1)]:
        after, reward, done = module.act(env, action, keys[5], 5)
        assert done
        assert (reward, after.at) == (want, 0)
    rewards = jnp.asarray([0.0, 0.0, 1.0, 0.0, -1.0, 0.0])
    want = [0.25, 0.5, 1.0, -0.5, -1.0, 0.0]
    assert module.returns_of(rewards).tolist() == want


def test_help_of_the_evaluation_needs_no_other_package(run, monkeypatch, capsys):
    # Other tests may have imported parts of these packages.
    packages = ("lm_eval", "datasets")
    for name in (*packages, *[name for name in sys.modules if name.startswith(packages)]):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "harness_model", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", "--help")
    assert stopped.value.code == 0
    assert "--tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("evaluate")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("This example requires lm_eval: pip install")


@pytest.mark.parametrize("name", ["classify_series", "encoder", "hybrid", "policy"])
def test_options_that_are_too_small_are_refused(run, capsys, name):
    for option, value, message in [
        ("--steps", "0", "must be at least 1, but got 0"),
        ("--d-model", "-3", "must be at least 1, but got -3"),
        ("--seed", "-1", "must be at least 0, but got -1"),
        ("--lr", "nan", "must be at least 0, but got nan"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run(name, option, value)
        assert stopped.value.code == 2
        error = f"{name}: error: argument {option}: {message}"
        assert capsys.readouterr().err.splitlines()[-1] == error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "state", "freeze"])
def test_finetune(run, tmp_path, method):
    block = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
    model = mbx.LanguageModelConfig(256, (block,)).build(key=jax.random.key(0))
    mbx.save_pretrained(model, tmp_path / "base")
    (tmp_path / "text").write_bytes(b"A text of some length, again and again. " * 20)
    out = run(
        "finetune", "--method", method, "--model", str(tmp_path / "base"),
        "--text", str(tmp_path / "text"), "--out", str(tmp_path / "tuned"),
        "--steps", "20", "--batch", "2", "--length", "16", "--train", "conv1d", "A_log",
    )  # fmt: skip
    before, after = (
        number(rf"([\d.]+)(?: bits per byte)? {when}", out) for when in ("before", "after")
    )
    assert after < before
    if method == "state":
        mbx.load_state(tmp_path / "tuned" / "prefix.safetensors", model)
    if method == "freeze":
        tuned = mbx.from_pretrained(tmp_path / "tuned")
        pairs = zip(jax.tree.leaves_with_path(model), jax.tree.leaves(tuned), strict=True)
        for (path, old), new in pairs:
            trained = any(part in jax.tree_util.keystr(path) for part in ("conv1d", "A_log"))
            assert bool(jnp.array_equal(old, new)) is not trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mamba3", MAMBA3["state-spaces"]["mimo"]),
        ("hybrid", HYBRIDS["state-spaces"]["mamba2"]),
    ],
)
def test_finetune_models_of_the_official_layout(run, tmp_path, name, config):
    config = dataclasses.replace(config, vocab_size=256, padded_vocab_size=256)
    model = config.build(key=jax.random.key(0))
    mbx.save_pretrained(model, tmp_path / "base", layout="state-spaces")
    (tmp_path / "text").write_bytes(b"A text of some length, again and again. " * 5)
    run(
        "finetune", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "text"),
        "--out", str(tmp_path / "tuned"), "--steps", "1", "--batch", "1", "--length", "8",
    )  # fmt: skip
    training.load_lora(tmp_path / "tuned", model, layout="state-spaces")


def test_attention_has_no_initial_state_to_train(run, tmp_path, capsys):
    config = HYBRIDS["state-spaces"]["mamba2"]
    config = dataclasses.replace(config, vocab_size=256, padded_vocab_size=256)
    model = config.build(key=jax.random.key(0))
    mbx.save_pretrained(model, tmp_path / "base", layout="state-spaces")
    args = ("--method", "state", "--model", str(tmp_path / "base"), "--out", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stopped:
        run("finetune", *args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "finetune: error: argument --method: state does not fit the model: " in error
    assert not (tmp_path / "run").exists()


def test_models_that_no_layout_stores_are_not_finetuned(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mbx, "layouts_for", lambda _: ())
    with pytest.raises(SystemExit) as stopped:
        run("finetune", "--out", str(tmp_path / "run"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "finetune: error: argument --model: no layout can store " in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere"], "argument --model: "),
        (["--text", "nowhere"], "argument --text: "),
        (["--length", "10000000"], "argument --text: must have more than 100000000 bytes"),
        (["--rank", "0"], "argument --rank: must be at least 1, but got 0"),
        (["--seed", "-1"], "argument --seed: must be at least 0, but got -1"),
        (["--lr", "-1"], "argument --lr: must be a positive number, but got -1"),
        (["--lr", "nan"], "argument --lr: must be a positive number, but got nan"),
        (["--out", __file__], "argument --out: "),
        (["--method", "freeze", "--train", "nothing"], "argument --train: must name parameters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_of_finetuning_are_one_sentence(run, tmp_path, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        run("finetune", "--out", str(tmp_path / "run"), *args)
    assert stopped.value.code == 2
    assert f"finetune: error: {message}" in capsys.readouterr().err.splitlines()[-1]
