"""How long a committed transaction takes until its message is stored, at a steady rate of one-row transactions.

pgbench commits at that rate (Poisson, eight clients, synchronous_commit=on, fsync on) while the bridge streams. For
each transaction it is the time at which the server stored the message, less the event's `committed_at`: PostgreSQL's
time in the commit record, taken before the WAL is flushed, so it holds the commit's own fsync. All is of one host's
clock. The yardstick is how long INSERT and COMMIT took the client in the same run.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import anyio

from bench import workloads
from bench.ground import Ground, ground, nanoseconds
from bench.result import Result, quantile, result
from bridge import configfile, event
from bridge.stream import reader, subjects
from bridge.stream.server import Broker

RATES = (100, 500, 2000)
SECONDS = 10.0
SHORTEST = 2.0
WARM_UP = 1.0
CLIENTS = 8
DATABASE = "latency"
REACHED = 0.9  # of the wanted rate; below, which no chance explains, the row says so


class Ticks(NamedTuple):
    """Where transactions are committed, and where the bridge stores their events."""

    database: str
    stream: str
    subject: str


class Times(NamedTuple):
    """One run: milliseconds in order from commit to stored and of the commits themselves; transactions a second."""

    stored: list[float]
    commits: list[float]
    rate: float


async def measure(mode: str, rates: list[int], runs: int, scale: float) -> list[Result]:
    """p50 and p99 at each rate, all with one bridge that keeps running."""
    times: dict[int, list[Times]] = {rate: [] for rate in rates}
    async with ground([mode]) as here, here.broker(mode) as broker:
        _, settings = await here.empty(DATABASE, [workloads.TICKS], mode)
        ticks = ticks_of(DATABASE, settings)
        async with here.running(settings):
            await committing(here, broker, ticks, 50, WARM_UP, 0)
            for run in range(runs):
                for rate in rates:
                    times[rate].append(await committing(here, broker, ticks, rate, seconds_of(scale), run))
    return [found for rate in rates for found in results(f"latency.{mode}.{rate}", rate, times[rate])]


def seconds_of(scale: float) -> float:
    """How long a run is, without its warm-up."""
    return max(SECONDS * scale, SHORTEST)


def ticks_of(database: str, settings: Path) -> Ticks:
    """The ticks of a bridge with these settings."""
    names = configfile.load(settings, {})
    subject = subjects.table_subject(names.stream.prefix, names.source.name, "public", "ticks")
    return Ticks(database, names.stream.name, subject)


def results(row: str, wanted: int, times: list[Times]) -> list[Result]:
    """p50 and p99 of the runs at a rate."""
    slowest = min(found.rate for found in times)
    note = "" if slowest >= wanted * REACHED else f"; only {slowest:,.0f} tx/s were reached"
    return [
        result(
            f"{row}.p{percent}",
            f"ms from commit to stored ÷ ms of INSERT and COMMIT{note}",
            [quantile(found.stored, percent / 100) for found in times],
            [quantile(found.commits, percent / 100) for found in times],
        )
        for percent in (50, 99)
    ]


async def committing(here: Ground, broker: Broker, ticks: Ticks, rate: int, seconds: float, run: int) -> Times:
    """Commit transactions at a rate for so many seconds behind the warm-up, and wait until all are stored."""
    state = await broker.stream(ticks.stream)
    before = state.last_seq if state is not None else 0
    known = await _count(broker, ticks)
    log = here.folder / f"pgbench-{rate}-{run}-{before}"
    await _pgbench(here, ticks.database, rate, seconds + WARM_UP, log)
    # The log's first transactions are the warm-up's; what follows is counted in both.
    lines = [line for file in log.parent.glob(f"{log.name}.*") for line in file.read_text().splitlines()]

    async def stored() -> bool:
        return await _count(broker, ticks) >= known + len(lines)

    await here.until(stored, len(lines), f"{known + len(lines):,} ticks are in {ticks.stream}")
    waits = []
    async for batch in reader.read(broker, ticks.stream, subjects=[ticks.subject], start=before + 1):
        waits += [(committed_at(message.data), message.at) for message in batch]
    return Times(
        sorted(warm([(at, (stored_at - at) / 1e6) for at, stored_at in waits])),
        sorted(warm(commits(lines))),
        len(lines) / (seconds + WARM_UP),
    )


async def _count(broker: Broker, ticks: Ticks) -> int:
    return (await broker.subjects(ticks.stream, ticks.subject)).get(ticks.subject, 0)


def warm(times: Iterable[tuple[int, float]]) -> list[float]:
    """The values whose time, in nanoseconds, is at least the warm-up after the first."""
    known = list(times)
    start = min((at for at, _ in known), default=0) + int(WARM_UP * 1e9)
    return [value for at, value in known if at >= start]


def committed_at(payload: bytes) -> int:
    """The event's time of commit in nanoseconds since 1970."""
    return nanoseconds(event.decode(payload).committed_at or "")


def commits(lines: Iterable[str]) -> list[tuple[int, float]]:
    """(end in nanoseconds since 1970, milliseconds without the wait for its turn) of each line of a pgbench log.

    Source: PostgreSQL documentation, pgbench, "Per-Transaction Logging"; with --rate a line's time counts from when
    the transaction was due, and its last field is how late it began.
    """
    found = []
    for line in lines:
        _, _, elapsed, _, second, microsecond, lag = line.split()[:7]
        at = int(second) * 10**9 + int(microsecond) * 1000
        found.append((at, (int(elapsed) - int(lag)) / 1000))
    return found


async def _pgbench(here: Ground, database: str, rate: int, seconds: float, log: Path) -> None:
    script = here.folder / "tick.sql"
    script.write_text(workloads.TICK)
    command = [
        str(here.pg.bindir / "pgbench"), "-h", here.pg.host, "-p", str(here.pg.port), "-U", "postgres", "-n",
        "-M", "prepared", "-c", str(CLIENTS), "-j", "1", "-T", str(round(seconds)), "-R", str(rate),
        "-l", "--log-prefix", str(log), "-f", str(script), database,
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    await anyio.run_process(command, env=env, stdout=subprocess.DEVNULL)
