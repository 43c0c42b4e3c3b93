"""Serves a page on this machine that streams text from a model and shows its recurrent state.

    pip install ".[serve]"
    python examples/serve.py                # then open the printed address
    python examples/serve.py --smoke        # sends one request to itself and exits

A state is a value: the page can continue from any state and fork it at no cost. The picture shows
the hidden state of every layer, with a column per channel and a row per state dimension.

The server uses aiohttp, a single package with HTTP, streaming and a client. It listens on the
loopback interface only, rejects requests for other host names (against DNS rebinding) and
from other origins, accepts JSON only, and loads nothing from other servers. The lengths of prompts
and answers, the number of stored states and the number of concurrent requests are limited.
"""

import argparse
import asyncio
import base64
import dataclasses
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from aiohttp import ClientSession, web

import mamba_eqx as mbx


PAGE = Path(__file__).with_suffix(".html")
MAX_PROMPT = 4096  # Characters.
MAX_NEW = 1024  # Tokens.
MAX_REQUESTS = 2  # Concurrent requests.
MAX_STATES = 64
BLOCK = 8  # Tokens between two pictures.
WIDTH = 64  # Channels in a picture.


class Generate(NamedTuple):
    """A validated request to generate text, continuing `state` if there is one."""

    prompt: list[int]
    state: mbx.DecodingState | None
    seed: int
    temperature: float
    max_new_tokens: int


def picture(state: mbx.DecodingState) -> dict[str, object]:
    """Returns the hidden states as pixels of one byte each, in which 128 is zero."""
    leaves = jax.tree.leaves(state.layers, is_leaf=has_hidden_state)
    hidden = [layer.ssm for layer in leaves if has_hidden_state(layer)]
    rows = [np.asarray(h, np.float32).reshape(h.shape[0], -1) for h in hidden]
    shown = np.stack([row[:, :: max(1, row.shape[1] // WIDTH)][:, :WIDTH] for row in rows])
    # Each layer has its own scale.
    scale = np.abs(shown).mean(axis=(1, 2), keepdims=True) * 2 + 1e-9
    pixels = np.round(128 + 127 * np.tanh(shown / scale)).astype(np.uint8)
    return {"shape": pixels.shape, "pixels": base64.b64encode(pixels.tobytes()).decode()}


def has_hidden_state(tree: object) -> bool:
    """Returns whether a subtree is the state of a Mamba-1 or Mamba-2 layer."""
    return isinstance(tree, mbx.Mamba1State | mbx.Mamba2State)


def refusal(reason: str) -> web.HTTPException:
    """Returns the error for an invalid request."""
    return web.HTTPBadRequest(text=reason)


class Server:
    """The page, the endpoint that generates text, and the states that clients can continue from."""

    def __init__(self, model: mbx.LanguageModel, tokenizer: mbx.TextTokenizer | mbx.ByteTokenizer):
        self.model, self.tokenizer = model, tokenizer
        eos = tokenizer.eos_token_id if isinstance(tokenizer, mbx.TextTokenizer) else None
        # The vocabulary of a model may be padded beyond its tokenizer. Padded ids are banned.
        padding = range(tokenizer.vocab_size, model.vocab_size)
        self.sampling = mbx.Sampling(
            logit_bias=dict.fromkeys(padding, -float("inf")) or None,
            stop_tokens=[] if eos is None else [eos],
        )
        self.states: OrderedDict[str, mbx.DecodingState] = OrderedDict()
        self.running = 0
        self.hosts: set[str] = set()  # host names under which the server accepts requests

    def app(self) -> web.Application:
        """Returns the application with its routes."""
        app = web.Application(middlewares=[self.guard], client_max_size=8 * MAX_PROMPT)
        app.add_routes([web.get("/", self.page), web.post("/generate", self.generate)])
        return app

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Rejects requests for other hosts and from other origins."""
        origin = request.headers.get("Origin")
        is_own = origin is None or origin.removeprefix("http://") in self.hosts
        if request.headers.get("Host") not in self.hosts or not is_own:
            raise web.HTTPForbidden(text="This server accepts requests from its own page only.")
        return await handler(request)

    async def page(self, request: web.Request) -> web.Response:
        """Returns the page, which can neither load nor run anything from other servers."""
        nonce = secrets.token_urlsafe(16)
        allowed = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        headers = {
            "Content-Security-Policy": f"default-src 'none'; {allowed}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        text = PAGE.read_text("utf-8").replace("NONCE", nonce)
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Streams lines of JSON: pieces of text with pictures, then the name of the final state."""
        asked = self.read(request, await request.text())
        if self.running >= MAX_REQUESTS:
            raise web.HTTPServiceUnavailable(text="Too many concurrent requests. Try again.")
        self.running += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            state, prompt, left = asked.state, asked.prompt, asked.max_new_tokens
            decoder, key = self.tokenizer.decoder(), jr.key(asked.seed)
            sampling = dataclasses.replace(self.sampling, temperature=asked.temperature)
            while left > 0:
                out = await asyncio.to_thread(
                    mbx.generate,
                    self.model,
                    prompt,
                    min(BLOCK, left),
                    sampling,
                    state=state,
                    key=key,
                )
                state, prompt, left = out.state, None, 0 if bool(out.stopped) else left - BLOCK
                text = decoder.feed(out.tokens[: int(out.length)].tolist())
                line = {"text": text, "picture": picture(state)}
                await response.write(json.dumps(line).encode() + b"\n")
            assert state is not None
            name = self.store(state)
            last = {"text": decoder.flush(), "state": name, "position": int(state.position) + 1}
            await response.write(json.dumps(last).encode() + b"\n")
            return response
        finally:
            self.running -= 1

    def read(self, request: web.Request, body: str) -> Generate:
        """Validates a request to generate text."""
        if request.content_type != "application/json":
            raise refusal("The request must be JSON.")
        try:
            asked = json.loads(body)
            fields = ("prompt", "state", "seed", "temperature", "max_new_tokens")
            prompt, name, seed, temperature, count = (asked[field] for field in fields)
        except (ValueError, TypeError, KeyError):
            raise refusal(
                "The request must have a prompt, state, seed, temperature and max_new_tokens."
            ) from None
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            raise refusal(f"The prompt must be text of at most {MAX_PROMPT} characters.")
        check_integer("max_new_tokens", count, 1, MAX_NEW)
        check_integer("seed", seed, 0, 2**32 - 1)
        if type(temperature) not in (int, float) or not 0 < temperature <= 10:
            raise refusal("`temperature` must be a number above 0 and at most 10.")
        if name is None and not prompt:
            raise refusal("The prompt is empty. Give at least one character to start from.")
        if name is not None and not (isinstance(name, str) and name in self.states):
            raise refusal("There is no such state: old states are dropped. Start a new text.")
        try:
            ids = self.tokenizer.encode(prompt)
        except ValueError as error:
            raise refusal(str(error)) from None
        state = None if name is None else self.states[name]
        return Generate(ids, state, seed, temperature, count)

    def store(self, state: mbx.DecodingState) -> str:
        """Stores a state, drops the oldest one beyond `MAX_STATES`, and returns the new name."""
        name = secrets.token_urlsafe(12)
        self.states[name] = state
        while len(self.states) > MAX_STATES:
            self.states.popitem(last=False)
        return name


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Rejects a request whose field `name` is not an integer within `low..high`."""
    if type(value) is not int or not low <= value <= high:
        raise refusal(f"`{name}` must be an integer within {low}..{high}.")


async def serve(server: Server, port: int, smoke: bool) -> None:
    """Serves until interrupted; with `smoke`, sends one request and prints the answer instead."""
    runner = web.AppRunner(server.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    port = runner.addresses[0][1]
    server.hosts |= {f"127.0.0.1:{port}", f"localhost:{port}"}
    url = f"http://127.0.0.1:{port}/"
    print(url, flush=True)
    try:
        if not smoke:
            await asyncio.Event().wait()
        asked = {"prompt": "ROMEO:", "state": None, "seed": 0, "temperature": 0.8}
        asked |= {"max_new_tokens": 32}
        async with ClientSession() as session, session.post(f"{url}generate", json=asked) as answer:
            lines = [json.loads(line) async for line in answer.content]
        print("".join(line["text"] for line in lines))
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default=str(mbx.SHIPPED),
        help="checkpoint folder, or repository on the Hub (default: the bundled model)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="send one request, print the answer, exit"
    )
    args = parser.parse_args()
    model = mbx.from_pretrained(args.model, dtype=jnp.float32)
    server = Server(model, mbx.load_tokenizer(args.model))
    try:
        asyncio.run(serve(server, 0 if args.smoke else args.port, args.smoke))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
