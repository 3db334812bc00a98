"""An index compared with the log, and mended, while its reader and a writer are at work."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from bridge.index.verify import Report, verify
from tests.integration.feeding import Log, row

pytestmark = pytest.mark.anyio


def post(number: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"id": number}, row(number, **changes)


async def compared(log: Log, **options: Any) -> Report:
    with anyio.fail_after(90):
        [report] = await verify(log.config, log.name, log.servers, **options)
    return report


async def delete(log: Log, doc_id: int | str) -> None:
    """Delete a document behind the bridge's back."""
    await log.engine.ask("DELETE", f"/{log.name}-000001/_doc/{doc_id}")


async def overwrite(log: Log, doc_id: int | str, **fields: Any) -> None:
    """Write a document behind the bridge's back."""
    await log.engine.ask("PUT", f"/{log.name}-000001/_doc/{doc_id}", fields)


async def source(log: Log, doc_id: int | str) -> dict[str, Any]:
    found = await log.engine.json("GET", f"/{log.name}/_doc/{doc_id}")
    return dict(found["_source"])


def kinds(report: Report) -> dict[str, list[str]]:
    return {
        kind: [finding.id for finding in found]
        for kind, found in itertools.groupby(
            sorted(report.findings, key=lambda finding: (finding.kind, finding.id)), lambda finding: finding.kind
        )
    }


@asynccontextmanager
async def writing(log: Log, first: int) -> AsyncIterator[None]:
    """A writer beside the block: inserts, updates with and without all columns, deletes, changed keys."""

    async def write() -> None:
        for number in itertools.count(first, 10):
            await log.put("insert", *post(number))
            await log.put("insert", *post(number + 1))
            await log.put("update", {"id": number}, {"id": number, "title": "t", "price": 2}, unchanged=["body"])
            await log.put("update", *post(number + 2), before={"id": number + 1})
            await log.put("update", *post(first, title=f"again {number}"))
            await log.put("delete", {"id": number - 8})

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        yield
        group.cancel_scope.cancel()


async def test_what_was_done_behind_the_bridges_back_is_found_and_mended_while_a_writer_writes(log: Log) -> None:
    await log.posts(1, 1_200)
    async with log.reading():
        await log.done()
        async with writing(log, 10_000):
            assert (await compared(log)).same
            await delete(log, 7)
            changed = await source(log, 8)
            await overwrite(log, 8, **{**changed, "body": "by hand"})
            await overwrite(log, "by-hand", id=1, title="nobody's")
            await overwrite(log, 9, id=9)
            older = {**await source(log, 10), "title": "older"}
            older["_bridge"]["version"] -= 1
            await overwrite(log, 10, **older)
            report = await compared(log)
            wanted = {"missing": ["7"], "different": ["8", "9"], "extra": ["by-hand"], "stale": ["10"]}
            assert kinds(report) == wanted
            assert report.counts == {"missing": 1, "different": 2, "extra": 1, "stale": 1}
            assert report.reader
            mended = await compared(log, repair=True)
            assert (mended.found, mended.counts, mended.repaired) == (report.counts, {}, 5)
            assert mended.same
        await log.done()
        found = await log.documents()
        assert {number: found[str(number)] for number in (7, 8, 9, 10)} == {n: row(n) for n in (7, 8, 9, 10)}
        assert "by-hand" not in found
        assert (await compared(log)).same


async def test_later_events_win_over_a_repair(quick: Log) -> None:
    await quick.posts(1, 5)
    async with quick.reading():
        await quick.done()
        await delete(quick, 1)
        await delete(quick, 2)
        await delete(quick, 3)
        assert (await compared(quick, repair=True)).repaired == 3
        await quick.put("update", {"id": 1}, {"id": 1, "title": "later", "price": 1}, unchanged=["body"])
        await quick.put("delete", {"id": 2})
        await quick.put("update", *post(33, title="moved"), before={"id": 3})
        await quick.done()
        found = await quick.documents()
        assert found == {
            "1": {**row(1), "title": "later", "price": 1},
            "33": row(33, title="moved"),
            "4": row(4),
            "5": row(5),
        }
        assert (await compared(quick)).same
    assert await quick.letters() == []
