"""The server: the engine's thread, the routes, and the connections."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator

from ..generation import Engine
from ._aiohttp import web
from ._connections import Connections
from ._errors import ApiError
from ._metrics import metrics
from ._openai import OpenAI
from ._page import Page
from ._served import Served
from ._worker import Worker


MAX_BODY = 2**20  # bytes


class Server:
    """A server of one model: OpenAI's API, the page, `/health` and `/metrics`."""

    def __init__(self, served: Served, *, key: str | None = None):
        """**Arguments:**

        - `served`: the model and its limits.
        - `key`: the key that clients must give, or `None`.
        """
        self._served = served
        self._connections = Connections(key)
        self.worker = Worker(self._engine)
        self._page = Page(served, self.worker)
        self._openai = OpenAI(served, self.worker, self._connections, self._page.note)

    @contextlib.asynccontextmanager
    async def listen(self, host: str, port: int) -> AsyncIterator[str]:
        """Serves until the block ends, and yields the address."""
        app = web.Application(middlewares=[self._connections.guard], client_max_size=MAX_BODY)
        app.add_routes([web.get("/health", self._health), web.get("/metrics", self._metrics)])
        app.add_routes([*self._openai.routes(), *self._page.routes()])
        self.worker.start()
        try:
            async with self._connections.listen(app, host, port) as url:
                yield url
        finally:
            self.worker.stop()

    def _engine(self) -> Engine:
        served = self._served
        engine = Engine(
            served.model,
            slots=served.slots,
            queue=served.queue,
            max_len=served.max_len,
            prefix_bytes=served.prefix_bytes,
        )
        usual = served.sampling()
        engine.warm_up(*(dataclasses.replace(usual, temperature=1.0, top_p=p) for p in (None, 0.9)))
        return engine

    async def _health(self, request: web.Request) -> web.Response:
        if not self.worker.alive:
            raise ApiError(503, "The engine has ended. Restart the server.")
        return web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        engine = self.worker.engine
        if engine is None:
            raise ApiError(503, "The engine has failed. Try again in a minute.")
        text = metrics(engine, self._openai.refused)
        return web.Response(
            body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
