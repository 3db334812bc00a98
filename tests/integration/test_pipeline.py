"""A database's changes in the stream: from the first row of a snapshot to idle slots, stops and altered tables."""

from __future__ import annotations

import pytest

from bridge.embedded import NatsServer
from tests.oracle import agrees
from tests.running import bridge, events, execute, messages, settled, source, streaming

pytestmark = pytest.mark.anyio

SLOT = "SELECT pg_create_logical_replication_slot('{}', 'wal2json')"


async def test_snapshot_and_stream_give_the_tables(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, body text)",
        "INSERT INTO t SELECT g, 'old ' || g FROM generate_series(1, 500) g",
        SLOT.format(oracle),
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "INSERT INTO t SELECT g, 'new' FROM generate_series(501, 2600) g",
            "UPDATE t SET body = body || '!' WHERE id % 3 = 0",
            "UPDATE t SET id = -id WHERE id % 100 = 0",
            "DELETE FROM t WHERE id % 7 = 0",
        )
        await settled(config)
    found = await agrees(config, oracle)
    assert {message.op for message, _ in found} == {"snapshot", "read", "insert", "update", "delete"}
