"""The option `--bits`, and quantised checkpoints."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import mamba_eqx as mbx
from tests.support.commands import call


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def model() -> mbx.LanguageModel:
    block = mbx.BlockConfig(mbx.Mamba1Config(32, d_state=2))
    return mbx.LanguageModelConfig(256, (block,)).build(key=jr.key(0))


@pytest.fixture
def run(model: mbx.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mbx.save_pretrained(model, tmp_path / "a", tokenizer=mbx.ByteTokenizer())

    def run_command(*args: Any) -> str:
        code = call(*args)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run_command


def test_convert_and_inspect(model: mbx.LanguageModel, run: Any, tmp_path: Path):
    out = run("convert", tmp_path / "a", tmp_path / "b", "--bits", 4)
    untied = sum(leaf.size for leaf in jax.tree.leaves(model)) + 256 * 32
    assert f"{untied:,} parameters" in out
    want = mbx.quantize(model, bits=4)
    assert eqx.tree_equal(mbx.from_pretrained(tmp_path / "b"), want)
    found = json.loads(run("inspect", tmp_path / "b", "--json"))
    assert found["quantization"] == {"bits": 4, "group": 64}
    assert found["parameters"]["total"] == untied
    assert found["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(want))
    assert "4 bits, in groups of 64" in run("inspect", tmp_path / "b")
    assert json.loads(run("inspect", tmp_path / "a", "--json"))["quantization"] is None
    # A quantised checkpoint keeps its bits in another layout.
    run("convert", tmp_path / "b", tmp_path / "c", "--layout", "state-spaces")
    assert eqx.tree_equal(mbx.from_pretrained(tmp_path / "c"), want)


def test_generate_and_score(model: mbx.LanguageModel, run: Any, tmp_path: Path):
    small, tokenizer = mbx.quantize(model, bits=8), mbx.ByteTokenizer()
    options = ("--model", tmp_path / "a", "--bits", "8")
    out = run("generate", "ab", *options, "--max-new-tokens", 5, "--temperature", 0)
    tokens = mbx.generate(small, tokenizer.encode("ab"), 5).tokens
    assert out == "ab" + tokenizer.decode(tokens.tolist()) + "\n"
    scored = json.loads(run("score", "some text", *options, "--json"))
    want = mbx.score(small, jnp.asarray(tokenizer.encode("some text"))).log_probs.sum()
    assert scored["log_prob"] == pytest.approx(float(want), rel=1e-4)
