"""A log of 750-byte rows as a finished snapshot of a table leaves it, and the engines that indexes of it are built in.

Nothing is read from PostgreSQL here: what the index side of the bridge costs is measured alone.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import anyio
import msgspec
import pytest

from bridge import event
from bridge.config import Config, Index, Stream
from bridge.embedded.process import Server, children
from bridge.event import Position
from bridge.stream import definition, server, subjects
from bridge.stream.publisher import Publisher
from bridge.stream.state import Column, SnapshotStatus, State, TableRecord
from bridge.stream.tail import Tail
from tests import servers

INDEX = "messages"
COLUMNS = [Column("id", "bigint", 20), Column("author", "text", 25), Column("subject", "text", 25),
           Column("body", "text", 25), Column("list_id", "integer", 23)]  # fmt: skip


class Kind(NamedTuple):
    """A search engine that can be had for tests: its name in words, and how one is started."""

    title: str
    throwaway: Callable[[], AbstractAsyncContextManager[servers.OpenSearch | servers.Elasticsearch]]


ENGINES = {
    "opensearch": Kind("OpenSearch", servers.OpenSearch.throwaway),
    "elasticsearch": Kind("Elasticsearch", servers.Elasticsearch.throwaway),
}


@asynccontextmanager
async def running(kind: str) -> AsyncIterator[servers.OpenSearch | servers.Elasticsearch]:
    """A node of an engine, gone at the end.

    Raises:
        RuntimeError: it cannot be had here.
    """
    if shutil.which("java") is None:
        raise RuntimeError("java is not installed")
    try:
        servers.fetched(kind)
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        raise RuntimeError(error.msg) from None
    async with ENGINES[kind].throwaway() as node:
        yield node


def configured(nats: str, engine: str) -> Config:
    """The configuration of an index of the log."""
    return Config(
        stream=Stream(servers=[nats], name="cdc_main", sync="always"),
        index={INDEX: Index(table="public.messages", url=[engine], alias=INDEX)},
    )


def pids(node: Server) -> list[int]:
    """A server's processes: a node may be a child of what was started."""
    return [node.pid, *children(node.pid)]


async def begin(config: Config, url: str, documents: int) -> None:
    """The empty stream, and the state as a finished snapshot of the table leaves it."""
    source, stream = config.source.name, config.stream
    async with server.connect(stream, [url]) as broker:
        await definition.ensure_stream(broker, stream, subjects.source_subjects(stream.prefix, source))
        state = await State.open(broker, config.state.bucket)
        await state.put(subjects.table_key(source, "public", "messages"), TableRecord(COLUMNS, ["id"]))
        status = SnapshotStatus(state="done", rows=documents, first_seq=1, last_seq=documents + 2, complete_from=1)
        await state.put(subjects.snapshot_key(source, "public", "messages"), status)


async def fill(config: Config, url: str, documents: int) -> None:
    """The snapshot's events, into the empty stream."""
    source, stream = config.source.name, config.stream
    subject = subjects.table_subject(stream.prefix, source, "public", "messages").encode()
    closing = b',"lsn":"0/1"' + event.transaction("0/1", None, None)
    read, mark = (event.head(op, source, "public", "messages") for op in ("read", "snapshot"))
    async with server.connect(stream, [url]) as broker, anyio.create_task_group() as tasks:
        publisher = Publisher(broker, stream.name, 1, Tail(0, "", 0))
        await publisher.open()
        tasks.start_soon(publisher.watch)
        rows = (b'%s,"key":{"id":%d},"after":%s%s' % (read, n, _row(n), closing) for n in range(documents))
        first = b'%s,"key":null,"phase":"begin"%s' % (mark, closing)
        events = itertools.chain([("snapshot", first)], (("read", row) for row in rows))
        for number, (op, payload) in enumerate(events, 1):
            publisher.add(subject, op.encode(), str(Position(1, 1, 0, 0, number)).encode(), payload)
            if publisher.full:
                await publisher.room()
        end = b'%s,"key":null,"phase":"end"%s' % (mark, closing)
        publisher.add(subject, b"snapshot", str(Position(1, 1, 0, 0, documents + 2)).encode(), end)
        await publisher.drain()
        tasks.cancel_scope.cancel()


def _row(number: int) -> bytes:
    body = "Some words of a message that people wrote to a list. " * 11
    return msgspec.json.encode(
        {"id": number, "author": f"author {number % 1000}", "subject": f"Re: subject number {number}",
         "body": body + str(number), "list_id": number % 100}
    )  # fmt: skip
