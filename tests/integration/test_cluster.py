"""A stream of three replicas: servers are killed, started again and cut off under load; nothing is lost or doubled."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import psycopg
import pytest

from bridge.config import Config
from bridge.embedded import until
from tests.cluster import MEMBERS, NatsCluster
from tests.oracle import agrees
from tests.running import Process, broker_of, execute, settled, source, streaming, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, body text)"
SYNCS = ("replicated", "1s")


def replicated(dsn: str, cluster: NatsCluster, sync: str = "replicated") -> Config:
    """A configuration for the whole cluster."""
    config = source(dsn, cluster.urls[0], sync=sync, stream={"replicas": MEMBERS})
    return msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, servers=cluster.urls))


@asynccontextmanager
async def writing(dsn: str) -> AsyncIterator[None]:
    """Inserts, updates and deletes for as long as the block lasts."""
    ended = anyio.Event()

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not ended.is_set():
                await connection.execute("INSERT INTO t (body) SELECT repeat('x', 200) FROM generate_series(1, 20)")
                await connection.execute("UPDATE t SET body = body || 'y' WHERE id % 20 = 3 AND length(body) < 203")
                await connection.execute("DELETE FROM t WHERE id % 20 = 7")
                await anyio.sleep(0.05)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        try:
            yield
        finally:
            ended.set()


async def last_seq(config: Config) -> int:
    """The stream's last sequence; 0 where nobody answers."""
    with contextlib.suppress(Exception):
        async with broker_of(config) as broker:
            found = await broker.stream(config.stream.name)
            return found.last_seq if found else 0
    return 0


async def goes_on(config: Config, seconds: float = 90) -> None:
    """Waits until the stream grows by what is written from now on."""
    before = 0

    async def known() -> bool:
        nonlocal before
        before = await last_seq(config)
        return before > 0

    async def grown() -> bool:
        return await last_seq(config) > before + 50

    await until(known, seconds, "the stream answers")
    await until(grown, seconds, "the stream grows")


@pytest.mark.parametrize("sync", SYNCS)
async def test_each_server_in_turn_is_killed_and_comes_back(
    pg_db: str, nats_cluster: NatsCluster, tmp_path: Path, sync: str
) -> None:
    config = replicated(pg_db, nats_cluster, sync)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await streaming(config, 60)
        async with writing(pg_db):
            led = [await nats_cluster.leader(config.stream.name)]
            for member in [*led, *(n for n in range(MEMBERS) if n not in led)]:
                await nats_cluster.servers[member].kill()
                await goes_on(config)
                await nats_cluster.servers[member].start()
                await until(lambda: nats_cluster.current(config.stream.name), 60, "all have the whole stream")
        await settled(config, 90)
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config, oracle)
