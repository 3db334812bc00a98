"""A stream of events written by hand, as the bridge would write them, and an index fed from it."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import msgspec

from bridge import event
from bridge.config import Config, Index, Source, Stream
from bridge.config import State as StateConfig
from bridge.index.engine import Engine, opened
from bridge.index.generation import IndexRecord
from bridge.index.indexer import run_index
from bridge.index.rebuild import Summary, rebuild
from bridge.stream.definition import ensure_stream
from bridge.stream.server import Broker, connect
from bridge.stream.state import Column, SnapshotStatus, State, TableRecord, Writer
from bridge.stream.subjects import epochs_key, index_key, snapshot_key, source_subjects, table_key, table_subject
from bridge.waiting import until

COLUMNS = {"id": "bigint", "title": "text", "body": "text", "price": "numeric(12,4)"}
SCHEMA, TABLE = "public", "posts"


class Log:
    """The stream, the state and the index of one test."""

    def __init__(self, broker: Broker, state: State, engine: Engine, config: Config, url: str) -> None:
        self.broker = broker
        self.state = state
        self.engine = engine
        self.config = config
        self.servers = [url]
        self.name = next(iter(config.index))
        self.epoch = 1
        self.last = 0

    @property
    def subject(self) -> str:
        return table_subject(self.config.stream.prefix, self.config.source.name, SCHEMA, TABLE)

    def with_index(self, **changes: Any) -> Config:
        """The configuration with a changed index."""
        index = msgspec.structs.replace(self.config.index[self.name], **changes)
        self.config = msgspec.structs.replace(self.config, index={self.name: index})
        return self.config

    def wire(
        self,
        op: event.Op,
        key: dict[str, Any] | None = None,
        after: dict[str, Any] | str | None = None,
        *,
        before: dict[str, Any] | None = None,
        unchanged: list[str] | None = None,
        partition: str | None = None,
        phase: str | None = None,
        table: str = TABLE,
    ) -> bytes:
        """One event's bytes; `after` as text is taken as it is."""
        data = event.head(op, self.config.source.name, SCHEMA, table)
        for name, value in (("key", key), ("before", before), ("after", after), ("unchanged", unchanged)):
            if value is not None:
                raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                data += b',"%s":%s' % (name.encode(), raw)
        if phase is not None:
            data += b',"phase":' + event.quote(phase)
        return data + event.tail(partition) + b',"lsn":"0/1"' + event.transaction("0/2", 7, None)

    async def put(self, op: event.Op, *args: Any, table: str = TABLE, **kwargs: Any) -> int:
        """Publish one event; its sequence."""
        subject = table_subject(self.config.stream.prefix, self.config.source.name, SCHEMA, table)
        return await self.publish(op, self.wire(op, *args, table=table, **kwargs), subject=subject)

    async def publish(self, op: event.Op, data: bytes, *, subject: str = "") -> int:
        """Publish bytes as an event; the sequence."""
        position = event.Position(1, self.last + 1, self.last + 1, 0, 0)
        headers = event.headers(op, position, self.epoch, last=True)
        answer = await self.broker.request(subject or self.subject, data, headers=headers)
        self.last = int(json.loads(answer.data)["seq"])
        return self.last

    async def posts(self, first: int, count: int) -> int:
        """Publish many inserts without waiting for each; the last sequence."""
        for number in range(first, first + count):
            position = event.Position(1, number + 1, number + 1, 0, 0)
            data = self.wire("insert", {"id": number}, row(number))
            headers = event.headers("insert", position, self.epoch, last=True)
            await self.broker.nc.publish(self.subject, data, headers=headers)
        self.last += count

        async def stored() -> bool:
            found = await self.broker.stream(self.config.stream.name)
            return found is not None and found.last_seq >= self.last

        assert await until(stored, seconds=60)
        return self.last

    async def record(self) -> IndexRecord:
        found = await self.state.get(index_key(self.config.source.name, self.name), IndexRecord)
        return found[0] if found is not None else IndexRecord()

    async def columns(self, columns: dict[str, str], key: tuple[str, ...] = ("id",), table: str = TABLE) -> None:
        """Record a table's shape as the bridge does."""
        shape = TableRecord([Column(name, kind, 0) for name, kind in columns.items()], list(key))
        await self.state.put(table_key(self.config.source.name, SCHEMA, table), shape)

    async def writers(self, *writers: tuple[int, int]) -> None:
        """Record the bridges that have written: (epoch, first sequence) each."""
        await self.state.put(epochs_key(self.config.source.name), [Writer(*writer) for writer in writers])

    async def snapshot(self, **status: Any) -> None:
        """Record the state of the table's snapshot."""
        key = snapshot_key(self.config.source.name, SCHEMA, TABLE)
        await self.state.put(key, SnapshotStatus(**status))

    async def done(self, seq: int | None = None, *, seconds: float = 30) -> None:
        """Wait until the live generation has everything up to a sequence (the last one published)."""
        wanted = self.last if seq is None else seq

        async def there() -> bool:
            record = await self.record()
            return record.state == "live" and record.seq >= wanted

        assert await until(there, seconds=seconds), (wanted, await self.record())

    async def writing(self) -> str:
        """The write alias of the reader that goes on after a first build, once it is on the index."""
        found = ""

        async def taken() -> bool:
            nonlocal found
            record = await self.record()
            live = record.get(record.generation)
            if live is None or live.opened < 2:
                return False
            found = live.write_alias
            return list(await self.engine.indexes(found)) == [live.physical]

        assert await until(taken, seconds=30), await self.record()
        return found

    async def documents(self, index: str = "") -> dict[str, dict[str, Any]]:
        """Every document that searches see, by id, without the bridge's own field."""
        index = index or self.name
        await self.engine.refresh(index)
        found = await self.engine.json("POST", f"/{index}/_search", {"size": 5000, "query": {"match_all": {}}})
        return {
            hit["_id"]: {name: value for name, value in hit["_source"].items() if name != "_bridge"}
            for hit in found["hits"]["hits"]
        }

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """An index reader beside the block, cancelled at its end."""
        async with anyio.create_task_group() as group:
            group.start_soon(run_index, self.config, [self.name], self.servers)
            yield
            group.cancel_scope.cancel()

    async def rebuild(self, **options: Any) -> Summary:
        return await rebuild(self.config, self.name, self.servers, **options)

    async def letters(self) -> list[dict[str, Any]]:
        """The dead letters of this test's source."""
        from bridge.stream.deadletters import letters

        found = letters(self.broker, self.config.stream, self.config.source.name, self.name)
        return [json.loads(data) async for data in found]


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A post."""
    return {"id": number, "title": f"post {number}", "body": "words " * 5, "price": 1.5, **changes}


@asynccontextmanager
async def fed(
    nats_url: str, engine_url: str, *, tag: str = "", with_engine: bool = True, **index: Any
) -> AsyncIterator[Log]:
    """A new stream with a new index's configuration; both are removed at the end."""
    tag = tag or secrets.token_hex(4)
    config = configured(tag, nats_url, engine_url, **index)
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(connect(config.stream, [nats_url]))
        engine = await stack.enter_async_context(opened(config.index[f"posts{tag}"]))
        await ensure_stream(broker, config.stream, source_subjects(config.stream.prefix, config.source.name))
        state = await State.open(broker, config.state.bucket)
        log = Log(broker, state, engine, config, nats_url)
        await log.columns(COLUMNS)
        await log.writers((1, 1))
        try:
            yield log
        finally:
            await _clean(log, with_engine)


def configured(tag: str, nats_url: str, engine_url: str, **index: Any) -> Config:
    """The configuration of one test; another process makes the same one from the same tag."""
    settings = {"table": f"{SCHEMA}.{TABLE}", "url": [engine_url], "alias": f"posts{tag}", **index}
    return Config(
        source=Source(name=f"main{tag}"),
        stream=Stream(servers=[nats_url], name=f"cdc_{tag}", prefix=f"cdc{tag}", sync="always"),
        state=StateConfig(bucket=f"bridge_{tag}"),
        index={f"posts{tag}": Index(**settings)},
    )


async def _clean(log: Log, with_engine: bool) -> None:
    with anyio.CancelScope(shield=True):
        for name in await log.engine.indexes(f"{log.name}*") if with_engine else ():
            await log.engine.delete(name)
        stream = log.config.stream.name
        for name in (stream, f"{stream}_dlq", f"KV_{log.config.state.bucket}"):
            if await log.broker.stream(name) is not None:
                await log.broker.api(f"STREAM.DELETE.{name}")
