"""The connection that notices a stopping server: idle, so that its end is the first sign."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
from psycopg import pq
from psycopg.errors import Diagnostic

from bridge import log
from bridge.errors import Unavailable
from bridge.source import connection


class Sentinel:
    """What an idle connection has to say: `gone` is set once it has ended."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self._told = ("", "")

    def hear(self, diagnostic: Diagnostic) -> None:
        """Note what the server says to nobody's question."""
        self._told = (diagnostic.sqlstate or "", diagnostic.message_primary or "")

    @property
    def why(self) -> Unavailable:
        """Why it has ended."""
        state, message = self._told
        if state.startswith(connection.PASSING_STATES):
            return connection.away(state, message, "waiting")
        return Unavailable("PostgreSQL closed the connection (no reason given)", "waiting for it to come back")


@contextlib.asynccontextmanager
async def posted(dsn: str) -> AsyncIterator[Sentinel]:
    """An idle connection whose end is the first sign of a server that stops.

    A walsender with a backlog stops only after it has sent everything; an idle backend gets 57P01 at once.
    """
    found = Sentinel()
    gone = found.gone
    async with connection.connect(dsn) as idle:
        idle.add_notice_handler(found.hear)
        pgconn = idle.pgconn
        loop = asyncio.get_running_loop()
        socket = pgconn.socket

        def readable() -> None:
            try:
                pgconn.consume_input()
                alive = pgconn.status == pq.ConnStatus.OK and not pgconn.is_busy()
            except (psycopg.Error, OSError):
                alive = False
            if not alive:
                loop.remove_reader(socket)
                gone.set()

        loop.add_reader(socket, readable)
        try:
            yield found
        finally:
            # Only once: the number of a closed socket may by now be another connection's.
            if not gone.is_set():
                loop.remove_reader(socket)
            log.get().debug("sentinel closed")
