"""Serves a page on this machine that streams text from a model and shows its recurrent state.

    pip install ".[serve]"
    python examples/serve.py                # then open the printed address
    python examples/serve.py --smoke        # sends one request to itself and exits

A state is a value: the page can continue from any state and fork it at no cost. The picture shows
the hidden state of every mixer, with a column per channel and a row per state dimension.

The server uses aiohttp, a single package with HTTP, streaming and a client. `local_server.py`
guards it. The server accepts JSON only, and the page loads nothing from other servers. The lengths
of prompts and answers, the stored states and the number of requests are limited. Requests take
turns after each block of tokens, and none has a turn while its client does not read, so that a slow
client delays no other.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import heapq
import json
import math
import secrets
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree
from local_server import LOG, ClientSession, LocalServer, start_log, web

import mamba_eqx as mbx


PAGE = Path(__file__).with_suffix(".html")
MAX_PROMPT = 4096  # Characters.
MAX_NEW = 1024  # Tokens.
PLACES = 2  # Blocks of tokens that are computed at the same time.
MAX_REQUESTS = 64  # Requests that take turns at these places.
MAX_STATES = 64
MAX_STATE_BYTES = 2**30  # All states together.
BLOCK = 8  # Tokens between two pictures.
WIDTH = 64  # Channels in a picture.
HEIGHT = 16  # State dimensions in a picture.
TINY = float(np.finfo(np.float32).tiny)


class Text(NamedTuple):
    """The tokens of a text, and the state after them."""

    ids: list[int]
    state: mbx.DecodingState


class Generate(NamedTuple):
    """A validated request to generate text, continuing `past` if there is one."""

    prompt: list[int]
    past: Text | None
    key: jax.Array
    sampling: mbx.Sampling
    max_new_tokens: int


def picture(state: mbx.DecodingState) -> list[dict[str, object]]:
    """Returns the hidden state of each mixer as pixels of one byte each, in which 128 is zero."""
    found = []
    for layer in jax.tree.leaves(state.layers, is_leaf=has_hidden_state):
        hidden = hidden_state(layer) if has_hidden_state(layer) else None
        if hidden is None or hidden.size == 0:
            continue
        rows, columns = hidden.shape
        shown = hidden[:: -(-rows // HEIGHT), :: max(1, columns // WIDTH)][:, :WIDTH]
        # Each mixer has its own scale.
        scale = np.abs(shown).mean() * 2 + 1e-9
        pixels = np.round(128 + 127 * np.tanh(np.nan_to_num(shown / scale))).astype(np.uint8)
        shape, data = pixels.shape, base64.b64encode(pixels.tobytes()).decode()
        found.append({"shape": shape, "pixels": data})
    return found


def has_hidden_state(tree: object) -> bool:
    """Returns whether a subtree is the state of a mixer that `hidden_state` knows."""
    kinds = mbx.Mamba1State | mbx.Mamba2State | mbx.Mamba3State | mbx.KVCache
    return isinstance(tree, kinds)


def hidden_state(layer: PyTree) -> np.ndarray:
    """Returns the hidden state of a layer as a matrix of state dimensions and channels.

    The state of attention is the keys of the last tokens: a row for each token.
    """
    match layer:
        case mbx.Mamba3State():
            hidden = np.moveaxis(np.asarray(layer.ssm, np.float32), -1, 0)
        case mbx.KVCache():
            keys = np.moveaxis(np.asarray(layer.k, np.float32), -2, 0)
            known = min(int(layer.length), len(keys))
            hidden = keys[max(0, known - HEIGHT) : known]
        case _:
            hidden = np.asarray(layer.ssm, np.float32)
    return hidden.reshape(len(hidden), math.prod(hidden.shape[1:]))


def refusal(reason: str) -> web.HTTPException:
    """Returns the error for an invalid request."""
    return web.HTTPBadRequest(text=reason)


class Turns:
    """The places in which blocks are computed. Those who have had the least come first, so that
    many long texts do not delay a short one."""

    def __init__(self):
        self.free = PLACES
        self.queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self.count = 0

    @contextlib.asynccontextmanager
    async def take(self, had: int) -> AsyncIterator[None]:
        """Holds a place, after those who have had less than `had`."""
        if self.free:
            self.free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self.count += 1
            heapq.heappush(self.queue, (had, self.count, turn))
            await turn
        try:
            yield
        finally:
            waiting = (heapq.heappop(self.queue)[-1] for _ in range(len(self.queue)))
            turn = next((turn for turn in waiting if not turn.done()), None)
            if turn is None:
                self.free += 1
            else:
                turn.set_result(None)


class Server:
    """The page, the endpoint that generates text, and the states that clients can continue from."""

    def __init__(self, model: mbx.LanguageModel, tokenizer: mbx.TextTokenizer | mbx.ByteTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.sampling = mbx.Sampling().for_model(model, tokenizer)
        self.texts: OrderedDict[str, Text] = OrderedDict()
        self.turns = Turns()
        self.requests = 0
        self.local = LocalServer()

    def app(self) -> web.Application:
        """Returns the application with its routes."""
        app = web.Application(middlewares=[self.local.guard], client_max_size=16 * MAX_PROMPT)
        app.add_routes([web.get("/", self.page), web.post("/generate", self.generate)])
        return app

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
        asked = self.read(request, await self.body(request))
        if self.requests >= MAX_REQUESTS:
            raise web.HTTPServiceUnavailable(text="Too many concurrent requests. Try again.")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        self.requests += 1
        try:
            await self.stream(request, response, asked)
        except (ValueError, ArithmeticError, MemoryError, jax.errors.JaxRuntimeError) as error:
            LOG.warning("A text ended early: %s", error)
            await self.send(request, response, {"error": f"The text ended early: {error}"})
        finally:
            self.requests -= 1
        return response

    async def stream(
        self, request: web.Request, response: web.StreamResponse, asked: Generate
    ) -> None:
        """Generates a text and sends it in blocks."""
        state, ids = (None, []) if asked.past is None else (asked.past.state, [*asked.past.ids])
        ids += asked.prompt
        prompt, left, had = asked.prompt or None, asked.max_new_tokens, 0
        decoder = self.tokenizer.decoder(prompt=ids)
        while left > 0:
            async with self.turns.take(had):
                out, shown = await asyncio.to_thread(
                    self.block, prompt, min(BLOCK, left), asked, state
                )
            state, prompt, left = out.state, None, 0 if bool(out.stopped) else left - BLOCK
            new = out.tokens[: int(out.length)].tolist()
            ids, had = ids + new, had + 1
            await self.send(request, response, {"text": decoder.feed(new), "picture": shown})
        assert state is not None
        name = self.store(Text(ids, state))
        last = {"text": decoder.flush(), "state": name, "position": int(state.position) + 1}
        await self.send(request, response, last)

    def block(
        self, prompt: list[int] | None, count: int, asked: Generate, state: mbx.DecodingState | None
    ) -> tuple[mbx.Generation, list[dict[str, object]]]:
        """Generates at most `count` tokens, and draws the state after them."""
        out = mbx.generate(self.model, prompt, count, asked.sampling, state=state, key=asked.key)
        return out, picture(out.state)

    async def send(
        self, request: web.Request, response: web.StreamResponse, line: dict[str, object]
    ) -> None:
        """Sends a line as soon as the client has read enough of the earlier ones. The request does
        not count as one meanwhile."""
        self.requests -= 1
        self.local.wait(request)
        try:
            if not response.prepared:
                await response.prepare(request)
            await response.write(json.dumps(line).encode() + b"\n")
        finally:
            self.local.work(request)
            self.requests += 1

    async def body(self, request: web.Request) -> str:
        """Returns the body of a request, which must be JSON in UTF-8."""
        if request.content_type != "application/json":
            raise refusal("The request must be JSON.")
        charset = request.charset
        if "Content-Encoding" in request.headers or (charset or "utf-8").lower() != "utf-8":
            raise refusal("The request must be JSON in UTF-8, without compression.")
        try:
            data = await request.read()
        except web.RequestPayloadError:
            raise refusal("The body of the request is damaged.") from None
        except RuntimeError as error:  # aiohttp raises it if the client is gone.
            if request.transport is None:
                raise ConnectionResetError("The client is gone.") from error
            raise
        self.local.work(request)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise refusal("The request must be JSON in UTF-8.") from None

    def read(self, request: web.Request, body: str) -> Generate:
        """Validates a request to generate text."""
        try:
            asked = json.loads(body)
            fields = ("prompt", "state", "seed", "temperature", "max_new_tokens")
            prompt, name, seed, temperature, count = (asked[field] for field in fields)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise refusal(
                "The request must have a prompt, state, seed, temperature and max_new_tokens."
            ) from None
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            raise refusal(f"The prompt must be text of at most {MAX_PROMPT} characters.")
        check_integer("max_new_tokens", count, 1, MAX_NEW)
        check_integer("seed", seed, 0, 2**32 - 1)
        if type(temperature) not in (int, float) or not TINY <= temperature <= 10:
            raise refusal(f"`temperature` must be a number within {TINY:.2g}..10.")
        if name is None and not prompt:
            raise refusal("The prompt is empty. Give at least one character to start from.")
        if name is not None and not (isinstance(name, str) and name in self.texts):
            raise refusal("There is no such state: old states are dropped. Start a new text.")
        past = None if name is None else self.texts[name]
        sampling = dataclasses.replace(self.sampling, temperature=float(temperature))
        return Generate(self.encode(prompt, past), past, jr.key(seed), sampling, count)

    def encode(self, prompt: str, past: Text | None) -> list[int]:
        """Encodes a prompt, or a text that continues an earlier one."""
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise refusal("The prompt must not have surrogates, which are no characters.") from None
        if past is not None and isinstance(self.tokenizer, mbx.TextTokenizer):
            ids = self.tokenizer.encode_piece(prompt)
        else:
            ids = self.tokenizer.encode(prompt)
        if past is None and not ids:
            raise refusal("The tokenizer finds no tokens in the prompt. Give a longer one.")
        if max(ids, default=0) >= self.model.vocab_size:
            raise refusal("The prompt has a token that the model lacks. Write it differently.")
        return ids

    def store(self, text: Text) -> str:
        """Stores a text, drops the oldest ones beyond the limits, and returns the new name."""
        name = secrets.token_urlsafe(12)
        self.texts[name] = text
        while len(self.texts) > 1 and not self.fits():
            self.texts.popitem(last=False)
        return name

    def fits(self) -> bool:
        """Returns whether the stored texts are within the limits."""
        states = [text.state for text in self.texts.values()]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
        return len(states) <= MAX_STATES and size <= MAX_STATE_BYTES


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Rejects a request whose field `name` is not an integer within `low..high`."""
    if type(value) is not int or not low <= value <= high:
        raise refusal(f"`{name}` must be an integer within {low}..{high}.")


async def serve(server: Server, port: int, smoke: bool) -> None:
    """Serves until interrupted; with `smoke`, sends one request and prints the answer instead."""
    async with server.local.listen(server.app(), port) as url:
        print(url, flush=True)
        if not smoke:
            await asyncio.Event().wait()
        asked = {"prompt": "ROMEO:", "state": None, "seed": 0, "temperature": 0.8}
        asked |= {"max_new_tokens": 32}
        async with ClientSession() as session, session.post(f"{url}generate", json=asked) as answer:
            lines = [json.loads(line) async for line in answer.content]
        print("".join(line["text"] for line in lines))


def port_number(text: str) -> int:
    """The type of the option `--port`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be an integer within 0..65535, but got {text}")
    return int(text)


def fail(option: str, error: Exception) -> NoReturn:
    """Ends the process with one line about an option that cannot be used."""
    print(f"serve.py: error: {option}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default=str(mbx.SHIPPED),
        help="checkpoint folder, or repository on the Hub (default: the bundled model)",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=8000,
        help="port; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="send one request, print the answer, exit"
    )
    args = parser.parse_args()
    start_log()
    try:
        model = mbx.from_pretrained(args.model, dtype=jnp.float32)
        server = Server(model, mbx.load_tokenizer(args.model))
    except (ValueError, OSError, ImportError) as error:
        fail("--model", error)
    try:
        asyncio.run(serve(server, 0 if args.smoke else args.port, args.smoke))
    except OSError as error:
        fail("--port", error)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
