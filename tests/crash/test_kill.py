"""An orderly end under the load of a music shop (../shared/data/chinook.sql, pgbench and hand-written edits), and kills
within one large transaction."""

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
from tests.crash.load import EDITS, TABLES
from tests.oracle import agrees
from tests.running import Process, broker_of, execute, messages, settled, source, streaming, toml
from tests.samples import CHINOOK

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

SLOT = "SELECT pg_create_logical_replication_slot('oracle', 'wal2json')"
# What the hand-written edits pick from; {r} is a random number.
SHOP_EDITS = [
    "UPDATE invoice SET total = total + 0.01 WHERE invoice_id % 40 = {r} % 40",
    "UPDATE track SET unit_price = 1.10, composer = NULL WHERE track_id % 100 = {r} % 100",
    "DELETE FROM playlist_track WHERE track_id = {r} % 3000",
    "UPDATE playlist_track SET playlist_id = 2 WHERE playlist_id = 18",
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
    await execute(dsn, "DELETE FROM pgbench_accounts WHERE aid > 15000", TABLES, SLOT)
    yield dsn


async def edit(dsn: str, choose: random.Random, times: int) -> None:
    """Hand-written edits in transactions of one to six statements, some of them rolled back; PostgreSQL may go away."""
    for _ in range(times):
        texts = choose.sample([*EDITS, *SHOP_EDITS], choose.randint(1, 6)) + choose.sample(RARE, choose.random() < 0.03)
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
        await execute(dsn, "INSERT INTO t SELECT g, 'row ' || g FROM generate_series(1, 50000) g")
        for reached in (5_000, 20_000):
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
