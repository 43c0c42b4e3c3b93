"""The connections of the server, which no client can hold up.

By default the server listens on the loopback interface only. It rejects requests for other host
names (against DNS rebinding) and from other origins. A connection on which the client neither sends
its request nor reads its answer is closed after some seconds, and the number of connections is
limited.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from ._aiohttp import web
from ._errors import ApiError
from ._worker import LOG


MAX_CONNECTIONS = 256
PATIENCE = 10.0  # Seconds that the server waits for a client to send or to read.
# For these and the files of the page, which asks for the key, none is needed.
_OPEN_PATHS = ("/", "/health")


class Connections:
    """The open connections, and how long the server has been waiting for each client.

    A connection on which the client does not send or read for `PATIENCE` seconds is closed, also
    before its first request is complete. Beyond `MAX_CONNECTIONS`, the one that has been waited for
    the longest makes room for a new one. If the server works for all of them, it refuses the new
    one.
    """

    def __init__(self, key: str | None):
        """**Arguments:**

        - `key`: the key that requests must have, or `None`.
        """
        self._key = key
        self._hosts: set[str] | None = set()  # the names of the server, `None` for any
        self._since: dict[web.RequestHandler, float] = {}  # when waiting for the client began
        self._working: set[web.RequestHandler] = set()  # connections that the server works for

    @contextlib.asynccontextmanager
    async def listen(self, app: web.Application, host: str, port: int) -> AsyncIterator[str]:
        """Serves an application, whose middleware is `guard`, and yields its address."""
        runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            lingering_time=1,
            shutdown_timeout=1,
        )
        await runner.setup()
        server = runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: self._accept(server), host, port)
        port = listener.sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        if is_loopback(host):
            names = {name, "127.0.0.1", "localhost"}
            self._hosts = {f"{known}:{port}" for known in names}
            if port == 80:  # Clients leave it out.
                self._hosts |= names
        else:
            self._hosts = None
        watch = asyncio.create_task(self._watch())
        try:
            yield f"http://{name}:{port}/"
        finally:
            watch.cancel()
            listener.close()
            await runner.cleanup()

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Rejects requests for other hosts, from other origins, or without the key, and logs faults
        of the server.

        A client that goes away is no fault.
        """
        try:
            self._check(request)
            return await handler(request)
        except ApiError as error:
            return error.response()
        except web.HTTPException as error:  # From the routes of aiohttp.
            return ApiError(
                error.status, f"{error.reason}: {request.method} {request.path}."
            ).response()
        except ConnectionError:
            raise
        except Exception:
            LOG.exception("%s %s failed", request.method, request.rel_url)
            return ApiError(500, "The server has a fault. See its log.").response()
        finally:
            self.wait(request)

    def wait(self, request: web.Request) -> None:
        """Notes that the client has to send or to read something now."""
        self._working.discard(request.protocol)
        self._since[request.protocol] = asyncio.get_running_loop().time()

    def work(self, request: web.Request) -> None:
        """Notes that the client waits for the server."""
        self._since.pop(request.protocol, None)
        self._working.add(request.protocol)

    async def write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Sends data as soon as the client has read enough of the earlier ones."""
        self.wait(request)
        try:
            if not response.prepared:
                await response.prepare(request)
            await response.write(data)
        finally:
            self.work(request)

    def _check(self, request: web.Request) -> None:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        is_known = self._hosts is None or host in self._hosts
        own = {host} if self._hosts is None else self._hosts
        if not is_known or (origin is not None and not _is_own(origin, own)):
            raise ApiError(403, "This server accepts requests from its own page and host only.")
        is_open = request.path in _OPEN_PATHS or request.path.startswith("/page/")
        if self._key is None or is_open:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            raise ApiError(
                401,
                "The request must have the API key of this server in its Authorization header.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _accept(self, server: web.Server) -> asyncio.Protocol:
        """Returns the protocol of a new connection."""
        made = [connection for connection in self._since if connection.transport is not None]
        if len(made) + len(self._working) >= MAX_CONNECTIONS:
            if not made:
                return _Refusal()
            self._close(min(made, key=lambda connection: self._since[connection]))
        connection = server()
        self._since[connection] = asyncio.get_running_loop().time()
        return connection

    def _close(self, connection: web.RequestHandler) -> None:
        self._since.pop(connection, None)
        if connection.transport is not None:
            connection.transport.abort()

    async def _watch(self) -> None:
        """Closes connections whose time is up, for ever."""
        while True:
            await asyncio.sleep(PATIENCE / 20)
            now = asyncio.get_running_loop().time()
            for connection, start in list(self._since.items()):
                is_gone = connection.transport is None and now - start > 1
                if is_gone or now - start > PATIENCE:
                    self._close(connection)


class _Refusal(asyncio.Protocol):
    """A connection that is closed at once, with an answer that says when to come again."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        error = ApiError(503, "The server has too many connections. Try again in a moment.")
        body = json.dumps(error.body()).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()


def _is_own(origin: str, hosts: set[str]) -> bool:
    """Returns whether an origin is one of some hosts, also behind a proxy with TLS."""
    scheme, _, host = origin.partition("://")
    return scheme in ("http", "https") and host in hosts


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
