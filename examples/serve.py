"""A page on this machine that streams text from a model and shows what its state does.

    pip install ".[serve]"
    python examples/serve.py                # then open the address that it prints
    python examples/serve.py --smoke        # asks itself once, and ends

A state is a value: the page goes on from one, and forks it, which costs nothing. The picture is
the hidden state of every layer, a column for each channel shown, a row for each of its states.

The server is aiohttp: one package that has HTTP, streaming and a client. It listens on the loopback
interface only, answers no request that comes by another name (against DNS rebinding) or from
another origin, takes JSON only, and loads nothing from elsewhere. Prompts, new tokens, kept states
and requests at a time are limited.
"""

import argparse
import asyncio
import base64
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from aiohttp import ClientSession, web

import mamba_eqx as mbx


PAGE = Path(__file__).with_suffix(".html")
MAX_PROMPT = 4096  # characters
MAX_NEW = 1024  # tokens
MAX_REQUESTS = 2  # at a time
MAX_STATES = 64
BLOCK = 8  # tokens between two pictures
WIDTH = 64  # channels in a picture


def picture(state: mbx.DecodingState) -> dict[str, Any]:
    """One byte for each value shown, 128 for zero."""
    hidden = [layer.ssm for layer in jax.tree.leaves(state.layers, is_leaf=has_hidden_state)]
    rows = [np.asarray(h, np.float32).reshape(h.shape[0], -1) for h in hidden]
    shown = np.stack([row[:, :: max(1, row.shape[1] // WIDTH)][:, :WIDTH] for row in rows])
    # Each layer by its own scale.
    scale = np.abs(shown).mean(axis=(1, 2), keepdims=True) * 2 + 1e-9
    pixels = np.round(128 + 127 * np.tanh(shown / scale)).astype(np.uint8)
    return {"shape": pixels.shape, "pixels": base64.b64encode(pixels.tobytes()).decode()}


def has_hidden_state(tree: Any) -> bool:
    return isinstance(tree, mbx.Mamba1State | mbx.Mamba2State)


class Server:
    def __init__(self, model: mbx.LanguageModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        end = tokenizer.end if isinstance(tokenizer, mbx.TextTokenizer) else None
        self.stop_tokens = [] if end is None else [end]
        # Some models have more tokens than their tokenizers, which mean nothing.
        no_text = range(tokenizer.vocab_size, model.vocab_size)
        self.bias = dict.fromkeys(no_text, -float("inf")) or None
        self.states: OrderedDict[str, mbx.DecodingState] = OrderedDict()
        self.running = 0
        self.names: set[str] = set()  # as which the server may be addressed

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=8 * MAX_PROMPT)
        app.add_routes([web.get("/", self.page), web.post("/generate", self.generate)])
        return app

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        ours = origin is None or origin.removeprefix("http://") in self.names
        if request.headers.get("Host") not in self.names or not ours:
            raise web.HTTPForbidden(text="This server answers to its own page only.")
        return await handler(request)

    async def page(self, request: web.Request) -> web.Response:
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
        """Lines of JSON: pieces of text with pictures, and at the end the name of the state."""
        asked = self.read(request, await request.text())
        if self.running >= MAX_REQUESTS:
            raise web.HTTPServiceUnavailable(text="Too many requests at a time: try again.")
        self.running += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            state, prompt, left = asked["state"], asked["prompt"], asked["max_new_tokens"]
            decoder, key = self.tokenizer.decoder(), jr.key(asked["seed"])
            sampling = mbx.Sampling(
                temperature=asked["temperature"],
                logit_bias=self.bias,
                stop_tokens=self.stop_tokens,
            )
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
            name = self.keep(state)
            last = {"text": decoder.end(), "state": name, "position": int(state.position) + 1}
            await response.write(json.dumps(last).encode() + b"\n")
            return response
        finally:
            self.running -= 1

    def read(self, request: web.Request, body: str) -> dict[str, Any]:
        def refuse(why: str) -> web.HTTPException:
            return web.HTTPBadRequest(text=why)

        if request.content_type != "application/json":
            raise refuse("The request must be JSON.")
        try:
            asked = json.loads(body)
            found = {name: asked[name] for name in ("prompt", "state", "seed", "temperature")}
            found["max_new_tokens"] = asked["max_new_tokens"]
        except (ValueError, TypeError, KeyError):
            raise refuse("A prompt, state, seed, temperature and max_new_tokens.") from None
        prompt, state, heat = found["prompt"], found["state"], found["temperature"]
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            raise refuse(f"The prompt must be text of at most {MAX_PROMPT} characters.")
        for name, low, high in (("max_new_tokens", 1, MAX_NEW), ("seed", 0, 2**32 - 1)):
            if type(found[name]) is not int or not low <= found[name] <= high:
                raise refuse(f"`{name}` must be an integer within {low}..{high}.")
        if type(heat) not in (int, float) or not 0 < heat <= 10:
            raise refuse("`temperature` must be a number above 0, and at most 10.")
        if state is None and not prompt:
            raise refuse("The prompt is empty: there is nothing to start from.")
        if state is not None and not (isinstance(state, str) and state in self.states):
            raise refuse("There is no such state any more: start afresh.")
        try:
            ids = self.tokenizer.encode(prompt)
        except ValueError as error:
            raise refuse(str(error)) from None
        return found | {"prompt": ids, "state": None if state is None else self.states[state]}

    def keep(self, state: mbx.DecodingState) -> str:
        name = secrets.token_urlsafe(12)
        self.states[name] = state
        while len(self.states) > MAX_STATES:
            self.states.popitem(last=False)
        return name


async def serve(server: Server, port: int, smoke: bool) -> None:
    runner = web.AppRunner(server.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    port = runner.addresses[0][1]
    server.names |= {f"127.0.0.1:{port}", f"localhost:{port}"}
    url = f"http://127.0.0.1:{port}/"
    print(url, flush=True)
    try:
        if not smoke:
            await asyncio.Event().wait()
        asked = {"state": None, "seed": 0, "temperature": 0.8, "max_new_tokens": 32}
        post = {"url": f"{url}generate", "json": asked | {"prompt": "ROMEO:"}}
        async with ClientSession() as session, session.post(**post) as answer:
            lines = [json.loads(line) async for line in answer.content]
        print("".join(line["text"] for line in lines))
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=str(mbx.SHIPPED), help="a folder, or a repository on the Hub"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--smoke", action="store_true", help="ask once, print the answer, end")
    args = parser.parse_args()
    model = mbx.from_pretrained(args.model, dtype=jnp.float32)
    server = Server(model, mbx.load_tokenizer(args.model))
    try:
        asyncio.run(serve(server, 0 if args.smoke else args.port, args.smoke))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
