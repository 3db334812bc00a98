"""`bridge verify TABLE…`: what it finds, and that it finds nothing else while everything is written to."""

from __future__ import annotations

import json
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import psycopg
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer, Postgres
from bridge.errors import ServerRefused, UsageError
from bridge.operate import verify as verifying
from bridge.operate.agreement import Report
from bridge.operate.verify import verify
from bridge.stream import subjects
from bridge.waiting import until
from tests.running import Process, bridge, broker_of, command, execute, messages, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v int, body text)"
FILL = "INSERT INTO t SELECT g, g, repeat('x', g % 50) FROM generate_series(1, 3000) g"


run = partial(command, "verify")


async def compared(config: Config, *tables: str, limit: int = 20) -> Report:
    """The report on the table t, or on the one that is named."""
    [report] = await verify(config, list(config.stream.servers), list(tables) or ["public.t"], limit=limit)
    return report


async def removed(config: Config, table: str, key: Any) -> None:
    """Take the last event of a row out of the stream, behind the bridge's back."""
    subject = subjects.table_filter(config.stream.prefix, config.source.name, "public", table, compact=False)
    async with broker_of(config) as broker:
        seq, found = 1, 0
        while (message := await broker.message(config.stream.name, next_by_subj=subject, seq=seq)) is not None:
            seq = message.seq + 1
            if msgspec.json.decode(message.data)["key"] == key:
                found = message.seq
        await broker.api(f"STREAM.MSG.DELETE.{config.stream.name}", {"seq": found})


def keys(report: Report, kind: str) -> list[Any]:
    return [msgspec.json.decode(one.key) for one in report.findings if one.kind == kind]


async def test_a_table_that_the_log_has_is_said_to_be_so(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, FILL)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "UPDATE t SET v = v + 1 WHERE id % 3 = 0", "DELETE FROM t WHERE id > 2900")
        done = await run(config, tmp_path)
        assert done.code == 0, done
        assert "public.t: as the log says" in done.out
        assert "2,900 rows, 2,900 in the log" in done.out
        assert "public.mark: as the log says" in done.out


async def test_rows_that_were_removed_from_the_stream_are_found(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, *(f"INSERT INTO t VALUES ({n}, {n}, 'secret')" for n in range(1, 6)))
        await execute(pg_db, "UPDATE t SET v = 20 WHERE id = 2", "DELETE FROM t WHERE id = 3")
        await settled(config)
        for number in (1, 2, 3):
            await removed(config, "t", {"id": number})
        done = await run(config, tmp_path, "public.t")
        assert done.code == 1
        assert "secret" not in done.out
        assert "differs from the log" in done.out
        lines = [line.split() for line in done.out.splitlines()]
        for words in (["missing", '{"id":1}'], ["extra", '{"id":3}'], ["different", '{"id":2}', "v"]):
            assert words in lines, done.out
        shown = await run(config, tmp_path, "public.t", "--values", "--json")
        assert shown.code == 1
        [found] = json.loads(shown.out)["tables"]
        assert found["counts"] == {"missing": 1, "extra": 1, "different": 1}
        values = {one["kind"]: (one["table"], one["log"]) for one in found["findings"]}
        assert values["missing"] == ({"id": 1, "v": 1, "body": "secret"}, None)
        assert values["extra"] == (None, {"id": 3, "v": 3, "body": "secret"})
        assert [side["v"] for side in values["different"]] == [20, 2]


async def test_rows_that_change_without_a_change_in_the_log_are_found(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(
        pg_db,
        TABLE,
        "INSERT INTO t VALUES (1, 1, 'a')",
        "CREATE TABLE p (id int PRIMARY KEY, v int) PARTITION BY RANGE (id)",
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)",
        "INSERT INTO p SELECT g, g FROM generate_series(1, 19) g",
    )
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "ALTER TABLE t ADD COLUMN extra int DEFAULT 7", "ALTER TABLE p DETACH PARTITION p2")
        found = await compared(config)
        assert found.counts == {"different": 1}
        assert found.findings[0].columns == ["extra"]
        assert (await compared(config, "public.p")).counts == {"extra": 10}
        await execute(pg_db, "UPDATE t SET v = 2")
        assert (await compared(config)).same


async def test_keys_of_types_whose_json_postgresql_does_not_read_are_found_too(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE t (at timestamptz, raw bytea, n int, v int, PRIMARY KEY (raw, at))",
        "INSERT INTO t SELECT timestamptz '2020-01-01' + g * interval '1 s', decode(md5(g::text), 'hex'), g, g"
        " FROM generate_series(1, 200) g",
    )
    async with bridge(config):
        await settled(config)
        assert (await compared(config)).same
        await execute(pg_db, "INSERT INTO t VALUES (now(), 'a', 0, 0)")
        await settled(config)
        async with broker_of(config) as broker:
            last = (await broker.stream(config.stream.name)).last_seq  # type: ignore[union-attr]
            subject = subjects.table_filter(config.stream.prefix, config.source.name, "public", "t", compact=False)
            found = await broker.message(config.stream.name, last_by_subj=subject)
            assert found is not None
            assert found.seq < last
            await broker.api(f"STREAM.MSG.DELETE.{config.stream.name}", {"seq": found.seq})
        report = await compared(config)
        assert report.counts == {"missing": 1}
        assert (report.rows, report.logged) == (201, 200)


@pytest.mark.parametrize(
    ("change", "changing"),
    [
        ("UPDATE t SET v = -1 WHERE id = 5", 1),
        ("DELETE FROM t WHERE id = 5", 1),
        ("UPDATE t SET id = 9999 WHERE id = 5", 2),
    ],
)
async def test_a_transaction_that_the_log_has_and_nobody_sees_yet_is_no_difference(
    own_pg: Postgres, nats: NatsServer, change: str, changing: int
) -> None:
    dsn = own_pg.dsn()
    config = source(dsn, nats.url)
    await execute(dsn, TABLE, FILL)
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)
        await execute(dsn, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
        tasks.start_soon(execute, dsn, f"SET synchronous_commit = on; {change}")

        async def delivered() -> bool:
            return any(message.op in ("update", "delete") for message, _ in await messages(config))

        assert await until(delivered, seconds=20)
        report = await compared(config)
        assert (report.counts, report.changing) == ({}, changing)
        await execute(dsn, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
        await settled(config)
        report = await compared(config)
        assert (report.counts, report.changing) == ({}, 0)


async def test_nothing_is_found_while_all_rows_are_written_to(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "MOST", 100)
    monkeypatch.setattr(verifying, "AMONG", 50)
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, FILL, "ALTER TABLE t REPLICA IDENTITY FULL")
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)
        stop = anyio.Event()
        for number in range(2):
            tasks.start_soon(_write, pg_db, random.Random(number), stop)
        for _ in range(3):
            report = await compared(config)
            assert report.same, report
        stop.set()
    async with bridge(config):
        await settled(config)
        report = await compared(config)
        assert report.same, report
        assert report.changing == 0
        assert report.rows == report.logged


async def _write(dsn: str, choose: random.Random, stop: anyio.Event) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as sql:
        while not stop.is_set():
            one, other = choose.randrange(1, 3000), choose.randrange(3001, 6000)
            statement = choose.choice(
                [
                    f"UPDATE t SET v = v + 1 WHERE id BETWEEN {one} AND {one + 20}",
                    f"DELETE FROM t WHERE id = {one}",
                    f"INSERT INTO t VALUES ({one}, 0, 'new') ON CONFLICT (id) DO UPDATE SET v = 0",
                    f"UPDATE t SET id = {other} WHERE id = {one} AND NOT EXISTS (SELECT FROM t WHERE id = {other})",
                    *(["TRUNCATE t"] if choose.random() < 0.02 else []),
                ]
            )
            try:
                await sql.execute(statement)
            except psycopg.errors.UniqueViolation:
                continue


async def test_what_is_still_on_its_way_into_the_log_is_waited_for(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, FILL)
    process = Process(tmp_path, toml(config))
    process.start()
    try:
        await settled(config)
        assert process.process is not None
        process.process.send_signal(signal.SIGSTOP)
        await execute(pg_db, "INSERT INTO t VALUES (4000, 1, 'x')", "DELETE FROM t WHERE id = 1")
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                assert (await compared(config)).same

            tasks.start_soon(look)
            await anyio.sleep(3)
            process.process.send_signal(signal.SIGCONT)
        assert await process.end() == 0
    finally:
        process.close()


async def test_what_may_not_be_published_is_not_compared(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    hiding = msgspec.structs.replace(config.source, table={"public.t": Table(exclude=["body"])})
    config = msgspec.structs.replace(config, source=hiding)
    await execute(pg_db, TABLE, FILL)
    async with bridge(config):
        await settled(config)
        assert (await compared(config)).same


async def test_it_is_said_how_many_rows_are_not_listed(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t SELECT g, g, 'x' FROM generate_series(1, 30) g")
        await settled(config)
        for number in range(1, 8):
            await removed(config, "t", {"id": number})
        done = await run(config, tmp_path, "public.t", "--limit", "2")
        assert done.code == 1
        assert "… and 5 more: 5 missing (--limit)" in done.out
        assert "more" not in (await run(config, tmp_path, "public.t", "--limit", "7")).out


async def test_what_cannot_be_compared_is_said(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        TABLE,
        FILL,
        "CREATE TABLE nokey (v int)",
        "INSERT INTO nokey SELECT generate_series(1, 1234)",
        "ANALYZE nokey",
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY LIST (id)",
        "CREATE TABLE part PARTITION OF parted DEFAULT",
    )
    async with bridge(config):
        await settled(config)
        done = await run(config, tmp_path)
        assert done.code == 0, done
        assert "public.nokey: not compared (about 1,234 rows): public.nokey has no key" in done.out
        [skipped] = [one for one in await verify(config, [nats.url], ["public.n*"]) if one.table == "public.nokey"]
        assert skipped.why
        with pytest.raises(ServerRefused, match="has no key"):
            await compared(config, "public.nokey")
        with pytest.raises(UsageError, match="no published table is called public\\.other"):
            await compared(config, "public.other")
        with pytest.raises(UsageError, match=r"public\.part is a partition of public\.parted"):
            await compared(config, "public.part")
        async with broker_of(config) as broker:
            await broker.api(f"STREAM.PURGE.{config.stream.name}", {"keep": 1})
        gap = await run(config, tmp_path, "public.t")
        assert gap.code == 3
        assert "bridge snapshot public.t" in gap.err
    stopped = await run(config, tmp_path)
    assert stopped.code == 4
    assert "no bridge runs" in stopped.err
