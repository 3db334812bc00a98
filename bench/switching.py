"""What searches and memory do while an index is built, followed and built anew, under a load that never ends.

A table of posts; pgbench inserts, changes and deletes some at a steady rate. `bridge index` makes the index from the
log (a rebuild in the same process) and follows; beside it `bridge reindex` builds the next generation and switches the
alias, while searchers ask for a word that every post has. At the end the index must hold what the table holds.
"""

from __future__ import annotations

import time

import anyio
import msgspec

from bench import processor
from bench.result import Result, result
from bench.whole import INSERT, WORD, Child, Whole, built, searching, whole
from bridge.embedded import until
from bridge.errors import BridgeError
from bridge.index.engine import Engine

ROWS = 100_000
FEWEST = 4_000
RATE = 200
SEARCHERS = 2
PAUSE = 0.005
AFTER = 2.0
LOOK_EVERY = 0.1
LONGEST = 600.0
CHANGE = """\\set id random(1, {rows})
UPDATE posts SET subject = 'Re: another subject', posted_at = clock_timestamp() WHERE id = :id;
"""
DELETE = """\\set id random(1, {rows})
DELETE FROM posts WHERE id = :id;
"""
MEMORY, SEARCHES = "rss.index", "index.searcher"


class _Hits(msgspec.Struct):
    hits: list[msgspec.Raw]


class _Shards(msgspec.Struct):
    failed: int


class _Answer(msgspec.Struct):
    timed_out: bool
    hits: _Hits
    shards: _Shards = msgspec.field(name="_shards")


class Run(msgspec.Struct):
    """One run: searches, those that failed, answered in part or found nothing; the largest RSS in MB of the index's
    reader and of the rebuild beside it; seconds of that rebuild."""

    searches: int = 0
    bad: int = 0
    reader: float = 0.0
    rebuild: float = 0.0
    seconds: float = 0.0


async def measure(rows: list[str], runs: int, scale: float) -> list[Result]:
    """What is wanted of memory and searches: both are of the same runs."""
    count = max(int(ROWS * scale), FEWEST)
    names = [f"posts{run}" for run in range(runs)]
    async with whole(names, count) as here:
        scripts = [part.format(rows=count) for part in (f"{INSERT};\n", CHANGE, DELETE)]
        async with here.load(RATE, scripts):
            found = [await _run(here, name) for name in names]
        # Nothing is written any more: the last index is followed to the table's end, and must be the same.
        await _compared(here, names[-1])
    return results(found, rows)


def results(found: list[Run], rows: list[str]) -> list[Result]:
    """Of the runs, what belongs to the wanted rows."""
    searches = sum(one.searches for one in found)
    every = [
        result(MEMORY, "MB, largest resident set of `bridge index`: built, and followed", [r.reader for r in found]),
        result(f"{MEMORY}.reindex", "MB, of `bridge reindex` beside it", [r.rebuild for r in found]),
        # One that fails in one run of three must not vanish in a median.
        result(
            SEARCHES,
            f"failed, partial or empty of {searches:,} searches in all runs, during a rebuild and its switch",
            [float(sum(one.bad for one in found))] * len(found),
        ),
        result(f"{SEARCHES}.asked", "searches a second meanwhile", [one.searches / one.seconds for one in found]),
    ]
    return [one for one in every if any(f"{one.row}.".startswith(f"{row}.") for row in rows)]


async def _run(here: Whole, name: str) -> Run:
    """Build, follow, and build anew beside it."""
    run = Run()
    async with here.running("index", name) as reader, searching(here, name) as engine:
        await built(engine, name, reader, LONGEST)
        before = await engine.indexes(name)
        started = time.monotonic()
        async with anyio.create_task_group() as searchers:
            for _ in range(SEARCHERS):
                searchers.start_soon(_search, engine, name, run)
            async with here.running("reindex", name) as rebuild, anyio.create_task_group() as watch:
                watch.start_soon(_watch, rebuild, run)
                await rebuild.finished()
                watch.cancel_scope.cancel()
            await anyio.sleep(AFTER)
            searchers.cancel_scope.cancel()
        run.seconds = time.monotonic() - started
        reader.check()
        if await engine.indexes(name) == before:
            raise RuntimeError(f"the alias {name} has not moved")
        run.reader = processor.peak(reader.pid)
    return run


async def _watch(child: Child, run: Run) -> None:
    """Keep a process' largest RSS, as long as it lives."""
    while True:
        try:
            run.rebuild = processor.peak(child.pid)
        except (OSError, StopIteration):
            return
        await anyio.sleep(LOOK_EVERY)


async def _search(engine: Engine, alias: str, run: Run) -> None:
    """Ask again and again, each in one try."""
    body = {"size": 3, "query": {"match": {"body": WORD}}}
    while True:
        run.searches += 1
        try:
            answer = msgspec.json.decode(await engine.ask("POST", f"/{alias}/_search", body, seconds=10), type=_Answer)
        except BridgeError:
            run.bad += 1
        else:
            run.bad += answer.timed_out or answer.shards.failed > 0 or not answer.hits.hits
        await anyio.sleep(PAUSE)


async def _compared(here: Whole, name: str) -> None:
    rows = await here.rows()
    async with here.running("index", name) as reader, searching(here, name) as engine:

        async def same() -> bool:
            reader.check()
            await engine.refresh(name)
            return await engine.count(name) == rows

        await until(same, LONGEST, f"the index {name} holds the table's {rows} rows")
