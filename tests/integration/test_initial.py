"""The initial snapshot: ranges on several connections, tables that change under it, and what an interruption leaves."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import msgspec
import psycopg
import pytest
from psycopg import pq

from bridge.config import Config, Secret, Source
from bridge.embedded import NatsServer, Postgres, until
from bridge.operate.show import snapshot as show_snapshot
from bridge.pipeline.initial import Initial
from bridge.source import connection, export
from bridge.source.catalog import Catalog, Relation
from bridge.stream import asking
from bridge.stream.state import SnapshotStatus, State
from tests.crash.process import Bridge
from tests.oracle import agrees
from tests.reading.checker import never_back
from tests.running import bridge, broker_of, complete, execute, messages, settled, source, statuses, toml
from tests.terminal import terminal

pytestmark = pytest.mark.anyio

SLOT = "SELECT pg_create_logical_replication_slot('{}', 'wal2json')"
# Some thirty blocks each.
LARGE = ["CREATE TABLE {0} (id int PRIMARY KEY, v int, body text)",
         "INSERT INTO {0} SELECT g, 0, repeat('x', 100) FROM generate_series(1, 1500) g"]  # fmt: skip


def large(*names: str) -> list[str]:
    return [statement.format(name) for name in names for statement in LARGE]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of two blocks."""
    monkeypatch.setattr(export, "RANGE", 2)


async def markers(config: Config) -> dict[str, list[str]]:
    """The phases of each table's markers, in the stream's order."""
    found: dict[str, list[str]] = {}
    for _, one in await messages(config):
        if one.op == "snapshot":
            found.setdefault(one.table, []).append(str(one.phase))
    return found


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("workers", [1, 3])
async def test_every_row_of_every_range_is_there_once(pg_db: str, nats: NatsServer, workers: int) -> None:
    config = source(pg_db, nats.url, workers=workers)
    await execute(
        pg_db, *large("a", "b"), *large("keyless"), "ALTER TABLE keyless DROP CONSTRAINT keyless_pkey",
        "ALTER TABLE keyless REPLICA IDENTITY FULL",
        "CREATE TABLE p (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)",
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (700)",
        "CREATE TABLE p2 PARTITION OF p DEFAULT",
        "INSERT INTO p SELECT g, repeat('y', 100) FROM generate_series(1, 1500) g",
        # Holes: ranges with few rows, and one with none.
        "DELETE FROM a WHERE id BETWEEN 200 AND 600", "CREATE TABLE nothing (id int PRIMARY KEY)",
    )  # fmt: skip
    async with bridge(config):
        await settled(config)
    found = await agrees(config)
    reads = Counter((one.table, bytes(one.after)) for _, one in found if one.op == "read")
    assert set(reads.values()) == {1}
    assert Counter(table for table, _ in reads) == {"a": 1099, "b": 1500, "keyless": 1500, "p": 1500}
    told = await statuses(config)
    assert {name: one.rows for name, one in told.items() if name != "mark"} == {
        "a": 1099, "b": 1500, "keyless": 1500, "p": 1500, "nothing": 0,
    }  # fmt: skip
    assert {one.state for one in told.values()} == {"done"}
    told.pop("mark")
    for name, one in told.items():
        own = [m.seq for m, e in found if e.table == name and e.op in ("snapshot", "read")]
        assert (one.first_seq, one.last_seq, one.complete_from) == (own[0], own[-1], own[0]), name


async def test_only_large_tables_with_a_key_are_cut(pg_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "RANGE", 10)
    await execute(pg_db, *large("a"), *large("keyless"), "ALTER TABLE keyless DROP CONSTRAINT keyless_pkey")
    relations = await _relations(pg_db)
    async with connection.connect(pg_db) as sql:
        parts = await export.parts(sql, relations)
        server = sql.pgconn.server_version
    cut = [(part.low, part.high) for part in parts if part.relation.table == "a"]
    assert cut == ([(0, 10), (10, 20), (20, None)] if server >= 140000 else [(0, None)])
    assert [(part.low, part.high) for part in parts if part.relation.table == "keyless"] == [(0, None)]


async def _relations(dsn: str) -> list[Relation]:
    async with connection.connect(dsn) as sql:
        return await Catalog(sql, Source(dsn=Secret(dsn), tables=["public.*"])).published()


CHANGES = [
    "TRUNCATE t", "ALTER TABLE t ALTER v TYPE text", "CLUSTER t USING t_pkey", "ALTER TABLE t DROP v",
    "ALTER TABLE t RENAME v TO w", "DELETE FROM t; VACUUM t",
]  # fmt: skip


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "between"])
async def test_a_table_that_changes_after_the_export_is_whole_in_the_end_and_the_others_stay(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, when: str, change: str
) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, *large("t", "u"), SLOT.format(oracle))
    left = 0 if when == "before" else 4
    part = Initial._part

    async def changing(self: Initial, sql: Any, table: Any, one: Any) -> None:
        nonlocal left
        if table.name == "public.t":
            left -= 1
            if left == -1:
                await execute(pg_db, *change.split("; "))
        await part(self, sql, table, one)

    monkeypatch.setattr(Initial, "_part", changing)
    async with bridge(config):
        await settled(config)
        told = await complete(config)
        await execute(pg_db, "INSERT INTO t (id) SELECT max(id) + 1 FROM u")
        await settled(config)
    assert left < 0
    found = await agrees(config, oracle, interrupted=True)
    assert told["u"].mode == "initial"
    phases = await markers(config)
    assert phases["u"] == ["begin", "end"]
    rewrites = change.startswith(("TRUNCATE", "CLUSTER", "ALTER TABLE t ALTER"))
    if rewrites:
        assert told["t"].mode == "incremental"
        assert phases["t"][:2] == ["begin", "begin"]
        assert phases["t"].index("end") == len(phases["t"]) - 1, "it was read to the end once"
    assert {m.epoch for m, _ in found} == {1}, "nothing began anew"


@pytest.mark.usefixtures("small")
async def test_a_table_without_a_key_that_is_truncated_after_the_export_starts_all_over(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE k (v int)", "ALTER TABLE k REPLICA IDENTITY FULL", "INSERT INTO k VALUES (1)",
                  *large("t"))  # fmt: skip
    read = Initial.read
    attempts = 0

    async def interrupted(self: Initial) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await execute(pg_db, "TRUNCATE k")
        await read(self)

    monkeypatch.setattr(Initial, "read", interrupted)
    async with bridge(config):
        await settled(config)
    assert attempts == 2
    await agrees(config)
    assert {one.mode for one in (await statuses(config)).values()} == {"initial"}


async def test_a_table_dropped_after_the_export_is_forgotten_and_the_others_go_on(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *large("t", "u"))
    read = Initial.read

    async def interrupted(self: Initial) -> None:
        await execute(pg_db, "DROP TABLE t")
        await read(self)

    monkeypatch.setattr(Initial, "read", interrupted)
    async with bridge(config):
        await settled(config)
        told = await complete(config)
    assert told.keys() == {"mark", "u"}
    said = "".join(capfd.readouterr())
    assert "table moved" in said
    assert "table gone" in said
    await agrees(config, strict=False)


@pytest.mark.parametrize("key", [True, False])
async def test_a_name_that_another_table_has_by_then_is_not_read(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, key: bool
) -> None:
    config = source(pg_db, nats.url)
    kind = "CONSTRAINT {} PRIMARY KEY" if key else "NOT NULL"
    await execute(
        pg_db,
        "CREATE SCHEMA hid",
        f"CREATE TABLE t (id int {kind.format('one')})",
        f"CREATE TABLE hid.t (id int {kind.format('other')})",
        "ALTER TABLE t REPLICA IDENTITY FULL",
        "INSERT INTO t VALUES (1)",
        "INSERT INTO hid.t VALUES (99)",
    )
    swap = ["ALTER TABLE t RENAME TO kept", "ALTER TABLE hid.t SET SCHEMA public"]
    back = ["ALTER TABLE t SET SCHEMA hid", "ALTER TABLE kept RENAME TO t"]
    begin, calls = export.begin, 0

    async def swapped(sql: Any, snapshot: str, relation: Relation) -> None:
        nonlocal calls
        if relation.table != "t" or calls:
            return await begin(sql, snapshot, relation)
        calls += 1
        await execute(pg_db, *swap)
        try:
            await begin(sql, snapshot, relation)
        finally:
            await sql.execute("ROLLBACK")  # what it has locked is to be renamed
            await execute(pg_db, *back)

    monkeypatch.setattr(export, "begin", swapped)
    async with bridge(config):
        await settled(config)
        await complete(config)
    found = await agrees(config, interrupted=True, rewritten=["t", "kept"])
    assert not [one for _, one in found if one.table != "mark" and b"99" in bytes(one.after)]


async def test_what_is_asked_for_meanwhile_is_done_afterwards_and_disturbs_nothing(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *large("t"))
    part = Initial._part

    async def asked(self: Initial, sql: Any, table: Any, one: Any) -> None:
        async with broker_of(config) as broker:
            state = await State.open(broker, config.state.bucket)
            await asking.ask(state, config.source.name, ("public", "t"))
        await part(self, sql, table, one)

    monkeypatch.setattr(Initial, "_part", asked)
    async with bridge(config):
        await settled(config)
        told = await complete(config)
    found = await agrees(config)
    assert (await markers(config))["t"] == ["begin", "end"] * 2
    assert {message.epoch for message, _ in found} == {1}
    assert told["t"].mode == "incremental"


KILLED = [
    "snapshot.prepared:kill", "table.began:kill:2", "table.rows:kill:2", "table.rows:kill:5", "table.read:kill:2",
    "table.done:kill:1", "table.done:kill:2", "snapshot.read:kill", "snapshot.drained:kill", "snapshot.noted:kill",
    "snapshot.done:kill",
]  # fmt: skip


@pytest.mark.parametrize("failpoint", KILLED)
async def test_what_is_whole_stays_and_the_rest_is_read_once_more(
    pg_db: str, nats: NatsServer, tmp_path: Path, failpoint: str
) -> None:
    config = source(pg_db, nats.url, workers=1)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db, *large("a", "b", "c"), SLOT.format(oracle), "ANALYZE",
        "INSERT INTO c SELECT g, 0, repeat('z', 800) FROM generate_series(2000, 9000) g",
    )  # fmt: skip
    process = Bridge(tmp_path, toml(config))
    await process.start(failpoint)
    try:
        assert await process.reached(0, 30)
        await process.ended()
        before = await statuses(config)
        await execute(pg_db, "UPDATE a SET v = 1", "DELETE FROM b WHERE id % 2 = 0",
                      "UPDATE c SET id = -id, v = 1 WHERE id % 3 = 0",
                      "INSERT INTO c VALUES (0, 0, 'new')")  # fmt: skip
        await process.start()
        await process.said("streaming")
        await settled(config)
        told = await complete(config)
        await process.stop()
        said = process.text
    finally:
        await process.close()
    found = await agrees(config, oracle, interrupted=True)
    phases = await markers(config)
    done = {name for name, one in before.items() if one.state == "done"}
    for name, one in told.items():
        if name in done:
            assert phases[name] == ["begin", "end"], f"{name} was whole"
            assert one == before[name]
    if done and len(done) < len(before):
        assert said.count("slot created") == 1
        assert {told[name].mode for name in before.keys() - done} == {"incremental"}
        for name in before.keys() - done:
            never_back(found, name)


async def test_what_the_stream_has_lost_of_a_whole_table_is_read_once_more(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, workers=1)
    await execute(pg_db, *large("a", "b", "c"))
    process = Bridge(tmp_path, toml(config))
    await process.start("table.done:kill:2")
    try:
        assert await process.reached(0, 30)
        await process.ended()
        before = await statuses(config)
        *kept_whole, lost = sorted(name for name, one in before.items() if one.state == "done")
        async with broker_of(config) as broker:
            # As after a power failure: the bucket is ahead of the stream.
            state, key = await State.open(broker, config.state.bucket), f"snapshot.{config.source.name}.public.{lost}"
            kept = await state.get(key, SnapshotStatus)
            assert kept is not None
            await state.put(key, msgspec.structs.replace(kept[0], last_seq=1_000_000), kept[1])
        await process.start()
        await process.said("streaming")
        told = await complete(config)
        await process.stop()
    finally:
        await process.close()
    assert kept_whole
    assert {name: one.mode for name, one in told.items()} == {
        name: "initial" if name in kept_whole else "incremental" for name in before
    }
    await agrees(config)


async def test_on_a_terminal_there_are_bars_for_all_tables_and_for_each_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal(monkeypatch, 120) as everything, show_snapshot.initial() as show:
        assert show is not None
        running = SnapshotStatus(state="running", rows=250, estimate=1000, rate=50.0, eta=15.0)
        show({("public", "a"): SnapshotStatus(state="done", rows=10, estimate=12), ("public", "b"): running})
    shown = everything()
    assert "snapshot: 1 of 2 tables" in shown
    assert "public.b" in shown
    assert "250/1000" in shown
    assert "50/s, 15.0 s left" in shown
    assert "public.a" not in shown


def test_elsewhere_there_are_none() -> None:
    with show_snapshot.initial() as show:
        assert show is None


async def test_the_transactions_that_a_new_slot_waits_for_are_named(
    nats: NatsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    async with Postgres.throwaway(settings={"max_prepared_transactions": "2"}, fsync=False) as pg:
        await execute(pg.dsn(), "CREATE TABLE t (id int PRIMARY KEY)")
        config = source(pg.dsn(), nats.url)
        async with await psycopg.AsyncConnection.connect(pg.dsn()) as prepared:
            await prepared.execute("INSERT INTO t VALUES (1)")
            await prepared.execute("PREPARE TRANSACTION 'left over'")
        async with await psycopg.AsyncConnection.connect(pg.dsn()) as idle, AsyncExitStack() as stack:
            await idle.execute("INSERT INTO t VALUES (2)")
            await stack.enter_async_context(bridge(config))
            said = ""

            def named() -> bool:
                nonlocal said
                said += "".join(capfd.readouterr())
                return "slot waits" in said

            await until(named, 30, "the log names them")
            assert str(idle.info.backend_pid) in said
            assert "left over" in said
            await idle.commit()
            await execute(pg.dsn(), "ROLLBACK PREPARED 'left over'")
            await settled(config)
        await agrees(config)


class Watched:
    """A connection of libpq's that notes how often it is asked to read while whole rows wait in its buffer."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self.empty = False
        self.behind = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pgconn, name)

    def consume_input(self) -> None:
        self.behind += not self.empty
        self._pgconn.consume_input()

    def get_copy_data(self, mode: int) -> tuple[int, Any]:
        found = self._pgconn.get_copy_data(mode)
        self.empty = found[0] <= 0
        return found


async def test_nothing_is_read_into_a_buffer_that_holds_rows_for_it_would_grow_without_end(pg_db: str) -> None:
    async with connection.connect(pg_db) as sql:
        await sql.execute("CREATE TABLE t AS SELECT g AS id, repeat('x', 200) AS body FROM generate_series(1, 50000) g")
        for _ in range(5):
            for result in await connection.command(sql.pgconn, b"COPY t TO STDOUT"):
                connection.check(sql.pgconn, result)
            watched, rows = Watched(sql.pgconn), 0
            copy = connection.CopyReader(cast(pq.abc.PGconn, watched))
            while lines := await copy.take():
                rows += len(lines)
            copy.close()
            await connection.finish(sql.pgconn)
            assert (rows, watched.behind) == (50_000, 0)
