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
from bridge.index.back import back
from bridge.waiting import until
from tests.crash.faults import INDEX
from tests.crash_index.points import READER, REBUILD
from tests.integration.feeding import COLUMNS, Log, fed, row

pytestmark = [pytest.mark.anyio, pytest.mark.crash]

PROGRAM = """
import sys, uvloop
from bridge.index.back import back
from bridge.index.indexer import run_index
from bridge.index.rebuild import rebuild
from tests.integration.feeding import configured
what, tag, nats, engine = sys.argv[1:]
config, name = configured(tag, nats, engine), f"posts{tag}"
work = {"index": run_index, "reindex": rebuild, "back": back}[what]
uvloop.run(work(config, [name] if what == "index" else name, [nats]))
"""
BACK = [name for name in POINTS if name.startswith("back.")]
TURNING = ["index.leased", *BACK, "switch.due", "switch.moved", "switch.finished"]
FOLLOWING = [*READER, "index.begun", "index.buried"]
REFUSED = {"id": "no number", "title": "refused", "body": "kept", "price": 1}


@pytest.fixture
async def log(nats: NatsServer, osmem: SearchEngine) -> AsyncIterator[Log]:
    async with fed(nats.url, osmem.url) as found:
        yield found


async def killed(log: Log, what: str, point: str) -> None:
    """Run a reader, a rebuild or a way back in a process of its own until it dies at a failpoint."""
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


async def turned_halfway(log: Log, point: str) -> dict[str, dict[str, object]]:
    """A way back from the second generation to the first one, which is there, killed; the documents of either one."""
    await log.rebuild(keep_old=True)
    left = await changes(log)
    await killed(log, "back", point)
    return left


async def goes_on(log: Log, left: dict[str, dict[str, object]], physical: str = "") -> None:
    """Under a reader all generations get what comes, and one of them is what searches see."""
    await log.put("insert", {"id": 60}, row(60))

    async def there() -> bool:
        record = await log.record()
        return not record.having("switching", "building", "retired") and all(
            generation.seq >= log.last for generation in record.generations
        )

    assert await until(there, seconds=30)
    record = await log.record()
    assert physical in ("", record.physical)
    assert list(await log.engine.indexes(log.name)) == [record.physical]
    assert sorted(await log.engine.indexes(f"{log.name}-0*")) == [one.physical for one in record.generations]
    for generation in record.generations:
        assert await log.documents(generation.physical) == {**left, "60": row(60)}


@pytest.mark.parametrize("then", ["back", "reindex", "reader"])
@pytest.mark.parametrize("point", TURNING)
async def test_a_way_back_killed_anywhere_is_gone_on_with_by_whatever_comes_next(
    log: Log, point: str, then: str
) -> None:
    await log.posts(1, 20)
    await log.rebuild()
    left = await turned_halfway(log, point)
    expected = ""
    if then == "back":
        # The record has ended it already: a way back from there is one to the other generation.
        expected = f"{log.name}-00000{2 if point == 'switch.finished' else 1}"
        assert (await back(log.config, log.name, log.servers)).physical == expected
    elif then == "reindex":
        expected = (await log.rebuild()).physical
        assert [one.physical for one in (await log.record()).generations] == [expected]
    async with log.reading():
        await goes_on(log, left, expected)


@pytest.mark.parametrize("point", [point for point in TURNING if point != "back.feeding"])
async def test_a_way_back_killed_beside_a_running_reader_is_ended_or_undone_by_it(log: Log, point: str) -> None:
    await log.posts(1, 20)
    await log.rebuild()  # before a reader is there, which would begin a first build
    async with log.reading():
        left = await turned_halfway(log, point)
        await goes_on(log, left)
        found = await back(log.config, log.name, log.servers)
        assert found.physical != found.before
        assert await log.documents() == {**left, "60": row(60)}


def test_every_point_is_one_of_a_reader_a_rebuild_or_a_way_back() -> None:
    assert sorted([*FOLLOWING, *REBUILD, *BACK]) == sorted(INDEX)
    assert set(INDEX) < set(POINTS)
