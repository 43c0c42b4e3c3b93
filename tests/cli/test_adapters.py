"""`mamba-eqx convert` with a LoRA, and folders that are checked before anything is loaded."""

import jax
import jax.numpy as jnp
import pytest

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, load_lora, save_lora
from tests.support.checkpoints import assert_same
from tests.support.commands import call


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with a model and a LoRA, and what they are."""
    folder = tmp_path_factory.mktemp("tuned")
    block = mbx.BlockConfig(mbx.Mamba1Config(32, d_state=2))
    model = mbx.LanguageModelConfig(256, (block,)).build(key=jax.random.key(1))
    lora = LoRA.init(model, rank=2, targets=["in_proj", "out_proj"], key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.5, lora)
    mbx.save_pretrained(model, folder / "model")
    save_lora(lora, model, folder / "lora")
    return folder, model, lora


def test_convert_merges_a_lora(tuned, tmp_path):
    folder, model, lora = tuned
    out = tmp_path / "out"
    options = ["--layout", "state-spaces", "--adapter", folder / "lora"]
    assert call("convert", folder / "model", out, *options) == 0
    assert_same(mbx.from_pretrained(out), lora.merge(model))
    # Quantised after the change, because integers cannot be changed.
    assert call("convert", folder / "model", out, *options, "--bits", 8, "--overwrite") == 0
    assert_same(mbx.from_pretrained(out), mbx.quantize(lora.merge(model), bits=8))


def test_convert_keeps_a_lora_under_the_names_of_the_new_layout(tuned, tmp_path, capsys):
    folder, model, lora = tuned
    out, kept = tmp_path / "out", tmp_path / "kept"
    options = ["--layout", "state-spaces", "--adapter", folder / "lora", "--keep-adapter", kept]
    assert call("convert", folder / "model", out, *options) == 0
    assert f"wrote {kept} (the LoRA)" in capsys.readouterr().out
    assert_same(mbx.from_pretrained(out), model)
    assert_same(load_lora(kept, model, layout="state-spaces").pairs, lora.pairs)
    assert str(out) in (kept / "adapter_config.json").read_text()


LOADERS = ["mamba_eqx._cli._convert.open_source", "mamba_eqx._cli._opened.open_source"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "./no", "out"], "SOURCE must name a folder or a repository on the Hub, but"),
        (["convert", "model", "file"], "DEST must be a folder, but file is a file."),
        (
            ["convert", "model", "out", "--adapter", "no"],
            "--adapter must name the folder of a LoRA",
        ),
        (
            ["convert", "model", "out", "--keep-adapter", "x"],
            "--keep-adapter needs a LoRA to keep.",
        ),
        (
            ["convert", "model", "out", "--adapter", "lora", "--keep-adapter", "model"],
            "--keep-adapter must name a new folder, but model is not empty.",
        ),
        (
            ["convert", "model", "out", "--adapter", "lora", "--keep-adapter", "out"],
            "--keep-adapter must name a folder outside of DEST, but out is in out.",
        ),
        (
            ["convert", "model", "out", "--adapter", "lora", "--keep-adapter", "x", "--bits", "8"],
            "--keep-adapter and --bits cannot be used together",
        ),
        (["generate", "x", "--model", "./no"], "--model must name a folder or a repository on the"),
        (
            ["score", "x", "--tokenizer", "/no/such"],
            "--tokenizer must name a folder or a repository",
        ),
        (
            ["generate", "x", "--adapter", "no"],
            "--adapter must name the folder of a LoRA, but no is",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_paths_are_checked_before_anything_is_opened(args, message, tuned, monkeypatch, capsys):
    folder = tuned[0]
    (folder / "file").write_text("x")
    monkeypatch.chdir(folder)
    for loader in LOADERS:
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("The model was opened."))
    assert call(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "out").exists()
    assert not (folder / "x").exists()


def test_dtype_of_the_model_is_kept(tuned, tmp_path):
    folder, model, lora = tuned
    half = mbx.cast(model, jnp.bfloat16)
    mbx.save_pretrained(half, tmp_path / "half")
    assert call("convert", tmp_path / "half", tmp_path / "out", "--adapter", folder / "lora") == 0
    assert_same(mbx.from_pretrained(tmp_path / "out"), lora.merge(half))
