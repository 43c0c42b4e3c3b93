"""Every registered architecture works in every command and example that takes a model."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, save_lora
from tests.support.checkpoints import STORED, Stored, make
from tests.support.commands import call
from tests.support.examples import load
from tests.support.serving import ASK, ask, in_process


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_fast", "as_users_run")]

VOCABULARY = 260  # Four more than there are bytes.


def architecture(stored: Stored) -> str:
    """Returns the layout and the mixers of a model."""
    return "-".join([stored.layout, *sorted({layer.mixer.kind for layer in stored.config.layers})])


# One model for each layout and set of mixers, the last of its kind in the list.
MODELS = {architecture(stored): stored for stored in STORED}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model of bytes, and a LoRA for it."""
    stored: Stored = request.param
    padded = VOCABULARY + 3 if stored.config.padded_vocab_size > stored.config.vocab_size else None
    config = dataclasses.replace(
        stored.config, vocab_size=VOCABULARY, padded_vocab_size=padded or VOCABULARY
    )
    model = make(config)
    mbx.save_pretrained(model, tmp_path / "model", layout=stored.layout)
    mbx.save_tokenizer(mbx.ByteTokenizer(), tmp_path / "model")
    lora = LoRA.init(model, rank=2, key=jax.random.key(0))
    save_lora(lora, model, tmp_path / "lora", layout=stored.layout)
    return tmp_path / "model"


def test_commands(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(*args: object, typed: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        assert call(*args) == 0
        out, err = capsys.readouterr()
        assert "error" not in err
        return out

    model = ("--model", checkpoint)
    few = (*model, "--max-new-tokens", 5)
    found = json.loads(run("generate", "To be", *few, "--json"))
    assert found["new_tokens"] == 5
    # A new LoRA changes nothing.
    lora = ("--adapter", checkpoint.parent / "lora")
    adapted = json.loads(run("generate", "To be", *few, *lora, "--json"))
    assert adapted["text"] == found["text"]
    assert json.loads(run("score", "To be", *model, "--json"))["tokens"] == 4
    state = checkpoint.parent / "state"
    typed = f"Hi\n/save {state}\nso?\n/reset\n/load {state}\nso?\n".encode()
    answers = run("chat", *few, "--stop", "\x00", typed=typed)
    assert answers
    dest = checkpoint.parent / "converted"
    layout = json.loads(run("inspect", checkpoint, "--json"))["layout"]
    assert "parameters" in run("convert", checkpoint, dest, "--layout", layout)


def test_page(checkpoint: Path):
    pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
    model = mbx.from_pretrained(checkpoint)
    with in_process(model, mbx.load_tokenizer(checkpoint), slots=1, max_len=64) as port:
        found = json.loads(ask(port, ASK | {"max_tokens": 10}).text)
        state = json.loads(ask(port, {"id": found["id"]}, path="/state").text)
    assert state["prompt_tokens"] + state["new_tokens"] == found["usage"]["total_tokens"]
    mixers = [layer.mixer for layer in mbx.LanguageModelConfig.of(model).layers]
    # Mixers side by side have a picture each.
    count = sum(len(m.mixers) if isinstance(m, mbx.ParallelConfig) else 1 for m in mixers)
    assert len(state["layers"]) == count
    for layer in state["layers"]:
        rows, columns = layer["shape"]
        assert 0 < rows <= 16
        assert 0 < columns <= 64
        assert layer["norm"] > 0


def test_evaluation(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval: the extra `eval`")
    module = load("harness_model", monkeypatch)
    model, tokenizer = mbx.from_pretrained(checkpoint), mbx.load_tokenizer(checkpoint)
    lm = module.HarnessModel(model, tokenizer, 2)

    class Request:
        def __init__(self, *args: Any):
            self.args = args

    scored = lm.loglikelihood([Request("To", " be"), Request("", "or not")])
    assert [type(best) for _, best in scored] == [bool, bool]
    whole = lm.loglikelihood_rolling([Request("To be")])
    options = {"until": ["\0"], "max_gen_toks": 5}
    texts = lm.generate_until([Request("To", options), Request("to be", options)])
    assert len(whole) == 1
    assert len(texts) == 2
