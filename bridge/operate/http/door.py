"""Where HTTP connections come in: so many at a time, each for so long and with so many bytes.

Whoever connects may be slow, huge, malformed or many; none of it may cost the bridge more than a little memory. One
request a connection: it must have arrived within seconds and be answered within seconds. Where all places are taken,
the oldest connection that has not asked for anything yet makes room; where all have asked, a newcomer is told to come
again. What is not HTTP is answered with 400 and logged nowhere: a log that strangers fill would do more harm than they.
A stream of events may stay; streams.py counts those.

Source: RFC 9110, RFC 9112; aiohttp's low-level server (`web.Server`, `web.RequestHandler`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import anyio
from aiohttp import web

from bridge import config
from bridge.errors import ServerRefused
from bridge.operate.http.answer import text

CONNECTIONS = 64
ASK_SECONDS = 5.0
ANSWER_SECONDS = 30.0
# Headers and body together: what a request with a long token and a table's name needs, many times over.
LARGEST = 64 << 10
LONGEST_LINE = 8 << 10
MOST_HEADERS = 64
BACKLOG = 64
# What the kernel keeps for a client that takes nothing.
SEND_BUFFER = 64 << 10
SHUTDOWN_SECONDS = 0.1

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    b"too many connections\n"
)
_TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def _silent() -> logging.Logger:
    logger = logging.getLogger("bridge.http")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    return logger


class Door:
    """Makes the protocol of each connection; `handler` answers what was asked."""

    def __init__(self, handler: Handler) -> None:
        self.server = web.Server(handler, handler_cancellation=True)
        self._there: dict[asyncio.BaseTransport, _Connection] = {}
        # In the order in which they came: those that have not asked for anything yet.
        self._asking: dict[asyncio.BaseTransport, _Connection] = {}

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self)

    def asked(self, transport: asyncio.BaseTransport | None) -> None:
        """The request on this connection has arrived: it is to be answered now."""
        if transport is not None and self._asking.pop(transport, None) is not None:
            self._there[transport].within(ANSWER_SECONDS)

    def stays(self, transport: asyncio.BaseTransport | None) -> None:
        """This connection may go on."""
        if transport in self._there:
            self._there[transport].within(None)

    def admit(self, connection: _Connection, transport: asyncio.Transport) -> bool:
        """Whether there is a place, or one can be had."""
        if len(self._there) >= CONNECTIONS:
            if not self._asking:
                return False
            self._asking[next(iter(self._asking))].end()
        self._there[transport] = self._asking[transport] = connection
        return True

    def gone(self, transport: asyncio.BaseTransport) -> None:
        """A connection has ended."""
        self._there.pop(transport, None)
        self._asking.pop(transport, None)


class _Requests(web.RequestHandler):
    """aiohttp's side of one connection: parser and answers."""

    __slots__ = ()

    def __init__(self, server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            logger=_silent(),
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
            max_headers=MOST_HEADERS,
            lingering_time=0.0,
            keepalive_timeout=ASK_SECONDS,
        )

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.Response:
        """What the parser refuses: its own words repeat what was sent."""
        del request, exc, message
        response = text("this is not a request that can be answered\n", status)
        response.force_close()
        return response


class _Connection(asyncio.Protocol):
    """One connection: aiohttp's protocol with a limit of bytes and of time around it."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are none by inheritance.
        self._transport = transport = cast(asyncio.Transport, transport)
        if not self._door.admit(self, transport):
            self._refuse(_BUSY)
            return
        self.within(ASK_SECONDS)
        self._inner = _Requests(self._door.server)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._taken += len(data)
        if self._inner is None:
            return
        if self._taken > LARGEST:
            self._refuse(_TOO_LARGE)
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.within(None)
        if self._transport is not None:
            self._door.gone(self._transport)
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def within(self, seconds: float | None) -> None:
        """End in so many seconds; None: not by itself."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.end) if seconds is not None else None

    def end(self) -> None:
        """Close at once; the place is free from here on."""
        if self._transport is not None:
            self._door.gone(self._transport)
            self._transport.abort()

    def _refuse(self, answer: bytes) -> None:
        assert self._transport is not None
        self._transport.write(answer)
        self._transport.close()
        self.within(1.0)


@contextlib.asynccontextmanager
async def listening(address: str, key: str) -> AsyncIterator[list[socket.socket]]:
    """Sockets that are bound to an address, for `served`.

    Args:
        address: "host:port"; a name may stand for several addresses.
        key: the configuration's key, for errors.

    Raises:
        ServerRefused: the port is in use, or the address is not to be had.
    """
    host, port = config.address(address)
    sockets: list[socket.socket] = []
    try:
        for found in await _resolved(address, host, port, key):
            sockets.append(_bound(found, address, key))  # noqa: PERF401 - those that were bound before an error are closed
        yield sockets
    finally:
        for one in sockets:
            one.close()


async def _resolved(address: str, host: str, port: int, key: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServerRefused(
            f"{address} ([operate] {key}) is no address of this machine: {error.strerror}", _remedy(key)
        ) from None
    return list(dict.fromkeys((family, where[:2]) for family, _, _, _, where in found))  # type: ignore[misc]


def _bound(found: tuple[socket.AddressFamily, tuple[str, int]], address: str, key: str) -> socket.socket:
    family, where = found
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        made.setblocking(False)
        made.bind(where)
        # Bound alone, the port could still be had by another process.
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        taken = error.errno == errno.EADDRINUSE
        why = "is in use by another process" if taken else f"cannot be listened on: {error.strerror}"
        raise ServerRefused(f"{address} ([operate] {key}) {why}", _remedy(key)) from None
    return made


def _remedy(key: str) -> str:
    return f'choose another address, or none: [operate] {key} = ""'


@contextlib.asynccontextmanager
async def served(sockets: list[socket.socket], door: Door) -> AsyncIterator[None]:
    """Connections are taken and answered while the block lasts; what is open at its end is closed."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(door, sock=one, backlog=BACKLOG) for one in sockets]
    try:
        yield
    finally:
        for server in servers:
            server.close()
        with anyio.CancelScope(shield=True):
            await door.server.shutdown(SHUTDOWN_SECONDS)
