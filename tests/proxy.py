"""A TCP proxy on loopback whose connections a test can cut, hold, strand, delay, throttle and refuse.

Failures are made here, on real sockets, not with mocks.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct

import anyio
from anyio.abc import TaskGroup

from bridge.embedded import until

CHUNK = 256 * 1024
PIECES_A_SECOND = 20


class Proxy:
    """Forwards connections from its own port to `target` on 127.0.0.1.

    Its tasks run in the group it is given, and end with that. The fixture `proxied` makes them.

    Attributes:
        port: where clients connect; it stays, also through `refuse` and `accept`.
        delay: seconds that each chunk of bytes waits, in both directions.
        rate: bytes a second that pass in each direction of a connection; 0 = as many as come.
        forwarded: bytes that have passed so far.
    """

    def __init__(self, target: int, tasks: TaskGroup) -> None:
        self.target = target
        self.delay = 0.0
        self.rate = 0
        self.forwarded = 0
        self._tasks = tasks
        self._connections: set[_Connection] = set()
        self._flowing = anyio.Event()
        self._flowing.set()
        self._accepting: anyio.CancelScope | None = None
        self.port = 0
        self.accept()

    @property
    def connections(self) -> int:
        """How many are open, stranded ones included."""
        return len(self._connections)

    async def cut(self) -> None:
        """Resets every connection at once, to both sides; new ones are accepted."""
        doomed = list(self._connections)
        for connection in doomed:
            connection.reset()
        # Whoever connects again meanwhile is let in.
        await until(
            lambda: not any(connection in self._connections for connection in doomed),
            10,
            "the cut connections are closed",
        )

    async def refuse(self) -> None:
        """As `cut`, and new connections are refused until `accept`: the server looks down."""
        if self._accepting is not None:
            accepting, self._accepting = self._accepting, None
            accepting.cancel()
            await until(lambda: self._refuses(), 10, "the proxy refuses connections")
        await self.cut()

    def accept(self) -> None:
        """Takes connections again after `refuse`, on the same port."""
        if self._accepting is not None:
            return
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._accepting = anyio.CancelScope()
        self._tasks.start_soon(self._accept, listener, self._accepting)

    def hold(self) -> None:
        """Nothing passes until `release`; connections stay open, senders meet back-pressure."""
        self._flowing = anyio.Event()

    def hold_present(self) -> None:
        """As `hold`, but only on the connections of now: what they carry comes late, after what new ones do."""
        for connection in self._connections:
            connection.flowing = anyio.Event()

    def release(self) -> None:
        """Everything passes again."""
        self._flowing.set()
        for connection in self._connections:
            connection.flowing.set()

    def strand(self, *, to_server: bool = True, to_client: bool = True) -> None:
        """Half-open: on the connections of now nothing ever passes again, and no side hears of an end.

        New connections work: as after a firewall forgot the old ones. With one of the two directions off, the other
        still passes.
        """
        for connection in self._connections:
            connection.strand(to_server=to_server, to_client=to_client)

    async def _accept(self, listener: socket.socket, scope: anyio.CancelScope) -> None:
        with scope, listener:
            while True:
                await anyio.wait_readable(listener)
                client, _ = listener.accept()
                self._tasks.start_soon(self._serve, client)

    async def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            try:
                server.connect(("127.0.0.1", self.target))
            except OSError:
                _linger_none(client)
                return
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, server)
            self._connections.add(connection)
            try:
                with connection.scope:
                    async with anyio.create_task_group() as pumps:
                        pumps.start_soon(self._pump, connection, client, server)
                        pumps.start_soon(self._pump, connection, server, client)
            finally:
                self._connections.discard(connection)

    async def _pump(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                await anyio.wait_readable(source)
                await self._flowing.wait()
                await connection.flowing.wait()
                if sink in connection.stranded:
                    await anyio.sleep(math.inf)
                data = source.recv(max(1, self.rate // PIECES_A_SECOND) if self.rate else CHUNK)
                pause = self.delay + (len(data) / self.rate if self.rate else 0)
                if pause:
                    await anyio.sleep(pause)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                self.forwarded += len(data)
                await _send(sink, data)
        except OSError:
            connection.reset()

    def _refuses(self) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.stranded: set[socket.socket] = set()
        self.scope = anyio.CancelScope()
        self.flowing = anyio.Event()
        self.flowing.set()
        self._ends = (client, server)

    def strand(self, *, to_server: bool, to_client: bool) -> None:
        self.stranded |= {end for end, chosen in zip(self._ends, (to_client, to_server), strict=True) if chosen}

    def reset(self) -> None:
        for end in self._ends:
            _linger_none(end)
        self.scope.cancel()


def _linger_none(end: socket.socket) -> None:
    """Its close sends a reset, as a crashed host would."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _send(sink: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sink.send(rest) :]
        except BlockingIOError:
            await anyio.wait_writable(sink)
