"""`mamba-eqx serve` with slow, silent, hostile and half-gone clients."""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from tests.support.commands import byte_model
from tests.support.serving import ASK, PATH, Serving, ask, serving


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
pytestmark = pytest.mark.slow

LONG = ASK | {"max_tokens": 1024, "stream": True, "logprobs": 5}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server whose log has no traceback in the end."""
    folder = tmp_path_factory.mktemp("page")
    block = mbx.BlockConfig(mbx.Mamba1Config(32, d_state=16))
    model = mbx.LanguageModelConfig(256, (block,) * 4).build(key=jax.random.key(0))
    mbx.save_pretrained(model, folder)
    mbx.save_tokenizer(mbx.ByteTokenizer(), folder)
    with serving(folder, "--model", folder, "--name", "tiny", "--slots", 4) as found:
        assert ask(found.port, ASK).status == 200
        yield found
        assert ask(found.port, ASK).status == 200
    log = found.log.read_text()
    assert "Traceback" not in log
    assert all(len(line) < 500 for line in log.splitlines())


def connect(port: int, received: int | None = None) -> socket.socket:
    client = socket.socket()
    if received is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
    client.settimeout(300)
    client.connect(("127.0.0.1", port))
    return client


def request(port: int, body: object, path: str = PATH) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    return (
        f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )


def reset(client: socket.socket) -> None:
    """Closes a connection without a farewell."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def assert_served(port: int, seconds: float = 60.0) -> None:
    start = time.monotonic()
    assert ask(port, ASK).status == 200
    assert time.monotonic() - start < seconds


def test_clients_that_never_read_hold_nobody_up(page: Serving):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(page.port, 1024)) for _ in range(20)]
        for client in clients:
            # The log-probabilities of one answer are 0.5 MB. Those of several fill the buffers.
            client.sendall(request(page.port, LONG) * 8)
        for _ in range(3):
            time.sleep(3)
            assert_served(page.port)


def test_clients_that_never_finish_their_request_are_dropped(page: Serving):
    whole = request(page.port, ASK)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(page.port)) for _ in range(300)]
        for i, client in enumerate(clients):
            with contextlib.suppress(ConnectionError):  # The oldest make room for others.
                client.sendall(whole[: i % len(whole)])
        assert_served(page.port)
        end = time.monotonic() + 60
        for client in clients:
            with contextlib.suppress(ConnectionError):
                while client.recv(4096):
                    assert time.monotonic() < end
    assert_served(page.port)


def test_clients_that_go_away_are_no_fault(page: Serving):
    whole = request(page.port, LONG)
    for cut in range(0, len(whole) + 1, 7):
        client = connect(page.port)
        client.sendall(whole[:cut])
        reset(client)
    for _ in range(8):
        client = connect(page.port)
        client.sendall(whole)
        client.recv(100)
        reset(client)
    assert_served(page.port)


@pytest.mark.parametrize("stream", [True, False])
def test_texts_of_clients_that_are_gone_end(page: Serving, stream: bool):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "n": 4, "stream": stream}
    before = numbers(page.port)
    client = connect(page.port)
    client.sendall(request(page.port, body, "/v1/completions"))
    while numbers(page.port)["generated_tokens_total"] == before["generated_tokens_total"]:
        time.sleep(0.01)
    reset(client)
    end = time.monotonic() + 60
    while (after := numbers(page.port))["requests_ended_total"] < after["requests_total"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 4 * 4000
    assert_served(page.port)


def numbers(port: int) -> dict[str, float]:
    lines = ask(port, b"", "GET", "/metrics").text.splitlines()
    pairs = (line.removeprefix("mamba_eqx_").split() for line in lines if line[0] != "#")
    return {name: float(value) for name, value in pairs}


def test_a_slow_text_does_not_keep_others(page: Serving):
    """Requests take turns. Beyond the limit they are told to come again."""
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(page.port, LONG).status))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 503}
    assert answers.count(200) >= 2
    assert_served(page.port)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
_STATE = st.fixed_dictionaries({"id": st.text(max_size=9) | _JSON})
_COMPLETION = st.fixed_dictionaries(
    {"model": st.just("tiny"), "prompt": st.just("x") | _JSON},
    optional={
        "max_tokens": st.integers(-1, 9) | _JSON,
        "n": st.integers(0, 3) | _JSON,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | _JSON,
        "logprobs": st.integers(0, 6) | _JSON,
        "stream": st.booleans() | _JSON,
        "logit_bias": st.dictionaries(st.integers(-1, 256).map(str), st.floats() | _JSON) | _JSON,
        "temperature": st.floats(0, 3) | _JSON,
        "messages": _JSON,
        "seed": _JSON,
    },
)
_BODIES = (_STATE | _COMPLETION | _JSON).map(lambda value: json.dumps(value).encode()) | st.binary(
    max_size=200
)
_KINDS = st.sampled_from(
    ["application/json", "application/json; charset=utf-16", "text/plain", "x", "application/json;"]
)


@pytest.mark.parametrize("path", ["/state", "/v1/completions", "/v1/chat/completions"])
@given(body=_BODIES, kind=_KINDS)
@settings(max_examples=100)
def test_any_body_is_served_or_refused(page: Serving, body: bytes, kind: str, path: str):
    answer = ask(page.port, body, path=path, Content_Type=kind)
    assert answer.status in (200, 400, 404, 413)
    if answer.status != 200:
        assert len(json.loads(answer.text)["error"]["message"]) < 200
        assert "\n" not in answer.text


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_are_answered_or_dropped(page: Serving, seed: int):
    rng = random.Random(seed)
    whole = request(page.port, ASK)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 10)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data
        with connect(page.port) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                first = client.recv(4096)
                assert b" 500 " not in first.split(b"\r\n")[0]
    assert_served(page.port)


def test_weights_that_are_not_numbers_end_a_text_with_a_message(tmp_path):
    model = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), byte_model())
    mbx.save_pretrained(model, tmp_path)
    mbx.save_tokenizer(mbx.ByteTokenizer(), tmp_path)
    with serving(tmp_path, "--model", tmp_path, "--name", "tiny", "--slots", 1) as found:
        answer = ask(found.port, ASK)
        assert answer.status == 500
        assert "NaN or infinite" in answer.text
        assert ask(found.port, b"", "GET", "/").status == 200
    assert "Traceback" not in found.log.read_text()
