"""What PostgreSQL is told of how far the bridge is, beside the stream that it sends."""

from __future__ import annotations

import asyncio

import anyio
import psycopg
from psycopg import pq

from bridge.source import connection, frames

FEEDBACK_EVERY = 1.0
FEEDBACK_REPEATED = 10


class Feedback:
    """What PostgreSQL is told: always how far we have received, and only now and then what it may forget."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._socket = pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._waits = False
        self.received = 0

    def send(self, flush: int = 0, *, ask: bool = False) -> None:
        """One status update, `ask` for an answer. Never waits: what the socket does not take goes out when it can."""
        try:
            self._pgconn.put_copy_data(frames.status(max(self.received, flush), flush, ask=ask))
            self._flush()
        except (psycopg.Error, OSError) as error:
            raise connection.refusal(error, "feedback") from None

    def confirm(self, reached: int) -> None:
        """PostgreSQL may forget what is at or before `reached`; at once after, flush = 0 again."""
        self.send(reached)
        self.send()

    def _flush(self) -> None:
        if self._pgconn.flush() and not self._waits:
            self._waits = True
            self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        try:
            done = not self._pgconn.flush()
        except (psycopg.Error, OSError):
            done = True  # the reader meets the same error and raises it
        if done:
            self._loop.remove_writer(self._socket)
            self._waits = False

    async def run(self) -> None:
        """Send on a timer, whatever the stream does, until cancelled; seldom while there is nothing new.

        A walsender that decodes for an hour without reading must not find its receive window full: a connection that
        cannot send ends by `tcp_user_timeout`.
        """
        said, ticks = -1, 0
        while True:
            await anyio.sleep(FEEDBACK_EVERY)
            ticks += 1
            if self.received != said or ticks % FEEDBACK_REPEATED == 0:
                said = self.received
                self.send()

    def close(self) -> None:
        """Stop watching the socket."""
        if self._waits:
            self._loop.remove_writer(self._socket)
            self._waits = False
