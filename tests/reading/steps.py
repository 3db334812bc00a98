"""What tests do with a table that is read while its changes stream: ask for it, hold it, wait, and judge the log.

ask(config, "t")        as `bridge snapshot public.t`
again(config, state=…)  waits until what is asked for has such values
read_again(config)      waits until nothing is asked for any more
held(…)                 stops a reading at a chunk
judged(config, dsn)     compares log and tables
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from bridge.config import Config
from bridge.pipeline import pace, passing, reading
from bridge.pipeline.rewrites import Rewrites
from bridge.stream import asking
from bridge.stream.state import Again, SnapshotStatus
from bridge.waiting import until
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, never_back, same
from tests.running import state_of

WIDE = "CREATE TABLE t (id int PRIMARY KEY, v bigint NOT NULL, body text)"
EXTERNAL = "ALTER TABLE t ALTER body SET STORAGE EXTERNAL"
ROWS = "INSERT INTO t SELECT g, g, repeat('x', 3000) || g FROM generate_series(1, 300) g"


def chunks_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Every chunk has so many rows; a server on which nothing else happens is not waited for."""
    for name in ("FIRST_UNKNOWN", "FIRST_MOST", "MOST"):
        monkeypatch.setattr(pace, name, rows)
    monkeypatch.setattr(passing, "PATIENCE", 0.01)


async def ask(config: Config, table: str = "t", where: str = "") -> None:
    async with state_of(config) as state:
        await asking.ask(state, config.source.name, ("public", table), where=where)


async def status(config: Config, table: str = "t") -> SnapshotStatus:
    async with state_of(config) as state:
        return (await asking.tables(state, config.source.name))["public", table]


async def again(config: Config, table: str = "t", **wanted: Any) -> Again:
    """Waits until what is asked for has such values."""
    found: list[Again | None] = [None]

    async def so() -> bool:
        found[0] = (await status(config, table)).again
        return found[0] is not None and all(getattr(found[0], name) == value for name, value in wanted.items())

    assert await until(so, seconds=20, every=0.02), found
    assert found[0] is not None
    return found[0]


async def read_again(config: Config, table: str = "t", seconds: float = 30) -> SnapshotStatus:
    """Waits until nothing is asked for any more."""
    found: list[SnapshotStatus] = []

    async def done() -> bool:
        found[:] = [await status(config, table)]
        return found[0].again is None

    assert await until(done, seconds=seconds), found
    return found[0]


async def judged(config: Config, dsn: str, table: str = "t") -> int:
    """Asserts that no key goes back, and that who begins at the last snapshot has all; how many rows were read."""
    found = await agrees(config)
    _, rows = from_last_begin(found, table)
    await same(dsn, table, rows)
    return never_back(found, table)


@asynccontextmanager
async def held(
    monkeypatch: pytest.MonkeyPatch, point: str, nth: int = 1
) -> AsyncIterator[tuple[anyio.Event, anyio.Event]]:
    """Stops a reading at a failpoint until the second event is set; the first tells that it is there."""
    there, on = anyio.Event(), anyio.Event()
    count = 0
    publish = reading.Reading._publish

    async def waiting(self: reading.Reading, sql: Any, chunk: Any) -> None:
        nonlocal count
        count += 1
        if point == "read" and count == nth:
            there.set()
            await on.wait()
        await publish(self, sql, chunk)
        if point == "published" and count == nth:
            there.set()
            await on.wait()

    monkeypatch.setattr(reading.Reading, "_publish", waiting)
    yield there, on


def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but the readings themselves sees what is altered, as where it happens just before the watch looks."""

    async def never(_: Rewrites) -> None:
        await anyio.sleep_forever()

    async def at_once(_: Rewrites) -> None:
        return

    monkeypatch.setattr(Rewrites, "run", never)
    monkeypatch.setattr(Rewrites, "settled", at_once)
