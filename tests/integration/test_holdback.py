"""A power failure takes back what a NATS server had acked: the bridge goes on, nothing is missing, nothing is doubled.

The server is killed and the end of its files cut off, as by a machine that had not synced them; PostgreSQL still has
what follows because it was told only what no failure can take back any more.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from bridge.config import Config
from bridge.embedded import Keeper, NatsServer, until
from bridge.embedded.nats import jetstream
from bridge.embedded.process import throwaway_folder
from bridge.pipeline import pace
from bridge.source import lsn
from bridge.stream import asking
from bridge.stream.state import State
from bridge.waiting import until as wait_until
from tests import powercut
from tests.oracle import agrees
from tests.powercut import Record
from tests.running import (
    Process,
    bridge,
    broker_of,
    checkpoint,
    complete,
    execute,
    messages,
    settled,
    source,
    streaming,
    toml,
    writers,
)

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, body text)"
NOISE = "CREATE TABLE noise (body text)"
MARK = "CREATE TABLE mark (id text PRIMARY KEY)"
SYNC = 3.0


@pytest.fixture
async def own_nats() -> AsyncIterator[NatsServer]:
    """A server that syncs now and then only, as one does by default."""
    home = throwaway_folder()
    settings = {"jetstream": jetstream(home / "store", "2m")}
    async with NatsServer(home, Keeper(home), home / "store", settings=settings) as server:
        yield server


def lossy(dsn: str, server: NatsServer, sync: str = f"{SYNC:g}s") -> Config:
    return source(dsn, server.url, sync=sync, tables=["public.t", "public.mark"])


@asynccontextmanager
async def process(folder: Path, config: Config) -> AsyncIterator[Process]:
    running = Process(folder, toml(config))
    running.start()
    try:
        yield running
    finally:
        running.close()


async def prepared(dsn: str, config: Config) -> str:
    oracle = f"o_{config.source.name}"
    await execute(dsn, TABLE, NOISE, MARK, f"SELECT pg_create_logical_replication_slot('{oracle}', 'wal2json')")
    return oracle


async def confirmed(config: Config) -> int:
    rows = await execute(
        str(config.source.dsn),
        f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{config.source.slot}'",
    )
    return lsn.parse(str(rows[0][0]))


async def write(dsn: str, first: int, transactions: int) -> int:
    """Transactions of 30 rows and, on a table that is not published, of many more; the next free id."""
    for number in range(first, first + 30 * transactions, 30):
        await execute(dsn, f"INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series({number}, {number + 29}) g")
        await execute(dsn, "INSERT INTO noise SELECT repeat('y', 200) FROM generate_series(1, 100)")
    return first + 30 * transactions


def younger(moment: float, seconds: float) -> Callable[[Record], bool]:
    return lambda record: record.time <= moment - seconds


async def fail(server: NatsServer, config: Config, stream_loses: float, kv_loses: float, into: int = 0) -> int:
    """Ends the server and takes back what it stored within the last seconds; how many messages are gone."""
    await server.kill()
    now = time.time()
    gone = powercut.cut(server.store_dir, config.stream.name, younger(now, stream_loses), into=into)
    powercut.cut(server.store_dir, f"KV_{config.state.bucket}", younger(now, kv_loses), into=into)
    await server.start()
    return gone


@pytest.mark.parametrize("ended", [True, False])
async def test_a_table_whose_rows_a_power_failure_took_back_is_read_once_more(
    pg_db: str, own_nats: NatsServer, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "FIRST_UNKNOWN", 50)
    monkeypatch.setattr(pace, "MOST", 50)
    config = lossy(pg_db, own_nats, "60s")
    oracle = await prepared(pg_db, config)
    await write(pg_db, 0, 20)
    async with bridge(config):
        await settled(config)
        async with broker_of(config) as broker:
            state = await State.open(broker, config.state.bucket)
            await asking.ask(state, config.source.name, ("public", "t"))

            async def so_far() -> bool:
                kept = (await asking.tables(state, config.source.name))["public", "t"]
                return kept.again is None if ended else kept.again is not None and kept.again.rows >= 200

            assert await wait_until(so_far, seconds=20, every=0.01)
            if not ended:
                await asking.pause(state, config.source.name, ("public", "t"))
    found = [message for message, one in await messages(config) if one.phase == "begin" and one.table == "t"]
    await own_nats.kill()
    assert powercut.cut(own_nats.store_dir, config.stream.name, lambda record: record.seq <= found[-1].seq + 60) > 10
    await own_nats.start()
    async with bridge(config):
        async with broker_of(config) as broker:
            state = await State.open(broker, config.state.bucket)
            if not ended:
                await settled(config)
                await asking.resume(state, config.source.name, ("public", "t"))

            async def read() -> bool:
                kept = (await asking.tables(state, config.source.name))["public", "t"]
                return kept.again is None and kept.complete_from > found[-1].seq

            assert await wait_until(read, seconds=30)
            done = (await asking.tables(state, config.source.name))["public", "t"]
        await settled(config)
    assert (done.state, done.rows, done.mode) == ("done", 600, "incremental")
    await agrees(config, oracle)


@pytest.mark.parametrize(("kv", "bridge_dies"), [("kept", False), ("cut", False), ("cut", True), ("cut further", True)])
async def test_what_a_power_failure_took_back_is_published_again(
    pg_db: str, own_nats: NatsServer, tmp_path: Path, kv: str, bridge_dies: bool
) -> None:
    config = lossy(pg_db, own_nats)
    oracle = await prepared(pg_db, config)
    async with process(tmp_path, config) as running:
        await streaming(config)
        began, told, number = await confirmed(config), 0, 0
        deadline = time.monotonic() + 60
        while told < 3 and time.monotonic() < deadline:
            number = await write(pg_db, number, 2)
            await anyio.sleep(0.3)  # a steady trickle, so that some of it is always too young to be safe
            now = await confirmed(config)
            told, began = told + (now > began), now
        assert told == 3, "PostgreSQL is told in steps while writes go on"
        before = await messages(config)
        if bridge_dies:
            await running.end(signal.SIGKILL)
        stream_loses, kv_loses = {"kept": (SYNC, 0.0), "cut": (SYNC, SYNC), "cut further": (0.7, SYNC)}[kv]
        gone = await fail(own_nats, config, stream_loses, kv_loses, into=40 if kv == "cut" else 0)
        assert gone > 10
        if bridge_dies:
            running.start()
        await settled(config, 60)
        number = await write(pg_db, number, 2)
        await settled(config)
        assert await running.end() == 0
    after = {message.seq: message.position for message, _ in await agrees(config, oracle)}
    for message, _ in before:
        assert after[message.seq] == message.position
    assert len(await writers(config)) >= 2


@pytest.mark.parametrize(
    ("kv", "finished"),
    [("kept", False), ("cut further", False), ("kept", True), ("cut", True), ("cut further", True)],
)
async def test_an_initial_snapshot_that_a_power_failure_took_back_is_read_again(
    pg_db: str, own_nats: NatsServer, tmp_path: Path, kv: str, finished: bool
) -> None:
    config = lossy(pg_db, own_nats, sync="60s")
    # More than a block of the stream's; where it is to be interrupted, more than is read before the kill.
    rows = 20_000 if finished else 60_000
    await execute(pg_db, TABLE, MARK, f"INSERT INTO t SELECT g, repeat('x', 300) FROM generate_series(1, {rows}) g")
    async with process(tmp_path, config) as running:
        if finished:
            await settled(config)
            await anyio.sleep(3)  # long enough to be told, if nothing were held back
            kept = await checkpoint(config)
            assert kept is not None
            assert await confirmed(config) == lsn.parse(kept.consistent_point)
        else:
            await running.said("slot created")
            await until(lambda: _has(config, 3000), 30, "a part of the snapshot is in the stream")
        await running.end(signal.SIGKILL)
        await execute(pg_db, "UPDATE t SET body = 'since' WHERE id % 100 = 0", "DELETE FROM t WHERE id % 100 = 1")
        await own_nats.kill()
        store, bucket = own_nats.store_dir, f"KV_{config.state.bucket}"
        assert powercut.cut(store, config.stream.name, lambda record: record.seq <= 2000, into=11) > 500
        if kv == "cut":
            # As it was when the snapshot had begun.
            _cut_state(own_nats, config, b'"phase": "stream"')
        elif kv == "cut further":
            powercut.cut(store, bucket, lambda _: False)
        await own_nats.start()
        running.start()
        await settled(config, 60)
        await execute(pg_db, "INSERT INTO t VALUES (0, 'new')")
        await settled(config)
        # The other table is empty: where it is whole in what was left, it stays, and the slot with it.
        assert "starting over" in running.text or "snapshot interrupted" in running.text
        await complete(config)
        assert await running.end() == 0
    found = await agrees(config, interrupted=True)
    assert [e.phase for _, e in found if e.table == "t" and e.op == "snapshot"] == ["begin", "begin", "end"]


@pytest.mark.parametrize("kv", ["kept", "cut"])
async def test_what_postgresql_was_told_of_others_writes_is_explained_when_the_stream_is_cut(
    pg_db: str, own_nats: NatsServer, tmp_path: Path, kv: str
) -> None:
    config = lossy(pg_db, own_nats)
    oracle = await prepared(pg_db, config)
    async with process(tmp_path, config) as running:
        await settled(config)
        tail = (await messages(config))[-1]
        end = lsn.parse(tail[1].commit_lsn)

        async def told_more() -> bool:
            await execute(pg_db, "INSERT INTO noise SELECT repeat('y', 200) FROM generate_series(1, 100)")
            return await confirmed(config) > end

        await until(told_more, 60, "PostgreSQL is told what is beyond the stream's last event")
        await write(pg_db, 0, 3)
        await until(lambda: _has(config, tail[0].seq + 90), 30, "the stream has it")
        began = time.monotonic()

        async def written() -> bool:
            kept = await checkpoint(config)
            return kept is not None and kept.stream_seq > tail[0].seq

        await until(written, 30, "the checkpoint is ahead of what will be left")
        assert time.monotonic() - began < SYNC
        await own_nats.kill()
        assert powercut.cut(own_nats.store_dir, config.stream.name, lambda record: record.seq <= tail[0].seq) == 90
        if kv == "cut":
            _cut_state(own_nats, config, b'"stream_seq": %d' % (tail[0].seq + 90))
        await own_nats.start()
        await settled(config, 60)
        assert await running.end() == 0
    await agrees(config, oracle)


def _cut_state(server: NatsServer, config: Config, first: bytes) -> None:
    def stays(record: Record) -> bool:
        data = record.block.read_bytes()[record.offset : record.offset + record.size]
        return first not in data

    powercut.cut(server.store_dir, f"KV_{config.state.bucket}", stays)


async def _has(config: Config, messages_: int) -> bool:
    async with broker_of(config) as broker:
        found = await broker.stream(config.stream.name)
        return found is not None and found.last_seq >= messages_


@pytest.mark.parametrize("kv", ["kept", "cut"])
async def test_without_holding_back_the_loss_is_a_gap_and_never_silent(
    pg_db: str, own_nats: NatsServer, tmp_path: Path, kv: str
) -> None:
    config = lossy(pg_db, own_nats, sync="always")
    await prepared(pg_db, config)
    async with process(tmp_path, config) as running:
        await streaming(config)
        number = await write(pg_db, 0, 10)
        [(written,)] = await execute(pg_db, "SELECT pg_current_wal_insert_lsn()::text")
        await settled(config)

        async def told() -> bool:
            return await confirmed(config) >= lsn.parse(written)

        await until(told, 30, "PostgreSQL is told at once")
        assert number == 300
        await own_nats.kill()
        store = own_nats.store_dir
        last = max(record.seq for record in powercut.records(store, config.stream.name))
        powercut.cut(store, config.stream.name, lambda record: record.seq <= last - 40)
        if kv == "cut":
            powercut.cut(store, f"KV_{config.state.bucket}", younger(time.time(), 2))
        await own_nats.start()
        assert await running.wait(60) == 3
        assert "was confirmed up to" in running.text
        assert "bridge drop" in running.text


async def test_what_postgresql_will_be_told_is_few_and_known_before(pg_db: str, own_nats: NatsServer) -> None:
    config = lossy(pg_db, own_nats)
    await prepared(pg_db, config)
    known: set[int] = set()
    told: set[int] = set()

    async def look() -> None:
        kept = await checkpoint(config)
        assert kept is not None
        assert len(kept.held) <= 17
        known.update(lsn.parse(pair.lsn) for pair in ([kept.confirmed] if kept.confirmed else []) + kept.held)
        told.add(await confirmed(config))

    async with bridge(config):
        await streaming(config)
        number, deadline = 0, time.monotonic() + 60
        while len(told) < 6 and time.monotonic() < deadline:
            number = await write(pg_db, number, 1)
            await look()
    assert len(told) >= 6
    assert told - {min(told)} <= known
