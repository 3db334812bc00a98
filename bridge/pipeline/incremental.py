"""Snapshots while the stream flows: each table that is asked for is read a chunk at a time, beside everything else.

What is asked for stands in the state bucket (`SnapshotStatus.again`), and so does how far it is: whoever runs the
bridge next goes on at the last chunk. `bridge snapshot` writes there; here it is watched.
"""

from __future__ import annotations

import anyio

from bridge import structured
from bridge.pipeline.between import Between
from bridge.pipeline.reading import Reading
from bridge.pipeline.session import Session
from bridge.pipeline.streaming import Streaming
from bridge.stream import subjects
from bridge.stream.publisher import Publisher
from bridge.stream.state import SnapshotStatus


class Incremental:
    """Reads what is asked for until cancelled, several tables at a time."""

    def __init__(self, session: Session, publisher: Publisher, between: Between, streaming: Streaming) -> None:
        self._session = session
        self._publisher = publisher
        self._between = between
        self._streaming = streaming
        self._slots = anyio.Semaphore(session.config.snapshot.workers)
        self._active: dict[tuple[str, str], Reading] = {}
        self._news: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Return only by raising: Unavailable where something is away."""
        source = self._session.config.source.name
        async with structured.group() as tasks:
            async for key, status in self._session.state.changes(f"snapshot.{subjects.token(source)}.", SnapshotStatus):
                root = subjects.table_of(key)
                again = status.again if status is not None else None
                if root in self._active:
                    self._news.add(root)
                    self._active[root].look()
                elif again is not None and again.under_way:
                    self._active[root] = self._reading(root)
                    tasks.start_soon(self._read, root)

    def _reading(self, root: tuple[str, str]) -> Reading:
        return Reading(self._session, self._publisher, self._between, self._streaming, root)

    async def _read(self, root: tuple[str, str]) -> None:
        """Read a table as often as that is asked for; one at a time, or each would undo what the other does."""
        reading = self._active[root]
        wanted = True
        while wanted:
            async with self._slots:
                await reading.run()
            reading = self._active[root] = self._reading(root)
            wanted = await self._asked_again(root, reading)
        del self._active[root]

    async def _asked_again(self, root: tuple[str, str], reading: Reading) -> bool:
        """Whether it was asked for again while it ended; nobody has asked since where this says no."""
        while True:
            self._news.discard(root)
            if await reading.wanted():
                return True
            if root not in self._news:
                return False
