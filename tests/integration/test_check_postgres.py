"""What `bridge check` finds of a PostgreSQL server that is not set up for it, each remedy followed as it says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import msgspec
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, Postgres
from bridge.errors import ServerRefused
from bridge.operate.check import check
from bridge.operate.checks.finding import Finding
from bridge.source import connection, slot
from tests.databases import database
from tests.replicas import base_backup
from tests.running import bridge, execute, settled, source

pytestmark = pytest.mark.anyio

WITHOUT = {
    "wal_level": "replica",
    "max_replication_slots": "2",
    "max_wal_senders": "2",
    "max_slot_wal_keep_size": "96MB",
    "wal_sender_timeout": "5s",
}


@pytest.fixture(scope="module")
async def bare() -> AsyncIterator[Postgres]:
    """A server as a package manager leaves it, nearly."""
    async with Postgres.throwaway(settings=WITHOUT, fsync=False) as server:
        yield server


async def found(config: Config) -> dict[str, Finding]:
    """What is found of PostgreSQL and its tables, by id."""
    every = (await check(config, list(config.stream.servers))).found
    return {one.id: one for one in every if one.id.startswith(("postgres.", "tables."))}


def as_user(dsn: str, user: str) -> str:
    return dsn.replace("//postgres@", f"//{user}@")


async def test_a_server_and_a_role_that_are_not_set_up_are_mended_as_it_says(bare: Postgres, nats: NatsServer) -> None:
    admin = bare.dsn()
    await execute(admin, "CREATE ROLE least", "REVOKE CONNECT ON DATABASE postgres FROM public")
    config = source(as_user(admin, "least"), nats.url, tables=["shop.*"])

    async def step(id: str, remedy: str, *statements: str) -> None:
        now = await found(config)
        assert id in now, now
        assert remedy in now[id].next
        await execute(admin, *statements)
        assert id not in await found(config)

    await execute(
        admin,
        "CREATE SCHEMA shop",
        "CREATE TABLE shop.items (id int PRIMARY KEY, n numeric)",
        "CREATE TABLE shop.secrets (id int PRIMARY KEY)",
        "ALTER TABLE shop.secrets ENABLE ROW LEVEL SECURITY",
    )
    # Not let in at all: once for the role, once for the database.
    refused = (await found(config))["postgres.reachable"]
    assert "ALTER ROLE … LOGIN" in refused.next
    await execute(admin, "ALTER ROLE least LOGIN")
    await step("postgres.reachable", "GRANT CONNECT ON DATABASE", "GRANT CONNECT ON DATABASE postgres TO least")
    now = await found(config)
    ids = {"postgres.wal_level", "postgres.role", "postgres.wal_keep", "tables.schema", "tables.select"}
    assert now.keys() == ids | {"tables.row_security"}
    # The same three at once where the bridge itself refuses to begin.
    async with connection.connect(str(config.source.dsn)) as sql:
        with pytest.raises(ServerRefused) as error:
            await slot.inspect(sql)
    assert all(one in str(error.value) for one in ("wal_level is replica", "may not replicate", "ALTER ROLE least"))
    await step("postgres.role", "ALTER ROLE least REPLICATION", "ALTER ROLE least REPLICATION")
    for id in ("tables.schema", "tables.select"):
        await step(id, "GRANT ", *now[id].next.split("; "))
    await step("tables.row_security", 'ALTER ROLE "least" BYPASSRLS', "ALTER ROLE least BYPASSRLS")
    await step("postgres.wal_keep", "SET max_slot_wal_keep_size = '50GB'", *_statements(now["postgres.wal_keep"].next))
    assert (await found(config)).keys() == {"postgres.wal_level"}
    await execute(admin, "ALTER SYSTEM SET wal_level = logical")
    await bare.restart()
    # The plugin can be tried now; a role that has no more than it needs is enough for the bridge.
    assert (await found(config)).keys() <= {"tables.exact"}
    async with bridge(msgspec.structs.replace(config, source=_with(config, tables=["shop.*", "public.mark"]).source)):
        pass


def _with(config: Config, **changes: object) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, **changes))


def _statements(remedy: str) -> list[str]:
    return [one.strip() for one in re.sub(r" \(.*", "", remedy).split(";")]


async def test_slots_that_are_used_up_are_lost_or_are_others(bare: Postgres, nats: NatsServer) -> None:
    await execute(
        bare.dsn(), "ALTER SYSTEM SET wal_level = logical", "ALTER SYSTEM SET max_slot_wal_keep_size = '96MB'"
    )
    await bare.restart()
    async with database(bare) as dsn:
        config = source(dsn, nats.url)
        name = config.source.slot
        await execute(
            dsn,
            "CREATE TABLE t (id int PRIMARY KEY)",
            "SELECT pg_create_logical_replication_slot('bridge_check_left', 'test_decoding')",
            "SELECT pg_create_physical_replication_slot('other')",
        )
        now = await found(config)
        assert ("none is left for" in now["postgres.slots"].what, now["postgres.slots"].level) == (True, "error")
        assert "every replication slot" in now["postgres.wal2json"].what
        left = now["postgres.leftover"]
        assert (left.about, left.next) == ("bridge_check_left", "SELECT pg_drop_replication_slot('bridge_check_left')")
        await execute(dsn, left.next)
        assert not {"postgres.slots", "postgres.leftover", "postgres.wal2json"} & (await found(config)).keys()
        # Somebody else's slot under our name.
        await execute(dsn, f"SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')")
        assert "the plugin test_decoding" in (await found(config))["postgres.slot"].what
        await execute(dsn, f"SELECT pg_drop_replication_slot('{name}')")
        await execute(bare.dsn(), f"SELECT pg_create_logical_replication_slot('{name}', 'wal2json')")
        assert "belongs to the database postgres" in (await found(config))["postgres.slot"].what
        await execute(dsn, f"SELECT pg_drop_replication_slot('{name}')")
        # Nearly at its limit, then over it.
        await execute(dsn, f"SELECT pg_create_logical_replication_slot('{name}', 'wal2json')")
        seen = [await _after_a_segment(dsn, config) for _ in range(10)]
        assert seen[0] is None
        assert [level for level in ("warning", "error") if level in [one.level for one in seen if one]] == [
            "warning",
            "error",
        ]
        assert seen[-1] is not None
        assert "removed WAL that the slot" in seen[-1].what
        await execute(dsn, "SELECT pg_drop_replication_slot('other')")


async def _after_a_segment(dsn: str, config: Config) -> Finding | None:
    await execute(dsn, "SELECT pg_logical_emit_message(false, 'x', 'y')", "SELECT pg_switch_wal()", "CHECKPOINT")
    return (await found(config)).get("postgres.slot")


async def test_a_database_whose_text_could_be_anything_and_a_standby(bare: Postgres, nats: NatsServer) -> None:
    await execute(bare.dsn(), "CREATE DATABASE anything TEMPLATE template0 ENCODING 'SQL_ASCII'")
    ascii_ = (await found(source(bare.dsn("anything"), nats.url)))["postgres.encoding"]
    assert ("SQL_ASCII" in ascii_.what, ascii_.level, ascii_.about) == (True, "error", "anything")
    async with base_backup(bare) as standby:
        (standby.data_dir / "standby.signal").touch()
        await standby.start()
        now = await found(source(standby.dsn(), nats.url))
        assert now["postgres.recovery"].next == "point [source] dsn at the primary"


async def test_a_plugin_that_postgresql_may_not_load_is_named_once(own_pg: Postgres, nats: NatsServer) -> None:
    config = source(own_pg.dsn(), nats.url)
    setting = "SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'"
    if await execute(own_pg.dsn(), setting) == [(0,)]:
        pytest.skip("this server has no output_plugin_libraries")
    await execute(own_pg.dsn(), "ALTER SYSTEM SET output_plugin_libraries = pgoutput", "SELECT pg_reload_conf()")
    now = await found(config)
    assert "postgres.plugin_libraries" in now
    assert "postgres.wal2json" not in now
    await execute(own_pg.dsn(), *now["postgres.plugin_libraries"].next.split("; "))
    assert "postgres.plugin_libraries" not in await found(config)


async def test_a_plugin_that_is_not_installed_is_named(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.source.slot.PLUGIN", "no_such_plugin")
    config = source(pg_db, nats.url)
    if (await execute(pg_db, "SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'")) == [(1,)]:
        pytest.skip("this server looks into output_plugin_libraries first")
    now = (await found(config))["postgres.wal2json"]
    assert ("no_such_plugin" in now.what, now.level) == (True, "error")
    assert "apt-get install postgresql-NN-wal2json" in now.next


async def test_open_transactions_leave_the_plugin_untried(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.operate.checks.ask_postgres.PROBE_SECONDS", 0.5)
    config = source(pg_db, nats.url)
    async with connection.connect(pg_db) as sql:
        await sql.execute("BEGIN")
        await sql.execute("SELECT txid_current()")
        now = (await found(config))["postgres.wal2json"]
        await sql.execute("COMMIT")
    assert (now.level, "transactions that are open" in now.what) == ("warning", True)
    assert await execute(pg_db, "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'bridge_check%'") == [
        (0,)
    ]


async def test_a_running_bridge_is_seen_and_not_disturbed(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    async with bridge(config):
        await settled(config)
        every = await check(config, [nats.url])
        said = {one.id: one.what for one in every.findings}
        assert said["postgres.slot"].startswith("being read, PostgreSQL keeps ")
        assert said["bridge.lease"].endswith("runs")
        assert "a log of" in said["jetstream.stream"]
        assert every.sound
        await settled(config)
