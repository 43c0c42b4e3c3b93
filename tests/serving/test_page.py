"""The page of `mamba-eqx serve`: its files, the states that it shows, and refused requests."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.commands import byte_model
from tests.support.serving import ASK, ask, events, in_process


pytestmark = pytest.mark.usefixtures("compile_fast", "as_users_run")
pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")

MODEL = byte_model()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with in_process(MODEL, slots=2) as found:
        yield found


def test_states_of_running_and_ended_texts_are_shown(port: int):
    answer = events(ask(port, ASK | {"stream": True, "max_tokens": 48}).text)
    state = look(port, answer[0]["id"])
    assert state["prompt_tokens"] == 6
    assert state["new_tokens"] == 48
    (layer,) = state["layers"]
    pixels = base64.b64decode(layer["pixels"])
    assert layer["shape"] == [4, 16]
    assert len(pixels) == 4 * 16
    assert len(set(pixels)) > 10
    sampling = mbx.Sampling(temperature=0.8).for_model(MODEL, mbx.ByteTokenizer())
    prompt = mbx.ByteTokenizer().encode("ROMEO:")
    alone = mbx.generate(MODEL, prompt, 48, sampling, key=jr.fold_in(jr.key(0), 0))
    ids = [*prompt, *alone.tokens.tolist()]
    # The last token is pending.
    _, (known,) = MODEL.scan(jnp.asarray(ids[:-1]), MODEL.init_state())
    assert layer["norm"] == pytest.approx(float(jnp.linalg.norm(known.ssm)), rel=1e-3)
    assert layer["bytes"] == known.ssm.nbytes + known.conv.nbytes
    # The next turn runs what is new only.
    again = json.loads(ask(port, ASK | {"prompt": [*ids, 33]}).text)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    state = look(port, again["id"])
    assert state["cached_tokens"] == cached == 6 + 48
    assert state["saved_seconds"] > 0


def look(port: int, name: str) -> dict[str, Any]:
    answer = ask(port, {"id": name}, path="/state")
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


@pytest.mark.parametrize(
    "body", [{}, {"id": "cmpl-0"}, {"id": ["x"]}, {"id": 3}, {"x": 1}], ids=str
)
def test_states_of_unknown_texts_are_refused(body: dict[str, object], port: int):
    answer = ask(port, body, path="/state")
    assert answer.status == (400 if "x" in body else 404)


def test_old_texts_are_forgotten():
    from mamba_eqx.generation import Job
    from mamba_eqx.serving import Served
    from mamba_eqx.serving._page import Page

    worker: Any = None
    page: Any = Page(Served(MODEL, mbx.ByteTokenizer(), "tiny", slots=2, queue=3), worker)
    for i in range(100):
        page.note(str(i), Job(np.array([1]), None))
    assert list(page._jobs) == [str(i) for i in range(79, 100)]


def test_other_hosts_origins_and_formats_are_refused(port: int):
    assert ask(port, ASK, Host="evil.example")[0] == 403
    assert ask(port, ASK, Host=f"evil.example:{port}")[0] == 403
    assert ask(port, b"", "GET", "/", Host="evil.example")[0] == 403
    assert ask(port, ASK, Origin="http://evil.example")[0] == 403
    assert ask(port, ASK, Origin="null")[0] == 403
    assert ask(port, ASK, Content_Type="text/plain")[0] == 400
    for body in (b"[]", b"", b"{", b"\xff", b"[" * 30000, b"9" * 5000, b"null", b'"\\ud800"'):
        assert ask(port, body)[0] == 400
    for charset in ("latin-1", "nonsense", "utf-16", "utf-8; charset=x"):
        kind = f"application/json; charset={charset}"
        assert ask(port, ASK, Content_Type=kind)[0] in (200, 400)
    assert ask(port, ASK, Content_Encoding="gzip")[0] == 400
    assert ask(port, b"x" * (2**20 + 1))[0] == 413
    for scheme in ("http", "https"):  # A proxy with TLS may be in front.
        own = f"{scheme}://localhost:{port}"
        assert ask(port, ASK, Origin=own, Host=f"localhost:{port}")[0] == 200
    for other in (f"localhost:{port}", f"ftp://localhost:{port}", "https://evil.example"):
        assert ask(port, ASK, Origin=other)[0] == 403


def test_page_loads_nothing_from_other_servers(port: int):
    answer = ask(port, b"", "GET", "/")
    assert answer.status == 200
    policy = answer.policy
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    files = re.findall('(?:src|href)="(/page/[a-z.]+)"', answer.text)
    for path in files:
        found = ask(port, b"", "GET", path)
        assert found.status == 200
        assert found.policy == policy
        kind = "text/css" if path.endswith(".css") else "text/javascript"
        assert found.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert found.headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search("https?:|innerHTML|outerHTML|insertAdjacentHTML|eval", found.text)
        files += [f"/page/{name}" for name in re.findall('from "./([a-z.]+)"', found.text)]
    assert len(set(files)) == 6
    for name in ("_page.py", "..%2f_page.py", "%2e%2e/_page.py", "x.js", "", "."):
        assert ask(port, b"", "GET", f"/page/{name}").status == 404


def test_page_asks_for_the_key_itself():
    with in_process(MODEL, slots=1, key="secret") as port:
        for path in ("/", "/page/page.js", "/page/page.css"):
            assert ask(port, b"", "GET", path).status == 200
        for path in ("/v1/models", "/state"):
            assert ask(port, b"{}", "GET" if "v1" in path else "POST", path).status == 401


def test_keys_of_stacked_attention_are_drawn():
    from mamba_eqx.serving._page import pictures

    block = mbx.BlockConfig(mbx.AttentionConfig(8, nheads=2))
    model = mbx.LanguageModelConfig(256, (block,) * 2).build(stacked=True, key=jr.key(0))
    engine = mbx.Engine(model, slots=1, max_len=32, block=2)
    job = engine.submit([1, 2, 3], 9)
    engine.step()
    state = engine.state(job)
    assert state is not None
    found = pictures(state.layers)
    assert [layer["shape"] for layer in found] == [(3, 16)]
