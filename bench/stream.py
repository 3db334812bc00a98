"""How fast changes get from PostgreSQL into the stream, against `pg_recvlogical -f /dev/null` over the same WAL.

The bridge makes one slot per run beforehand; then the load is written once, and bridge and pg_recvlogical read it in
turn, each from a slot of its own at the same place. The bridge's rate comes from the times at which the server stored
the first and the last message; pg_recvlogical's from its whole run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import psycopg

from bench.result import Result, result
from bridge import config
from bridge.embedded import NatsServer, Postgres, until
from bridge.source import wal2json
from bridge.stream import server

RUNS = 3
TABLE = """
CREATE TABLE messages (id bigint PRIMARY KEY, list_id int NOT NULL, author text NOT NULL, subject text NOT NULL,
    body text NOT NULL, posted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    score numeric(10,2), spam bool NOT NULL)
"""
LOAD = """
CREATE PROCEDURE load(total int, per int) LANGUAGE plpgsql AS $$
BEGIN
    FOR chunk IN 0 .. total / per - 1 LOOP
        INSERT INTO messages SELECT chunk * per + n, n % 100, 'author ' || n % 1000, 'Re: subject number ' || n,
            repeat('Some words of a message that people wrote. ', 12), now(), n % 1000 / 7.0, n % 50 = 0
        FROM generate_series(1, per) n;
        COMMIT;
    END LOOP;
END $$
"""


async def measure(row: str, *, rows: int, per_transaction: int) -> list[Result]:
    """Rows a second of the bridge over those of pg_recvlogical, and the bridge's memory and processor time."""
    async with Postgres.throwaway() as pg, NatsServer.throwaway() as nats, _folder() as folder:
        async with await psycopg.AsyncConnection.connect(pg.dsn(), autocommit=True) as sql:
            await sql.execute(TABLE)
            await sql.execute(LOAD)
            for run in range(RUNS):
                await _prepared(_settings(folder, pg, nats, run), run)
                await sql.execute(f"SELECT pg_copy_logical_replication_slot('bridge_b{run}', 'yard{run}')")
            await sql.execute("SET synchronous_commit = off")
            await sql.execute(f"CALL load({rows}, {per_transaction})")
            end = (await (await sql.execute("SELECT pg_current_wal_flush_lsn()::text")).fetchone() or ("0/0",))[0]
        rates, yardsticks, cpus, peaks = [], [], [], []
        for run in range(RUNS):
            yardsticks.append(rows / await _recvlogical(pg, f"yard{run}", end))
            seconds, cpu, peak = await _bridge(_settings(folder, pg, nats, run), nats, rows)
            rates.append(rows / seconds)
            cpus.append(cpu / rows * 1e6)
            peaks.append(peak)
    return [
        result(row, "rows/s ÷ pg_recvlogical -f /dev/null", rates, yardsticks),
        result(f"{row}.cpu", "µs of the bridge's processor time a row", cpus),
        result(f"{row}.rss", "MB, the bridge's largest resident set", peaks),
    ]


@asynccontextmanager
async def _folder() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bridge-bench-") as folder:
        yield Path(folder)


def _settings(folder: Path, pg: Postgres, nats: NatsServer, run: int) -> Path:
    file = folder / f"b{run}.toml"
    file.write_text(
        f'[source]\nname = "b{run}"\ndsn = "{pg.dsn()}"\n'
        f'[stream]\nservers = ["{nats.url}"]\nsync = "always"\n[snapshot]\nmode = "never"\n'
    )
    return file


@asynccontextmanager
async def _running(settings: Path) -> AsyncIterator[anyio.abc.Process]:
    log = settings.with_suffix(".log")
    with log.open("wb") as out:
        process = await anyio.open_process(
            [sys.executable, "-m", "bridge", "--config", str(settings), "run"], stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _prepared(settings: Path, run: int) -> None:
    """A slot and a checkpoint for one run, as a bridge that was stopped leaves them."""
    async with _running(settings):
        log = settings.with_suffix(".log")
        await until(lambda: "streaming" in log.read_text(), 30, f"the bridge b{run} streams")


async def _recvlogical(pg: Postgres, slot: str, end: str) -> float:
    """Seconds that pg_recvlogical takes to read the slot up to `end` into nothing, with the bridge's own options."""
    options = wal2json.OPTIONS
    command = [
        "pg_recvlogical", "-h", pg.host, "-p", str(pg.port), "-U", "postgres", "-d", "postgres", "-S", slot,
        "--start", "-f", "/dev/null", "--endpos", end, *(f"-o{name}={value}" for name, value in options.items()),
    ]  # fmt: skip
    program = pg.bindir / "pg_recvlogical"
    started = time.monotonic()
    await anyio.run_process([str(program), *command[1:]])
    return time.monotonic() - started


async def _bridge(settings: Path, nats: NatsServer, rows: int) -> tuple[float, float, float]:
    """(seconds between the first and the last message, the bridge's processor seconds, its peak memory in MB)."""
    stream = config.load(settings, {}).stream
    async with server.connect(stream, [nats.url]) as broker, _running(settings) as process:

        async def there() -> bool:
            state = await broker.stream(stream.name)
            return state is not None and state.messages >= rows

        await until(there, 120, f"{rows:,} messages are in {stream.name}")
        cpu, peak = _usage(process.pid)
        info = await broker.api(f"STREAM.INFO.{stream.name}")
        return _seconds(info["state"]), cpu, peak


def _seconds(state: Any) -> float:
    first, last = (_nanoseconds(state[key]) for key in ("first_ts", "last_ts"))
    return (last - first) / 1e9


def _nanoseconds(text: str) -> int:
    """A time of the server's with nine digits of fraction, in nanoseconds."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 10**9 + int(f"{fraction:0<9}"[:9] or 0)


def _usage(pid: int) -> tuple[float, float]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return ticks / os.sysconf("SC_CLK_TCK"), peak / 1024
