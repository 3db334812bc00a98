"""One seed: writers of every kind, snapshots of the same tables meanwhile, a bridge that is stopped and killed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from unittest import mock

import anyio
import psycopg

from bridge.config import Config
from bridge.embedded import NatsServer, Postgres
from bridge.pipeline import between, pace
from bridge.pipeline.run import run as run_bridge
from bridge.stream import asking
from bridge.stream.state import State
from bridge.waiting import until
from tests.crash.tally import Outcome
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, never_back, same
from tests.running import broker_of, execute, settled, source

WRITERS = 3
ROWS = 900
SETTINGS = {"max_prepared_transactions": "10", "deadlock_timeout": "100ms", "max_wal_size": "256MB"}
TABLES = {
    "plain": "CREATE TABLE plain (id int PRIMARY KEY, v bigint NOT NULL, body text)",
    "wide": 'CREATE TABLE wide (word text COLLATE "C", n int, v bigint NOT NULL, body text, PRIMARY KEY (n, word))',
    "parted": "CREATE TABLE parted (id int, v bigint NOT NULL, body text, PRIMARY KEY (id)) PARTITION BY HASH (id)",
}
KEYS = {"plain": "id = {0}", "wide": "n = {0} % 7 AND word = 'w' || {0}", "parted": "id = {0}"}
VALUES = {"plain": "{0}", "wide": "'w' || {0}, {0} % 7", "parted": "{0}"}
MOVES = {"plain": "id = {0}", "wide": "n = {0} % 7, word = 'w' || {0}", "parted": "id = {0}"}


class Servers(NamedTuple):
    pg: Postgres
    nats: NatsServer


class Plan(NamedTuple):
    """What a seed does."""

    seed: int
    rounds: int
    rows_at_once: int
    first: int
    kills: bool


def planned(seed: int) -> Plan:
    """The plan of a seed."""
    choose = random.Random(seed)
    rounds, rows_at_once = choose.randrange(2, 4), choose.choice([1, 7, 50, 200])
    return Plan(seed, rounds, rows_at_once, choose.choice([10, 40, 150]), choose.random() < 0.6)


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    """What seeds share."""
    async with Postgres.throwaway(fsync=False, settings=SETTINGS) as pg, NatsServer.throwaway() as nats:
        yield Servers(pg, nats)


class Writer:
    """Writes to keys of its own, so that it knows which row came last; `v` only grows."""

    def __init__(self, dsn: str, number: int, choose: random.Random, rows: int = ROWS, *, prepare: bool = True) -> None:
        self._rows = rows
        self._prepare = prepare
        self._dsn = dsn
        self._number = number
        self._choose = choose
        self._v = 1_000_000 + number
        self.done = 0
        self.ended = anyio.Event()

    def _next(self) -> int:
        self._v += WRITERS
        return self._v

    def _key(self) -> int:
        return self._choose.randrange(self._rows // WRITERS) * WRITERS + self._number

    def statement(self) -> str:
        """A change of one row or a few."""
        choose = self._choose
        table, key = choose.choice(list(TABLES)), self._key()
        here, v = KEYS[table].format(key), self._next()
        kind = choose.randrange(12)
        if kind < 3:
            return f"UPDATE {table} SET v = {v} WHERE {here}"
        if kind < 5:
            return f"UPDATE {table} SET v = {v}, body = {_body(choose)} WHERE {here}"
        if kind < 7:
            return f"DELETE FROM {table} WHERE {here}"
        if kind < 10:
            return (
                f"INSERT INTO {table} VALUES ({VALUES[table].format(key)}, {v}, {_body(choose)}) ON CONFLICT DO NOTHING"
            )
        to = self._key()
        there = KEYS[table].format(to)
        return (
            f"DELETE FROM {table} WHERE {there}; "
            f"UPDATE {table} SET {MOVES[table].format(to)}, v = {self._next()} WHERE {here}"
        )

    async def work(self, stop: anyio.Event) -> None:
        """Commit one transaction after another; `ended` says when the last one is."""
        async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
            while not stop.is_set():
                try:
                    await self._transaction(connection)
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    await connection.execute("ROLLBACK")
                self.done += 1
                await anyio.sleep(self._choose.uniform(0, 0.01))
        self.ended.set()

    async def _transaction(self, connection: psycopg.AsyncConnection[Any]) -> None:
        choose = self._choose
        await connection.execute("BEGIN")
        if choose.random() < 0.3:
            await connection.execute("SET LOCAL synchronous_commit = off")
        for _ in range(choose.choice([1, 1, 1, 2, 5])):
            if choose.random() < 0.15:
                await connection.execute("SAVEPOINT s")
                await connection.execute(self.statement())
                await connection.execute("ROLLBACK TO s")
            await connection.execute(self.statement())
            if choose.random() < 0.05:
                await anyio.sleep(choose.uniform(0, 0.4))
        if choose.random() < 0.003:
            await connection.execute("ROLLBACK; TRUNCATE " + choose.choice(list(TABLES)))
        elif self._prepare and choose.random() < 0.1:
            name = f"p{self._number}_{self.done}"
            await connection.execute(f"PREPARE TRANSACTION '{name}'")
            await anyio.sleep(choose.uniform(0, 0.2))
            await connection.execute(f"{choose.choice(['COMMIT', 'COMMIT', 'ROLLBACK'])} PREPARED '{name}'")
        else:
            await connection.execute(choose.choice(["COMMIT"] * 5 + ["ROLLBACK"]))


def _body(choose: random.Random) -> str:
    if choose.random() < 0.6:
        return f"repeat('{choose.randrange(10)}', 3000) || {choose.randrange(1000)}"
    return f"'{choose.randrange(1000)}'"


async def made(dsn: str, rows: int = ROWS) -> None:
    """The tables, each with so many rows."""
    large = [f"ALTER TABLE {table} ALTER body SET STORAGE EXTERNAL" for table in TABLES]
    parts = [
        f"CREATE TABLE parted_{n} PARTITION OF parted FOR VALUES WITH (MODULUS 3, REMAINDER {n})" for n in range(3)
    ]
    await execute(dsn, *TABLES.values(), *large, *parts)
    for table in TABLES:
        await execute(
            dsn,
            f"INSERT INTO {table} SELECT {VALUES[table].format('g')}, g, repeat('x', 2500) || g "
            f"FROM generate_series(0, {rows - 1}) g",
        )


class _Bridge:
    """A bridge in this process that can be stopped in order, and cancelled where it is."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stop = anyio.Event()
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    async def run(self, failed: Callable[[BaseException], None]) -> None:
        with self._scope:
            try:
                await run_bridge(self._config, list(self._config.stream.servers), self._stop)
            except Exception as error:  # noqa: BLE001 - told by whoever waits
                failed(error)
        self._ended.set()

    async def end(self, *, kill: bool) -> None:
        if kill:
            self._scope.cancel()
        self._stop.set()
        with anyio.fail_after(30):
            await self._ended.wait()


async def run(mine: Servers, plan: Plan) -> Outcome:
    """Run one seed; AssertionError where anything is not as it must be."""
    began, choose = time.monotonic(), random.Random(plan.seed)
    name = f"reading_{plan.seed}_{int(began * 1000)}"
    await execute(mine.pg.dsn(), f"CREATE DATABASE {name}")
    dsn, done = mine.pg.dsn(name), Counter[str]()
    config = source(dsn, mine.nats.url)
    await made(dsn)
    with (
        mock.patch.object(pace, "FIRST_UNKNOWN", plan.first), mock.patch.object(pace, "MOST", plan.first * 3),
        mock.patch.object(between, "PIECE", plan.rows_at_once),
    ):  # fmt: skip
        async with anyio.create_task_group() as tasks:
            errors: list[BaseException] = []
            bridge = _Bridge(config)
            tasks.start_soon(bridge.run, errors.append)
            await settled(config)
            stop = anyio.Event()
            writers = [Writer(dsn, n, random.Random(f"{plan.seed}/{n}")) for n in range(WRITERS)]
            for writer in writers:
                tasks.start_soon(writer.work, stop)
            for _ in range(plan.rounds):
                await _ask(config, choose)
                while plan.kills and choose.random() < 0.6:
                    await anyio.sleep(choose.uniform(0.05, 0.6))
                    kill = choose.random() < 0.7
                    await bridge.end(kill=kill)
                    done["kill" if kill else "stop"] += 1
                    bridge = _Bridge(config)
                    tasks.start_soon(bridge.run, errors.append)
                await _all_read(config, errors)
                done["round"] += 1
            await _ask(config, choose, everything=True)
            await _all_read(config, errors)
            stop.set()
            for writer in writers:
                await writer.ended.wait()
            await settled(config)
            await bridge.end(kill=False)
            assert not errors, errors
    found = await agrees(config)
    for table in TABLES:
        done["reads"] += never_back(found, table)
        _, rows = from_last_begin(found, table)
        await same(dsn, table, rows)
    done["transactions"] = sum(writer.done for writer in writers)
    await execute(dsn, f"SELECT pg_drop_replication_slot('{config.source.slot}')")
    await execute(mine.pg.dsn(), f"DROP DATABASE {name} WITH (FORCE)")
    return Outcome(len(found), done, time.monotonic() - began)


async def _ask(config: Config, choose: random.Random, *, everything: bool = False) -> None:
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        for table in TABLES:
            if everything or choose.random() < 0.7:
                await asking.ask(state, config.source.name, ("public", table))


async def _all_read(config: Config, errors: list[BaseException]) -> None:
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)

        async def none_left() -> bool:
            assert not errors, errors
            tables = await asking.tables(state, config.source.name)
            failed = {root: s.again for root, s in tables.items() if s.again is not None and s.again.state == "failed"}
            assert not failed, failed
            return all(status.again is None for status in tables.values())

        await _within(none_left)


async def _within(condition: Callable[[], Awaitable[bool]]) -> None:
    assert await until(condition, seconds=60, every=0.1), "the snapshots come to no end"
