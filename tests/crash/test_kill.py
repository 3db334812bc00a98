"""Kills the bridge, the broker and PostgreSQL at random moments under load, and compares what is left.

The music shop of ../shared/data/chinook.sql is loaded before; pgbench and hand-written edits run meanwhile.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import psycopg
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, Postgres, until
from tests.oracle import agrees
from tests.running import Process, broker_of, execute, messages, settled, source, streaming, toml

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

CHINOOK = Path(__file__).parents[2].parent / "shared" / "data" / "chinook.sql"
SLOT = "SELECT pg_create_logical_replication_slot('oracle', 'wal2json')"
OWN_TABLES = """
CREATE TABLE notes (id int PRIMARY KEY, title text, body text, seen int DEFAULT 0);
ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
CREATE TABLE loose (word text, number numeric, body text);
ALTER TABLE loose ALTER body SET STORAGE EXTERNAL;
ALTER TABLE loose REPLICA IDENTITY FULL;
CREATE TABLE days (day date, n int, note text, PRIMARY KEY (day, n)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
INSERT INTO notes SELECT g, 'title ' || g, repeat(md5(g::text), 200) FROM generate_series(1, 400) g;
INSERT INTO loose SELECT 'word ' || g, nullif(g % 5, 0), CASE WHEN g % 3 = 0 THEN repeat(md5(g::text), 150) END
  FROM generate_series(1, 100) g;
INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, 'day' FROM generate_series(1, 200) g;
"""
# What the hand-written edits pick from; {r} is a random number.
EDITS = [
    "UPDATE notes SET seen = seen + 1 WHERE id % 10 = {r} % 10",
    "UPDATE notes SET title = 'edited {r}' WHERE id BETWEEN {r} % 400 AND {r} % 400 + 20",
    "UPDATE notes SET body = repeat(md5('{r}'), 150) WHERE id = {r} % 400",
    "UPDATE notes SET id = id + 1000000 WHERE id = {r} % 400",
    "DELETE FROM notes WHERE id = {r} % 400",
    "INSERT INTO notes SELECT g, 'new', repeat('x{r}', 900) FROM generate_series({r} * 100, {r} * 100 + 5) g",
    "UPDATE loose SET number = {r} WHERE word = 'word ' || {r} % 100",
    "UPDATE loose SET word = NULL WHERE number = {r} % 5 AND word < 'word 3'",
    "DELETE FROM loose WHERE word = 'word ' || {r} % 100",
    "INSERT INTO loose VALUES ('same', 1.10, NULL), ('same', 1.10, NULL), (NULL, NULL, repeat('{r}', 2500))",
    "UPDATE days SET day = day + 30 WHERE n = {r} % 200 AND day < '2026-01-28'",
    "UPDATE days SET note = 'edited {r}' WHERE n % 20 = {r} % 20",
    "UPDATE invoice SET total = total + 0.01 WHERE invoice_id % 40 = {r} % 40",
    "UPDATE track SET unit_price = 1.10, composer = NULL WHERE track_id % 100 = {r} % 100",
    "DELETE FROM playlist_track WHERE track_id = {r} % 3000",
    "UPDATE playlist_track SET playlist_id = 2 WHERE playlist_id = 18",
    "SAVEPOINT a; INSERT INTO notes VALUES (-{r}, 'kept', NULL); SAVEPOINT b;"
    " INSERT INTO notes VALUES (-{r} - 1, 'undone', NULL); ROLLBACK TO b; DELETE FROM loose WHERE number = {r} % 7",
    "SELECT pg_logical_emit_message({r} % 2 = 0, 'other', 'text {r}')",
]
RARE = ["TRUNCATE days_1", "TRUNCATE loose, days", "TRUNCATE playlist_track"]


@asynccontextmanager
async def shop(server: Postgres) -> AsyncIterator[str]:
    """The dsn of the loaded database, with an independent slot."""
    assert CHINOOK.exists(), f"{CHINOOK} is missing: the sample database lies beside the checkout"
    psql = [str(server.bindir / "psql"), "-q", "-X", "-v", "ON_ERROR_STOP=1", "-o", os.devnull]
    await anyio.run_process([*psql, "-f", str(CHINOOK), server.dsn()])
    dsn = server.dsn("chinook")
    await anyio.run_process([str(server.bindir / "pgbench"), "-i", "-q", "-s", "1", dsn])
    await execute(dsn, "DELETE FROM pgbench_accounts WHERE aid > 15000", *OWN_TABLES.split(";\n")[:-1], SLOT)
    yield dsn


async def edit(dsn: str, choose: random.Random, times: int) -> None:
    """Hand-written edits in transactions of one to six statements, some of them rolled back; PostgreSQL may go away."""
    for _ in range(times):
        texts = choose.sample(EDITS, choose.randint(1, 6)) + choose.sample(RARE, choose.random() < 0.03)
        script = "; ".join(text.replace("{r}", str(choose.randint(1, 10**6))) for text in texts)
        try:
            await execute(dsn, f"BEGIN; {script}; {'ROLLBACK' if choose.random() < 0.1 else 'COMMIT'}")
        except (psycopg.errors.UniqueViolation, psycopg.errors.CheckViolation):
            pass
        except psycopg.OperationalError:
            pass  # the server is down: a later try finds it up
        await anyio.sleep(choose.uniform(0, 0.06))  # a person's pace, so that it lasts


async def pgbench(server: Postgres, dsn: str, transactions: int) -> None:
    """Its own tables, 8 clients; it ends early where the server does."""
    rate = ["-R", "500"]  # so that it lasts
    command = [str(server.bindir / "pgbench"), "-n", "-c", "8", "-j", "2", *rate, "-t", str(transactions // 8), dsn]
    await anyio.run_process(command, check=False)


@asynccontextmanager
async def load(server: Postgres, dsn: str, choose: random.Random, seconds: int) -> AsyncIterator[None]:
    """Both kinds of load, for about so long; the block's end waits for theirs."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pgbench, server, dsn, 500 * seconds)
        tasks.start_soon(edit, dsn, choose, 25 * seconds)
        yield


async def pause(choose: random.Random, longest: float) -> None:
    """A moment of chance: nothing is waited for, the kill may hit anything."""
    await anyio.sleep(choose.uniform(0.05, longest))


@asynccontextmanager
async def process(folder: Path, config: Config) -> AsyncIterator[Process]:
    running = Process(folder, toml(config))
    try:
        yield running
    finally:
        running.close()


@pytest.fixture
def choose() -> random.Random:
    seed = int(os.environ.get("BRIDGE_SEED") or secrets.randbelow(10**6))
    print(f"BRIDGE_SEED={seed}")  # noqa: T201 - shown where the test fails
    return random.Random(seed)


async def test_three_kills_of_the_bridge_lose_and_double_nothing(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path, choose: random.Random
) -> None:
    async with shop(own_pg) as dsn:
        config = source(dsn, nats.url)
        async with process(tmp_path, config) as bridge:
            async with load(own_pg, dsn, choose, 10):
                bridge.start()
                await bridge.said("slot created")
                await pause(choose, 0.8)  # within the snapshot, or soon after
                await bridge.end(9)
                bridge.start()
                await pause(choose, 4)  # anywhere
                await bridge.end(9)
                bridge.start()
                await bridge.said("streaming", times=bridge.text.count("streaming") + 1)
                await pause(choose, 1)
                await bridge.end(9)
                bridge.start()
            await settled(config, 60)
            assert await bridge.end() == 0
        await agrees(config, "oracle")


async def test_a_killed_broker_loses_and_doubles_nothing(
    own_pg: Postgres, own_nats: NatsServer, tmp_path: Path, choose: random.Random
) -> None:
    async with shop(own_pg) as dsn:
        config = source(dsn, own_nats.url)
        async with process(tmp_path, config) as bridge:
            async with load(own_pg, dsn, choose, 8):
                bridge.start()
                await bridge.said("slot created")
                for _ in range(3):
                    await pause(choose, 2)
                    await own_nats.kill()
                    await own_nats.start()
            await settled(config, 60)
            assert await bridge.end() == 0
        await agrees(config, "oracle")


async def test_a_crashed_postgresql_loses_and_doubles_nothing(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path, choose: random.Random
) -> None:
    async with shop(own_pg) as dsn:
        config = source(dsn, nats.url)
        async with process(tmp_path, config) as bridge:
            async with load(own_pg, dsn, choose, 8):
                bridge.start()
                await bridge.said("slot created")
                for _ in range(2):
                    await pause(choose, 2)
                    await own_pg.restart(mode="immediate")
            await settled(config, 60)
            assert await bridge.end() == 0
        await agrees(config, "oracle")


async def test_sigterm_drains_and_a_restart_publishes_nothing_twice(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path, choose: random.Random
) -> None:
    async with shop(own_pg) as dsn:
        config = source(dsn, nats.url)
        async with process(tmp_path, config) as bridge:
            bridge.start()
            await bridge.said("streaming")
            async with load(own_pg, dsn, choose, 6):
                for count in range(2, 4):
                    await pause(choose, 1.5)
                    assert await bridge.end() == 0
                    bridge.start()
                    await bridge.said("streaming", times=count)
            await settled(config, 60)
            assert await bridge.end() == 0
            before = len(await messages(config))
            bridge.start()
            await streaming(config)
            await settled(config)
            assert await bridge.end() == 0
        assert len(await agrees(config, "oracle")) == before + 1  # the mark of the second `settled`


async def test_a_kill_within_a_large_transaction_goes_on_inside_it_with_flat_memory(
    own_pg: Postgres, nats: NatsServer, tmp_path: Path
) -> None:
    dsn = own_pg.dsn()
    config = source(dsn, nats.url)
    await execute(dsn, "CREATE TABLE t (id int PRIMARY KEY, body text)", SLOT)
    async with process(tmp_path, config) as bridge:
        bridge.start()
        await bridge.said("streaming")
        await execute(dsn, "INSERT INTO t SELECT g, 'row ' || g FROM generate_series(1, 100000) g")
        for reached in (10_000, 40_000):
            await until(partial(length_is, config, reached), 60, "the transaction is on its way")
            await bridge.end(9)
            bridge.start()
        await settled(config, 60)
        assert bridge.process is not None
        assert peak_memory(bridge.process.pid) < 150 << 20
        assert await bridge.end() == 0
    found = await agrees(config, "oracle")
    assert len({message.epoch for message, event in found if event.table == "t" and event.op == "insert"}) == 3


async def length_is(config: Config, reached: int) -> bool:
    async with broker_of(config) as broker:
        state = await broker.stream(config.stream.name)
        return state is not None and state.last_seq >= reached


def peak_memory(pid: int) -> int:
    """The most that the process ever had in memory, in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10
