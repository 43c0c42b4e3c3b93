"""`mamba-eqx chat` and `score`."""

import io
import json
import math
import os
import signal
import sys

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx._cli import _conversation, _opened, _score as _cli_score
from mamba_eqx.pretrained import from_pretrained, save_pretrained
from tests.support.commands import byte_model, call, spawn


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "bytes"
    save_pretrained(byte_model(), path)
    mbx.save_tokenizer(mbx.ByteTokenizer(), path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    def run_command(*args, typed=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        code = call(*args)
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


# score


def test_score_matches_mbx_score(checkpoint, run, tmp_path, monkeypatch):
    model = from_pretrained(checkpoint, dtype=jnp.float32)
    texts = ["To be, or nöt.\n", "line\n" * 50, "no end" * 9]
    for i, text in enumerate(texts):
        (tmp_path / str(i)).write_text(text, "utf-8")
    want = [mbx.score(model, list(text.encode())) for text in texts]
    # Pieces are small, so that each text has several.
    monkeypatch.setattr(_cli_score, "_READ", 16)
    monkeypatch.setattr(_cli_score, "_PIECE", 32)
    files = [part for i in range(3) for part in ("--file", tmp_path / str(i))]
    code, out, err = run(
        "score", "-", *files, "--json", "--model", checkpoint, typed=b"line\n" * 50
    )
    assert (code, err) == (0, "")
    first, *found = map(json.loads, out.splitlines())
    assert first == found[1] | {"source": "standard input"}
    for one, score, text in zip(found, want, texts, strict=True):
        total = float(score.log_probs.sum())
        assert one["tokens"] == one["bytes"] == len(text.encode()) - 1
        np.testing.assert_allclose(one["log_prob"], total, rtol=1e-5)
        np.testing.assert_allclose(one["perplexity"], float(score.perplexity), rtol=1e-5)
        bits = -total / math.log(2) / one["bytes"]
        np.testing.assert_allclose(one["bits_per_byte"], bits, rtol=1e-5)
    code, out, _ = run("score", "line\n" * 50, "--model", checkpoint)
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["249", f"{found[1]['log_prob']:.2f}"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fast", [False, True])
def test_score_keeps_bfloat16_where_it_is_fast(fast, stored, run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(_opened, "multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(_opened, "load", lambda _, dtype, **_options: seen.append(dtype) or 1 / 0)
    save_pretrained(mbx.cast(byte_model(), jnp.dtype(stored)), tmp_path / "model")
    for options in ([], ["--dtype", "float32"], ["--dtype", "stored"]):
        run("score", "x y", "--model", tmp_path / "model", "--tokenizer", "bytes", *options)
    keep = fast and stored != "float16"
    assert seen == [None if keep else jnp.float32, jnp.float32, None]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Give a TEXT"),
        (["--file", "/no/such"], 2, "There is no file /no/such"),
        (["x"], 2, "text is too short"),
        (["-"], 2, "standard input is not UTF-8"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_scored_are_refused(args, code, message, checkpoint, run):
    got, _, err = run("score", *args, "--model", checkpoint, typed=b"ab\xff")
    assert got == code
    assert err.count("\n") == 1
    assert message in err


def test_texts_that_cannot_be_scored_do_not_end_the_command(checkpoint, run, tmp_path):
    for name, data in {"a": b"To be", "empty": b"", "noise": b"ab\xff", "b": b"To be"}.items():
        (tmp_path / name).write_bytes(data)
    files = [x for name in ("a", "empty", "noise", "b") for x in ("--file", tmp_path / name)]
    code, out, err = run("score", *files, "--json", "--model", checkpoint)
    assert code == 2
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["source"] for one in found] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert found[0]["log_prob"] == found[1]["log_prob"]
    first, second = err.splitlines()
    assert "empty is too short" in first
    assert "noise is not UTF-8" in second


@pytest.mark.slow
def test_byte_order_marks_are_no_text(checkpoint, run, tmp_path):
    outs = []
    for name, data in {"plain": b"To be", "marked": b"\xef\xbb\xbfTo be"}.items():
        (tmp_path / name).write_bytes(data)
        options = ("--model", checkpoint, "--json")
        text = ("--file", tmp_path / name)
        _, scored, _ = run("score", *text, *options)
        _, made, _ = run("generate", *text, *options, "--max-new-tokens", 3)
        _, said, _ = run("chat", *options[:2], "--max-new-tokens", 3, typed=data)
        one, other = json.loads(scored), json.loads(made)
        outs.append((one["tokens"], one["log_prob"], other["prompt"], other["text"], said))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.slow), "cp1252"])
def test_output_in_other_encodings(checkpoint, monkeypatch, encoding):
    """What an encoding lacks becomes a question mark, and the text goes on."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    options = ("--model", checkpoint, "--max-new-tokens", 40, "--temperature", 3)
    for extra in ((), ("--json",)):
        assert call("generate", "漢 é", *options, *extra) == 0
    assert call("score", "漢字", "--model", checkpoint) == 0
    text = written.getvalue().decode(encoding)
    plain, found = text.splitlines()[0], [x for x in text.splitlines() if x.startswith("{")]
    assert plain.startswith("? é" if encoding == "cp1252" else "? ?")
    assert json.loads(found[0])["prompt"] == "漢 é"


# chat


def test_plain_chat_continues_one_text(checkpoint, run, tmp_path):
    """The state is kept between turns, and can be saved, reset and loaded."""
    model, tokenizer = from_pretrained(checkpoint, dtype=jnp.float32), mbx.ByteTokenizer()
    lines = ["Hi", "/save FILE", "so?", "/reset", "Hi", "/load FILE", "so?"]
    typed = "\n".join(lines).replace("FILE", str(tmp_path / "state")) + "\n"
    options = ("--model", checkpoint, "--max-new-tokens", "12", "--seed", "5", "--stop", "\n")
    code, out, err = run("chat", *options, typed=typed.encode())
    assert (code, err) == (0, "")
    ids, answers = [], []
    for line in ("Hi", "so?"):
        ids += tokenizer.encode(line + "\n")
        new = mbx.generate(
            model, ids, 12, mbx.Sampling(temperature=0.8), key=jr.key(5)
        ).tokens.tolist()
        assert 10 not in new
        ids += new
        answers.append(tokenizer.decode(new))
    first, second = answers
    assert out == "".join(f"{text}\n" for text in (first, second, first, second))


def test_errors_do_not_end_a_chat(checkpoint, run, tmp_path):
    (tmp_path / "noise").write_bytes(b"noise")
    lines = [
        "/save",
        "/save x",
        "Hi",
        f"/save {tmp_path / 'noise' / 'x'}",
        "/nope",
        f"/load {tmp_path / 'noise'}",
        "/load y",
        "/help",
        "/quit",
    ]
    options = ("--model", checkpoint, "--max-new-tokens", "3")
    code, out, err = run("chat", *options, typed="\n".join([*lines, "never said"]).encode())
    assert code == 0
    assert out.endswith("\n")
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    unwritable = f"error: Not a directory: {tmp_path / 'noise' / 'x'}"
    words = ["needs the name", "Nothing has", unwritable, "no command", "noise", "y"]
    for line, word in zip(told, words, strict=True):
        assert word in line
    assert "/reset" in err


def test_ctrl_c_ends_the_answer_but_not_the_chat(checkpoint):
    options = ("--model", checkpoint, "--max-new-tokens", 2**30, "--stop", "\x01")
    with spawn("chat", *options) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/save\n/quit\n", timeout=60)
    assert process.returncode == 0
    assert out.endswith(b"\n")
    assert err == b"error: /save needs the name of a file.\n"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    from tests.support.tokenizers import CONFIG, FILES

    path = tmp_path_factory.mktemp("model") / "chatty"
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG)
    save_pretrained(byte_model(tokenizer.vocab_size + 3), path)
    mbx.save_tokenizer(tokenizer, path)
    return path


def test_chat_names_a_special_token_that_the_model_lacks(chatty, run, tmp_path):
    from tests.support.tokenizers import CONFIG, FILES

    template = {"chat_template": "{{ '<|big|>' }}" + str(CONFIG["chat_template"])}
    more = {"additional_special_tokens": ["<|big|>"]}
    tokenizer = mbx.TextTokenizer(FILES["byte_level"], CONFIG | template | more)
    number = tokenizer.special_tokens["<|big|>"]
    assert number == tokenizer.vocab_size - 1
    save_pretrained(byte_model(number), tmp_path)
    mbx.save_tokenizer(tokenizer, tmp_path)
    options = ("--model", tmp_path, "--max-new-tokens", "2")
    code, out, err = run("chat", *options, typed=b"Hi")
    assert (code, out) == (0, "")
    assert err == (
        f"error: The chat template uses the special token '<|big|>' with id {number}, but the "
        f"model has a vocabulary of {number} tokens. Use --plain to chat without the template, or "
        "--tokenizer to name the tokenizer that the model was trained with.\n"
    )
    code, out, err = run("chat", *options, "--plain", typed=b"Hi")
    assert (code, err) == (0, "")
    assert out.endswith("\n")


def test_template_chat_reads_nothing_twice(chatty, run, tmp_path, monkeypatch):
    model, tokenizer = from_pretrained(chatty, dtype=jnp.float32), mbx.load_tokenizer(chatty)
    assert isinstance(tokenizer, mbx.TextTokenizer)
    read, prefill = [], _conversation.prefill

    def counting(model, ids, *, state, room):
        read.append(len(ids))
        return prefill(model, ids, state=state, room=room)

    monkeypatch.setattr(_conversation, "prefill", counting)
    lines = ["To be?", "/save FILE", "Or not?", "/reset", "/load FILE", "Or not?"]
    typed = "\n".join(lines).replace("FILE", str(tmp_path / "state"))
    options = ("--model", chatty, "--max-new-tokens", "12", "--temperature", "0")
    code, out, err = run("chat", *options, typed=typed.encode())
    assert (code, err) == (0, "")

    messages, want, whole = [], "", []
    for line in ("To be?", "Or not?"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer.encode_chat(messages)
        whole.append(len(ids))
        bias = dict.fromkeys(range(tokenizer.vocab_size, model.vocab_size), -math.inf)
        new = mbx.generate(model, ids, 12, mbx.Sampling(stop_tokens=[0], logit_bias=bias))
        answer = tokenizer.decode(new.tokens[: int(new.length)].tolist())
        messages.append({"role": "assistant", "content": answer})
        want += answer + "\n"
    assert out == want + want[want.index("\n") + 1 :]
    assert read[0] == whole[0]
    assert read[1] <= whole[1] - whole[0]
    (tmp_path / "state.json").unlink()
    _, _, err = run("chat", *options, typed=f"/load {tmp_path / 'state'}".encode())
    assert "which /save writes beside the state" in err
    _, out, err = run("chat", *options, "--plain", typed=f"/load {tmp_path / 'state'}\nx".encode())
    assert err == ""
    assert out


HISTORY = {"messages": [{"role": "user", "content": "x"}], "tokens": [5]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"tokens": ["a"]},
        {"tokens": [10**6]},
        {"tokens": [-1]},
        {"tokens": [True]},
        {"tokens": [[1]]},
        {"tokens": {}},
        {"messages": [None]},
        {"messages": ["x"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 1, "content": "x"}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"more": 1},
        {"shifted": True},
    ],
    ids=str,
)
def test_histories_that_are_none_are_refused(change, chatty, run, tmp_path):
    """The chat goes on as if nothing had been loaded."""
    options = ("--model", chatty, "--max-new-tokens", "3", "--temperature", "0")
    state = tmp_path / "state"
    _, want, _ = run("chat", *options, typed=f"x\n/save {state}\nso?".encode())
    history = json.loads((tmp_path / "state.json").read_text())
    if change.pop("shifted", False):
        change = {"tokens": [(token + 1) % 256 for token in history["tokens"]]}
    elif "tokens" in change and isinstance(change["tokens"], list):
        change = {"tokens": change["tokens"] * len(history["tokens"])}
    (tmp_path / "state.json").write_text(json.dumps(history | change))
    code, out, err = run("chat", *options, typed=f"x\n/load {state}\nso?".encode())
    assert (code, out) == (0, want)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_template_that_refuses_a_turn_does_not_end_the_chat(chatty, run, tmp_path):
    from tests.support.tokenizers import CONFIG, FILES

    template = (
        "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    )
    config = CONFIG | {"chat_template": template + str(CONFIG["chat_template"])}
    save_pretrained(from_pretrained(chatty), tmp_path)
    mbx.save_tokenizer(mbx.TextTokenizer(FILES["byte_level"], config), tmp_path)
    options = ("--model", tmp_path, "--max-new-tokens", "3", "--temperature", "0")
    code, want, err = run("chat", *options, typed=b"x\nso?")
    assert (code, err) == (0, "")
    code, out, err = run("chat", *options, typed=b"x\nno\n\xff\nso?")
    assert (code, out) == (0, want)
    refused, garbled = err.splitlines()
    assert "not this" in refused
    assert "not UTF-8" in garbled


def test_generate_stops_at_end_of_text_and_bans_padding(chatty, run):
    code, out, _ = run("generate", "To", "--model", chatty, "--temperature", "5", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["finish"] in ("stop_token", "length")
    assert found["new_tokens"] > 1


def test_convert_copies_the_tokenizer(chatty, run, tmp_path):
    code, _, _ = run("convert", chatty, tmp_path / "new", "--layout", "state-spaces")
    assert code == 0
    text = "To be"
    assert mbx.load_tokenizer(tmp_path / "new").encode(text) == mbx.load_tokenizer(chatty).encode(
        text
    )


@pytest.mark.parametrize("kind", ["bytes", "text"])
def test_generate_stops_at_a_declared_end_that_the_tokenizer_lacks(kind, chatty, run, tmp_path):
    model = byte_model(300) if kind == "bytes" else from_pretrained(chatty)
    tokenizer = mbx.ByteTokenizer() if kind == "bytes" else mbx.load_tokenizer(chatty)
    end = model.vocab_size - 1
    assert end not in tokenizer.token_ids
    save_pretrained(model, tmp_path)
    mbx.save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    # At this temperature, all tokens are about equally likely.
    options = ("--model", tmp_path, "--temperature", "1e6", "--max-new-tokens", "5000")
    code, out, err = run("generate", "To", *options, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["finish"] == "stop_token"
