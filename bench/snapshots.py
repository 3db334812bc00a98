"""How fast a table's rows get into the stream, what that costs, and what it does to what streams meanwhile.

The table is that of `stream.chain.tx1000`. Per run the bridge first streams its rows, from a slot made before they were
written; then one of its own name takes an initial snapshot of them, and goes on to an incremental one, asked for as
`bridge snapshot` asks; then a publisher alone stores the very messages of the first initial snapshot, from memory.

An initial snapshot is measured from the moment at which its table's turn comes, just before its first row is read,
until the checkpoint says that all is in the stream: making the slot comes before that. An incremental one lasts from
its begin marker until the state bucket has it as done. These are the product's own times, from the state bucket.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio

from bench import latency, processor, stream, workloads
from bench.ground import MODES, Ground, ground, nanoseconds
from bench.processor import Sampler
from bench.result import Result, result
from bridge import configfile
from bridge.stream import asking, definition, reader, subjects
from bridge.stream.publisher import Publisher
from bridge.stream.server import Broker
from bridge.stream.state import Checkpoint, SnapshotStatus, State
from bridge.stream.tail import Tail

MODE = "chain"
DATABASE = "messages"
TABLE = ("public", "messages")
SIZE = "tx1000"
SMALLEST = 0.05  # of the scale; below, a server uses less processor time than /proc counts
INITIAL, LIMIT, INCREMENTAL = "snapshot.initial", "snapshot.limit", "snapshot.incremental"
MEMORY = "rss.snapshot"
LONG = 3_000_000
PART = 10  # of the long table, one row in so many is read by an incremental snapshot
RATES = (200,)
OTHER, FEWEST = 500_000, 50_000  # rows of the table that is read while transactions are timed


class Taken(NamedTuple):
    """One snapshot, or what stands in its place: rows a second, and microseconds of a processor a row."""

    rate: float
    postgres: float
    nats: float
    bridge: float


class Runs(NamedTuple):
    """What has been measured of each, run by run."""

    streamed: list[float]
    initial: list[Taken]
    incremental: list[Taken]
    published: list[Taken]


class Ready(NamedTuple):
    """One message, as a publisher takes it."""

    subject: bytes
    op: bytes
    position: bytes
    payload: bytes


class Place:
    """A bridge's names, and what it says of itself."""

    def __init__(self, here: Ground, broker: Broker, state: State, settings: Path) -> None:
        self.config = configfile.load(settings, {})
        self.settings = settings
        self._here = here
        self._broker = broker
        self._state = state

    @classmethod
    async def of(cls, here: Ground, broker: Broker, settings: Path) -> Place:
        """The place of a bridge with these settings."""
        state = await State.open(broker, configfile.load(settings, {}).state.bucket)
        return cls(here, broker, state, settings)

    async def ask(self, where: str = "") -> None:
        """Ask for the table to be read while the stream flows."""
        await asking.ask(self._state, self.config.source.name, TABLE, where=where)

    async def status(self) -> SnapshotStatus:
        """What the bucket has of the table's snapshot."""
        key = subjects.snapshot_key(self.config.source.name, *TABLE)
        found = await self._state.get(key, SnapshotStatus)
        return found[0] if found is not None else SnapshotStatus(state="waiting")

    async def initial(self, rows: int) -> tuple[int, int]:
        """Wait for the initial snapshot of so many rows; its beginning and end in nanoseconds since 1970."""
        ended: list[int] = []

        async def done() -> bool:
            found = await self._state.get(subjects.checkpoint_key(self.config.source.name), Checkpoint)
            if found is not None and found[0].phase == "stream":
                ended.append(nanoseconds(found[0].at))
            return bool(ended)

        await self._here.until(done, rows, "the initial snapshot is done")
        status = await self.status()
        self._check(status, rows)
        return nanoseconds(status.started_at), ended[0]

    async def incremental(self, rows: int) -> tuple[int, int]:
        """Wait for the incremental snapshot that was asked for; as `initial`."""
        await self.read(rows)
        status = await self.status()
        self._check(status, rows)
        return nanoseconds(status.started_at), nanoseconds(status.finished_at)

    async def read(self, rows: int) -> None:
        """Wait until nothing is asked for any more."""

        async def done() -> bool:
            found = await self.status()
            if found.again is not None and not found.again.under_way:
                raise RuntimeError(f"the snapshot is {found.again.state}: {found.again.why}")
            return found.again is None

        await self._here.until(done, rows, "the incremental snapshot is done")

    def _check(self, status: SnapshotStatus, rows: int) -> None:
        if (status.state, status.rows) != ("done", rows):
            raise RuntimeError(f"the snapshot is {status.state} with {status.rows:,} rows of {rows:,}")


async def measure(rows: list[str], runs: int, scale: float) -> list[Result]:
    """Rates and processor times of what is wanted, all of the same rows."""
    load = stream.SIZES[SIZE](max(scale, SMALLEST))
    found = Runs([], [], [], [])
    ready: list[Ready] = []
    async with ground([MODE]) as here:
        backlog = None
        if INITIAL in rows:
            backlog = await here.write(DATABASE, load, runs)
            async with here.sql(DATABASE) as sql:
                for statement in workloads.SETTLE:
                    await sql.execute(statement)
        else:
            await here.create(DATABASE, load.settled)
        for run in range(runs):
            if backlog is not None:
                found.streamed.append((await here.bridge(backlog, MODE, run)).rate)
            await _snapshots(here, run, load.rows, found, ready, rows)
            if LIMIT in rows:
                found.published.append(await _publish(here, ready))
    return results(found, rows)


def results(found: Runs, rows: list[str]) -> list[Result]:
    """Of the runs, what belongs to the wanted rows."""
    every: list[Result] = []
    rates = [one.rate for one in found.initial]
    if INITIAL in rows:
        unit = "rows/s of the initial snapshot ÷ of streaming the same rows in transactions of 1,000"
        every += [result(INITIAL, unit, rates, found.streamed), *_costs(INITIAL, found.initial)]
    if LIMIT in rows:
        unit = "rows/s of the initial snapshot ÷ of storing its messages from memory"
        every += [
            result(LIMIT, unit, rates, [one.rate for one in found.published]),
            result(f"{LIMIT}.cpu.nats", "µs of processor a message from memory", [p.nats for p in found.published]),
            result(
                f"{LIMIT}.cpu.publisher", "µs of processor a message from memory", [p.bridge for p in found.published]
            ),
        ]
    if INCREMENTAL in rows:
        unit = "rows/s of an incremental snapshot, nothing else streaming ÷ of the initial one"
        read = found.incremental
        every += [result(INCREMENTAL, unit, [one.rate for one in read], rates), *_costs(INCREMENTAL, read)]
    return every


def _costs(row: str, taken: list[Taken]) -> list[Result]:
    cost = "µs of processor a row"
    return [
        result(f"{row}.cpu.postgres", cost, [one.postgres for one in taken]),
        result(f"{row}.cpu.nats", cost, [one.nats for one in taken]),
        result(f"{row}.cpu.bridge", cost, [one.bridge for one in taken]),
        result(
            f"{row}.bound",
            "rows/s that these processor times allow two idle processors",
            [stream.bound(one.postgres, one.nats, one.bridge) for one in taken],
        ),
    ]


async def _snapshots(here: Ground, run: int, rows: int, found: Runs, ready: list[Ready], wanted: list[str]) -> None:
    """One bridge's initial snapshot and what else is wanted of it; `ready` gets its messages, if it has none yet."""
    settings = here.settings(DATABASE, MODE, run, snapshot="initial")
    async with here.broker(MODE) as broker:
        place = await Place.of(here, broker, settings)
        name = place.config.stream.name
        async with here.running(settings) as pid, _sampling(here, pid) as sampler:
            found.initial.append(_taken(sampler, rows, await place.initial(rows)))
            if INCREMENTAL in wanted:
                await place.ask()
                found.incremental.append(_taken(sampler, rows, await place.incremental(rows)))
        if LIMIT in wanted and not ready:
            async for batch in reader.read(broker, name, subjects=[">"], last=rows + 2):
                ready += [Ready(m.subject.encode(), m.op.encode(), m.position.encode(), m.data) for m in batch]
        async with here.sql(DATABASE) as sql:
            await here.dropped(broker, name, sql, place.config.source.slot)


@asynccontextmanager
async def _sampling(here: Ground, pid: int) -> AsyncIterator[Sampler]:
    sampler = Sampler()
    sampler.watch("bridge", pid)
    sampler.watch("nats", here.servers[MODE].pid)
    sampler.watch("postgres", here.pg.pid, family=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sampler.run)
        yield sampler
        tasks.cancel_scope.cancel()


def _taken(sampler: Sampler, rows: int, times: tuple[int, int]) -> Taken:
    sampler.sample()
    start, end = times
    costs = {name: processor.spent(samples, start, end) / rows * 1e6 for name, samples in sampler.samples.items()}
    return Taken(rows / (end - start) * 1e9, **costs)


async def _publish(here: Ground, ready: list[Ready]) -> Taken:
    """Store these messages in an empty stream like theirs, by the bridge's own publisher in this process."""
    config = configfile.load(here.settings(DATABASE, MODE, 0, snapshot="initial"), {})
    wanted = subjects.source_subjects(config.stream.prefix, config.source.name)
    async with here.broker(MODE) as broker:
        await definition.ensure_stream(broker, config.stream, wanted)
        publisher = Publisher(broker, config.stream.name, 1, Tail(0, "", 0), MODES[MODE].publish)
        await publisher.open()
        before = time.monotonic(), processor.used(here.servers[MODE].pid), time.process_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publisher.watch)
            for one in ready:
                publisher.add(*one)
                if publisher.full:
                    await publisher.room()
            await publisher.drain()
            tasks.cancel_scope.cancel()
        after = time.monotonic(), processor.used(here.servers[MODE].pid), time.process_time()
        await broker.api(f"STREAM.DELETE.{config.stream.name}")
    seconds, nats, ours = (now - was for now, was in zip(after, before, strict=True))
    return Taken(len(ready) / seconds, 0.0, nats / len(ready) * 1e6, ours / len(ready) * 1e6)


async def memory(runs: int, scale: float) -> list[Result]:
    """The bridge's largest resident set while it takes a long initial snapshot, and of one that reads a part of the
    table while the stream flows."""
    load = workloads.messages(int(LONG * scale), 1000)
    part = load.rows // PART
    whole, incremental = list[float](), list[float]()
    async with ground([MODE]) as here, here.broker(MODE) as broker:
        await here.create(DATABASE, load.settled)
        for run in range(runs):
            place = await Place.of(here, broker, here.settings(DATABASE, MODE, run, snapshot="initial"))
            async with here.running(place.settings) as pid:
                await place.initial(load.rows)
                whole.append(processor.peak(pid))
            # Another process, with a peak of its own.
            async with here.running(place.settings) as pid:
                await place.ask(f"id <= {part}")
                await place.read(part)
                incremental.append(processor.peak(pid))
                # With a begin and an end around the first.
                await here.reached(broker, place.config.stream.name, load.rows + part + 2)
            async with here.sql(DATABASE) as sql:
                await here.dropped(broker, place.config.stream.name, sql, place.config.source.slot)
    unit = "MB, the bridge's largest resident set during"
    return [
        result(MEMORY, f"{unit} an initial snapshot of {load.rows:,} rows", whole),
        result(f"{MEMORY}.incremental", f"{unit} an incremental snapshot of {part:,} rows", incremental),
    ]


async def delay(rates: list[int], runs: int, scale: float) -> list[Result]:
    """As `latency.measure`, while another table of the same database is read again and again."""
    load = workloads.messages(max(int(OTHER * scale), FEWEST), 1000)
    times: dict[int, list[latency.Times]] = {rate: [] for rate in rates}
    read: dict[int, list[float]] = {rate: [] for rate in rates}
    async with ground([MODE]) as here, here.broker(MODE) as broker:
        _, settings = await here.empty(DATABASE, [workloads.TICKS, *load.settled], MODE)
        place, ticks = await Place.of(here, broker, settings), latency.ticks_of(DATABASE, settings)
        async with here.running(settings), anyio.create_task_group() as tasks:
            await latency.committing(here, broker, ticks, 50, latency.WARM_UP, 0)
            tasks.start_soon(_again, place, load.rows)
            await here.until(lambda: _begun(place), 0, "the table is being read")
            for run in range(runs):
                for rate in rates:
                    before, started = await _rows(broker, ticks), time.monotonic()
                    times[rate].append(
                        await latency.committing(here, broker, ticks, rate, latency.seconds_of(scale), run)
                    )
                    read[rate].append((await _rows(broker, ticks) - before) / (time.monotonic() - started))
            tasks.cancel_scope.cancel()
    unit = "rows/s that the snapshot read meanwhile"
    return [
        one
        for rate in rates
        for row in [f"latency.snapshot.{rate}"]
        for one in [*latency.results(row, rate, times[rate]), result(f"{row}.rows", unit, read[rate])]
    ]


async def _again(place: Place, rows: int) -> None:
    """Ask for the table to be read, each time that it has been."""
    while True:
        await place.ask()
        await place.read(rows)


async def _begun(place: Place) -> bool:
    again = (await place.status()).again
    return again is not None and again.rows > 0


async def _rows(broker: Broker, ticks: latency.Ticks) -> int:
    """How many messages of other tables than the ticks' the stream has."""
    found = await broker.subjects(ticks.stream, ">")
    return sum(count for subject, count in found.items() if subject != ticks.subject)
