"""A kill at every failpoint of index readers and rebuilds: on a log written by hand, so that all are reached."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import anyio
import pytest

from bridge.embedded import NatsServer, SearchEngine
from bridge.failpoints import POINTS, VARIABLE
from tests.crash.faults import INDEX
from tests.crash_index.points import READER, REBUILD
from tests.integration.feeding import COLUMNS, Log, fed, row

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

PROGRAM = """
import sys, uvloop
from bridge.index.indexer import run_index
from bridge.index.rebuild import rebuild
from tests.integration.feeding import configured
what, tag, nats, engine = sys.argv[1:]
config, name = configured(tag, nats, engine), f"posts{tag}"
uvloop.run(run_index(config, [name], [nats]) if what == "index" else rebuild(config, name, [nats]))
"""
FOLLOWING = [*READER, "index.begun", "index.buried"]
REFUSED = {"id": "no number", "title": "refused", "body": "kept", "price": 1}


@pytest.fixture
async def log(nats: NatsServer, osmem: SearchEngine) -> AsyncIterator[Log]:
    async with fed(nats.url, osmem.url) as found:
        yield found


async def killed(log: Log, what: str, point: str) -> None:
    """Run a reader or a rebuild in a process of its own until it dies at a failpoint."""
    url = log.config.index[log.name].url[0]
    command = [sys.executable, "-c", PROGRAM, what, log.name.removeprefix("posts"), log.servers[0], url]
    environment = {**os.environ, VARIABLE: f"{point}:kill"}
    async with await anyio.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            with anyio.fail_after(60):
                assert await process.wait() == -9
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def changes(log: Log) -> dict[str, dict[str, object]]:
    """Events that take a reader past all of its points, and the documents that they leave of the rows 1 to 20."""
    await log.put("snapshot", phase="begin")
    for number in range(1, 11):
        await log.put("read", {"id": number}, row(number))
    await log.put("snapshot", phase="end")
    moved = {"id": 101, "title": "moved", "price": 2}
    await log.put("update", {"id": 101}, moved, before={"id": 1}, unchanged=["body"])
    await log.put("insert", {"id": 50}, REFUSED)
    # What stands behind it is not in the same bulk.
    await log.put("truncate", partition="public.none")
    await log.put("update", {"id": 50}, {"id": 50, "title": "good", "price": 3}, unchanged=["body"])
    await log.columns({**COLUMNS, "more": "integer"})
    await log.put("update", {"id": 2}, {"id": 2, "title": "2", "price": 1, "more": 7}, unchanged=["body"])
    await log.put("delete", {"id": 3})
    left = {str(number): row(number) for number in range(2, 11) if number != 3}
    left["2"] = {"id": 2, "title": "2", "price": 1, "more": 7, "body": row(2)["body"]}
    left["50"] = {"id": 50, "title": "good", "price": 3, "body": "kept"}
    left["101"] = {**moved, "body": row(1)["body"]}
    return left


@pytest.mark.parametrize("point", FOLLOWING)
async def test_a_reader_killed_anywhere_leaves_nothing_out(log: Log, point: str) -> None:
    await log.posts(1, 20)
    await log.rebuild()
    left = await changes(log)
    await killed(log, "index", point)
    async with log.reading():
        await log.done()
    assert await log.documents() == left
    assert {letter["id"] for letter in await log.letters()} == {"50"}


@pytest.mark.parametrize("point", REBUILD)
async def test_a_rebuild_killed_anywhere_is_made_up_for_by_reader_and_next_rebuild(log: Log, point: str) -> None:
    await log.posts(1, 20)
    await log.rebuild()
    left = await changes(log)
    await killed(log, "reindex", point)
    async with log.reading():
        await log.put("insert", {"id": 60}, row(60))
        await log.done()
        assert await log.documents() == {**left, "60": row(60)}
        await log.rebuild()
        assert await log.documents() == {**left, "60": row(60)}
    record = await log.record()
    assert [g.state for g in record.generations] == ["live"]
    assert list(await log.engine.indexes(f"{log.name}-0*")) == [record.physical]


def test_every_point_is_one_of_a_reader_or_a_rebuild() -> None:
    assert sorted([*FOLLOWING, *REBUILD]) == sorted(INDEX)
    assert set(INDEX) < set(POINTS)
