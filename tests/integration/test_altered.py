"""What alters a table without a trace in its changes: partitions that come and go, names and kinds, replica identity.

The bridge runs all the while and knows each table well before it is altered.
"""

from __future__ import annotations

from typing import Any

import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.errors import ConfigError, ServerRefused
from bridge.pipeline.plans import Plans
from tests.running import MARK, bridge, broker_of, events, execute, failure, messages, settled, source, streaming

pytestmark = pytest.mark.anyio

PARTED = "CREATE TABLE part (id int PRIMARY KEY, body text, pw text) PARTITION BY RANGE (id)"
FIRST = "CREATE TABLE part1 PARTITION OF part FOR VALUES FROM (0) TO (1000)"
LOOSE = "CREATE TABLE part2 (id int PRIMARY KEY, body text, pw text)"
FILL = "INSERT INTO {} SELECT g, 'b', 'secret' FROM generate_series({}, {}) g"
ATTACH = "ALTER TABLE part ATTACH PARTITION part2 FOR VALUES FROM (2000) TO (3000)"


async def ids(config: Config, table: str) -> list[Any]:
    return [one["after"]["id"] for one in await events(config, table) if one["op"] == "insert"]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tables", [["public.part", "public.mark"], ["public.*"]])
async def test_a_partition_that_is_attached_is_its_roots_from_then_on(
    pg_db: str, nats: NatsServer, tables: list[str], together: bool
) -> None:
    config = source(pg_db, nats.url, tables=tables)
    await execute(pg_db, MARK, PARTED, FIRST, LOOSE)
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, FILL.format("part2", 2900, 2910), FILL.format("part", 1, 10), "DELETE FROM part2")
        await settled(config)
        steps = [ATTACH, FILL.format("part", 2000, 2020)]
        await execute(pg_db, *([f"BEGIN; {'; '.join(steps)}; COMMIT"] if together else steps))
        await settled(config)
    assert await ids(config, "part") == [*range(1, 11), *range(2000, 2021)]
    assert await ids(config, "part2") == ([] if tables[0] == "public.part" else [*range(2900, 2911)])


async def test_a_partition_that_is_detached_is_a_table_of_its_own(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "!public.secret"])
    await execute(pg_db, PARTED, FIRST, PARTED.replace("part", "secret"), FIRST.replace("part", "secret"))
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, FILL.format("part", 1, 10), FILL.format("secret", 1, 10))
        await settled(config)
        for name in "part", "secret":
            await execute(pg_db, f"ALTER TABLE {name} DETACH PARTITION {name}1", FILL.format(f"{name}1", 11, 20))
        await settled(config)
    assert await ids(config, "part") == [*range(1, 11)]
    assert await ids(config, "part1") == [*range(11, 21)]
    assert await ids(config, "secret1") == [*range(11, 21)]
    assert await ids(config, "secret") == []


async def test_what_a_root_excludes_is_not_published_of_a_partition_that_comes(pg_db: str, nats: NatsServer) -> None:
    config = source(
        pg_db, nats.url, tables=["public.*", "!public.hidden"], table={"public.part": Table(exclude=["pw"])}
    )
    await execute(pg_db, PARTED, FIRST, LOOSE, PARTED.replace("part", "hidden"), LOOSE.replace("part2", "loose"))
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, FILL.format("part2", 2900, 2910), FILL.format("loose", 2900, 2910))
        await execute(pg_db, "DELETE FROM part2", "DELETE FROM loose")
        await settled(config)
        before = len(await messages(config))
        await execute(pg_db, ATTACH, ATTACH.replace("part2", "loose").replace("TABLE part", "TABLE hidden"))
        await execute(pg_db, FILL.format("part", 2000, 2010), FILL.format("hidden", 2000, 2010))
        await settled(config)
        found = (await messages(config))[before:]
    assert [e.table for _, e in found if e.op == "insert" and e.table != "mark"] == ["part"] * 11
    assert not [e for m, e in found if b"secret" in m.data]


async def test_a_table_in_the_place_of_a_materialized_view_is_published(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.*"])
    await execute(pg_db, "CREATE TABLE src (id int PRIMARY KEY)", "INSERT INTO src VALUES (1)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "CREATE MATERIALIZED VIEW mv AS SELECT * FROM src", "REFRESH MATERIALIZED VIEW mv")
        await settled(config)
        await execute(pg_db, "DROP MATERIALIZED VIEW mv", "CREATE TABLE mv (id int PRIMARY KEY)")
        await execute(pg_db, "INSERT INTO mv VALUES (7)")
        await settled(config)
    assert await ids(config, "mv") == [7]


async def test_a_root_that_is_renamed_and_one_that_gets_its_name_are_two_tables(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.*"])
    await execute(pg_db, PARTED, FIRST)
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, FILL.format("part", 1, 5))
        await settled(config)
        await execute(pg_db, "ALTER TABLE part RENAME TO other", FILL.format("other", 6, 6))
        await execute(pg_db, "CREATE TABLE part (id int PRIMARY KEY, body text, pw text)", FILL.format("part", 6, 7))
        await settled(config)
    assert await ids(config, "part") == [1, 2, 3, 4, 5, 6, 7]
    assert await ids(config, "other") == [6]


async def test_a_table_that_moves_to_a_schema_that_is_not_published_is_not(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.*"])
    await execute(pg_db, LOOSE, "CREATE SCHEMA private")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, FILL.format("part2", 1, 5))
        await settled(config)
        await execute(pg_db, "ALTER TABLE part2 SET SCHEMA private", FILL.format("private.part2", 6, 9))
        await settled(config)
    assert await ids(config, "part2") == [1, 2, 3, 4, 5]


async def test_inserts_have_the_key_of_a_new_replica_identity(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, "CREATE TABLE i (id int PRIMARY KEY, k text NOT NULL)", "CREATE UNIQUE INDEX ik ON i (k)",
    )  # fmt: skip
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO i SELECT g, 'k' || g FROM generate_series(1, 600) g", "DELETE FROM i")
        await settled(config)
        await execute(pg_db, "ALTER TABLE i REPLICA IDENTITY USING INDEX ik", "INSERT INTO i VALUES (1, 'x')")
        await execute(pg_db, "UPDATE i SET id = 2", "DELETE FROM i")
        await settled(config)
    assert [e["key"] for e in (await events(config, "i"))[-3:]] == [{"k": "x"}] * 3


async def test_savepoints_and_temporary_tables_cost_a_look_and_forget_no_plan(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, loaded = [], []
    compare, load = Plans.compare, Plans.load

    async def counted(self: Plans, xid: int) -> None:
        looked.append(xid)
        await compare(self, xid)

    async def again(self: Plans, schema: str, table: str, *rest: Any) -> Any:
        loaded.append(table)
        return await load(self, schema, table, *rest)

    monkeypatch.setattr(Plans, "compare", counted)
    monkeypatch.setattr(Plans, "load", again)
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    savepoints = "".join(f"SAVEPOINT s{n}; INSERT INTO t VALUES ({{0}} + {n}); " for n in range(8))
    async with bridge(config):
        await streaming(config)
        for start in range(0, 100, 10):
            await execute(pg_db, f"BEGIN; {savepoints.format(start)}COMMIT", "CREATE TEMP TABLE x (a int)")
            await settled(config)
    assert 10 <= len(looked) <= 40
    assert loaded.count("t") == 1
    assert len(await ids(config, "t")) == 80


@pytest.mark.parametrize("wrong", [{"tables": ["public.missing"]}, {"table": {"public.t": Table(exclude=["id"])}}])
async def test_a_configuration_that_cannot_work_leaves_nothing_behind(
    pg_db: str, nats: NatsServer, wrong: dict[str, Any]
) -> None:
    config = source(pg_db, nats.url, **wrong)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    error = await failure(config)
    assert isinstance(error, ServerRefused if "tables" in wrong else ConfigError)
    assert await execute(pg_db, f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'") == []
    async with broker_of(config) as broker:
        assert await broker.stream(config.stream.name) is None


@pytest.mark.parametrize("parted", [False, True])
async def test_a_change_from_before_a_column_came_does_not_leave_its_value_unchanged(
    pg_db: str, nats: NatsServer, parted: bool
) -> None:
    config = source(pg_db, nats.url)
    if parted:
        parts = "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (9)"
        await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)", parts)
    else:
        await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text)")
    await execute(pg_db, "INSERT INTO t VALUES (1, 'a'), (2, 'a')")
    async with bridge(config):
        await settled(config)
    before = len(await events(config, "t"))
    external = "" if parted else "; ALTER TABLE t ALTER {0} SET STORAGE EXTERNAL"
    alter = f"ALTER TABLE t ADD {{0}} text{external or '; ALTER TABLE t1 ALTER {0} SET STORAGE EXTERNAL'}"
    await execute(
        pg_db,
        "UPDATE t SET body = 'b'",
        "DELETE FROM t WHERE id = 1",
        alter.format("more"),
        "UPDATE t SET body = 'c'",
        f"UPDATE t SET more = '{'m' * 3000}'",
        "UPDATE t SET body = 'd'",
        alter.format("other"),
        "UPDATE t SET body = 'e'",
        f"UPDATE t SET other = '{'o' * 3000}'",
        "UPDATE t SET body = 'f'",
    )
    for _ in range(2):
        async with bridge(config):
            await settled(config)
        await execute(pg_db, "UPDATE t SET body = 'g'")
    found = [e for e in (await events(config, "t"))[before:] if e["op"] == "update"]
    assert [(sorted(e["after"]), e.get("unchanged", [])) for e in found] == [
        (["body", "id"], []),
        (["body", "id"], []),
        (["body", "id", "more"], []),
        (["body", "id", "more"], []),
        (["body", "id"], ["more"]),
        (["body", "id", "other"], ["more"]),
        (["body", "id", "other"], ["more"]),
        (["body", "id"], ["more", "other"]),
        (["body", "id"], ["more", "other"]),
    ]
