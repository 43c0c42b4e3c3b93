"""`examples/evaluate.py`: the harness finds in our model what it finds in transformers' own."""

import importlib
from typing import Any

import pytest


for package in ("lm_eval", "accelerate", "tokenizers", "torch", "transformers"):
    pytest.importorskip(package, reason=f"needs {package}: the extras `eval` and `parity`")

import mamba_eqx as mbx  # noqa: E402
from tests.support.commands import byte_model  # noqa: E402
from tests.support.examples import load  # noqa: E402
from tests.support.tokenizers import CONFIG, FILES  # noqa: E402


pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.slow
def test_the_numbers_are_those_of_transformers(tmp_path, monkeypatch, as_users_run):
    import tokenizers
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    HFLM = importlib.import_module("lm_eval.models.huggingface").HFLM
    module = load("evaluate", monkeypatch)
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG)
    model = byte_model(tokenizer.vocab_size)
    mbx.save_pretrained(model, tmp_path)
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(FILES["byte_level"]),
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
        ),
        batch_size=1,
        max_length=4096,
    )
    ours = load("harness_model", monkeypatch).HarnessModel(model, tokenizer, batch=3)
    found, want = (module.evaluate(lm, module.local_tasks(1)) for lm in (ours, theirs))
    assert found.keys() == {"next_line", "next_speaker", "the_play"}
    for task, metrics in want.items():
        assert found[task] == pytest.approx(metrics, rel=1e-5), task

    # Not only what tasks make of them.
    class Request:
        def __init__(self, *args: Any):
            self.args = args

    pairs = [Request("", "To be"), Request("To be,", " or not"), Request("x", "y" * 40)]
    for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == other[1]
    until = [Request(text, {"until": ["a", "zq"], "max_gen_toks": 12}) for text in ("To", "be, or")]
    assert ours.generate_until(until) == theirs.generate_until(until)
    # Each request has its own options.
    asked = [
        ("To", {"until": ["a"], "max_gen_toks": 12}),
        ("be", {"until": "zq", "max_gen_toks": 5}),
    ]
    asked.append(("or", {"max_gen_toks": 9}))
    alone = [ours.generate_until([Request(*one)])[0] for one in asked]
    assert ours.generate_until([Request(*one) for one in asked]) == alone
    assert len({len(text) for text in alone}) > 1
