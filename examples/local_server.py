"""A web server for one page on this machine, which no client can hold up. `serve.py` uses it.

The server listens on the loopback interface only, and rejects requests for other host names
(against DNS rebinding) and from other origins. A connection on which the client neither sends its
request nor reads its answer is closed after some seconds, and the number of connections is limited.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable


try:
    from aiohttp import ClientSession as ClientSession, web as web
except ImportError:
    print('This example requires aiohttp: pip install "mamba_eqx[serve]".', file=sys.stderr)
    raise SystemExit(2) from None


MAX_CONNECTIONS = 128
PATIENCE = 10.0  # Seconds that the server waits for a client to send or to read.

LOG = logging.getLogger("server")


class LocalServer:
    """The open connections, and how long the server has been waiting for each client.

    A connection on which the client does not send or read for `PATIENCE` seconds is closed, also
    before its first request is complete. Beyond `MAX_CONNECTIONS`, the one that has been waited for
    the longest makes room for a new one.
    """

    def __init__(self):
        self.hosts: set[str] = set()  # host names under which the server accepts requests
        self.since: dict[web.RequestHandler, float] = {}  # when waiting for the client began

    @contextlib.asynccontextmanager
    async def listen(self, app: web.Application, port: int) -> AsyncIterator[str]:
        """Serves an application, whose middleware is `guard`, and yields its address."""
        runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, lingering_time=1, shutdown_timeout=1
        )
        await runner.setup()
        server = runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: self.accept(server), "127.0.0.1", port)
        port = listener.sockets[0].getsockname()[1]
        self.hosts |= {f"127.0.0.1:{port}", f"localhost:{port}"}
        watch = asyncio.create_task(self.watch())
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            watch.cancel()
            listener.close()
            await runner.cleanup()

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Rejects requests for other hosts and from other origins, and logs faults of the server.

        A client that goes away is no fault.
        """
        origin = request.headers.get("Origin")
        is_own = origin is None or origin.removeprefix("http://") in self.hosts
        try:
            if request.headers.get("Host") not in self.hosts or not is_own:
                raise web.HTTPForbidden(text="This server accepts requests from its own page only.")
            return await handler(request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            LOG.exception("%s %s failed", request.method, request.rel_url)
            raise web.HTTPInternalServerError(text="The server has a fault. See its log.") from None
        finally:
            self.wait(request)

    def accept(self, server: web.Server) -> web.RequestHandler:
        """Returns the protocol of a new connection."""
        made = [connection for connection in self.since if connection.transport is not None]
        if len(made) >= MAX_CONNECTIONS:
            self.close(min(made, key=lambda connection: self.since[connection]))
        connection = server()
        self.since[connection] = asyncio.get_running_loop().time()
        return connection

    def wait(self, request: web.Request) -> None:
        """Notes that the client has to send or to read something now."""
        self.since[request.protocol] = asyncio.get_running_loop().time()

    def work(self, request: web.Request) -> None:
        """Notes that the client waits for the server."""
        self.since.pop(request.protocol, None)

    def close(self, connection: web.RequestHandler) -> None:
        self.since.pop(connection, None)
        if connection.transport is not None:
            connection.transport.abort()

    async def watch(self) -> None:
        """Closes connections whose time is up, for ever."""
        while True:
            await asyncio.sleep(PATIENCE / 20)
            now = asyncio.get_running_loop().time()
            for connection, start in list(self.since.items()):
                is_gone = connection.transport is None and now - start > 1
                if is_gone or now - start > PATIENCE:
                    self.close(connection)


def start_log() -> None:
    """Writes what happens to standard error. A damaged request is one line, because whoever can
    connect could fill the log otherwise. Faults of the server keep their tracebacks."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler])


class _OneLine(logging.Formatter):
    """aiohttp logs what is wrong with a request as an exception."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name != LOG.name and record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return f"{record.getMessage()}: {cause}"
        return super().format(record)
