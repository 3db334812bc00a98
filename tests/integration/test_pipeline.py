"""A database's changes in the stream: from the first row of a snapshot to idle slots, stops and altered tables."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psycopg
import pytest

from bridge import embedded
from bridge.config import Config, Stream, Table
from bridge.embedded import NatsServer, Postgres, until
from bridge.embedded.nats import shipped_config
from bridge.errors import BridgeError, Contradiction, MissingIdentity
from bridge.event import Position
from bridge.operate.status.collect import collect
from bridge.pipeline import run
from bridge.source import lsn
from bridge.stream.state import SnapshotStatus, State, TableRecord
from bridge.waiting import until as wait_until
from tests.oracle import agrees
from tests.proxy import Proxy
from tests.rewriting import judged
from tests.running import (
    MARK,
    Process,
    Running,
    bridge,
    broker_of,
    checkpoint,
    complete,
    events,
    execute,
    failure,
    messages,
    settled,
    source,
    streaming,
    toml,
)

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


async def confirmed(config: Config) -> int:
    """The slot's confirmed_flush_lsn."""
    rows = await execute(
        str(config.source.dsn),
        "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots"
        f" WHERE slot_name = '{config.source.slot}'",
    )
    return int(rows[0][0])


async def wal_end(dsn: str) -> int:
    rows = await execute(dsn, "SELECT (pg_current_wal_lsn() - '0/0')::int8")
    return int(rows[0][0])


async def test_an_idle_slot_advances_while_only_others_are_busy(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.mine"])
    await execute(pg_db, "CREATE TABLE mine (id int PRIMARY KEY)", "CREATE TABLE other (id int PRIMARY KEY, t text)")
    async with bridge(config):
        await streaming(config)
        for dsn in (pg_db, pg_db.replace(pg_db.rpartition("/")[2], "postgres")):
            if dsn != pg_db:
                await execute(dsn, "DROP TABLE IF EXISTS other", "CREATE TABLE other (id int PRIMARY KEY, t text)")
            await execute(dsn, "INSERT INTO other SELECT g, repeat('x', 500) FROM generate_series(1, 5000) g")
            busy = await wal_end(dsn)
            await until(partial(_reaches, config, busy), 15, "the slot has advanced")
    assert await events(config, "mine") == []


async def _reaches(config: Config, position: int) -> bool:
    return await confirmed(config) >= position


async def test_hold_back_delays_what_postgresql_is_told(pg_db: str, nats: NatsServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("bridge.pipeline.checkpoint.MARGIN", 0.0)
    config = source(pg_db, nats.url, sync="4s")
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (1)")
        written = await wal_end(pg_db)

        async def kept() -> bool:
            found = await checkpoint(config)
            return found is not None and lsn.parse(found.lsn) >= written

        await until(kept, 10, "the bucket has the position")
        started = time.monotonic()
        assert await confirmed(config) < written
        await until(lambda: _reaches(config, written), 15, "PostgreSQL is told")
        assert time.monotonic() - started > 2.5


async def stops_soon(server: Postgres) -> None:
    started = time.monotonic()
    await server.stop(10)
    assert time.monotonic() - started < 5


async def test_postgresql_stops_at_once_with_the_broker_up_and_down(
    own_pg: Postgres, own_nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(own_nats.port)
    config = source(own_pg.dsn(), f"nats://127.0.0.1:{proxy.port}")
    dsn = own_pg.dsn()
    async with bridge(config):
        await execute(dsn, "CREATE TABLE t (id int PRIMARY KEY, t text)", "INSERT INTO t VALUES (1, 'a')")
        await settled(config)
        await stops_soon(own_pg)
        await own_pg.start()
        await settled(config)
        proxy.hold()  # the broker hangs: nothing can be published, and a backlog grows
        await execute(dsn, "INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(10, 60000) g")
        await stops_soon(own_pg)
        await own_pg.start()
        await proxy.refuse()
        proxy.release()
        await stops_soon(own_pg)
        await own_pg.start()
        proxy.accept()
        await settled(config, 60)
    await agrees(config)


async def test_partitions_appear_under_their_root(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db,
        "CREATE SCHEMA parts",
        "CREATE TABLE m (day date, id int, note text, PRIMARY KEY (day, id)) PARTITION BY RANGE (day)",
        "CREATE TABLE m_1 PARTITION OF m FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
        "CREATE TABLE parts.m_2 PARTITION OF m FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY LIST (id)",
        "CREATE TABLE parts.m_2_even PARTITION OF parts.m_2 FOR VALUES IN (0, 2, 4)",
        "CREATE TABLE parts.m_2_rest PARTITION OF parts.m_2 DEFAULT",
        "INSERT INTO m SELECT '2026-01-20'::date + g, g, 'read' FROM generate_series(0, 30) g",
        SLOT.format(oracle),
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "INSERT INTO m VALUES ('2026-02-05', 2, 'a'), ('2026-02-05', 3, 'b'), ('2026-01-05', 3, 'c')",
            "UPDATE m SET day = '2026-01-06' WHERE day = '2026-02-05' AND id = 3",
            "CREATE TABLE parts.m_3 PARTITION OF m FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')",
            "INSERT INTO m VALUES ('2026-03-01', 1, 'late partition')",
            "TRUNCATE m_1",
            "TRUNCATE parts.m_2_even",
            "INSERT INTO m VALUES ('2026-01-07', 1, 'again')",
        )
        await settled(config)
        found = await agrees(config)
        partitions = {e.partition for _, e in found if e.table == "m" and e.op == "insert"}
        assert partitions == {"public.m_1", "parts.m_2_even", "parts.m_2_rest", "parts.m_3"}
        assert [e.partition for _, e in found if e.op == "truncate"] == ["public.m_1", "parts.m_2_even"]
        await execute(pg_db, "TRUNCATE m")
        await settled(config)
    found = await agrees(config)
    assert None in [e.partition for _, e in found if e.op == "truncate"]
    assert {m.subject.rpartition(".")[2] for m, _ in found} == {"m", "mark"}


def told(event: dict[str, Any], but: str) -> tuple[dict[str, Any], set[str]]:
    """What an update says of its row, without a column's value: the columns that it shows, and those left alone."""
    after = {name: None if name == but else value for name, value in event["after"].items()}
    return after, set(event.get("unchanged", ()))


async def test_a_table_is_altered_between_writes(pg_db: str, nats: NatsServer) -> None:
    # A table that is read again meanwhile lends its rows' large values to the updates that leave them out.
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, a int, body text)",
        "ALTER TABLE t ALTER body SET STORAGE EXTERNAL",
        "INSERT INTO t SELECT g, g, repeat('long', 1000) FROM generate_series(1, 5) g",
    )
    steps = [
        "INSERT INTO t VALUES (10, 1, 'x')",
        "ALTER TABLE t ADD b numeric",
        "UPDATE t SET b = 1.10 WHERE id = 10",
        "INSERT INTO t VALUES (11, 1, 'y', 2.50)",
        "ALTER TABLE t DROP a",
        "INSERT INTO t VALUES (12, 'z', 3)",
        "UPDATE t SET b = 4 WHERE id = 1",
        "ALTER TABLE t RENAME b TO c",
        "UPDATE t SET c = 5 WHERE id = 2",
        "ALTER TABLE t ALTER c TYPE text",
        "UPDATE t SET c = 'text' WHERE id = 3",
        "INSERT INTO t VALUES (13, 'w', 'text')",
        "ALTER TABLE t ADD k uuid DEFAULT gen_random_uuid() NOT NULL",
        "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (k)",
        "UPDATE t SET c = 'new key' WHERE id = 11",
        "INSERT INTO t VALUES (14, 'v', 'text')",
        "ALTER TABLE t DROP body",
        "INSERT INTO t VALUES (15, 'text')",
        "ALTER TABLE t ADD note text",
        "UPDATE t SET note = 'n' WHERE id = 15",
        "DELETE FROM t WHERE id = 14",
        "ALTER TABLE t REPLICA IDENTITY FULL",
        "UPDATE t SET note = NULL WHERE id = 15",
        "ALTER TABLE t REPLICA IDENTITY DEFAULT",
        "UPDATE t SET note = 'last' WHERE id = 15",
    ]
    async with bridge(config):
        await settled(config)
        for step in steps:  # each statement read before the next: the catalogue fits
            await execute(pg_db, step)
            await settled(config)
    live = await events(config, "t")
    await execute(pg_db, "DROP TABLE t", "CREATE TABLE t (id int PRIMARY KEY, a int, body text)")
    await execute(pg_db, "ALTER TABLE t ALTER body SET STORAGE EXTERNAL")
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "INSERT INTO t SELECT g, g, repeat('long', 1000) FROM generate_series(1, 5) g", *steps)
    async with bridge(config):  # all read behind the last statement: the catalogue is ahead
        await settled(config)
    late = (await events(config, "t"))[len(live) :]
    inserted = [e for e in late if e["op"] == "insert"][5:]
    assert [set(e["after"]) for e in inserted] == [set(e["after"]) for e in live if e["op"] == "insert"]
    changed = [e for e in late if e["op"] == "update"]
    before = [e for e in live if e["op"] == "update"]
    # The uuids are others.
    assert [told(e, but="k") for e in changed] == [told(e, but="k") for e in before]
    assert [e["key"].keys() for e in changed if "k" in e["key"]]


@pytest.mark.parametrize("behind", [False, True])
async def test_the_key_of_an_insert_is_the_one_of_its_time(pg_db: str, nats: NatsServer, behind: bool) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (a int NOT NULL, b int NOT NULL)")
    steps = [
        "INSERT INTO t VALUES (1, 10)",
        "ALTER TABLE t ADD PRIMARY KEY (a)",
        "INSERT INTO t VALUES (2, 20)",
        "BEGIN; ALTER TABLE t DROP CONSTRAINT t_pkey; INSERT INTO t VALUES (3, 30); "
        "ALTER TABLE t ADD PRIMARY KEY (b, a); INSERT INTO t VALUES (4, 40); COMMIT",
        "INSERT INTO t VALUES (5, 50)",
        "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (b)",
        "INSERT INTO t VALUES (6, 60)",
    ]
    async with bridge(config):
        await settled(config)
        for step in steps if not behind else []:
            await execute(pg_db, step)
            await settled(config)
    if behind:
        await execute(pg_db, *steps)
        async with bridge(config):
            await settled(config)
    assert [e["key"] for e in await events(config, "t") if e["op"] == "insert"] == [
        None, {"a": 2}, None, {"a": 4, "b": 40}, {"a": 5, "b": 50}, {"b": 60},
    ]  # fmt: skip


async def test_a_table_dropped_with_changes_unread_is_still_published(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE known (id int PRIMARY KEY, body text)",
        "ALTER TABLE known ALTER body SET STORAGE EXTERNAL",
        "INSERT INTO known VALUES (1, repeat('long', 1000))",
    )
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        "CREATE TABLE brief (id int PRIMARY KEY, n numeric, b bytea)",
        "INSERT INTO brief VALUES (1, 1.10, '\\x00ff')",
        "UPDATE brief SET n = 2.50",
        "UPDATE known SET id = 2",
        "DELETE FROM brief",
        "DROP TABLE brief, known",
    )
    async with bridge(config):
        await settled(config)
    found = await events(config, "brief")
    assert [e["op"] for e in found] == ["insert", "update", "delete"]
    assert found[0]["after"] == {"id": 1, "n": 1.1, "b": "AP8="}
    assert found[2]["key"] == {"id": 1}
    last = (await events(config, "known"))[-1]
    assert (last["op"], last["after"], last["unchanged"]) == ("update", {"id": 2}, ["body"])
    assert (last["key"], last["before"]) == ({"id": 2}, {"id": 1})


async def test_tables_that_appear_and_odd_names(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["*.*"])
    odd = '"sch.é ma"."we.ird *>$ tbl"'
    await execute(
        pg_db,
        'CREATE SCHEMA "sch.é ma"',
        f'CREATE TABLE {odd} ("k ey" int PRIMARY KEY, "va\\l""ue" text)',
        f"INSERT INTO {odd} VALUES (1, 'snapshot')",
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            f"INSERT INTO {odd} VALUES (2, 'stream')",
            f'UPDATE {odd} SET "k ey" = 3 WHERE "k ey" = 2',
            'CREATE TABLE "日本 表" (id int PRIMARY KEY, "名" text)',
            "INSERT INTO \"日本 表\" VALUES (1, 'new')",
            f"TRUNCATE {odd}",
        )
        await settled(config)
    found = await agrees(config)
    subjects = {message.subject.split(".", 2)[2] for message, _ in found}
    assert subjects == {
        "sch=2E=C3=A9=20ma.we=2Eird=20=2A=3E=24=20tbl",
        "public.=E6=97=A5=E6=9C=AC=20=E8=A1=A8",
        "public.mark",
    }


@pytest.mark.parametrize("slow", [False, True])
async def test_a_change_without_identity_stops_or_warns(
    pg_db: str, nats: NatsServer, monkeypatch: Any, slow: bool
) -> None:
    if slow:  # what the server has to say is there before anybody looks
        start = run._start

        async def late(session: Any) -> None:
            await start(session)
            await anyio.sleep(1)

        monkeypatch.setattr(run, "_start", late)
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)")
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "INSERT INTO t VALUES (2)", "UPDATE t SET a = 3", "INSERT INTO t VALUES (4)")
    error = await failure(config)
    assert isinstance(error, MissingIdentity)
    assert error.exit_code == 3
    assert "an UPDATE of public.t" in str(error)
    relaxed = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, on_missing_identity="warn"))
    async with bridge(relaxed):
        await settled(relaxed)
    found = await events(config, "t")
    assert [e["op"] for e in found] == ["read", "insert", "insert"]


async def test_changes_without_identity_are_counted_and_shown_until_the_table_is_read_again(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(on_missing_identity="warn")})
    await execute(pg_db, *(f"CREATE TABLE {name} (a int)" for name in ("t", "other")), "INSERT INTO t VALUES (1), (2)")

    async def shown() -> list[str]:
        return [one.what for one in (await collect(config, [nats.url])).findings if "has not logged" in one.what]

    async with bridge(config):
        await settled(config)
        await execute(pg_db, "UPDATE t SET a = a + 1", "INSERT INTO other VALUES (1)", "DELETE FROM t WHERE a = 2")
        await settled(config)
    assert await shown() == ["PostgreSQL has not logged 3 updates and deletes of public.t: it had no replica identity"]
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "DELETE FROM t")
        await settled(config)
    assert await shown() == ["PostgreSQL has not logged 4 updates and deletes of public.t: it had no replica identity"]
    await execute(pg_db, "ALTER TABLE t ADD COLUMN id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY")
    async with bridge(config):
        await judged(config)
        await complete(config)
        await settled(config)
    assert await shown() == []
    await execute(pg_db, "UPDATE other SET a = 2")
    assert isinstance(await failure(config), MissingIdentity)


async def test_full_identity_keeps_nulls_and_toast(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db,
        "CREATE TABLE t (a int, b text, big text, c numeric)",
        "ALTER TABLE t REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL",
        "CREATE TABLE p (id int PRIMARY KEY, b text, big text)",
        "ALTER TABLE p REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL",
        "INSERT INTO t VALUES (1, NULL, repeat('x', 4000), NULL), (NULL, NULL, NULL, NULL), (2, '', 'short', 1.10)",
        "INSERT INTO p VALUES (1, NULL, repeat('x', 4000)), (2, NULL, NULL)",
        SLOT.format(oracle),
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "UPDATE t SET b = 'set' WHERE a = 1",
            "UPDATE t SET a = 9 WHERE a IS NULL",
            "DELETE FROM t WHERE a = 2",
            "UPDATE p SET id = id + 10",
            "UPDATE p SET b = 'set' WHERE id = 11",
            "DELETE FROM p WHERE id = 12",
        )
        await settled(config)
    await agrees(config, oracle)
    first = (await events(config, "t"))[3]
    assert first["before"] == {"a": 1, "b": None, "big": "x" * 4000, "c": None}
    assert first["after"] == {"a": 1, "b": "set", "big": "x" * 4000, "c": None}
    assert "unchanged" not in first


async def test_records_that_share_an_lsn_are_counted(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "CREATE TABLE u (id int PRIMARY KEY)", SLOT.format(oracle)
    )
    async with bridge(config):
        await streaming(config)
        async with (
            await psycopg.AsyncConnection.connect(pg_db) as connection,
            connection.cursor() as cursor,
            cursor.copy("COPY t FROM STDIN") as copy,
        ):
            for number in range(3000):
                await copy.write_row([number])
        await execute(pg_db, "TRUNCATE t, u", "INSERT INTO u VALUES (1)")
        await settled(config)
    found = await agrees(config, oracle)
    positions = [Position.parse(m.position) for m, e in found if e.table == "t" and e.op == "insert"]
    assert max(p.k for p in positions) > 10
    assert [Position.parse(m.position).k for m, e in found if e.op == "truncate"] == [0, 1]


async def test_logical_messages_break_nothing(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    oracle = f"o_{config.source.name}"
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", SLOT.format(oracle))
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "BEGIN; INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(false, 'p', 'x');"
            " SELECT pg_logical_emit_message(true, 'p', 'y'); INSERT INTO t VALUES (2); COMMIT",
            "SELECT pg_logical_emit_message(true, 'p', '\\xff00fe'::bytea)",
            "SELECT pg_logical_emit_message(false, 'p', '\\xc3'::bytea)",
            "BEGIN; INSERT INTO t VALUES (3); SELECT pg_logical_emit_message(false, 'p', 'z'); ROLLBACK",
            "INSERT INTO t VALUES (4)",
        )
        await settled(config)
    await agrees(config, oracle)
    assert [e["after"]["id"] for e in await events(config, "t")] == [1, 2, 4]


async def test_a_latin1_database_arrives_as_utf8(pg: Postgres, nats: NatsServer) -> None:
    name = f"test_{secrets.token_hex(4)}"
    await execute(pg.dsn(), f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    config = source(pg.dsn(name), nats.url)
    try:
        await execute(
            pg.dsn(name),
            'CREATE TABLE "größe" (id int PRIMARY KEY, wörter text)',
            "INSERT INTO \"größe\" VALUES (1, 'schön ÿ')",
        )
        async with bridge(config):
            await streaming(config)
            await execute(pg.dsn(name), "INSERT INTO \"größe\" VALUES (2, 'schön ÿ')")
            await settled(config)
        await agrees(config)
        read, inserted = await events(config, "größe")
        assert read["after"] == {"id": 1, "wörter": "schön ÿ"}
        assert inserted["after"] == {"id": 2, "wörter": "schön ÿ"}
    finally:
        await execute(
            pg.dsn(), f"SELECT pg_drop_replication_slot('{config.source.slot}')", f"DROP DATABASE {name} WITH (FORCE)"
        )


async def test_excluded_columns_appear_nowhere(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, table={"public.t": Table(exclude=["secret"])})
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, secret text, shown text)",
        "ALTER TABLE t REPLICA IDENTITY FULL, ALTER secret SET STORAGE EXTERNAL",
        "INSERT INTO t VALUES (1, repeat('classified', 400), 'a')",
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "UPDATE t SET shown = 'b'",
            "UPDATE t SET secret = 'classified'",
            "INSERT INTO t VALUES (2, 'classified', NULL)",
            "ALTER TABLE t ADD more int",
            "UPDATE t SET more = 1",
            "DELETE FROM t WHERE id = 2",
        )
        await settled(config)
    for message, _ in await agrees(config):
        assert b"classified" not in message.data
        assert b'"secret"' not in message.data


async def test_without_a_snapshot_only_what_comes_later_is_there(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (2)")
        await settled(config)
    assert [(e["op"], e["key"]) for e in await events(config, "t")] == [("insert", {"id": 2})]


async def test_a_second_bridge_waits_and_takes_over(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)")
    async with anyio.create_task_group() as tasks:
        first, second = Running(config), Running(config)
        tasks.start_soon(first.run)
        await streaming(config)
        tasks.start_soon(second.run)
        await execute(pg_db, "INSERT INTO t VALUES (1)")
        await settled(config)
        first.stop.set()
        await first.ended.wait()
        await execute(pg_db, "INSERT INTO t VALUES (2)")
        await settled(config)
        second.stop.set()
    assert (first.failed, second.failed) == (None, None)
    found = await agrees(config)
    assert len({message.epoch for message, _ in found}) == 2


async def test_the_embedded_server_serves_the_bridge(pg_db: str, tmp_path: Path) -> None:
    config = source(pg_db, "embedded", stream={"store_dir": str(tmp_path / "store")})
    process = Process(tmp_path, toml(msgspec.structs.replace(config, stream=_embedded(config, tmp_path))))
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    process.start()
    try:
        await process.said("streaming")
        url = embedded.find(tmp_path / "store")
        assert url is not None
        outside = msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, servers=[url]))
        await settled(outside)
        await agrees(outside)
        second = Process(tmp_path, process.file.read_text())
        second.start()
        assert await second.wait() == 4
        assert "another bridge" in process.text
        assert "Traceback" not in process.text
        assert await process.end() == 0
    finally:
        process.close()


async def test_a_key_too_large_for_the_embedded_server_names_what_to_raise_and_where(
    pg_db: str, tmp_path: Path
) -> None:
    config = source(pg_db, "embedded")
    process = Process(tmp_path, toml(msgspec.structs.replace(config, stream=_embedded(config, tmp_path))))
    store = tmp_path / "store"
    store.mkdir()
    shipped = shipped_config()
    (store / "nats-server.conf").write_text(shipped.read_text().replace("max_payload: 8MB", "max_payload: 2KB"))
    await execute(
        pg_db, "CREATE TABLE t (id text PRIMARY KEY, body text)", "INSERT INTO t VALUES (repeat('x', 1500), '')"
    )
    process.start()
    try:
        assert await process.wait() == 3
        assert f"copy {shipped} to {store}/nats-server.conf, raise max_payload there" in process.text
        (store / "nats-server.conf").unlink()
        process.start()
        await process.said("streaming")
        assert await process.end() == 0
    finally:
        process.close()


def _embedded(config: Config, folder: Path) -> Stream:
    return msgspec.structs.replace(config.stream, servers="embedded", store_dir=str(folder / "store"))


async def test_values_of_several_megabytes_pass(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text)", "INSERT INTO t VALUES (1, repeat('a', 5000000))"
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t SELECT g, repeat('b', 3000000) FROM generate_series(2, 6) g")
        await execute(pg_db, "UPDATE t SET id = -id")
        await settled(config)
    await agrees(config)


async def claims(config: Config) -> dict[str, SnapshotStatus]:
    """What the state bucket says of each table of the schema public, by its name."""
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        keys = await state.keys(f"snapshot.{config.source.name}.public.")
        found = {key.rpartition(".")[2]: await state.get(key, SnapshotStatus) for key in keys}
    return {name: status[0] for name, status in found.items() if status is not None}


def publishing(config: Config, *tables: str) -> Config:
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, tables=list(tables)))


async def test_a_table_that_is_published_later_is_read_while_the_stream_flows(
    pg_db: str, nats: NatsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    config = source(pg_db, nats.url, tables=["public.a", "public.mark"])
    await execute(
        pg_db,
        MARK,
        "CREATE TABLE a (id int PRIMARY KEY)",
        "CREATE TABLE filled (id int PRIMARY KEY)",
        "INSERT INTO filled VALUES (1)",
        "CREATE TABLE empty (id int PRIMARY KEY)",
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1)",
        "INSERT INTO parted VALUES (1)",
    )
    async with bridge(config):
        await settled(config)
    wider = publishing(config, "public.*")
    async with bridge(wider):
        await settled(wider)
        after = len(await messages(wider))
        await execute(pg_db, "INSERT INTO empty VALUES (1)")
        await settled(wider)
        found = await read(wider)
    said = "".join(capfd.readouterr())
    assert [said.count("table incomplete"), said.count("it is read while the stream flows")] == [2, 2]
    assert {name: (status.state, status.mode) for name, status in found.items()} == {
        "a": ("done", "initial"), "mark": ("done", "initial"), "filled": ("done", "incremental"),
        "empty": ("done", "initial"), "parted": ("done", "incremental"),
    }  # fmt: skip
    assert 0 < found["a"].complete_from < found["filled"].complete_from
    assert 0 < found["empty"].complete_from <= after + 1
    await agrees(wider)
    narrow = publishing(config, "public.filled", "public.mark")
    async with bridge(narrow):
        await settled(narrow)
        await execute(pg_db, "INSERT INTO a VALUES (2)")  # in no log
        await settled(narrow)
    async with bridge(wider):
        await settled(wider)
        assert (await read(wider))["a"].complete_from > found["filled"].complete_from
    await agrees(wider)


async def test_a_table_that_appears_while_the_bridge_streams_is_complete(
    own_pg: Postgres, own_nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(own_nats.port)
    dsn = own_pg.dsn()
    config = source(dsn, f"nats://127.0.0.1:{proxy.port}", tables=["public.*", "!public.aside*"])
    await execute(dsn, "CREATE TABLE aside (id int PRIMARY KEY)", "INSERT INTO aside VALUES (1)")
    async with bridge(config):
        await settled(config)
        await execute(
            dsn,
            "CREATE TABLE late (id int PRIMARY KEY)",
            "INSERT INTO late VALUES (1)",
            "CREATE TABLE aside_too (id int PRIMARY KEY)",
            "INSERT INTO aside_too VALUES (1)",
        )
        await settled(config)
        await execute(
            dsn,
            "ALTER TABLE aside RENAME TO inside",
            "INSERT INTO inside VALUES (2)",
            "ALTER TABLE aside_too RENAME TO inside_too",
            "INSERT INTO inside_too VALUES (2)",
        )
        await settled(config)
        await proxy.refuse()
        await execute(dsn, "CREATE TABLE meanwhile (id int PRIMARY KEY)", "INSERT INTO meanwhile VALUES (1)")
        await anyio.sleep(0.2)
        proxy.accept()
        await settled(config)
        found = await read(config)
    assert {name for name, status in found.items() if status.mode == "incremental"} == {"inside", "inside_too"}
    assert found.keys() == {"mark", "late", "meanwhile", "inside", "inside_too"}
    assert all(status.state == "done" for status in found.values())
    first = {name: next(m.seq for m, e in await messages(config) if e.table == name) for name in ("late", "meanwhile")}
    assert all(0 < found[name].complete_from <= seq for name, seq in first.items())


async def read(config: Config) -> dict[str, SnapshotStatus]:
    """What is known of the tables, once none is to be read any more."""
    found: dict[str, SnapshotStatus] = {}

    async def all_read() -> bool:
        found.update(await claims(config))
        return all(status.again is None for status in found.values())

    assert await wait_until(all_read, seconds=20), found
    return found


async def test_without_a_snapshot_only_empty_tables_are_complete_and_all_are_known(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(
        pg_db,
        "CREATE TABLE filled (id int PRIMARY KEY)",
        "INSERT INTO filled VALUES (1)",
        "CREATE TABLE empty (id int PRIMARY KEY)",
        "CREATE TABLE parted (id int PRIMARY KEY, n int) PARTITION BY LIST (id)",
    )
    async with bridge(config):
        await streaming(config)
        found = await claims(config)
        assert {name: status.state for name, status in found.items()} == {
            "filled": "incomplete", "empty": "done", "parted": "done",
        }  # fmt: skip
        async with broker_of(config) as broker:
            state = await State.open(broker, config.state.bucket)
            keys = await state.keys(f"table.{config.source.name}.public.")
            parted = await state.get(f"table.{config.source.name}.public.parted", TableRecord)
    assert [key.rpartition(".")[2] for key in keys] == ["empty", "filled", "parted"]
    assert parted is not None
    assert [column.name for column in parted[0].columns] == ["id", "n"]


def hiding(config: Config, *columns: str) -> Config:
    table = {"public.users": Table(exclude=list(columns))}
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, table=table))


async def planted(config: Config) -> list[bytes]:
    return [message.data for message, _ in await messages(config) if b"planted" in message.data]


@pytest.fixture
async def users(pg_db: str, nats: NatsServer) -> Config:
    """A bridge that has run on a table with an excluded column, and is stopped."""
    config = hiding(source(pg_db, nats.url), "secret")
    await execute(
        pg_db,
        "CREATE TABLE users (id int PRIMARY KEY, n int, secret text)",
        "INSERT INTO users VALUES (1, 1, 'planted')",
    )
    async with bridge(config):
        await settled(config)
    return config


RENAMED = [
    "UPDATE users SET n = 2, secret = 'planted 2'",
    "ALTER TABLE users RENAME secret TO other",
    "UPDATE users SET n = 3, other = 'planted 3'",
]


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("remedy", [("secret", "other"), ("other",), ()])
async def test_an_excluded_column_that_was_renamed_is_not_published(
    users: Config, behind: bool, remedy: tuple[str, ...]
) -> None:
    dsn = str(users.source.dsn)
    if behind:
        await execute(dsn, *RENAMED)
        error: BridgeError | None = await failure(users)
    else:
        running = Running(users)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.run)
            for step in RENAMED[:2]:
                await settled(users)
                await execute(dsn, step)
            await settled(users)
            await execute(dsn, RENAMED[2])
            with anyio.fail_after(20):
                await running.ended.wait()
        error = running.failed
    assert isinstance(error, Contradiction)
    assert error.exit_code == 3
    assert 'add other to exclude or mask of [source.table."public.users"]' in error.remedy
    assert await planted(users) == []
    mended = hiding(users, *remedy)
    async with bridge(mended):
        await settled(mended)
    # Only who takes the old name out without the new one says that it may be published: then from its rename on.
    expected = [b'"other":"planted 3"'] if not remedy else []
    told = [data[data.index(b'"other"') :][: len(b'"other":"planted 3"')] for data in await planted(mended)]
    # A renamed column has the table read again: its row as it is may have come once more by now.
    assert told in (expected, expected * 2)
    found = [(e["op"], e["after"]["n"]) for e in await events(mended, "users") if e["op"] != "schema"]
    changes = [("read", 1), ("update", 2), ("update", 3)]
    assert found in (changes, [*changes, ("read", 3)])


async def test_the_log_may_have_an_excluded_column_under_a_name_that_it_has_no_more(users: Config) -> None:
    await execute(
        str(users.source.dsn),
        *RENAMED,
        "ALTER TABLE users RENAME other TO secret",
        "UPDATE users SET n = 4, secret = 'planted 4'",
    )
    async with bridge(users):
        await settled(users)
    assert await planted(users) == []
    assert [e["after"] for e in await events(users, "users")] == [{"id": 1, "n": n} for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("exclude", [("secret",), ()])
async def test_an_excluded_column_that_was_dropped_stays_hidden_in_what_is_unread(
    users: Config, exclude: tuple[str, ...]
) -> None:
    await execute(str(users.source.dsn), RENAMED[0], "ALTER TABLE users DROP secret", "UPDATE users SET n = 3")
    advised = hiding(users, *exclude)
    async with bridge(advised):
        await settled(advised)
    assert await planted(advised) == []
    assert [e["after"] for e in await events(advised, "users")] == [{"id": 1, "n": n} for n in (1, 2, 3)]


async def test_an_excluded_name_that_no_column_has_is_a_warning(
    pg_db: str, nats: NatsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    config = hiding(source(pg_db, nats.url), "nothing")
    await execute(pg_db, "CREATE TABLE users (id int PRIMARY KEY)", "INSERT INTO users VALUES (1)")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO users VALUES (2)")
        await settled(config)
    assert [e["after"] for e in await events(config, "users")] == [{"id": 1}, {"id": 2}]
    said = "".join(capfd.readouterr())
    assert said.count("excluded column missing") == 1


async def test_an_insert_into_a_table_that_is_gone_has_its_key(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "CREATE TABLE brief (a int, b int PRIMARY KEY)", "INSERT INTO brief VALUES (1, 2)")
    await execute(pg_db, "DROP TABLE brief")
    async with bridge(config):
        await settled(config)
    assert [e["key"] for e in await events(config, "brief")] == [{"b": 2}]
