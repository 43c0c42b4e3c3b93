"""Measures `mamba-eqx serve` under load: 1, 8, 32 and 128 clients over loopback.

    python benchmarks/serve.py [--quick]
    python benchmarks/serve.py --soak 10000  # memory over so many short requests

Clients are in a process of their own. Each streams one text after another, after prompts of mixed
lengths. The table shows the time to the first token and the tokens per second of a text (median,
and the worst of a hundred), and the tokens per second of all clients together. One row has clients
beside it that read slowly, leave in the middle of an answer, never finish their request, or send
what is no request. The last rows show `generate` on the same requests, in batches of as many rows
as there are slots. Other libraries are not measured.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.random as jr
import numpy as np
from _common import (
    arguments,
    byte_model,
    medians,
    print_facts,
    print_table,
    print_verdict,
    shown,
    tiny_model,
)
from aiohttp import ClientSession, TCPConnector

import mamba_eqx as mbx
from mamba_eqx.serving import Served, Server


SLOTS = 8
CLIENTS = (1, 8, 32, 128)
HEADER = (
    *("clients", "prompts", "first token (ms)", "worst of 100", "tokens/s of a text"),
    *("worst of 100", "tokens/s of all"),
)


class Ask(NamedTuple):
    """A request: its prompt and its number of tokens."""

    prompt: list[int]
    tokens: int

    def body(self, **changes: object) -> dict[str, object]:
        asked = {"model": "bytes", "prompt": self.prompt, "max_tokens": self.tokens, "seed": 0}
        return asked | {"stream": True, "stream_options": {"include_usage": True}} | changes


class Took(NamedTuple):
    """The seconds that a text took, and its number of tokens."""

    first: float
    last: float
    tokens: int


# --- Clients, which run in another process ---


async def _client(url: str, session: ClientSession, asks: Sequence[Ask]) -> list[Took]:
    found: list[Took] = []
    for ask in asks:
        start = time.perf_counter()
        first, tokens = 0.0, 0
        async with session.post(f"{url}v1/completions", json=ask.body()) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - start
                    usage = json.loads(line[6:]).get("usage")
                    tokens = usage["completion_tokens"] if usage else 0
        found.append(Took(first, time.perf_counter() - start, tokens))
    return found


async def _trouble(url: str, kind: str, rng: random.Random) -> None:
    """Is a client that behaves badly, again and again."""
    host, port = url.removeprefix("http://").strip("/").split(":")
    whole = json.dumps(Ask([1] * 8, 400).body(logprobs=5)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(whole)}\r\n\r\n"
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port), limit=2**10)
            try:
                match kind:
                    case "slow":  # It reads 64 bytes in 0.1 s.
                        writer.write(head.encode() + whole)
                        for _ in range(50):
                            await reader.read(64)
                            await asyncio.sleep(0.1)
                    case "leaving":
                        writer.write(head.encode() + whole)
                        await reader.read(500)
                    case "half":
                        writer.write((head.encode() + whole)[: rng.randrange(len(head) + 20)])
                        await asyncio.sleep(1)
                    case _:
                        body = rng.choice([rng.randbytes(999), b"[" * 30000, b'{"n": 1e999}'])
                        begin = head.rpartition("Content-Length")[0]
                        writer.write(f"{begin}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                        await reader.read(500)
                        await asyncio.sleep(0.02)
            finally:
                writer.transport.abort()


def drive(url: str, texts: Sequence[Sequence[Ask]], *, trouble: bool = False) -> list[Took]:
    """Runs clients, each with its requests in turn."""

    async def run() -> list[Took]:
        kinds = ("slow", "slow", "leaving", "half", "half", "hostile") if trouble else ()
        others = [
            asyncio.create_task(_trouble(url, kind, random.Random(i)))
            for i, kind in enumerate(kinds)
        ]
        async with ClientSession(connector=TCPConnector(limit=0)) as session:
            found = await asyncio.gather(*(_client(url, session, asks) for asks in texts))
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return [took for tooks in found for took in tooks]

    return asyncio.run(run())


# --- The server ---


class Load:
    """A server, and the process of its clients."""

    def __init__(self, url: str, pool: concurrent.futures.Executor):
        self._url, self._pool = url, pool

    async def run(self, texts: Sequence[Sequence[Ask]], *, trouble: bool = False) -> list[Took]:
        call = functools.partial(drive, self._url, texts, trouble=trouble)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def row(
        self, name: object, prompts: str, texts: Sequence[Sequence[Ask]], *, trouble: bool = False
    ) -> list[object]:
        """Returns a row of the table."""
        start = time.perf_counter()
        found = await self.run(texts, trouble=trouble)
        seconds = time.perf_counter() - start
        first = [1e3 * took.first for took in found]
        speed = [(took.tokens - 1) / max(took.last - took.first, 1e-9) for took in found]
        rate = sum(took.tokens for took in found) / seconds
        numbers = [np.median(first), np.percentile(first, 99)]
        numbers += [np.median(speed), np.percentile(speed, 1), rate]
        return [name, prompts, *map(float, numbers)]


@contextlib.asynccontextmanager
async def serving(model: mbx.LanguageModel) -> AsyncIterator[Load]:
    """Runs the server in this process, and clients in another one."""
    served = Served(model, mbx.ByteTokenizer(), "bytes", slots=SLOTS, queue=256, prefix_bytes=2**24)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        async with Server(served).listen("127.0.0.1", 0) as url:
            yield Load(url, pool)


class Sizes(NamedTuple):
    """What is asked for."""

    texts: int
    """The number of texts of each client, fewer if there are many clients."""
    tokens: int
    lengths: list[int]
    """The lengths of prompts, which are equally frequent."""


def asks(vocab_size: int, count: int, sizes: Sizes, seed: int) -> list[Ask]:
    """Returns requests with random prompts."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice(sizes.lengths, count).tolist()
    return [Ask(rng.integers(0, vocab_size, size).tolist(), sizes.tokens) for size in lengths]


async def measure(model: mbx.LanguageModel, sizes: Sizes) -> None:
    """Prints the table."""
    short = sizes._replace(lengths=sizes.lengths[:1])
    names = {True: "mixed", False: f"{short.lengths[0]} tokens"}
    rows: list[list[object]] = []

    def texts(clients: int, of: Sizes) -> list[list[Ask]]:
        count = max(1, min(of.texts, of.texts * 2 * SLOTS // clients))
        return [asks(model.vocab_size, count, of, seed) for seed in range(clients)]

    async with serving(model) as load:
        # Every size is compiled, and every number of rows, before it is timed.
        # Log-probabilities, which bad clients ask for, are one more program.
        for _ in range(2):
            await load.run([[Ask([1] * n, 16)] * 4 for n in sizes.lengths] * 4, trouble=True)
        await load.run([[Ask([1] * 8, 128)] * 4])  # The batch shrinks to one row.
        for clients in CLIENTS:
            rows.append(await load.row(clients, names[True], texts(clients, sizes)))
        name = f"{SLOTS}, beside bad ones"
        rows.append(await load.row(name, names[True], texts(SLOTS, sizes), trouble=True))
        ratios: list[float] = []
        for of in (sizes, short):
            requests = [ask for client in texts(SLOTS, of) for ask in client]
            alone: list[float] = []
            served: list[list[object]] = []
            for _ in range(3):  # They take turns, so that other load affects both alike.
                alone.append(await asyncio.to_thread(generate_rate, model, requests))
                served.append(await load.row(SLOTS, "", texts(SLOTS, of)))
            rates = [float(str(row[-1])) for row in served]
            ratios.append(float(np.median(np.divide(rates, alone))))
            kind = names[of is sizes]
            if of is short:
                middle = sorted(range(3), key=lambda i: rates[i])[1]
                rows.append([SLOTS, kind, *served[middle][2:]])
            rows.append([f"`generate`, {SLOTS} rows", kind, *[None] * 4, float(np.median(alone))])
    print_table(HEADER, rows)
    for of, ratio in zip((sizes, short), ratios, strict=True):
        what = f"{SLOTS} clients, prompts: {names[of is sizes]}: tokens/s beside `generate`"
        print_verdict(what, ratio, 0.9)


def generate_rate(model: mbx.LanguageModel, requests: Sequence[Ask]) -> float:
    """Returns the tokens per second of `generate`, with batches of `SLOTS` of the requests."""
    sampling = mbx.Sampling(temperature=1.0)

    def run() -> None:
        for at in range(0, len(requests), SLOTS):
            batch = [ask.prompt for ask in requests[at : at + SLOTS]]
            mbx.generate(
                model, batch, requests[0].tokens, sampling, key=jr.key(0)
            ).tokens.block_until_ready()

    seconds = medians({"generate": run}, repeats=1)["generate"]
    return sum(ask.tokens for ask in requests) / seconds


async def soak(model: mbx.LanguageModel, count: int) -> None:
    """Prints the memory of the server while it answers many short requests."""
    sizes = Sizes(0, 4, [4, 8, 16])
    print("| requests | resident memory (MiB) |\n|---|---|", flush=True)
    async with serving(model) as load:
        for part in range(10 + 1):
            number = count // 10 // SLOTS
            if part:
                batch = [
                    asks(model.vocab_size, number, sizes, SLOTS * part + i) for i in range(SLOTS)
                ]
                await load.run(batch, trouble=True)
            else:  # Everything is compiled, and the prefix cache begins to fill.
                await load.run([asks(model.vocab_size, 200, sizes, i) for i in range(SLOTS)])
            # Long runs show how far they are.
            print(f"| {part * number * SLOTS} | {shown(resident_mib())} |", flush=True)


def resident_mib() -> float | None:
    """Returns the memory of this process, or `None` where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--soak", type=int, metavar="N", help="show the memory over N requests")
    args = arguments(__doc__, parent=parser)
    print_facts("Serving", quick=args.quick)
    model = tiny_model("mamba1") if args.quick else byte_model()
    if args.soak is not None:
        asyncio.run(soak(model, args.soak))
    else:
        sizes = Sizes(1, 4, [8, 20]) if args.quick else Sizes(6, 128, [8, 32, 128, 512])
        asyncio.run(measure(model, sizes))


if __name__ == "__main__":
    main()
