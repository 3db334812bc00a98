"""A compacted log under a random load, its bridge killed again and again, is the tables in the end."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import psycopg
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer
from tests.compacted import agrees
from tests.crash.faults import COMPACT
from tests.running import Process, complete, execute, messages, settled, source, toml

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

TABLES = """
CREATE TABLE users (id int PRIMARY KEY, age int);
CREATE TABLE pairs (a int, b text, n numeric(8,2), PRIMARY KEY (a, b));
ALTER TABLE pairs REPLICA IDENTITY FULL;
CREATE TABLE words (word text PRIMARY KEY, body text);
ALTER TABLE words ALTER body SET STORAGE EXTERNAL;
ALTER TABLE words REPLICA IDENTITY FULL;
CREATE TABLE days (day date, n int, seen int, PRIMARY KEY (day, n)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
INSERT INTO users SELECT g, g FROM generate_series(1, 3000) g;
INSERT INTO pairs SELECT g % 7, 'pair ' || g, g / 10.0 FROM generate_series(1, 500) g;
INSERT INTO words SELECT 'word.' || g, repeat(md5(g::text), 120) FROM generate_series(1, 200) g;
INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, 0 FROM generate_series(1, 400) g;
"""
# {r} is a random number.
EDITS = [
    "INSERT INTO users SELECT g, {r} FROM generate_series({r}, {r} + 40) g ON CONFLICT DO NOTHING",
    "UPDATE users SET age = {r} WHERE id % 50 = {r} % 50",
    "UPDATE users SET id = id + 1000000 WHERE id BETWEEN {r} % 3000 AND {r} % 3000 + 30",
    "UPDATE users SET id = -id WHERE id % 97 = {r} % 97",
    "DELETE FROM users WHERE id % 60 = {r} % 60",
    "INSERT INTO users VALUES (5, {r}) ON CONFLICT (id) DO UPDATE SET age = 0; DELETE FROM users WHERE id = 5",
    "DELETE FROM users WHERE id = 5; INSERT INTO users VALUES (5, {r})",
    "UPDATE pairs SET b = b || '.', n = n + 0.01 WHERE a = {r} % 7 AND n < 20",
    "UPDATE pairs SET a = a + 1 WHERE b = 'pair ' || {r} % 500",
    "DELETE FROM pairs WHERE b = 'pair ' || {r} % 500",
    "INSERT INTO pairs VALUES ({r} % 7, 'new {r}', NULL) ON CONFLICT DO NOTHING",
    "UPDATE words SET word = 'moved {r}' WHERE word = 'word.' || {r} % 200",
    "UPDATE words SET body = repeat('{r}', 700) WHERE word LIKE 'word._'",
    "INSERT INTO words VALUES ('{r}', repeat('x{r}', 600)), (repeat('w{r}', 60), NULL) ON CONFLICT DO NOTHING",
    "UPDATE days SET day = day + 28 WHERE n % 40 = {r} % 40 AND day < '2026-02-01'",
    "UPDATE days SET day = day - 28 WHERE n % 40 = {r} % 40 AND day >= '2026-02-01'",
    "UPDATE days SET n = n + 1000 WHERE n = {r} % 400",
    "UPDATE days SET seen = {r} WHERE n % 25 = {r} % 25",
    "INSERT INTO days SELECT '2026-01-01'::date + {r} % 59, {r}, 1 ON CONFLICT DO NOTHING",
    "SAVEPOINT a; DELETE FROM words; ROLLBACK TO a; UPDATE words SET body = NULL WHERE word = 'word.' || {r} % 200",
]
RARE = ["TRUNCATE days_1", "TRUNCATE days", "TRUNCATE pairs, words", "TRUNCATE users"]


async def edit(dsn: str, choose: random.Random, times: int) -> None:
    """Edits in transactions of one to five statements, some of them rolled back."""
    for _ in range(times):
        texts = choose.sample(EDITS, choose.randint(1, 5)) + choose.sample(RARE, choose.random() < 0.04)
        choose.shuffle(texts)
        script = "; ".join(text.replace("{r}", str(choose.randint(1, 10**6))) for text in texts)
        with contextlib.suppress(
            psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure
        ):
            await execute(dsn, f"BEGIN; {script}; {'ROLLBACK' if choose.random() < 0.1 else 'COMMIT'}")
        await anyio.sleep(choose.uniform(0, 0.05))  # a person's pace, so that it lasts


@pytest.mark.parametrize("ttl", ["7d", "2s"])
async def test_kills_under_a_random_load_leave_exactly_the_tables(
    pg_db: str, nats: NatsServer, tmp_path: Path, ttl: str
) -> None:
    seed = int(os.environ.get("BRIDGE_SEED") or secrets.randbelow(10**6))
    print(f"BRIDGE_SEED={seed}")  # noqa: T201 - shown where the test fails
    choose = random.Random(seed)
    await execute(pg_db, *TABLES.strip().split(";\n"))
    config = source(pg_db, nats.url, stream={"mode": "compact", "tombstone_ttl": ttl})
    bridge = Process(tmp_path, toml(config))
    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(edit, pg_db, random.Random(choose.random()), 150)
            bridge.start()
            await bridge.said("slot created")
            for _ in range(5):
                await anyio.sleep(choose.uniform(0.05, 2))  # a moment of chance: the kill may hit anything
                await bridge.end(9)
                bridge.start()
        await settled(config, 60)
        await complete(config)  # a kill within the initial snapshot leaves tables to be read later
        assert await bridge.end() == 0
    finally:
        bridge.close()
    await agrees(config)


@contextlib.asynccontextmanager
async def compacted(dsn: str, nats: NatsServer, folder: Path) -> AsyncIterator[tuple[Config, Process]]:
    """A bridge that has put all tables into a compacted log, and is stopped."""
    await execute(dsn, *TABLES.strip().split(";\n"))
    config = source(dsn, nats.url, stream={"mode": "compact", "tombstone_ttl": "7d"})
    bridge = Process(folder, toml(config))
    try:
        bridge.start()
        await settled(config)
        assert await bridge.end() == 0
        yield config, bridge
    finally:
        bridge.close()


@pytest.mark.parametrize("point", COMPACT)
async def test_a_purge_that_a_kill_prevented_is_made_up_for(
    pg_db: str, nats: NatsServer, tmp_path: Path, point: str
) -> None:
    async with compacted(pg_db, nats, tmp_path) as (config, bridge):
        bridge.start(failpoint=f"{point}:kill")
        await bridge.said("streaming", times=2)
        await execute(pg_db, "TRUNCATE users")
        assert await bridge.wait() == -signal.SIGKILL
        await execute(pg_db, "INSERT INTO users VALUES (1, 1)")
        bridge.start()
        await settled(config)
        assert await bridge.end() == 0
    await agrees(config)
    left = [e for _, e in await messages(config) if e.table == "users" and e.op != "snapshot"]
    assert [e.op for e in left] == ["truncate", "insert"]


@pytest.mark.parametrize("point", ["reading.began", "reading.published", "reading.ended"])
async def test_rows_that_went_unlogged_are_purged_though_a_kill_interrupts_the_reading(
    pg_db: str, nats: NatsServer, tmp_path: Path, point: str
) -> None:
    async with compacted(pg_db, nats, tmp_path) as (config, bridge):
        # What is deleted from an unlogged table is in no log.
        for statement in ("SET UNLOGGED", "SET LOGGED"):
            await execute(pg_db, f"ALTER TABLE users {statement}", "DELETE FROM users WHERE id <= 1000")
        bridge.start(failpoint=f"{point}:kill")
        assert await bridge.wait() == -signal.SIGKILL
        bridge.start()
        await settled(config)
        await complete(config)
        assert await bridge.end() == 0
    await agrees(config)
