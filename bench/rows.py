"""Which rows there are, what has to be measured for those that are wanted."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from bench import documents, growth, intake, latency, readable, rebuild, snapshots, stream, switching
from bench.ground import MODES
from bench.result import Result

RSS = "rss.stream"
ALL = ["stream", "rss", "latency", "snapshot", "index"]
# A side of the bridge whose rows have other beginnings, too.
ALSO = {"index": ["latency.index", "rss.index"], "snapshot": ["latency.snapshot", "rss.snapshot"]}


class Measurement(NamedTuple):
    """What is measured in one go: the rows that it can give, and how, given those that are wanted."""

    rows: list[str]
    measure: Callable[[list[str]], Awaitable[list[Result]]]


def measurements(runs: int, scale: float) -> list[Measurement]:
    """All there are, in the order in which they are taken."""
    peaks: dict[str, float] = {}

    async def size(name: str, rows: list[str]) -> list[Result]:
        return await stream.measure(name, [_token(row, 1) for row in rows], runs, scale, peaks)

    async def memory(_: list[str]) -> list[Result]:
        return stream.memory(peaks, runs)

    async def delay(mode: str, rows: list[str]) -> list[Result]:
        return await latency.measure(mode, [int(_token(row, 2)) for row in rows], runs, scale)

    async def tables(rows: list[str]) -> list[Result]:
        return await growth.tables([int(row.removeprefix("stream.tables")) for row in rows], runs, scale)

    async def backlog(_: list[str]) -> list[Result]:
        return await growth.backlog(runs, scale)

    async def read(rows: list[str]) -> list[Result]:
        return await snapshots.measure(rows, runs, scale)

    async def long(_: list[str]) -> list[Result]:
        return await snapshots.memory(runs, scale)

    async def beside(rows: list[str]) -> list[Result]:
        return await snapshots.delay([int(_token(row, 2)) for row in rows], runs, scale)

    async def rebuilt(kind: str, _: list[str]) -> list[Result]:
        return await rebuild.measure(kind, runs, scale)

    async def taken(_: list[str]) -> list[Result]:
        return await intake.measure(runs, scale)

    async def indexed(rows: list[str]) -> list[Result]:
        return await readable.measure([int(_token(row, 2)) for row in rows], runs, scale)

    async def switched(rows: list[str]) -> list[Result]:
        return await switching.measure(rows, runs, scale)

    return [
        *(
            Measurement([f"stream.{mode}.{name}" for mode in MODES], functools.partial(size, name))
            for name in stream.SIZES
        ),
        Measurement([RSS], memory),
        Measurement([f"stream.tables{count}" for count in growth.TABLES], tables),
        Measurement(["stream.backlog"], backlog),
        *(
            Measurement([f"latency.{mode}.{rate}" for rate in latency.RATES], functools.partial(delay, mode))
            for mode in MODES
        ),
        Measurement([snapshots.INITIAL, snapshots.LIMIT, snapshots.INCREMENTAL], read),
        Measurement([snapshots.MEMORY], long),
        Measurement([f"latency.snapshot.{rate}" for rate in snapshots.RATES], beside),
        *(Measurement([f"index.rebuild.{kind}"], functools.partial(rebuilt, kind)) for kind in documents.ENGINES),
        Measurement(["index.reader"], taken),
        Measurement([f"latency.index.{rate}" for rate in readable.RATES], indexed),
        Measurement([switching.MEMORY, switching.SEARCHES], switched),
    ]


def _token(row: str, number: int) -> str:
    return row.split(".")[number]


def choose(every: list[Measurement], only: list[str]) -> list[tuple[Measurement, list[str]]]:
    """What has to be measured for a choice, each with the rows that are wanted of it; an empty choice is all.

    A choice names a row, what rows begin with up to a dot, or a part of a row's results; `index` and `snapshot` also
    name those of their rows that begin otherwise. The largest memory is a row of its own that follows from all sizes:
    who wants it, gets those measured.

    Raises:
        ValueError: names what there is not.
    """
    names = [row for one in every for row in one.rows]
    unknown = [part for part in only if not any(_takes(part, row) for row in names)]
    if unknown:
        raise ValueError(f"no such row: {', '.join(unknown)}; there are {', '.join(names)}")
    sizes = [f"stream.{mode}.{size}" for mode in MODES for size in stream.SIZES]
    parts = [
        name
        for part in only or ["stream", "rss", "latency", "snapshot", "index"]
        for name in (part, *ALSO.get(part, []))
    ]
    if any(_takes(part, RSS) for part in parts):
        parts = [*parts, *sizes]
    if any(_takes(part, row) for part in parts for row in sizes):
        parts = [*parts, RSS]
    chosen = [(one, [row for row in one.rows if any(_takes(part, row) for part in parts)]) for one in every]
    return [(one, rows) for one, rows in chosen if rows]


def _takes(part: str, row: str) -> bool:
    return f"{row}.".startswith(f"{part}.") or part.startswith(f"{row}.")
