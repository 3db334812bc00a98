"""Servers, backlogs, and the two that read a backlog in turn: the bridge and pg_recvlogical.

A backlog is one database with its rows, and as many slots at the same place before them as will be needed: one per run
for pg_recvlogical, one per run and mode for the bridge, each left behind by a bridge that was stopped. So the load is
written once, and everybody reads the same WAL.

What a start costs is no part of a rate. pg_recvlogical is measured from its first write to its end; the bridge between
the times at which the server stored the message after a twentieth of the rows and the one a twentieth before the last:
there its windows are full at both moments, so what it had read ahead at the first is what it has at the second.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import psycopg

from bench import processor
from bench.processor import Sampler
from bench.workloads import Workload
from bridge import config, configfile
from bridge.embedded import Keeper, NatsServer, Postgres, until
from bridge.embedded.nats import jetstream
from bridge.embedded.process import tail, throwaway_folder
from bridge.pipeline.run import run as bridge
from bridge.source import wal2json
from bridge.stream import server
from bridge.stream.mode import Publishing
from bridge.stream.server import Broker

ROOT = Path(__file__).resolve().parents[1]
POSTGRES = {
    "max_replication_slots": "100",
    "max_wal_senders": "100",
    "max_connections": "300",
    "max_locks_per_transaction": "256",
    "max_wal_size": "16GB",
    "autovacuum": "off",
}
STOPPED_WITHIN = 60.0
MARGIN = 0.05  # of the rows, at the start and at the end
LOOK_EVERY = 0.1  # often enough: the times of what happened count, not when it is seen
SLOWEST = 500  # rows a second below which a run is given up


class Mode(NamedTuple):
    """How the bridge publishes, and how often its nats-server syncs."""

    publish: Publishing
    sync: str


MODES = {"chain": Mode("chain", "2m"), "batch": Mode("batch", "always")}


class Backlog(NamedTuple):
    """A database, its rows, and where they end in the WAL."""

    database: str
    rows: int
    end: str


class Yard(NamedTuple):
    """One run of pg_recvlogical: rows a second, and the walsender's microseconds a row."""

    rate: float
    walsender: float


class Figures(NamedTuple):
    """One run of the bridge: rows a second, microseconds a row of each process, the bridge's largest RSS in MB, and
    the seconds from the start of its process to the first message."""

    rate: float
    walsender: float
    nats: float
    bridge: float
    rss: float
    start: float


class Ground:
    """The running servers of one measurement."""

    def __init__(self, pg: Postgres, servers: dict[str, NatsServer], keeper: Keeper, folder: Path) -> None:
        self.pg = pg
        self.servers = servers
        self.folder = folder
        self._keeper = keeper
        self._options: dict[str, str] = {}

    async def write(self, database: str, workload: Workload, runs: int) -> Backlog:
        """Make the database, its slots, and then its rows."""
        await self.create(database, workload.setup)
        async with self.sql(database) as sql:
            async with anyio.create_task_group() as tasks:
                for mode in self.servers:
                    for run in range(runs):
                        tasks.start_soon(self._prepare, sql, database, mode, run)
            mode = next(iter(self.servers))
            for run in range(runs):
                await sql.execute(
                    "SELECT pg_copy_logical_replication_slot(%s, %s)",
                    (f"bridge_{_name(database, mode, run)}", _yard(database, run)),
                )
            self._options = await _options(sql, _yard(database, 0))
            await sql.execute("SET synchronous_commit = off")
            await sql.execute(workload.load)
            end = (await (await sql.execute("SELECT pg_current_wal_insert_lsn()::text")).fetchone() or ("0/0",))[0]
            # Something behind the end, for which no table is needed: without it pg_recvlogical learns only from a
            # keepalive, at PostgreSQL's leisure, that it is there.
            await sql.execute("SELECT pg_logical_emit_message(true, 'bench', 'end')")
            await sql.execute("CHECKPOINT")
        return Backlog(database, workload.rows, end)

    async def empty(self, database: str, setup: list[str], mode: str) -> tuple[str, Path]:
        """A database, and the stream's name and settings of a bridge that only needs to be started."""
        await self.create(database, setup)
        async with self.sql(database) as sql:
            await self._prepare(sql, database, mode, 0)
        settings = self.settings(database, mode, 0)
        return configfile.load(settings, {}).stream.name, settings

    async def create(self, database: str, setup: list[str]) -> None:
        """Make a database with what these statements make in it."""
        async with self.sql("postgres") as sql:
            await sql.execute(f"CREATE DATABASE {database}")
        async with self.sql(database) as sql:
            for statement in setup:
                await sql.execute(statement)

    async def _prepare(self, sql: psycopg.AsyncConnection[Any], database: str, mode: str, run: int) -> None:
        """A slot, a stream and a checkpoint for one run, as a bridge that was stopped leaves them."""
        settings = configfile.load(self.settings(database, mode, run), {})
        stop = anyio.Event()

        async def streams() -> bool:
            found = await sql.execute(
                "SELECT FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid"
                " WHERE slot_name = %s AND state IN ('catchup', 'streaming')",
                (settings.source.slot,),
            )
            return await found.fetchone() is not None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bridge, settings, [self.servers[mode].url], stop)
            await until(streams, 120, f"a bridge streams from {settings.source.slot}")
            stop.set()

    async def recvlogical(self, backlog: Backlog, run: int) -> Yard:
        """pg_recvlogical reads its slot to the backlog's end into nothing, with the bridge's own options."""
        slot = _yard(backlog.database, run)
        command = [
            str(self.pg.bindir / "pg_recvlogical"), "-h", self.pg.host, "-p", str(self.pg.port), "-U", "postgres",
            "-d", backlog.database, "-S", slot, "--start", "--no-loop", "-f", "/dev/null", "--endpos", backlog.end,
            *(f"-o{name}={value}" for name, value in self._options.items()),
        ]  # fmt: skip
        sampler = Sampler()
        log = (self.folder / f"{slot}.log").open("wb")
        with log:
            process = await anyio.open_process(command, stdout=log, stderr=log)
        async with self.sql(backlog.database) as sql, process:
            await until(lambda: processor.has_written(process.pid), 600, "pg_recvlogical has read a record")
            sampler.watch("walsender", await _walsender(sql, slot))
            started = time.monotonic()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sampler.run)
                code = await process.wait()
                tasks.cancel_scope.cancel()
            seconds, ended = time.monotonic() - started, time.time_ns()
            if code != 0:
                raise RuntimeError(f"pg_recvlogical ended with code {code}: {tail(Path(log.name))}")
            await _dropped(sql, slot)
        whole = processor.extrapolated(sampler.samples["walsender"], ended)
        return Yard(backlog.rows / seconds, whole / backlog.rows * 1e6)

    async def bridge(self, backlog: Backlog, mode: str, run: int) -> Figures:
        """`python -m bridge` reads its slot until the stream has the backlog's rows."""
        settings = self.settings(backlog.database, mode, run)
        names = configfile.load(settings, {})
        stream, sampler = names.stream.name, Sampler()
        async with self.broker(mode) as broker, self.sql(backlog.database) as sql:
            before = await _last(broker, stream)
            async with self.running(settings) as pid, anyio.create_task_group() as tasks:
                spawned = time.time_ns()
                sampler.watch("bridge", pid)
                sampler.watch("nats", self.servers[mode].pid)
                sampler.watch("walsender", await _walsender(sql, names.source.slot))
                tasks.start_soon(sampler.run)
                await self.reached(broker, stream, before + backlog.rows)
                rss = processor.peak(pid)
                sampler.sample()
                tasks.cancel_scope.cancel()
            margin = int(backlog.rows * MARGIN)
            first, start, end = [
                await _stored(broker, stream, before + number) for number in (1, 1 + margin, backlog.rows - margin)
            ]
            await self.dropped(broker, stream, sql, names.source.slot)
        rows = backlog.rows - 1 - 2 * margin
        return Figures(
            rows / (end - start) * 1e9,
            # The walsender reads far ahead, and all that it does is done for these rows.
            walsender=sampler.samples["walsender"][-1].seconds / backlog.rows * 1e6,
            nats=processor.spent(sampler.samples["nats"], start, end) / rows * 1e6,
            bridge=processor.spent(sampler.samples["bridge"], start, end) / rows * 1e6,
            rss=rss,
            start=(first - spawned) / 1e9,
        )

    @asynccontextmanager
    async def running(self, settings: Path) -> AsyncIterator[int]:
        """`python -m bridge run` as a child; its pid. It is stopped in order at the end."""
        log = settings.with_suffix(".log")
        command = [sys.executable, "-m", "bridge", "--config", str(settings), "run"]
        pid = await self._keeper.spawn(command, cwd=ROOT, log=log)
        try:
            yield pid
        finally:
            # A cancelled scope needs no order: closing the keeper ends the child.
            self._keeper.signal(signal.SIGTERM)
            with anyio.move_on_after(STOPPED_WITHIN):
                await self._keeper.wait()

    async def reached(self, broker: Broker, stream: str, last: int) -> None:
        """Wait until the stream has the sequence; fails at once where the bridge has ended."""

        async def there() -> bool:
            return await _last(broker, stream) >= last

        await self.until(there, last - await _last(broker, stream), f"{last:,} messages are in {stream}")

    async def until(self, condition: Callable[[], Awaitable[bool]], rows: int, what: str) -> None:
        """Wait for what takes the bridge so many rows; fails at once where it has ended."""
        seconds = 60 + rows / SLOWEST
        deadline = time.monotonic() + seconds
        while not await condition():
            if not self._keeper.running:
                logs = "\n".join(tail(log) for log in self.folder.glob("*.log"))
                raise RuntimeError(f"the bridge ended with code {self._keeper.exit_code}\n{logs}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")
            await anyio.sleep(LOOK_EVERY)

    async def dropped(self, broker: Broker, stream: str, sql: psycopg.AsyncConnection[Any], slot: str) -> None:
        """Remove the stream and the slot of a bridge that was stopped."""
        await broker.api(f"STREAM.DELETE.{stream}")
        await _dropped(sql, slot)

    @asynccontextmanager
    async def broker(self, mode: str) -> AsyncIterator[Broker]:
        """A connection to the mode's nats-server."""
        url = self.servers[mode].url
        async with server.connect(config.Stream(servers=[url]), [url], name="bench") as broker:
            yield broker

    @asynccontextmanager
    async def sql(self, database: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection to the database, each statement its own transaction."""
        async with await psycopg.AsyncConnection.connect(self.pg.dsn(database), autocommit=True) as connection:
            yield connection

    def settings(self, database: str, mode: str, run: int, *, snapshot: str = "never") -> Path:
        """The settings of one run's bridge; with another `snapshot` than "never" it has a name of its own, too."""
        name = _name(database, mode, run) + ("" if snapshot == "never" else f"_{snapshot}")
        file = self.folder / f"{name}.toml"
        file.write_text(
            f'[source]\nname = "{name}"\ndsn = "{self.pg.dsn(database)}"\n'
            f'[stream]\nservers = ["{self.servers[mode].url}"]\n'
            f'sync = "{MODES[mode].sync}"\npublish = "{MODES[mode].publish}"\n[snapshot]\nmode = "{snapshot}"\n'
        )
        return file


@asynccontextmanager
async def ground(modes: list[str]) -> AsyncIterator[Ground]:
    """A PostgreSQL and one nats-server per mode; all gone at the end, whatever ends it."""
    async with AsyncExitStack() as stack:
        pg = await stack.enter_async_context(Postgres.throwaway(settings=POSTGRES))
        servers = {mode: await stack.enter_async_context(_nats(MODES[mode].sync)) for mode in modes}
        folder = throwaway_folder()
        keeper = Keeper(folder)
        stack.push_async_callback(keeper.close)
        yield Ground(pg, servers, keeper, folder)


@asynccontextmanager
async def _nats(sync: str) -> AsyncIterator[NatsServer]:
    home = throwaway_folder()
    store = home / "store"
    async with NatsServer(home, Keeper(home), store, settings={"jetstream": jetstream(store, sync)}) as running:
        yield running


def _name(database: str, mode: str, run: int) -> str:
    return f"{database}_{mode}{run}"


def _yard(database: str, run: int) -> str:
    return f"yard_{database}{run}"


async def _options(sql: psycopg.AsyncConnection[Any], slot: str) -> dict[str, str]:
    """The options that the bridge gives this server's wal2json."""
    exact = {wal2json.NUMERIC_AS_STRING: "1"}
    with contextlib.suppress(psycopg.errors.InvalidParameterValue):
        await sql.execute(
            "SELECT FROM pg_logical_slot_peek_changes(%s, NULL, 1, VARIADIC %s::text[])",
            (slot, [part for option in (wal2json.OPTIONS | exact).items() for part in option]),
        )
        return wal2json.OPTIONS | exact
    return wal2json.OPTIONS


async def _walsender(sql: psycopg.AsyncConnection[Any], slot: str) -> int:
    """The pid of the process that serves the slot, once there is one."""
    pids: list[int] = []

    async def there() -> bool:
        found = await sql.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (slot,))
        pids[:] = [row[0] for row in await found.fetchall() if row[0]]
        return bool(pids)

    await until(there, 60, f"somebody reads the slot {slot}")
    return pids[0]


async def _dropped(sql: psycopg.AsyncConnection[Any], slot: str) -> None:
    async def free() -> bool:
        found = await sql.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (slot,))
        return await found.fetchone() == (None,)

    await until(free, 60, f"nobody reads the slot {slot}")
    await sql.execute("SELECT pg_drop_replication_slot(%s)", (slot,))


async def _last(broker: Broker, stream: str) -> int:
    state = await broker.stream(stream)
    return state.last_seq if state is not None else 0


async def _stored(broker: Broker, stream: str, seq: int) -> int:
    """When the server stored the message, in nanoseconds since 1970."""
    return nanoseconds((await broker.api(f"STREAM.MSG.GET.{stream}", {"seq": seq}))["message"]["time"])


def nanoseconds(text: str) -> int:
    """A time of the server's ("2026-01-01T00:00:00.123456789Z", up to nine digits) in nanoseconds since 1970."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 10**9 + int(f"{fraction:0<9}"[:9] or 0)
