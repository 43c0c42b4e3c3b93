"""`mamba-eqx train` makes a model that the other commands read, resumes, and refuses in words of
its options."""

import json

import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from mamba_eqx._cli._train_settings import PRESETS, Settings, config_of
from tests.support.commands import call


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")

SMALL = ["--d-model", "8", "--layers", "1", "--batch", "2", "--length", "16", "--stretch", "2",
         "--every", "3", "--no-compilation-cache"]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(32, 127)) * 20)
    return path


@pytest.mark.slow
def test_trains_resumes_and_extends(text, tmp_path, capsys):
    """More steps continue a run; another text, or other settings, do not."""
    out = tmp_path / "run"
    args = ["train", text, "--out", out, *SMALL]

    def train(*more, code=0):
        assert call(*args, *more) == code
        return "".join(capsys.readouterr())

    assert "starting a new run" in train("--steps", "4")
    assert "resuming from step 4" in (said := train("--steps", "8"))
    metrics = training.read_metrics(out)
    assert metrics["bits_per_byte"][0].tolist() == list(range(1, 9))
    assert metrics["held_out_bits_per_byte"][0].tolist() == [3, 4, 6, 8]
    # Every score is printed, and the last one is that of the record.
    for step, score in zip(*metrics["held_out_bits_per_byte"], strict=True):
        assert f"{int(step):8,}  {float(score):.3f} #" in said
    about = json.loads((out / "training.json").read_text())
    assert about["steps"] == 8
    assert f"held out: {about['held_out_bits_per_byte']:.4f} bits per byte" in said
    # The learning rate is that of the longer schedule, whose end is a hundredth of its peak.
    rates = metrics["learning_rate"][1]
    assert rates[4] > 2 * rates[3]

    model = mbx.from_pretrained(out)
    assert isinstance(mbx.load_tokenizer(out), mbx.ByteTokenizer)
    assert mbx.LanguageModelConfig.of(model) == config_of(Settings(d_model=8, layers=1, d_state=8))
    assert call("score", "To be", "--model", out) == 0
    capsys.readouterr()

    assert "was written by a run with --lr=0.003, but this run has --lr=0.5" in train(
        "--lr", "0.5", code=2
    )
    text.write_bytes(bytes(range(33, 127)) * 20)
    assert "was written by a run with TEXT='sha256 " in train(code=2)


@pytest.mark.slow
def test_named_documents_are_held_out(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(b"ONE " + b"a" * 100 + b"\0TWO " + b"b" * 60 + b"\0THREE " + b"c" * 90)
    args = ["train", path, "--out", tmp_path / "run", *SMALL, "--steps", "1"]
    assert call(*args, "--hold-out", "TWO") == 0
    assert "202 bytes to train on, 65 held out" in capsys.readouterr().out


def test_sizes_of_every_mixer_fit_any_width():
    for mixer in ("mamba1", "mamba2", "mamba3"):
        for d_model in (1, 3, 8, 100, 192):
            config_of(Settings(mixer=mixer, d_model=d_model, layers=1, d_state=4))


def test_preset_is_that_of_the_bundled_model():
    """Its record names every setting."""
    about = json.loads((mbx.SHIPPED / "training.json").read_text())
    bundled = PRESETS["bundled"]
    for name in ("mixer", "d_model", "layers", "steps", "batch", "length", "stretch", "lr"):
        assert about[name] == getattr(bundled, name)
    shipped = mbx.LanguageModelConfig.of(mbx.from_pretrained(mbx.SHIPPED))
    assert config_of(Settings(d_model=192, layers=6, d_state=8)) == shipped


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no file nowhere."),
        (["."], ". is a folder. Give a file in it."),
        ([__file__, "--length", "1000000"], "bytes with --length 1000000 and --stretch 2, but has"),
        ([__file__, "--steps", "0"], "--steps must be an integer within 1.."),
        ([__file__, "--lr", "nan"], "--lr must be a number above 0 and at most 1, but got nan."),
        ([__file__, "--mixer", "mamba4"], "--mixer must be one of mamba1, mamba2, mamba3"),
        ([__file__, "--prompt", ""], "--prompt must not be empty."),
        ([__file__, "--hold-out", "x"], "--hold-out must be opening tokens of documents, but none"),
        ([__file__, "--out", __file__], "--out must be a folder, but "),
        ([__file__, "--d-modle", "8"], "Did you mean --d-model?"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, args, message):
    text, *options = args
    assert call("train", text, "--out", tmp_path / "run", *SMALL, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()
