"""How long a committed transaction takes until its document can be read, at a steady rate of one-row transactions.

Clients in this process insert a post each at random times around that rate. From when COMMIT has returned, one poller
asks for all that are not there yet in one realtime `_mget` (the GET by id of several documents), at most every two
milliseconds: what it asks for may be read, whether or not searches see it. The yardstick is how long INSERT and COMMIT
took the client.
"""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

import anyio
import msgspec
import psycopg
from anyio.streams.memory import MemoryObjectReceiveStream

from bench.latency import warm
from bench.result import Result, quantile, result
from bench.whole import CLIENTS, INSERT, Whole, built, searching, whole
from bridge.index.engine import Engine

RATES = (100,)
SECONDS = 20.0
SHORTEST = 2.0
WARM_UP = 1.0
EVERY = 0.002
LONGEST = 60.0
REACHED = 0.9
NAME = "posts"


class _Found(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    found: bool = False


class _Answer(msgspec.Struct):
    docs: list[_Found]


class Times(NamedTuple):
    """One run: milliseconds in order from commit to readable and of the commits themselves; transactions a second."""

    readable: list[float]
    commits: list[float]
    rate: float


class Waiting:
    """What was committed and cannot be read yet, and what has been found. Times are nanoseconds."""

    def __init__(self) -> None:
        self.committed: dict[str, int] = {}
        self.readable: list[tuple[int, float]] = []
        self.commits: list[tuple[int, float]] = []
        self.over = False

    def commit(self, number: int, began: int, ended: int) -> None:
        """A transaction that inserted a post."""
        self.committed[str(number)] = ended
        self.commits.append((ended, (ended - began) / 1e6))

    def see(self, number: str, at: int) -> None:
        """A document that was there when an answer came in."""
        committed = self.committed.pop(number)
        self.readable.append((committed, (at - committed) / 1e6))


async def measure(rates: list[int], runs: int, scale: float) -> list[Result]:
    """p50 and p99 at each rate, with one bridge and one index reader that keep running."""
    times: dict[int, list[Times]] = {rate: [] for rate in rates}
    async with whole([NAME], 1_000) as here, here.running("index", NAME) as reader, searching(here, NAME) as engine:
        await built(engine, NAME, reader, 120)
        await _run(here, engine, 50, WARM_UP)
        for _ in range(runs):
            for rate in rates:
                times[rate].append(await _run(here, engine, rate, max(SECONDS * scale, SHORTEST)))
                reader.check()
    return [found for rate in rates for found in _results(f"latency.index.{rate}", rate, times[rate])]


def _results(row: str, wanted: int, times: list[Times]) -> list[Result]:
    slowest = min(found.rate for found in times)
    note = "" if slowest >= wanted * REACHED else f"; only {slowest:,.0f} tx/s were reached"
    return [
        result(
            f"{row}.p{percent}",
            f"ms from commit to readable in OpenSearch ÷ ms of INSERT and COMMIT{note}",
            [quantile(found.readable, percent / 100) for found in times],
            [quantile(found.commits, percent / 100) for found in times],
        )
        for percent in (50, 99)
    ]


async def _run(here: Whole, engine: Engine, rate: int, seconds: float) -> Times:
    waiting = Waiting()
    send, receive = anyio.create_memory_object_stream[None](100_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_poll, engine, waiting)
        async with anyio.create_task_group() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(_insert, here, receive.clone(), waiting)
            receive.close()
            started = due = time.monotonic()
            async with send:
                while due < started + seconds + WARM_UP:
                    due += random.expovariate(rate)
                    await anyio.sleep(max(due - time.monotonic(), 0))
                    send.send_nowait(None)
        took = time.monotonic() - started
        waiting.over = True
    return Times(sorted(warm(waiting.readable)), sorted(warm(waiting.commits)), len(waiting.commits) / took)


async def _insert(here: Whole, turns: MemoryObjectReceiveStream[None], waiting: Waiting) -> None:
    async with here.sql() as sql, turns:
        async for _ in turns:
            began = time.monotonic_ns()
            number = await _inserted(sql)
            waiting.commit(number, began, time.monotonic_ns())


async def _inserted(sql: psycopg.AsyncConnection[Any]) -> int:
    found = await (await sql.execute(f"{INSERT} RETURNING id")).fetchone()
    assert found is not None
    return int(found[0])


async def _poll(engine: Engine, waiting: Waiting) -> None:
    """Look for what was committed until all of it has been found and no more comes."""
    while not waiting.over or waiting.committed:
        asked = time.monotonic()
        if waiting.committed:
            overdue = asked - min(waiting.committed.values()) / 1e9
            if overdue > LONGEST:
                raise RuntimeError(f"a document cannot be read {overdue:.0f} s after its commit")
            body = {"ids": list(waiting.committed)}
            answer = await engine.ask("POST", f"/{NAME}/_mget?realtime=true&_source=false", body)
            at = time.monotonic_ns()
            for doc in msgspec.json.decode(answer, type=_Answer).docs:
                if doc.found:
                    waiting.see(doc.id, at)
        await anyio.sleep(max(asked + EVERY - time.monotonic(), 0))
