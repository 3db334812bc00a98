"""The log against the tables, lap after lap: each lap's events are read once and applied to what was there before."""

from __future__ import annotations

from typing import Any

import psycopg

from bridge import event
from bridge.config import Config
from bridge.event import Event
from bridge.stream import claims, objects, reader, subjects
from bridge.stream.reader import Message
from bridge.stream.server import NOT_FOUND_STREAM, ApiError
from tests.oracle import Replay, Table, is_whole, published, same_rows
from tests.running import broker_of
from tests.schema import conforms

Found = list[tuple[Message, Event]]


class Log:
    """What the log has said so far.

    Attributes:
        events: how many events were compared.
        large: how many of them stand in the object store.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._replay = Replay()
        self._last: Found = []
        self.events = 0
        self.large = 0

    async def compare(self) -> None:
        """Assert that the log is whole up to now, that it gives PostgreSQL's tables, and that the object store holds
        what it refers to."""
        found = await self._new()
        is_whole([*self._last, *found])
        for message, one in found:
            self._replay.apply(message, one)
        self.events += len(found)
        self._last = found[-1:] or self._last
        await self._same_tables()
        await self._same_objects()

    async def _new(self) -> Found:
        stream = self._config.stream
        wanted = [subjects.source_subjects(stream.prefix, self._config.source.name)]
        start = self._last[0][0].seq + 1 if self._last else None
        found: Found = []
        async with broker_of(self._config) as broker:
            async for batch in reader.read(broker, stream.name, subjects=wanted, start=start):
                for message in batch:
                    conforms(message.data)
                    self.large += bool(event.decode(message.data).ref)
                async for part in claims.whole(broker, stream.name, batch):
                    found += [(message, event.decode(message.data)) for message in part]
        return found

    async def _same_tables(self) -> None:
        connecting: Any = psycopg.AsyncConnection.connect(
            str(self._config.source.dsn), autocommit=True, client_encoding="utf8"
        )
        async with await connecting as connection:
            for schema, table in await published(connection, self._config.source.tables):
                rows = self._replay.tables.get((schema, table), Table()).rows
                await same_rows(connection, schema, table, rows, [])

    async def _same_objects(self) -> None:
        bucket = claims.bucket_of(self._config.stream.name)
        async with broker_of(self._config) as broker:
            try:
                stored = await objects.counted(broker, bucket, objects.description_subject(bucket, ""))
            except ApiError as error:
                if error.code != NOT_FOUND_STREAM:
                    raise
                stored = {}
        assert len(stored) == self.large, f"{len(stored)} objects are stored, the log refers to {self.large}"
