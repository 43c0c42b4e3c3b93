"""Two clients talk to the server, whole and streamed: OpenAI's own, and that of huggingface_hub."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import jax.random as jr
import pytest

import mamba_eqx as mbx
from tests.support.commands import byte_model
from tests.support.serving import in_process


pytest.importorskip("aiohttp", reason="needs aiohttp: the extra `serve`")
openai: Any = pytest.importorskip("openai", reason="needs openai: the extra `parity`")
tokenizers = pytest.importorskip("tests.support.tokenizers", reason="needs the extra `text`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compile_fast", "as_users_run"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKENIZER = mbx.TextTokenizer(tokenizers.FILES["byte_level"], tokenizers.CONFIG)
MODEL = byte_model(TOKENIZER.vocab_size)
MESSAGES = [{"role": "user", "content": "To be?"}]
KEY = "sk-local"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with in_process(MODEL, TOKENIZER, key=KEY, slots=2, queue=16, max_len=256) as found:
        yield found


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def alone(ids: list[int], count: int, seed: int, i: int = 0) -> str:
    """Returns the text of `generate` after a prompt."""
    sampling = mbx.Sampling(temperature=1.0).for_model(MODEL, TOKENIZER)
    out = mbx.generate(MODEL, ids, count, sampling, key=jr.fold_in(jr.key(seed), i))
    decoder = TOKENIZER.decoder(prompt=ids)
    return decoder.feed(out.tokens[: int(out.length)].tolist()) + decoder.flush()


def test_completions(client: Any):
    prompt = "To be, or"
    out = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=9, seed=4, n=2, logprobs=1
    )
    assert [c.text for c in out.choices] == [
        alone(TOKENIZER.encode(prompt), 9, 4, i) for i in range(2)
    ]
    assert len(out.choices[0].logprobs.tokens) == out.usage.completion_tokens / 2
    stream = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=9, seed=4, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == out.choices[0].text


def test_chats(client: Any):
    ask: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 9}
    out = client.chat.completions.create(**ask, seed=4, logprobs=True, top_logprobs=3)
    choice = out.choices[0]
    assert choice.message.role == "assistant"
    ids = TOKENIZER.encode_chat(MESSAGES)
    assert choice.message.content == alone(ids, 9, 4)
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    assert out.usage.prompt_tokens == len(ids)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**ask, seed=4, stream=True, stream_options=options)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].usage.completion_tokens == out.usage.completion_tokens


def test_next_turn_of_a_chat_reuses_the_state(client: Any):
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    first = client.chat.completions.create(messages=MESSAGES, **ask)
    answer = {"role": "assistant", "content": "or not"}
    turn = [*MESSAGES, answer, {"role": "user", "content": "What?"}]
    second = client.chat.completions.create(messages=turn, **ask)
    # The template renders the answer otherwise than it was generated, so its state does not fit.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 2
    ids = TOKENIZER.encode_chat(turn)
    sampling = mbx.Sampling().for_model(MODEL, TOKENIZER)
    alone = mbx.generate(MODEL, ids, 5, sampling)
    assert second.choices[0].message.content.strip() == (
        TOKENIZER.decode(alone.tokens[: int(alone.length)].tolist()).strip()
    )


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["answer", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}


def assert_valid(text: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: the extra `parity`")
    jsonschema.validate(json.loads(text), SCHEMA)


def test_texts_have_the_format_that_was_asked_for(client: Any):
    pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
    ask: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "response_format": FORMAT}
    out = client.chat.completions.create(**ask, seed=1, n=3)
    for choice in out.choices:
        if choice.finish_reason == "stop":
            assert_valid(choice.message.content)
    assert "stop" in [choice.finish_reason for choice in out.choices]
    stream = client.chat.completions.create(**ask, seed=1, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == out.choices[0].message.content
    extra = {"structured_outputs": {"regex": "[ab]{3}-[0-9]"}}
    text = client.completions.create(model="tiny", prompt="x", extra_body=extra).choices[0].text
    assert re.fullmatch("[ab]{3}-[0-9]", text)
    any_json = {"type": "json_object"}
    text = client.completions.create(
        model="tiny", prompt="x", max_tokens=5, extra_body={"response_format": any_json}
    )
    assert text.choices[0].text.startswith("{")


def test_the_client_of_huggingface_hub(port: int):
    pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
    url = f"http://127.0.0.1:{port}/v1"
    client: Any = huggingface_hub.InferenceClient(base_url=url, api_key=KEY, timeout=120)
    ask: dict[str, Any] = {"messages": MESSAGES, "model": "tiny", "seed": 4, "max_tokens": 9}
    out = client.chat_completion(**ask, logprobs=True, top_logprobs=2)
    assert out.choices[0].message.content == alone(TOKENIZER.encode_chat(MESSAGES), 9, 4)
    assert out.choices[0].logprobs is not None
    assert len(out.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat_completion(**ask, stream=True)
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(deltas) == out.choices[0].message.content
    ask |= {"max_tokens": 200, "response_format": FORMAT, "temperature": 0.5}
    choice = client.chat_completion(**ask).choices[0]
    assert choice.finish_reason == "stop"
    assert_valid(choice.message.content)
    with pytest.raises(huggingface_hub.errors.BadRequestError, match="`seed` must be"):
        client.chat_completion(**ask | {"seed": "x"})


def test_models(client: Any):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mamba_eqx"


def test_errors_are_those_of_the_client(client: Any, port: int):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="`temperature` must be") as caught:
        client.completions.create(model="tiny", prompt="x", temperature=99)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="no system"):
        client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="must be at most 18, but got 60 times 1"):
        client.completions.create(model="tiny", prompt="x", n=60)
    with pytest.raises(openai.BadRequestError, match="`max_tokens` must equal"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=3, max_completion_tokens=4
        )
    message = {"role": "user", "content": "x"}
    with pytest.raises(openai.BadRequestError, match="at most 1024 messages, but got 1025"):
        client.chat.completions.create(model="tiny", messages=[message] * 1025)
    long = [message | {"content": "x" * 300_000}]
    with pytest.raises(openai.BadRequestError, match="at most 262144 characters as JSON"):
        client.chat.completions.create(model="tiny", messages=long)
    other = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_many_clients_at_once(client: Any):
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        out = client.completions.create(
            model="tiny", prompt=[5, 6, seed + 7], max_tokens=12, seed=seed
        )
        found[seed] = out.choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: alone([5, 6, seed + 7], 12, seed) for seed in range(12)}
