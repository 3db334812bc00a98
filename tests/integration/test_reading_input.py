"""Tables that cannot be read while the stream flows, or not now: each says why, the others and the stream go on."""

from __future__ import annotations

import io
import secrets
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psycopg
import pytest

from bridge.config import Config, Secret
from bridge.embedded import Keeper, NatsServer
from bridge.embedded.process import throwaway_folder
from bridge.operate import snapshot as commands
from bridge.operate.show import snapshot as show_snapshot
from bridge.operate.show import status as show
from bridge.operate.snapshot import Asked
from bridge.operate.status.collect import collect
from bridge.pipeline import pace
from bridge.pipeline.reading import Reading
from bridge.source import chunks, connection
from bridge.source.patience import Patient
from bridge.stream import asking
from bridge.waiting import until
from tests import rewriting
from tests.disk import small_disk
from tests.integration.test_retention import limited
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, never_back, same
from tests.reading.steps import EXTERNAL, ROWS, WIDE, again, ask, chunks_of, held, judged, read_again, status
from tests.running import bridge, broker_of, command, execute, messages, settled, source, state_of

pytestmark = pytest.mark.anyio

TABLE = "(id int PRIMARY KEY, v int, body text)"
FILL = "SELECT g, g, 'x' FROM generate_series(1, 100) g"
BAD = "'\\x706c616e746564ff'::bytea::text"  # "planted" and a byte that no UTF-8 has
WHY = {
    "denied": "permission denied for table denied",
    "secured": "row-level security",
    "nokey": "has no key",
    "bad": "holds in body what is no valid text",
    "loose": "is not logged (UNLOGGED)",
    "viewed": "public.viewed is no table any more",
    "gone": "does not exist (any more)",
}
MENDED = [
    "GRANT SELECT ON denied TO {role}",
    "ALTER ROLE {role} BYPASSRLS",
    "ALTER TABLE nokey ADD PRIMARY KEY (id)",
    "UPDATE bad SET body = 'good', v = 1000 WHERE id = 7",
    "ALTER TABLE loose SET LOGGED",
    "DROP VIEW viewed; ALTER TABLE kept RENAME TO viewed",
]


async def as_role(config: Config, dsn: str) -> tuple[Config, str]:
    """The configuration with a role that may read what is granted to it, and the role's name."""
    role = f"r{secrets.token_hex(4)}"
    await execute(
        dsn,
        f"CREATE ROLE {role} LOGIN REPLICATION",
        f"GRANT ALL ON SCHEMA public TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
    )
    login = Secret(dsn.replace("postgres@", f"{role}@"))
    return msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=login)), role


async def test_tables_that_cannot_be_read_say_why_and_the_others_go_on(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, mode="never", tables=["public.*", "!public.kept"], workers=4)
    names = ["denied", "secured", "nokey", "bad", "loose", "viewed", "gone", "fine", "empty"]
    await execute(
        pg_db,
        *(f"CREATE TABLE {name} {TABLE}" for name in names),
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "ALTER TABLE nokey DROP CONSTRAINT nokey_pkey",
        "CREATE CAST (bytea AS text) WITHOUT FUNCTION",
        *(f"INSERT INTO {name} {FILL}" for name in names if name != "empty"),
        f"UPDATE bad SET body = {BAD} WHERE id = 7",
    )
    login, role = await as_role(config, pg_db)
    await execute(
        pg_db, f"REVOKE SELECT ON denied FROM {role}", "ALTER TABLE secured ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY few ON secured TO {role} USING (id < 5)",
    )  # fmt: skip
    async with bridge(login):
        await settled(login)
        await execute(
            pg_db, "ALTER TABLE loose SET UNLOGGED", "ALTER TABLE viewed RENAME TO kept", "DROP TABLE gone",
            "CREATE VIEW viewed AS SELECT * FROM kept",
        )  # fmt: skip
        await rewriting.judged(login)
        asked = await command("snapshot", login, tmp_path, "--all", "--wait")
        assert asked.code == 1, asked
        shown, page = io.StringIO(), io.StringIO()
        told = await commands.snapshot(login, [nats.url], Asked(action="status"))
        show_snapshot.told(told.tables, shown, asked=False, running=told.running)
        overview = await collect(login, [nats.url])
        show.page(overview, page)
        assert not overview.in_step
        for name, why in WHY.items():
            kept = (await status(config, name)).again
            assert kept is not None, name
            assert (kept.state, why in kept.why) == ("failed", True), (name, kept)
            [line] = [line for line in shown.getvalue().splitlines() if f"public.{name} " in line]
            assert "failed" in line
            assert why in line
            assert f"the reading of public.{name} is failed: " in page.getvalue()
        assert "planted" not in asked.out + asked.err + shown.getvalue() + page.getvalue()
        for name, rows in (("fine", 100), ("empty", 0), ("parted", 0)):
            done = await status(config, name)
            assert (done.state, done.rows, done.again) == ("done", rows, None), name
        # What streams goes on, also for a table that failed.
        await execute(pg_db, "INSERT INTO denied VALUES (1000, 1, 'y')", "UPDATE fine SET v = 1000 WHERE id = 5")
        await settled(login)
        async with state_of(config) as state:
            assert await asking.cancel(state, config.source.name, ("public", "gone"))
        await execute(pg_db, *(statement.format(role=role) for statement in MENDED))
        # What is asked for stays so, whatever is found to have become of the tables; before, it may be read twice.
        await rewriting.judged(login)
        await commands.snapshot(login, [nats.url], Asked(action="resume"))
        for name in ("denied", "secured", "nokey", "bad", "loose", "viewed"):
            done = await read_again(config, name)
            assert (done.state, done.rows) == ("done", 101 if name == "denied" else 100), name
        await settled(login)
    found = await messages(config)
    for name in (*WHY, "fine"):
        if name != "gone":
            never_back(found, name)
            await same(pg_db, name, from_last_begin(found, name)[1])


async def test_a_table_that_is_named_and_cannot_be_read_is_refused_at_once(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, "CREATE TABLE nokey (id int)", "INSERT INTO nokey VALUES (1)", f"CREATE TABLE orders {TABLE}")
    async with bridge(config):
        await settled(config)
        refused = await command("snapshot", config, tmp_path, "public.orders", "public.nokey")
        assert refused.code == 4
        assert "public.nokey has no key by which its rows could be read in parts" in refused.err
        assert "give it a primary key" in refused.err
        # Nothing is asked for of the others, either.
        assert [(await status(config, name)).again for name in ("nokey", "orders")] == [None, None]
        near = await command("snapshot", config, tmp_path, "public.order")
        assert near.code == 2
        assert "no published table is called public.order" in near.err
        assert "did you mean public.orders? the bridge knows: public.mark, public.nokey, public.orders" in near.err
        # What a pattern chooses is read as far as it can be.
        both = await command("snapshot", config, tmp_path, "public.?????*", "--wait")
        assert both.code == 1
        assert [line.split()[:2] for line in both.out.splitlines()[1:]] == [
            ["public.nokey", "failed"], ["public.orders", "done"],
        ]  # fmt: skip


async def test_a_privilege_that_is_taken_away_meanwhile_ends_the_reading_where_it_is(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    login, role = await as_role(config, pg_db)
    async with bridge(login), held(monkeypatch, "published", 2) as (there, on):
        await settled(login)
        before = (await messages(config))[-1][0].seq
        await ask(config)
        await there.wait()
        await execute(pg_db, f"REVOKE SELECT ON t FROM {role}")
        on.set()
        failed = await again(config, state="failed")
        assert "permission denied" in failed.why
        assert "GRANT SELECT" in failed.why
        assert failed.after == ["100"]
        await execute(pg_db, f"GRANT SELECT ON t TO {role}", "UPDATE t SET id = -1, v = 1000 WHERE id = 150")
        async with state_of(config) as state:
            await asking.resume(state, config.source.name, ("public", "t"))
        await read_again(config)
        await settled(login)
    reads = [one for message, one in await messages(config) if message.seq > before and message.op == "read"]
    assert len(reads) == 300
    await judged(config, pg_db)


CALM = """
CREATE FUNCTION calm(code text, n int) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
    IF EXISTS (SELECT FROM raised) THEN RAISE EXCEPTION 'planted %', n USING ERRCODE = code; END IF;
    RETURN true;
END $$
"""
PASSING = ["57014", "55P03", "40P01", "40001", "72000", "53100", "53200"]


async def test_what_passes_by_itself_is_waited_for_and_everything_else_is_told_without_values(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url, tables=["public.*", "!public.raised"], workers=len(PASSING))
    names = {code: f"t{code.lower()}" for code in PASSING}
    await execute(
        pg_db, "CREATE TABLE raised AS SELECT 1 AS id", CALM, WIDE, ROWS,
        *(f"CREATE TABLE {name} {TABLE}" for name in names.values()),
        *(f"INSERT INTO {name} {FILL}" for name in names.values()),
    )  # fmt: skip
    wrong = {
        "nothing = 'planted'": 'column "nothing" does not exist',
        "id = ": "syntax error",
        "id > 0); DELETE FROM t; --": "syntax error",
        "true)) TO STDOUT; COMMIT; DELETE FROM t; COPY (SELECT 1 AS id WHERE (true": "multiple commands",
        "body::int = 1": "a value does not fit (SQLSTATE 22P02)",
        "calm('XX001', id)": "SQLSTATE XX001",
    }
    async with bridge(config):
        await settled(config)
        for condition, why in wrong.items():
            await ask(config, where=condition)
            failed = await again(config, state="failed", where=condition)
            assert why in failed.why, (condition, failed.why)
            assert "--where" in failed.why or condition == "calm('XX001', id)"
            assert condition == "calm('XX001', id)" or "planted" not in failed.why
            assert "xxx" not in failed.why
        found = await collect(config, [nats.url])
        [refused] = [one for one in found.findings if "the reading of a part of public.t is failed" in one.what]
        assert (refused.level, "bridge snapshot public.t --cancel" in refused.next) == ("note", True)
        assert found.in_step, "the table is as complete as it was"
        for condition, rows in {"id IN (SELECT 7 UNION SELECT 8) -- two": 2, "body LIKE '%%x7' OR id = 9": 2}.items():
            before = len(await messages(config))
            await ask(config, where=condition)
            await read_again(config)
            assert [m.op for m, _ in (await messages(config))[before:]] == ["read"] * rows
        for code, name in names.items():
            await ask(config, name, where=f"calm('{code}', id)")
        for code, name in names.items():
            waiting = await again(config, name, state="waiting")
            assert f"SQLSTATE {code}" in waiting.why
        await settled(config)
        await execute(pg_db, "DELETE FROM raised")
        for name in names.values():
            assert (await read_again(config, name)).state == "done"
        await settled(config)
    assert await execute(pg_db, "SELECT count(*) FROM t") == [(300,)]
    await agrees(config)


async def test_a_chunk_that_takes_longer_than_the_server_allows_gets_smaller_until_it_passes(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 100)
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    rows: list[int] = []
    publish = Reading._publish

    async def counted(self: Reading, sql: Any, chunk: chunks.Chunk) -> None:
        rows.append(len(chunk.rows))
        await publish(self, sql, chunk)

    monkeypatch.setattr(Reading, "_publish", counted)
    async with bridge(config):
        await settled(config)
        # As behind a pooler that sets it for every session: nothing that a connection asks for gets past it.
        monkeypatch.setitem(connection.SETTINGS, "statement_timeout", "250")
        await ask(config, where="pg_sleep(0.004) IS NOT NULL")
        assert "statement timeout" in (await again(config, state="waiting")).why
        assert (await read_again(config)).state == "done"
        await settled(config)
    assert sum(rows) == 300
    assert max(rows) < 100


async def test_a_table_that_somebody_has_locked_is_waited_for_and_read_as_it_is_then(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LOCK_MS", 200)
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS, f"CREATE TABLE other {TABLE}")
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        async with await psycopg.AsyncConnection.connect(pg_db) as locker:
            await locker.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
            # Writes every row anew, and nothing of that is in the log: who looked before would see none.
            await locker.execute("ALTER TABLE t ALTER v TYPE bigint USING v + 0")
            on.set()
            waiting = await again(config, state="waiting")
            assert f"ACCESS EXCLUSIVE by {locker.info.backend_pid}" in waiting.why
            await execute(pg_db, "INSERT INTO other VALUES (1, 1, 'x')")
            await settled(config)
            # Now as one waits for it: what it does is to be seen by the chunk.
            monkeypatch.setattr(chunks, "LOCK_MS", 60_000)
            assert await until(partial(waits_for, pg_db, locker.info.backend_pid), seconds=20)
            await locker.execute("UPDATE t SET v = 1000 WHERE id = 7")
            await locker.commit()
        await read_again(config)
        await settled(config)
    await judged(config, pg_db)


async def waits_for(dsn: str, pid: int) -> bool:
    """Whether somebody has waited for this backend for a while."""
    asked = (
        f"SELECT 1 FROM pg_stat_activity WHERE {pid} = ANY (pg_blocking_pids(pid)) AND now() - query_start > '0.3 s'"
    )
    return bool(await execute(dsn, asked))


async def test_a_query_that_is_cancelled_and_a_connection_that_is_ended_are_nothing_to_the_reading(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url, workers=2)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    read, done, pids = chunks.read, list[str](), list[int]()

    async def disturbed(sql: Any, catalog: Any, oid: int, planned: Any, where: chunks.Where) -> chunks.Chunk:
        pids.append(sql.info.backend_pid)
        how = ["cancel", "terminate", "cancel"][len(done) : len(done) + 1]
        if not how:
            return await read(sql, catalog, oid, planned, where)
        done.extend(how)
        async with anyio.create_task_group() as tasks:

            async def hit() -> bool:
                """Whether it was at the chunk, and is hit."""
                there = f"pid = {sql.info.backend_pid} AND state = 'active' AND query LIKE 'COPY%'"
                return bool(
                    await execute(pg_db, f"SELECT pg_{how[0]}_backend(pid) FROM pg_stat_activity WHERE {there}")
                )

            tasks.start_soon(partial(until, hit, seconds=20))
            slow = where._replace(condition="pg_sleep(0.2) IS NOT NULL")
            try:
                return await read(sql, catalog, oid, planned, slow)
            except Exception as error:  # noqa: BLE001 - raised again outside the group
                failed = error
        raise failed

    monkeypatch.setattr(chunks, "read", disturbed)
    async with bridge(config):
        await settled(config)
        before = len(await messages(config))
        await ask(config)
        assert (await read_again(config)).rows == 300
        await settled(config)
    assert len(done) == 3
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert [m.op for m, _ in (await messages(config))[before:]].count("read") == 300
    await judged(config, pg_db)


async def test_what_has_no_room_is_waited_for(pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    run, readings = Reading.run, 0

    async def counted(self: Reading) -> None:
        nonlocal readings
        readings += 1
        await run(self)

    async def limited(name: str, size: int) -> None:
        async with broker_of(config) as broker:
            info = await broker.api(f"STREAM.INFO.{name}")
            limit = info["state"]["bytes"] + size if size >= 0 else -1
            wanted = {**info["config"], "max_bytes": limit, "discard": "new"}
            await broker.api(f"STREAM.UPDATE.{name}", wanted)

    monkeypatch.setattr(Reading, "run", counted)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        # The note of the second chunk has no room in the bucket, the rows of the next ones have none in the stream.
        await limited(f"KV_{config.state.bucket}", 0)
        await limited(config.stream.name, 200_000)
        on.set()
        await anyio.sleep(1.5)
        await limited(f"KV_{config.state.bucket}", -1)
        await again(config, rows=150)
        await anyio.sleep(1.5)
        rest = await again(config)
        assert rest.rows < 300
        await limited(config.stream.name, -1)
        await read_again(config)
        await settled(config)
    assert readings == 1
    await judged(config, pg_db)


async def test_a_disk_that_is_full_is_waited_for(pg_db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 300)
    await execute(pg_db, WIDE, EXTERNAL, ROWS.replace("300", "1500"))
    # Not within `home`, which could not be removed before the disk is.
    home, store = throwaway_folder(), tmp_path / "small"
    with small_disk(store, 100):
        async with NatsServer(home, Keeper(home), store) as server:
            limited(server, "max_file_store: 10GB")
            await server.restart()
            config = source(pg_db, server.url)
            async with bridge(config):
                await settled(config)
                rest = store / "rest"
                rest.write_bytes(bytes(shutil.disk_usage(store).free - (2 << 20)))
                await ask(config)

                async def full() -> bool:
                    return shutil.disk_usage(store).free == 0

                assert await until(full, seconds=30)
                await anyio.sleep(1)
                rest.unlink()
                # nats-server does not write to the stream again before.
                await server.restart()
                assert (await read_again(config, seconds=60)).rows == 1500
                await settled(config)
            await judged(config, pg_db)


async def test_rows_that_are_suddenly_wide_are_cut_off_at_what_may_be_held(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(pace, "FIRST_UNKNOWN", 400)
    config = source(pg_db, nats.url)
    await execute(
        pg_db, WIDE, EXTERNAL, "INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 400) g",
        "INSERT INTO t SELECT g, g, repeat('x', 200000) FROM generate_series(401, 450) g",
    )  # fmt: skip
    sizes: list[int] = []
    publish, cancel, cancelled = Reading._publish, Patient.cancel_safe, Counter[int]()

    async def cancelling(self: Patient) -> None:
        cancelled[0] += 1
        await cancel(self)

    monkeypatch.setattr(Patient, "cancel_safe", cancelling)

    async def counted(self: Reading, sql: Any, chunk: chunks.Chunk) -> None:
        sizes.append(chunk.size)
        if len(sizes) == 2:
            await execute(pg_db, "UPDATE t SET id = id - 1000, v = v + 1000 WHERE id > 420")
        await publish(self, sql, chunk)

    monkeypatch.setattr(Reading, "_publish", counted)
    async with bridge(config):
        await settled(config)
        await ask(config)
        assert (await read_again(config)).rows >= 400
        await settled(config)
    assert max(sizes) < (1 << 20) + 300_000
    assert sum(sizes) > 50 * 200_000
    assert cancelled[0] >= 2
    await judged(config, pg_db)


async def test_a_partition_with_most_rows_and_one_with_none_are_read(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE t (id int, v int, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "CREATE TABLE none PARTITION OF t FOR VALUES FROM (-100) TO (0)",
        "CREATE TABLE most (v int, id int PRIMARY KEY)",
        "ALTER TABLE t ATTACH PARTITION most FOR VALUES FROM (0) TO (1000000)",
        "CREATE TABLE rest PARTITION OF t DEFAULT",
        "INSERT INTO t SELECT g, g FROM generate_series(0, 9999) g",
        "INSERT INTO t VALUES (2000000, 1)",
    )
    async with bridge(config):
        await settled(config)
        before = len(await messages(config))
        await ask(config)
        assert (await read_again(config)).rows == 10_001
        await settled(config)
    assert [m.op for m, _ in (await messages(config))[before:]].count("read") == 10_001
    await agrees(config)
