"""A stream of three replicas: servers are killed, started again and cut off under load; nothing is lost or doubled."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import msgspec
import psycopg
import pytest

from bridge import waiting
from bridge.config import Config
from bridge.embedded import until
from bridge.errors import BridgeError
from bridge.operate.status.collect import collect
from tests.cluster import MEMBERS, NatsCluster
from tests.oracle import agrees
from tests.running import Process, broker_of, execute, settled, source, streaming, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, body text)"


def replicated(dsn: str, cluster: NatsCluster, sync: str = "replicated") -> Config:
    """A configuration for the whole cluster."""
    config = source(dsn, cluster.urls[0], sync=sync, stream={"replicas": MEMBERS})
    return msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, servers=cluster.urls))


@asynccontextmanager
async def writing(dsn: str) -> AsyncIterator[None]:
    """Inserts, updates and deletes for as long as the block lasts."""
    ended = anyio.Event()

    async def write() -> None:
        # Shielded: it ends by itself, with its connection closed, when the block fails, too.
        with anyio.CancelScope(shield=True):
            await insert()

    async def insert() -> None:
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


async def shown_behind(config: Config, member: int) -> bool:
    """Whether `bridge status` says that this replica alone is away, and that another one leads."""
    found = await collect(config, list(config.stream.servers))
    stream = found.stream
    return stream is not None and stream.behind == [f"n{member}"] and stream.leader not in ("", f"n{member}")


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

    # Not too often: each question is a connection of its own, and elections take their time on a busy machine.
    assert await waiting.until(known, seconds=seconds, every=0.5), "the stream does not answer"
    assert await waiting.until(grown, seconds=seconds, every=0.5), "the stream does not grow"


@pytest.mark.parametrize("sync", ["replicated", "1s"])
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
                await until(partial(shown_behind, config, member), 60, "`bridge status` names the server")
                await nats_cluster.servers[member].start()
                await until(lambda: nats_cluster.current(config.stream.name), 60, "all have the whole stream")
        await until(lambda: whole(nats_cluster), 60, "JetStream answers everywhere")
        await settled(config, 90)
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config, oracle)


@pytest.mark.parametrize("whom", ["the stream's leader", "the one that the bridge talks to"])
async def test_a_server_that_is_cut_off_from_the_others_is_left(
    pg_db: str, nats_cluster: NatsCluster, tmp_path: Path, whom: str
) -> None:
    config = replicated(pg_db, nats_cluster)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await streaming(config, 60)
        async with writing(pg_db):
            await goes_on(config)
            talks = await nats_cluster.talks_to(f"bridge {config.source.name}")
            member = talks if whom.startswith("the one") else await nats_cluster.leader(config.stream.name)
            await nats_cluster.isolate(member)
            await until(lambda: not_led_by(nats_cluster, member), 60, "the others know that it is away")
            for _ in range(8):
                async with broker_of(config) as broker:
                    assert broker.where != nats_cluster.urls[member]
            await goes_on(config, 120)
            if member == talks:
                assert await nats_cluster.talks_to(f"bridge {config.source.name}") != talks
            nats_cluster.join()
            await goes_on(config)
        await caught_up(config, nats_cluster)
        await until(lambda: whole(nats_cluster), 60, "JetStream answers everywhere")
        await settled(config, 90)
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config, oracle)


async def caught_up(config: Config, cluster: NatsCluster) -> None:
    """Waits until every replica has the whole stream.

    One that was cut off may never catch up by itself (nats-server 2.15: "Expected first catchup entry to be a snapshot"
    there, "snapshot can not be installed while catchups running" on the leader): then another one has to lead.
    """
    name = config.stream.name
    for _ in range(6):
        if await waiting.until(lambda: cluster.current(name), seconds=10, every=0.2):
            return
        with contextlib.suppress(BridgeError):
            async with broker_of(config) as broker:
                await broker.api(f"STREAM.LEADER.STEPDOWN.{name}")
    await until(lambda: cluster.current(name), 10, "all have the whole stream")


async def whole(cluster: NatsCluster) -> bool:
    """Whether JetStream answers at every member."""
    return all([await cluster.answers(n) for n in range(MEMBERS)])


async def not_led_by(cluster: NatsCluster, member: int) -> bool:
    """Whether JetStream no longer answers at this member, and does at every other one."""
    return [await cluster.answers(n) for n in range(MEMBERS)] == [n != member for n in range(MEMBERS)]


async def test_a_cluster_without_a_majority_is_waited_for(
    pg_db: str, nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    config = replicated(pg_db, nats_cluster)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, TABLE, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    for member in (1, 2):
        await nats_cluster.servers[member].kill()
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        async with writing(pg_db):
            await process.said("waiting")
            for member in (1, 2):
                await nats_cluster.servers[member].start()
            await streaming(config, 60)
            await goes_on(config)
            for member in (0, 1):
                await nats_cluster.servers[member].kill()
            await process.said("waiting", 60, times=process.text.count("waiting") + 1)
            for member in (0, 1):
                await nats_cluster.servers[member].start()
            await goes_on(config, 120)
        await settled(config, 90)
        assert await process.end() == 0
        assert "Traceback" not in process.text
    finally:
        process.close()
    await agrees(config, oracle)
