"""Failover slots: PostgreSQL 17 keeps the bridge's slot on a standby, which takes the primary's place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path

import msgspec
import pytest

from bridge.config import Config, Secret
from bridge.embedded import NatsServer, Postgres, until
from bridge.errors import ServerRefused
from bridge.operate.check import check
from bridge.operate.show.status import page
from bridge.operate.status.collect import collect
from tests import replicas
from tests.oracle import agrees
from tests.running import bridge, events, execute, failure, settled, source, streaming

pytestmark = pytest.mark.anyio

STANDBY = "standby_1"
WAITING = f"ALTER SYSTEM SET synchronized_standby_slots = '{STANDBY}'"
SYNCED = "SELECT synced AND failover AND NOT temporary FROM pg_replication_slots WHERE slot_name = '{}'"


def wanting(config: Config, failover: bool | None) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, failover=failover))


def at_either(config: Config, *servers: Postgres) -> Config:
    """The same source behind whichever of the servers takes writes."""
    hosts = ",".join(f"{one.host}:{one.port}" for one in servers)
    dsn = Secret(f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write")
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=dsn))


async def found(config: Config) -> dict[str, tuple[str, str]]:
    """What `check` says of failover: level and words by id."""
    every = (await check(config, list(config.stream.servers))).findings
    ids = ("postgres.failover", "postgres.synchronized_standbys", "postgres.slot_sync")
    return {one.id.removeprefix("postgres."): (one.level, one.what) for one in every if one.id in ids}


@pytest.fixture
async def primary(bin17: Path) -> AsyncIterator[Postgres]:
    async with Postgres.throwaway(bindir=bin17, fsync=False) as server:
        yield server


async def test_a_slot_is_made_a_failover_slot_and_back_before_it_is_read(primary: Postgres, nats: NatsServer) -> None:
    config = source(primary.dsn(), nats.url)
    await execute(primary.dsn(), "CREATE TABLE n (id int PRIMARY KEY, v numeric)")
    slot = f"SELECT failover FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'"
    for key, (wanted, then) in enumerate([(None, False), (True, True), (None, True), (False, False)]):
        if then and wanted:
            assert (await found(wanting(config, wanted)))["failover"][0] == "warning"
        async with bridge(wanting(config, wanted)):
            await settled(config)
            assert await execute(primary.dsn(), slot) == [(then,)]
            # Nobody can alter it now: the bridge has done so before.
            await execute(primary.dsn(), f"INSERT INTO n VALUES ({key}, 'NaN')")
            await settled(config)
    # The plugin of this server can tell them.
    assert [row["after"]["v"] for row in await events(config, "n")] == ["NaN"] * 4


async def test_a_bridge_goes_on_at_the_standby_that_is_promoted(primary: Postgres, nats: NatsServer) -> None:
    config = wanting(source(primary.dsn(), nats.url), True)
    assert (await found(config))["synchronized_standbys"][0] == "warning"
    await primary.stop()
    async with replicas.cold_copy(primary) as standby:
        await primary.start()
        await execute(
            primary.dsn(),
            "CREATE TABLE t (id int PRIMARY KEY, body text)",
            "INSERT INTO t VALUES (1, 'a')",
            WAITING,
            "SELECT pg_reload_conf()",
        )
        assert "which is no physical slot" in (await found(config))["synchronized_standbys"][1]
        await execute(primary.dsn(), f"SELECT pg_create_physical_replication_slot('{STANDBY}', true)")
        assert "no standby reads" in (await found(config))["synchronized_standbys"][1]
        await replicas.start(standby, follow=primary, slot=STANDBY)
        # Once promoted it waits for a standby of its own, until it is told that there is none.
        await execute(standby.dsn(), WAITING, "SELECT pg_reload_conf()")
        config = at_either(config, primary, standby)
        async with bridge(config):
            await settled(config)
            await execute(primary.dsn(), "INSERT INTO t VALUES (2, 'b')")

            async def synced() -> bool:
                # The slot's position has to come past what the standby still holds.
                await execute(primary.dsn(), "SELECT pg_log_standby_snapshot()", "UPDATE t SET body = body || '.'")
                return await execute(standby.dsn(), SYNCED.format(config.source.slot)) == [(True,)]

            await until(synced, 30, "the standby has the slot")
            await settled(config)
            assert {level for level, _ in (await found(config)).values()} == {"ok"}
            await primary.kill()
            await replicas.promote(standby)
            await execute(standby.dsn(), "INSERT INTO t VALUES (3, 'c')")
            await streaming(config)
            with pytest.raises(TimeoutError):
                await settled(config, 1)
            assert (await found(config))["synchronized_standbys"][0] == "error"
            await execute(standby.dsn(), "ALTER SYSTEM RESET synchronized_standby_slots", "SELECT pg_reload_conf()")
            await settled(config)
            page(await collect(config, list(config.stream.servers)), shown := StringIO())
            assert "a failover slot, made by slot synchronization" in shown.getvalue()
        read = await agrees(config)
        assert {message.position[:8] for message, _ in read} == {"00000001", "00000002"}
        assert [one["after"]["id"] for one in await events(config, "t") if one["op"] == "insert"] == [2, 3]


async def test_a_server_that_has_no_such_slots_is_refused(pg_db: str, nats: NatsServer) -> None:
    [(version,)] = await execute(pg_db, "SHOW server_version_num")
    if int(version) >= 170000:
        pytest.skip("this server has failover slots")
    config = wanting(source(pg_db, nats.url), True)
    error = await failure(config)
    assert isinstance(error, ServerRefused)
    assert f"this is PostgreSQL {int(version) // 10000}: failover slots came with 17" in str(error)
    assert (await found(config))["failover"][0] == "error"
    assert await execute(pg_db, "SELECT FROM pg_replication_slots WHERE database = current_database()") == []
