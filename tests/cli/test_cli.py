"""`mamba-eqx generate`, in a separate process where signals and pipes matter."""

import dataclasses
import io
import json
import os
import re
import signal
import sys

import jax.numpy as jnp
import jax.random as jr
import pytest

import mamba_eqx as mbx
from mamba_eqx import pretrained
from mamba_eqx._cli import _streaming
from mamba_eqx.generation._loop import Cursor, Decoded
from tests.support.commands import byte_model, call, spawn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "bytes"
    pretrained.save_pretrained(byte_model(), path)
    mbx.save_tokenizer(mbx.ByteTokenizer(), path)
    return path


def test_command_prints_the_text_of_generate(checkpoint):
    with spawn(
        "generate", "-", "--model", checkpoint, "--max-new-tokens", "20", "--seed", "3"
    ) as process:
        out, err = process.communicate("Ö:".encode())
    assert process.returncode == 0, err
    tokenizer = mbx.ByteTokenizer()
    expected = mbx.generate(
        pretrained.from_pretrained(checkpoint),
        tokenizer.encode("Ö:"),
        20,
        mbx.Sampling(temperature=0.8),
        key=jr.key(3),
    )
    assert out.decode() == "Ö:" + tokenizer.decode(expected.tokens.tolist()) + "\n"
    assert "20 tokens, the first after " in err.decode()
    assert " tokens/s" in err.decode()


def test_ctrl_c_keeps_the_output(checkpoint):
    with spawn(
        "generate", "x", "--model", checkpoint, "--max-new-tokens", 2**30, "--temperature", "0"
    ) as process:
        assert process.stdout is not None
        written = os.read(process.stdout.fileno(), 1) + os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert written.startswith(b"x")
    assert out.endswith(b"\n")
    assert err == b""


@pytest.mark.slow
def test_closed_output_is_not_an_error(checkpoint):
    with spawn("generate", "x", "--model", checkpoint, "--max-new-tokens", 2**30) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pretrained.save_pretrained(byte_model(300), folder / "OTHER")
    pretrained.save_pretrained(byte_model(200), folder / "SMALL")
    mbx.save_tokenizer(mbx.ByteTokenizer(), folder / "SMALL")
    (folder / "EMPTY").mkdir()
    return folder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "The prompt is empty"),
        (["x", "--stop", ""], "--stop must not be empty"),
        ([], "Give either a PROMPT"),
        (["x", "--file", "y"], "Give either a PROMPT"),
        (["--file", "/no/such/model"], "There is no file /no/such/model"),
        (["x", "--model", "/no/such/model"], "--model must name a folder or"),
        (["x", "--model", "OTHER"], r"has no tokenizer\.json"),
        (["x", "--model", "SMALL"], "token ids up to 255, but .* a vocabulary of 200. Use --token"),
        (["x", "--model", "EMPTY"], r"has no config\.json"),
        (["x", "--adapter", "EMPTY"], r"adapter_config\.json"),
        (["x", "--adapter", "/no/such/model"], "--adapter must name the folder of a LoRA"),
        (["x", "--typical-p", "0"], "--typical-p must be a number above 0 and at most 1, .* 0"),
        (["x", "--repetition-penalty", "0"], "--repetition-penalty must be a number within 1e-30"),
        (["x", "--presence-penalty", "inf"], "--presence-penalty must be a number within"),
        (["x", "--frequency-penalty", "nan"], "--frequency-penalty must be a number within"),
        (["x", "--penalty-window", "0"], "--penalty-window must be an integer within 1.."),
        (["x", "--temperature", "-1"], "--temperature must be 0, or a number within .*got -1"),
        (["x", "--temperature", "1e-38"], "--temperature must be 0, or a number within 1.2e-38"),
        (["x", "--top-k", "-1"], "--top-k must be an integer within 0.*, but got -1"),
        (["x", "--top-p", "a" * 5000], "--top-p must be a number"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens must be an integer within 1.*got 0"),
        (["x", "--seed", str(2**70)], "--seed must be an integer within 0..4294967295"),
        (["x", "--min-p", "2"], "--min-p must be a number within 0..1, but got 2"),
        (["to", "be", "or"], r"unknown argument be\. Put a text of several words into quotes"),
        (["x", "--tpo-k", "2"], r"unknown option --tpo-k\. Did you mean --top-k\?"),
        (["x", "--local-files-only", "--force-download"], "not allowed with .*--local-files-only"),
        (["x", "--token-file", "/no/such/model"], "No such file .*/no/such/model"),
        (["\udcff"], "PROMPT must be UTF-8 text"),
        (["x", "--stop", "\udcff"], "--stop must be UTF-8 text"),
    ],
    ids=str,
)
def test_errors_are_one_line_in_the_words_of_the_options(args, message, checkpoint, others, capsys):
    args = [str(others / arg) if arg in ("OTHER", "SMALL", "EMPTY") else arg for arg in args]
    if "--model" not in args:
        args += ["--model", str(checkpoint)]
    assert call("generate", *args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match("mamba-eqx( generate)?: error: ", err)
    assert re.search(message, err)
    assert len(err) < 1100
    # Python's names do not appear.
    assert not re.search("top_|min_p|typical_p|max_new|local_files|Penalties|window=", err)


def test_top_k_of_0_keeps_all_tokens(checkpoint, capsys):
    options = ["x", "--max-new-tokens", "8", "--model", str(checkpoint)]
    assert call("generate", *options, "--top-k", "0") == 0
    text = capsys.readouterr().out
    assert call("generate", *options) == 0
    assert capsys.readouterr().out == text


def test_a_command_is_asked_for(capsys):
    assert call() == 0
    out = capsys.readouterr().out
    for command in ("generate", "chat", "score", "inspect", "convert"):
        assert f"    {command}" in out
    assert call("--version") == 0
    assert capsys.readouterr().out == f"mamba-eqx {mbx.__version__}\n"
    commands = "generate, chat, score, serve, train, inspect, convert, completion"
    for word, hint in [
        ("genrate", "Did you mean generate?"),
        ("x", f"The commands are {commands}."),
    ]:
        assert call(word) == 2
        error = capsys.readouterr().err
        assert error == f"mamba-eqx: error: unknown command {word}. {hint}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert", "a", "b", "--dtype", "flaot32"), r"--dtype must be .*flaot32\. Did you mean"),
        (("generate", "x", "--bits", "7"), r"--bits must be one of 8, 4, but got 7\."),
    ],
    ids=str,
)
def test_values_that_are_no_choice(args, message, capsys):
    assert call(*args) == 2
    assert re.search(message, capsys.readouterr().err)


def test_stdin_that_is_not_utf8_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert call("generate", "-") == 2
    assert "Standard input is not UTF-8" in capsys.readouterr().err


def test_options_reach_the_sampler(checkpoint, monkeypatch, capsys):
    seen = {}

    def stream(model, prompt, n, sampling, **options):
        seen.update(options, sampling=sampling, prompt=prompt, n=n)
        tokens = jnp.array(list(b"one; two"))
        length, none = jnp.array(8), jnp.zeros((), int)
        begin = Cursor(mbx.prefill(model, [1]), none)
        block = Decoded(mbx.Generation(tokens, length, jnp.zeros(8), none, begin.state), none)
        return mbx.generation.Stream(model, lambda: begin, lambda *_: block, n, 8)

    monkeypatch.setattr(_streaming, "stream", stream)
    args = "x --max-new-tokens 9 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --seed 4"
    args += " --typical-p 0.5 --repetition-penalty 1.5 --presence-penalty 0.1"
    args += " --frequency-penalty 0.2 --penalty-window 9"
    options = [*args.split(), "--stop", "!", "--stop", "; t", "--model", str(checkpoint)]
    assert call("generate", *options) == 0
    assert seen.pop("key") == jr.key(4)
    sampling = seen.pop("sampling")
    assert seen == {"prompt": [120], "n": 9, "state": None}
    assert isinstance(sampling.tokenizer, mbx.ByteTokenizer)
    assert dataclasses.replace(sampling, tokenizer=None) == mbx.Sampling(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.5,
        penalties=mbx.sampling.Penalties(1.5, 0.1, 0.2, 9),
        stop_tokens=[],
    )
    out, err = capsys.readouterr()
    assert out == "xone\n"
    assert err.startswith("6 tokens, ")


def test_json_output_is_one_object(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt").write_text("Ö:")
    args = ["--file", str(tmp_path / "prompt"), "--model", str(checkpoint), "--seed", "3"]
    assert call("generate", *args, "--max-new-tokens", "20", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["finish"] == "length"
    assert (found["prompt"], found["prompt_tokens"], found["new_tokens"]) == ("Ö:", 3, 20)
    stop = found["text"][5:7]
    assert call("generate", *args, "--json", "--stop", stop) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["text"] == found["text"].partition(stop)[0]
    assert again["finish"] == "stop_string"
    # A stop text that the last token completes is the reason as well.
    args += ["--json", "--stop", stop, "--max-new-tokens", again["new_tokens"]]
    assert call("generate", *args) == 0
    last = json.loads(capsys.readouterr().out)
    assert last["finish"] == "stop_string"
    assert (last["text"], last["new_tokens"]) == (again["text"], again["new_tokens"])


@pytest.mark.slow
def test_texts_can_have_a_format(checkpoint, tmp_path, capsys):
    pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
    args = ["generate", "x", "--model", checkpoint, "--max-new-tokens", "40"]
    assert call(*args, "--regex", "(ab|c){2}!") == 0
    assert re.fullmatch("x(ab|c){2}!\n", capsys.readouterr().out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert call(*args, "--json-schema", schema) == 0
    assert capsys.readouterr().out in ('x"yes"\n', 'x"no"\n')
    schema.write_text("{")
    assert call(*args, "--json-schema", schema) == 2
    assert "must be a JSON schema" in capsys.readouterr().err
    assert call(*args, "--regex", "(a") == 2
    assert "unclosed group" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    assert call("generate", "--help") == 0
    text = capsys.readouterr().out
    for option in ["--model", "--stop", "--min-p", "default: 400", "default: 0.8"]:
        assert option in text
