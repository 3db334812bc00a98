"""How fast a rebuild is, against the same client bulking ready documents from memory into the same engine.

The log holds 750-byte rows as a snapshot leaves them. The rebuild's figure is its whole length: index made, log
replayed, settings restored, documents counted, alias switched.
"""

from __future__ import annotations

import functools
import secrets
import time

import anyio
import msgspec

from bench.result import Result, result
from bridge import event
from bridge.config import Config, Index, Stream
from bridge.embedded import NatsServer
from bridge.event import Position
from bridge.index.engine import Engine, opened
from bridge.index.rebuild import rebuild
from bridge.stream import server, subjects
from bridge.stream.publisher import Publisher
from bridge.stream.state import Column, SnapshotStatus, State, TableRecord
from bridge.stream.tail import Tail
from tests.servers import OpenSearch, fetched

DOCUMENTS = 100_000
PER_BULK = 2_000
IN_FLIGHT = 2
COLUMNS = [Column("id", "bigint", 20), Column("author", "text", 25), Column("subject", "text", 25),
           Column("body", "text", 25), Column("list_id", "integer", 23)]  # fmt: skip


async def measure(runs: int, scale: float) -> list[Result]:
    """Documents a second of `reindex` over those of plain bulks, and the share of replaying alone."""
    documents = max(int(DOCUMENTS * scale), PER_BULK)
    fetched("opensearch")
    async with NatsServer.throwaway() as nats, OpenSearch.throwaway() as engine:
        config = Config(
            stream=Stream(servers=[nats.url], name="cdc_main", sync="always"),
            index={"messages": Index(table="public.messages", url=[engine.url], alias="messages")},
        )
        await _fill(config, nats.url, documents)
        rates, yardsticks = [], []
        async with opened(config.index["messages"]) as client:
            await _plain(client, documents)  # the engine's own code gets warm
            for _ in range(runs):
                yardsticks.append(await _plain(client, documents))
                started = time.monotonic()
                summary = await rebuild(config, "messages", [nats.url])
                rates.append(summary.documents / (time.monotonic() - started))
    return [result("index.rebuild", "documents/s of reindex ÷ plain bulks from memory (OpenSearch)", rates, yardsticks)]


def _row(number: int) -> bytes:
    body = "Some words of a message that people wrote to a list. " * 11
    return msgspec.json.encode(
        {"id": number, "author": f"author {number % 1000}", "subject": f"Re: subject number {number}",
         "body": body + str(number), "list_id": number % 100}
    )  # fmt: skip


async def _fill(config: Config, url: str, documents: int) -> None:
    """The stream and the state as a finished snapshot of the table leaves them."""
    source, stream = config.source.name, config.stream
    subject = subjects.table_subject(stream.prefix, source, "public", "messages").encode()
    closing = b',"lsn":"0/1"' + event.transaction("0/1", None, None)
    read, mark = (event.head(op, source, "public", "messages") for op in ("read", "snapshot"))
    async with server.connect(stream, [url]) as broker, anyio.create_task_group() as tasks:
        await server.ensure_stream(broker, stream, subjects.source_subjects(stream.prefix, source))
        state = await State.open(broker, config.state.bucket)
        publisher = Publisher(broker, stream.name, 1, Tail(0, "", 0))
        await publisher.open()
        tasks.start_soon(publisher.watch)
        rows = (b'%s,"key":{"id":%d},"after":%s%s' % (read, n, _row(n), closing) for n in range(documents))
        events = [("snapshot", b'%s,"key":null,"phase":"begin"%s' % (mark, closing))]
        for number, (op, payload) in enumerate([*events, *(("read", row) for row in rows)], 1):
            publisher.add(subject, op.encode(), str(Position(1, 1, 0, 0, number)).encode(), payload)
            if publisher.full:
                await publisher.room()
        end = b'%s,"key":null,"phase":"end"%s' % (mark, closing)
        publisher.add(subject, b"snapshot", str(Position(1, 1, 0, 0, documents + 2)).encode(), end)
        await publisher.drain()
        tasks.cancel_scope.cancel()
        await state.put(subjects.table_key(source, "public", "messages"), TableRecord(COLUMNS, ["id"]))
        status = SnapshotStatus(state="done", rows=documents, first_seq=1, last_seq=documents + 2, complete_from=1)
        await state.put(subjects.snapshot_key(source, "public", "messages"), status)


async def _plain(client: Engine, documents: int) -> float:
    """Documents a second of ready bulks, two on their way at a time, into an index without refresh and replicas."""
    index = f"yardstick-{secrets.token_hex(4)}"
    text = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}
    columns = {"id": {"type": "long"}, "author": text, "subject": text, "body": text, "list_id": {"type": "integer"}}
    mapping = {"dynamic": False, "properties": columns}
    settings = {"refresh_interval": "-1", "number_of_replicas": 0, "number_of_shards": 1}
    await client.create(index, {"settings": settings, "mappings": mapping})
    await client.json("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": f"{index}-w"}}]})
    bulks = [
        b"".join(
            b'{"index":{"_id":"%d","version":%d,"version_type":"external"}}\n%s\n' % (n, n + 1, _row(n))
            for n in range(first, first + PER_BULK)
        )
        for first in range(0, documents, PER_BULK)
    ]
    started = time.monotonic()

    async def send() -> None:
        while bulks:
            body = bulks.pop()
            await client.patiently(functools.partial(client.bulk, f"{index}-w", body))

    async with anyio.create_task_group() as senders:
        for _ in range(IN_FLIGHT):
            senders.start_soon(send)
    await client.refresh(index)
    rate = documents / (time.monotonic() - started)
    await client.delete(index)
    return rate
