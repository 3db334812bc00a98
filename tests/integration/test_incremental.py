"""Snapshots while the stream flows: what is hard about them, each case on purpose, judged after one pass."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import psycopg
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, Postgres
from bridge.stream import asking
from bridge.waiting import until
from tests.crash.process import Bridge
from tests.oracle import agrees
from tests.reading.steps import EXTERNAL, ROWS, WIDE, again, ask, chunks_of, held, judged, read_again, status, unwatched
from tests.running import bridge, execute, messages, settled, source, state_of, toml

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 rows."""
    chunks_of(monkeypatch, 50)


async def test_a_table_is_read_again_while_the_bridge_runs(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text)",
        "INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 3000) g",
    )  # fmt: skip
    async with bridge(config):
        await settled(config)
        before = (await messages(config))[-1][0].seq
        await ask(config)
        done = await read_again(config)
        await execute(pg_db, "UPDATE t SET body = 'y' WHERE id = 7")
        await settled(config)
    assert (done.state, done.mode, done.rows) == ("done", "incremental", 3000)
    assert done.complete_from == done.first_seq > before
    found = await agrees(config)
    ops = [(m.op, e.phase) for m, e in found if m.seq > before and e.table == "t"]
    assert ops[0] == ("snapshot", "begin")
    assert ops[1:3001] == [("read", None)] * 3000
    assert ops[3001:] == [("snapshot", "end"), ("update", None)]
    keys = [msgspec.json.decode(e.key)["id"] for m, e in found if m.seq > before and m.op == "read"]
    assert keys == list(range(1, 3001))


@pytest.mark.parametrize("restart", [False, True])
async def test_a_commit_that_is_delivered_but_not_visible_is_waited_for(
    own_pg: Postgres, nats: NatsServer, restart: bool
) -> None:
    dsn = own_pg.dsn()
    config = source(dsn, nats.url)
    await execute(dsn, WIDE, EXTERNAL, ROWS)
    async with anyio.create_task_group() as tasks:

        async def stuck() -> None:
            await execute(dsn, "SET synchronous_commit = on; UPDATE t SET v = 1000 WHERE id = 7")

        async with bridge(config):
            await settled(config)
            await execute(dsn, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
            tasks.start_soon(stuck)

            async def delivered() -> bool:
                return any(m.op == "update" for m, _ in await messages(config))

            assert await until(delivered, seconds=20)
            if not restart:
                await _blocked(config, dsn)
        if restart:
            # Nobody in the new session has seen it come but by what PostgreSQL sends once more.
            await execute(dsn, "SET synchronous_commit = local; CREATE TABLE more (id int PRIMARY KEY)")
            async with bridge(config):
                await _blocked(config, dsn)
    assert await judged(config, dsn) >= 300


async def _blocked(config: Config, dsn: str) -> None:
    await ask(config)
    found = await again(config, state="waiting")
    assert "committed but not visible yet" in found.why
    await execute(dsn, "SET synchronous_commit = local; UPDATE t SET v = 2000 WHERE id = 8")
    await anyio.sleep(1.0)
    assert (await status(config)).again is not None
    await execute(dsn, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
    await read_again(config)
    await settled(config)


async def test_a_row_that_moves_behind_the_cursor_without_its_large_column_is_read_at_the_end(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(
            pg_db, "UPDATE t SET id = -5, v = 1000 WHERE id = 290", "UPDATE t SET id = -6, v = 1001 WHERE id = 291"
        )
        await settled(config)
        on.set()
        done = await read_again(config)
        await settled(config)
    assert done.state == "done"
    assert await judged(config, pg_db) == 300 + 300


async def test_a_row_that_moved_while_nobody_was_there_to_note_it_is_found_in_the_stream(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with held(monkeypatch, "published", 2) as (there, _), bridge(config):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, "UPDATE t SET id = -5, v = 1000 WHERE id = 290")
        await settled(config)
    assert (await status(config)).again is not None
    async with bridge(config):
        await read_again(config)
        await settled(config)
    await judged(config, pg_db)


@pytest.mark.parametrize(
    ("while_", "change"),
    [
        ("read", "UPDATE t SET v = 1000 WHERE id % 10 = 0"),
        ("read", "DELETE FROM t WHERE id % 10 = 0"),
        ("read", "UPDATE t SET id = -id, v = v + 1000 WHERE id % 10 = 0"),
        ("read", "TRUNCATE t"),
        ("read", "TRUNCATE t; INSERT INTO t SELECT g, g + 1000, 'new' FROM generate_series(20, 80) g"),
        ("published", "TRUNCATE t"),
        ("published", "DELETE FROM t WHERE id > 20; INSERT INTO t VALUES (60, 5000, 'new')"),
        ("read", "ALTER TABLE t ALTER body TYPE varchar(5000), ADD COLUMN more int DEFAULT 7"),
        ("published", "ALTER TABLE t ALTER v TYPE numeric, ADD COLUMN more int DEFAULT 7"),
    ],
)
async def test_what_happens_between_a_chunk_and_the_next_is_merged(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch, while_: str, change: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config), held(monkeypatch, while_, 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, change)
        await settled(config)
        on.set()
        await read_again(config)
        await settled(config)
    await judged(config, pg_db)


async def test_a_writer_that_idles_in_its_transaction_holds_nothing_up(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config):
        await settled(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as idle:
            await idle.execute("UPDATE t SET v = 1000 WHERE id = 7")
            await ask(config)
            assert (await read_again(config)).state == "done"
            await idle.commit()
        await settled(config)
    assert await judged(config, pg_db) == 600


async def test_rows_that_were_deleted_while_nobody_looked_are_swept(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatched(monkeypatch)
    config = source(pg_db, nats.url, tables=["public.*", "!public.aside"])
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config):
        await settled(config)
        unseen = ["DELETE FROM aside WHERE id < 100", "UPDATE aside SET v = 900 WHERE id = 200"]
        await execute(pg_db, "ALTER TABLE t RENAME TO aside", *unseen, "ALTER TABLE aside RENAME TO t")
        await settled(config)
        await ask(config)
        await read_again(config)
        await settled(config)
    assert await judged(config, pg_db) == 300 + 201


async def test_a_part_of_the_rows_is_read_without_markers(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    async with bridge(config):
        await settled(config)
        before = await status(config)
        last = (await messages(config))[-1][0].seq
        await ask(config, where="id % 100 = 0")
        assert await read_again(config) == before
        await settled(config)
    new = [(m.op, e.phase) for m, e in await agrees(config) if m.seq > last and e.table == "t"]
    assert new == [("read", None)] * 3


async def test_paused_resumed_and_cancelled(pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    root = ("public", "t")
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on), state_of(config) as state:
        await settled(config)
        before = await status(config)
        assert not await asking.pause(state, config.source.name, root)
        await ask(config)
        await there.wait()
        assert await asking.pause(state, config.source.name, root)
        on.set()
        await anyio.sleep(1)
        rested = await again(config, state="paused")
        assert rested.after == ["50"]
        await execute(pg_db, "UPDATE t SET id = -1, v = 1000 WHERE id = 290")
        assert await asking.resume(state, config.source.name, root)
        assert (await read_again(config)).rows == 299
        await settled(config)
    await judged(config, pg_db)
    assert before.complete_from < (await status(config)).complete_from


async def test_a_table_without_key_or_dropped_meanwhile_fails_alone(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(pg_db, nats.url)
    others = ["CREATE TABLE keyless (n int)", "CREATE TABLE other (id int PRIMARY KEY)"]
    filled = ["INSERT INTO other SELECT generate_series(1, 100)", "INSERT INTO keyless VALUES (1)"]
    await execute(pg_db, WIDE, EXTERNAL, ROWS, *others, *filled)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config, "keyless")
        await ask(config)
        await there.wait()
        await execute(pg_db, "DROP TABLE t")
        on.set()
        failed = await again(config, state="failed")
        assert "dropped" in failed.why
        await ask(config, "other")
        assert (await read_again(config, "other")).rows == 100
        without = (await status(config, "keyless")).again
        assert without is not None
        assert without.state == "failed"
        assert "has no key" in without.why
        await settled(config)


@pytest.mark.parametrize(
    "point", ["reading.began", "reading.read:2", "reading.published:2", "reading.noted:2", "reading.ended"]
)
async def test_a_reading_whose_connections_break_goes_on_and_is_complete(
    pg_db: str, nats: NatsServer, tmp_path: Path, point: str
) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, WIDE, EXTERNAL, "INSERT INTO t SELECT g, g, repeat('x', 3000) || g FROM generate_series(1, 2000) g"
    )
    name, _, nth = point.partition(":")
    process = Bridge(tmp_path, toml(config))
    try:
        await process.start(f"{name}:cut:{nth or 1}")
        await settled(config)
        await ask(config)
        await execute(pg_db, "UPDATE t SET v = v + 10000 WHERE id % 3 = 0")
        await process.said("failpoint")
        assert (await read_again(config, seconds=60)).state == "done"
        await settled(config)
        await process.stop()
    finally:
        await process.close()
    await judged(config, pg_db)
