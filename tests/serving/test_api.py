"""OpenAI's API: the texts are those of `generate`, and errors have its form."""

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.generation import Job
from mamba_eqx.generation.engine._reading import Readings
from tests.support.commands import byte_model
from tests.support.serving import PATH, Answer, ask, events, in_process


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")

MODEL = byte_model()
TOKENIZER = mbx.ByteTokenizer()
BODY: dict[str, Any] = {"model": "tiny", "prompt": "To be", "max_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with in_process(MODEL, slots=2, queue=8, max_len=200) as found:
        yield found


def post(port: int, path: str = PATH, **changes: Any) -> Answer:
    return ask(port, BODY | changes, path=path)


def complete(port: int, **changes: Any) -> dict[str, Any]:
    answer = post(port, **changes)
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


def alone(text: str, count: int, seed: int, i: int = 0, **options: Any) -> list[int]:
    """Returns the tokens of `generate` for one choice."""
    changed: dict[str, Any] = {"temperature": 1.0} | options
    sampling = mbx.Sampling(**changed).for_model(MODEL, TOKENIZER)
    key = jr.fold_in(jr.key(seed), i)
    out = mbx.generate(MODEL, TOKENIZER.encode(text), count, sampling, key=key)
    return out.tokens[: int(out.length)].tolist()


def decoded(text: str, ids: list[int]) -> str:
    decoder = TOKENIZER.decoder(prompt=TOKENIZER.encode(text))
    return decoder.feed(ids) + decoder.flush()


def test_choices_are_the_texts_of_generate(port: int):
    found = complete(port, n=3, prompt=["To be", "or not"], temperature=0.9)
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    for i, choice in enumerate(found["choices"]):
        prompt = "To be" if i < 3 else "or not"
        assert choice["index"] == i
        assert choice["text"] == decoded(prompt, alone(prompt, 12, 3, i, temperature=0.9))
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] is None
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        11,
        72,
        83,
    )


def test_streams_join_to_the_whole_text(port: int):
    whole = complete(port, n=2)["choices"]
    answer = post(port, n=2, stream=True, stream_options={"include_usage": True})
    assert answer.headers["Content-Type"] == "text/event-stream"
    *pieces, last = events(answer.text)
    texts = ["", ""]
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
        assert piece["id"] == last["id"]
    assert texts == [choice["text"] for choice in whole]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 24


def test_texts_end_before_stop_strings(port: int):
    text = complete(port)["choices"][0]["text"]
    stop = text[5:8]
    found = complete(port, stop=[stop, "\0never"])["choices"][0]
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    pieces = events(post(port, stop=stop, stream=True).text)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == found["text"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_options_reach_the_sampler(port: int):
    found = complete(port, top_p=0.5, top_k=20, presence_penalty=0.5, logit_bias={"97": -100})
    bias = {97: -100.0}
    penalties = mbx.sampling.Penalties(presence=0.5)
    options = {"top_p": 0.5, "top_k": 20, "penalties": penalties, "logit_bias": bias}
    assert found["choices"][0]["text"] == decoded("To be", alone("To be", 12, 3, **options))


def test_greedy_texts_need_no_seed_and_prompts_may_be_tokens(port: int):
    greedy = complete(port, temperature=0, seed=None)["choices"][0]["text"]
    assert greedy == decoded("To be", alone("To be", 12, 0, temperature=0.0))
    ids = complete(port, prompt=TOKENIZER.encode("To be"))["choices"][0]["text"]
    assert ids == complete(port)["choices"][0]["text"]


@pytest.mark.slow
def test_log_probs_come_with_the_tokens(port: int):
    found = complete(port, logprobs=2, max_tokens=5)["choices"][0]
    shown = found["logprobs"]
    assert "".join(shown["tokens"]) == found["text"]
    assert shown["text_offset"][0] == 0
    assert shown["text_offset"] == sorted(shown["text_offset"])
    assert all(value <= 0 for value in shown["token_logprobs"])
    assert [len(top) for top in shown["top_logprobs"]] == [2] * 5
    none = complete(port, logprobs=0, max_tokens=5)["choices"][0]["logprobs"]
    assert none["token_logprobs"] == pytest.approx(shown["token_logprobs"], abs=1e-4)
    assert none["top_logprobs"] == [{}] * 5


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "There is no model 'other' here. Use 'tiny'"),
        ({"model": None}, 400, "`model` must be the name"),
        ({"prompt": None}, 400, "`prompt` must be a text"),
        ({"prompt": []}, 400, "`prompt` must be a text"),
        ({"prompt": [1, "x"]}, 400, "`prompt` must be a text"),
        ({"prompt": [256]}, 400, "a token that the model lacks"),
        ({"prompt": [-1]}, 400, "token ids"),
        ({"prompt": ""}, 400, "no tokens in `prompt`"),
        ({"prompt": "\ud800"}, 400, "surrogates"),
        ({"prompt": "x" * 300}, 400, "fewer than 200 tokens, but has 300"),
        ({"max_tokens": 0}, 400, "`max_tokens` must be an integer within"),
        ({"max_tokens": 196}, 400, "at most 200 tokens together, but are 5 and 196"),
        ({"max_tokens": True}, 400, "`max_tokens`"),
        ({"n": 65}, 400, "`n`"),
        ({"prompt": ["a"] * 6, "n": 2}, 400, "must be at most 10, but got 2 times 6"),
        ({"temperature": -1}, 400, "`temperature` must be a number within 0..10, but got -1"),
        ({"temperature": 1e-40}, 400, "`temperature` must be 0, or at least"),
        ({"temperature": float("nan")}, 400, "`temperature`"),
        ({"top_p": 1.5}, 400, "`top_p`"),
        ({"seed": "x"}, 400, "`seed`"),
        ({"stop": [""]}, 400, "`stop`"),
        ({"stop": ["x"] * 17}, 400, "`stop`"),
        ({"stop": 3}, 400, "`stop`"),
        ({"logit_bias": {"x": 1}}, 400, "`logit_bias`"),
        ({"logit_bias": {"256": 1}}, 400, "`logit_bias`"),
        ({"logit_bias": {"1": 101}}, 400, "within -100..100"),
        ({"logprobs": 6}, 400, "`logprobs`"),
        ({"echo": True}, 400, "`echo` must be false here"),
        ({"best_of": 2}, 400, "`best_of`"),
        ({"stream_options": {}, "stream": False}, 400, "`stream_options` must come with"),
        ({"stream": "yes"}, 400, "`stream` must be true or false"),
        ({"temprature": 1}, 400, 'There is no field "temprature"'),
        ({"response_format": {"type": "xml"}}, 400, "must be text, json_object or json_schema"),
        ({"response_format": "json"}, 400, "`response_format` must be an object"),
        ({"response_format": {"type": "json_schema"}}, 400, "must come with the type json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, 400, "must come with"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            400,
            "`schema` must be a JSON schema",
        ),
        ({"response_format": {"type": "text", "value": {}}}, 400, "must come with the type json_o"),
        ({"structured_outputs": {"grammar": "x"}}, 400, 'There is no field "grammar"'),
        ({"structured_outputs": {"regex": "a", "json": {}}}, 400, "A text can have one format"),
        ({"structured_outputs": {"regex": "[^\\s\\S]"}}, 400, "allow"),
    ],
    ids=str,
)
def test_invalid_requests_are_refused(port: int, changes: Any, status: int, message: str):
    answer = post(port, **changes)
    error = json.loads(answer.text)["error"]
    assert answer.status == status
    assert message in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"regex": "(a"}, "unclosed group"), ({"json": {"type": "foo"}}, "Invalid type: foo")],
)
def test_formats_that_cannot_be_read_are_refused(port: int, extra: Any, message: str):
    pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
    answer = post(port, structured_outputs=extra)
    assert answer.status == 400
    assert message in json.loads(answer.text)["error"]["message"]
    assert json.loads(answer.text)["error"]["param"] == "structured_outputs"


def test_without_llguidance_there_are_no_formats(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = post(port, response_format={"type": "json_object"})
    assert answer.status == 501
    assert 'pip install "mamba_eqx[structured]"' in json.loads(answer.text)["error"]["message"]


def test_a_text_that_cannot_go_on_in_its_format_ends_with_an_error(
    port: int, monkeypatch: pytest.MonkeyPatch
):
    class Broken:
        def start(self) -> "Broken":
            return self

        def allowed(self) -> np.ndarray:
            return np.ones(256, bool)

        def advance(self, token: int) -> None:
            raise ValueError("It is too complex.")

    monkeypatch.setattr("mamba_eqx.serving._asked.read_format", lambda fields, served: Broken())
    answer = post(port)
    assert answer.status == 400
    assert answer.text.count("The text cannot go on in the given format. It is too complex.") == 1


def test_models_without_a_template_do_not_chat(port: int):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    answer = ask(port, body, path="/v1/chat/completions")
    assert answer.status == 400
    assert "no chat template" in answer.text


def test_other_paths_and_methods_are_errors_in_json(port: int):
    for method, path, status in (("GET", "/x", 404), ("GET", PATH, 405), ("POST", "/health", 405)):
        answer = ask(port, b"", method, path)
        assert answer.status == status
        assert json.loads(answer.text)["error"]["message"]


def test_models_are_listed(port: int):
    listed = json.loads(ask(port, b"", "GET", "/v1/models").text)["data"]
    one = json.loads(ask(port, b"", "GET", "/v1/models/tiny").text)
    assert listed == [one]
    assert one["id"] == "tiny"
    assert ask(port, b"", "GET", "/v1/models/other").status == 404


def test_health_and_metrics(port: int):
    assert json.loads(ask(port, b"", "GET", "/health").text) == {"status": "ok"}
    before = numbers(port)
    complete(port, prompt="A prompt that no other test has", max_tokens=4)
    complete(port, prompt="A prompt that no other test has", max_tokens=4)
    after = numbers(port)
    changes = {name: after[name] - before[name] for name in after}
    assert changes["requests_total"] == changes["requests_ended_total"] == 2
    assert changes["generated_tokens_total"] == 8
    assert changes["prompt_tokens_total"] == 62
    assert changes["prompt_tokens_reused_total"] == 31
    assert changes["prefix_hits_total"] == 1
    assert after["requests_decoding"] == 0


def numbers(port: int) -> dict[str, float]:
    text = ask(port, b"", "GET", "/metrics").text
    found = re.findall(r"^mamba_eqx_(\w+) ([\d.e+-]+)$", text, re.MULTILINE)
    assert len(found) == text.count("# TYPE")
    return {name: float(value) for name, value in found}


def test_full_server_says_when_to_come_again(port: int):
    before = numbers(port)["requests_total"]
    first = threading.Thread(target=complete, args=(port,), kwargs={"n": 10, "max_tokens": 195})
    first.start()
    while numbers(port)["requests_total"] < before + 10:
        assert first.is_alive()
    answer = post(port, n=10)
    first.join()
    assert answer.status == 503
    error = json.loads(answer.text)["error"]
    assert error["message"] == "The server is full. Try again in a moment."
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    # None of the ten texts is left behind.
    assert complete(port)["usage"]["completion_tokens"] == 12


def test_texts_without_a_token_in_time_are_refused():
    with in_process(MODEL, slots=2, queue=8, max_len=200, seconds=1e-9) as port:
        answer = ask(port, BODY)
    assert answer.status == 503
    assert "too busy to begin" in answer.text


def test_requests_in_prefill_are_counted(port: int, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, float]] = []
    run = Readings._run_piece  # pyright: ignore[reportPrivateUsage]

    def look(readings: Any, reading: Any, most: int) -> int:
        found = numbers(port)
        seen.append((found["requests_prefilling"], found["requests_decoding"]))
        return run(readings, reading, most)

    monkeypatch.setattr(Readings, "_run_piece", look)
    complete(port, prompt="A prompt of its own", max_tokens=2)
    assert seen == [(1, 0)]


def test_connections_that_are_worked_for_are_counted(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mamba_eqx.serving._connections.MAX_CONNECTIONS", 1)
    go, begun = threading.Event(), threading.Event()
    submit = mbx.Engine.submit

    def wait(engine: mbx.Engine, **options: Any) -> Job:
        begun.set()
        go.wait(60)
        return submit(engine, **options)

    monkeypatch.setattr(mbx.Engine, "submit", wait)
    found: list[dict[str, Any]] = []
    first = threading.Thread(target=lambda: found.append(complete(port)))
    first.start()
    try:
        assert begun.wait(60)
        answer = ask(port, b"", "GET", "/health")
    finally:
        go.set()
        first.join()
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1"
    assert "too many connections" in json.loads(answer.text)["error"]["message"]
    assert found[0]["choices"][0]["finish_reason"] == "length"
    # An idle connection makes room.
    with socket.create_connection(("127.0.0.1", port), timeout=60) as idle:
        assert ask(port, b"", "GET", "/health").status == 200
        assert idle.recv(1) == b""


def test_an_error_ends_the_choices_before_it(port: int, monkeypatch: pytest.MonkeyPatch):
    submit = mbx.Engine.submit
    jobs: list[Job] = []

    def fail(engine: mbx.Engine, **options: Any) -> Job:
        if jobs:
            raise ValueError("a fault on purpose")
        jobs.append(submit(engine, **options))
        return jobs[0]

    monkeypatch.setattr(mbx.Engine, "submit", fail)
    assert post(port, n=2).status == 500
    assert jobs[0].cancelled


def test_texts_of_the_most_likely_tokens_keep_the_first():
    from mamba_eqx.serving._forms import Completion
    from mamba_eqx.serving._texts import Shown

    top = [("\ufffd", b"\x80", -0.5), ("a", b"a", -1.0), ("\ufffd", b"\x81", -2.0)]
    choice: Any = Completion("tiny").choice(0, "a", [Shown("a", b"a", -1.0, top, 0)], None)
    assert choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.5, "a": -1.0}]


def test_key_is_needed_if_there_is_one():
    with in_process(MODEL, key="secret", slots=1) as port:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = ask(port, BODY, path=PATH, **given)
            assert answer.status == 401
            assert json.loads(answer.text)["error"]["code"] == "invalid_api_key"
        assert ask(port, BODY, path=PATH, Authorization="Bearer secret").status == 200
        assert ask(port, b"", "GET", "/health").status == 200
        assert ask(port, b"", "GET", "/metrics").status == 401
