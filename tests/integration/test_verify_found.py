"""`bridge verify TABLE…`: what was changed where no log sees it, what it says meanwhile, and how it ends early."""

from __future__ import annotations

import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import anyio
import psycopg
import pytest

from bridge.embedded import NatsServer
from bridge.errors import ServerRefused
from bridge.operate import verify as verifying
from bridge.operate.verify import verify
from bridge.waiting import until
from tests.disk import small_disk
from tests.reading import scenario
from tests.reading.steps import ask, chunks_of, read_again
from tests.running import bridge, command, execute, settled, source, toml

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v int, body text)"
FILL = "INSERT INTO t SELECT g, g, repeat('x', 50) FROM generate_series(1, 1000) g"
UNSEEN = [
    "ALTER TABLE t SET UNLOGGED",
    "UPDATE t SET v = -v WHERE id = 5; DELETE FROM t WHERE id = 6; INSERT INTO t VALUES (2000, 1, 'new')",
    "ALTER TABLE t SET LOGGED",
]

run = partial(command, "verify")


async def test_what_was_changed_while_a_table_was_not_logged_is_found_and_mended(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, TABLE, FILL)
    async with bridge(config):
        await settled(config)
        await execute(pg_db, *UNSEEN[:2])
        with pytest.raises(ServerRefused, match="is not logged"):
            await verify(config, [nats.url], ["public.t"])
        await execute(pg_db, UNSEEN[2])
        [report] = await verify(config, [nats.url], ["public.t"])
        assert report.counts == {"missing": 1, "extra": 1, "different": 1}
        keys = {one.kind: bytes(one.key) for one in report.findings}
        assert keys == {"missing": b'{"id":2000}', "extra": b'{"id":6}', "different": b'{"id":5}'}
        await ask(config)
        await read_again(config)
        [report] = await verify(config, [nats.url], ["public.t"])
        assert (report.counts, report.rows, report.logged) == ({}, 1000, 1000)
        wrong = await run(config, tmp_path, "nothing.*")
        assert (wrong.code, "no published table matches nothing.*" in wrong.err) == (2, True)


async def test_nothing_is_found_while_rows_move_and_tables_are_read_again(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 40)
    monkeypatch.setattr(verifying, "MOST", 60)
    config = source(pg_db, nats.url)
    await scenario.made(pg_db, 300)
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)
        stop = anyio.Event()
        for number in range(scenario.WRITERS):
            writer = scenario.Writer(pg_db, number, random.Random(number), 300, prepare=False)
            tasks.start_soon(writer.work, stop)
        for _ in range(2):
            for table in scenario.TABLES:
                await ask(config, table)
            for report in await verify(config, [nats.url], []):
                assert report.same, report
        for table in scenario.TABLES:
            await read_again(config, table)
        stop.set()
    async with bridge(config):
        await settled(config)
        for report in await verify(config, [nats.url], []):
            assert (report.counts, report.changing, report.rows) == ({}, 0, report.logged), report


async def test_rows_nested_deeper_than_a_decoder_goes_are_no_end_of_it(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    deep = "(repeat('[', 2000) || repeat(']', 2000))::json"
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, v int, body json)", f"INSERT INTO t VALUES (1, 1, {deep})"
    )
    await execute(pg_db, "INSERT INTO t VALUES (2, 2, '[]')")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, f"INSERT INTO t VALUES (3, 3, {deep})")
        await ask(config)
        await read_again(config)
        [report] = await verify(config, [nats.url], ["public.t"])
        assert report.same, report
        assert (report.rows, report.unread) == (3, 2)
        await execute(pg_db, "DELETE FROM t WHERE id = 3")
        [report] = await verify(config, [nats.url], ["public.t"])
        assert (report.counts, report.rows, report.unread) == ({}, 2, 1)


async def test_an_interrupt_leaves_nothing_behind(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, FILL)
    file, temporary = tmp_path / "bridge.toml", tmp_path / "temporary"
    file.write_text(toml(config))
    temporary.mkdir()
    asked = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{pg_db.rpartition('/')[2]}' AND wait_event_type = 'Lock'"
    async with bridge(config):
        await settled(config)
        async with await psycopg.AsyncConnection.connect(pg_db) as locker:
            await locker.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
            called = [sys.executable, "-m", "bridge", "--config", str(file), "verify", "public.t"]
            environment = {**os.environ, "TMPDIR": str(temporary)}
            async with await anyio.open_process(called, env=environment) as process:

                async def waits() -> bool:
                    return bool(await execute(pg_db, asked))

                assert await until(waits, seconds=20)
                process.send_signal(signal.SIGINT)
                with anyio.fail_after(20):
                    assert await process.wait() == 130
                assert process.stderr is not None
                assert b"Traceback" not in b"".join([part async for part in process.stderr])

            async def none() -> bool:
                return not await execute(pg_db, asked)

            assert await until(none, seconds=10)
        assert list(temporary.iterdir()) == []


LITTLE = """
import sys
from bridge import cli
from bridge.index import picture

picture.CACHE_KIB = 256
sys.exit(cli.main(["--config", sys.argv[1], "verify", "public.t"]))
"""


async def test_no_room_for_the_temporary_file_is_said(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, "INSERT INTO t SELECT g, g, repeat('x', 9000) FROM generate_series(1, 1000) g")
    file, small = tmp_path / "bridge.toml", tmp_path / "small"
    file.write_text(toml(config))
    with small_disk(small, 2):
        async with bridge(config):
            await settled(config)
            with anyio.fail_after(60):
                done = await anyio.run_process(
                    [sys.executable, "-c", LITTLE, str(file)], check=False, env={**os.environ, "TMPDIR": str(small)}
                )
    assert done.returncode == 4, done
    assert "point TMPDIR to a folder with room" in done.stderr.decode()
