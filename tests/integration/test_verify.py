"""An index compared with the log, and mended, while its reader and a writer are at work."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from bridge.config import Config, Part
from bridge.embedded import NatsServer
from bridge.index import verify as verifying
from bridge.index.verify import Report, verify
from bridge.operate.show.index import report as show_report
from tests.integration.feeding import COLUMNS, Log, fed, row

ROOT = Path(__file__).parents[2]

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


def toml(config: Config) -> str:
    """The configuration as a file."""
    [(name, index)] = config.index.items()
    return f"""
[source]
name = "{config.source.name}"
[stream]
servers = {config.stream.servers}
name = "{config.stream.name}"
prefix = "{config.stream.prefix}"
sync = "always"
[state]
bucket = "{config.state.bucket}"
[index.{name}]
table = "{index.table}"
url = {index.url}
alias = "{index.alias}"
"""


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
            # No faster than the engine, else its reader never comes near the log's end.
            await log.done(log.last - 200)

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        yield
        group.cancel_scope.cancel()


def shown(report: Report) -> str:
    """What a person reads of it."""
    out = io.StringIO()
    show_report(report, out)
    return out.getvalue()


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
            assert (mended.found, mended.counts, mended.repaired, mended.mended) == (report.counts, {}, 5, 5)
            assert "5 of 5 mended, 5 rows written anew" in shown(mended)
            assert mended.same
        await log.done()
        for number in (7, 8, 9, 10):
            found = await source(log, number)
            assert {name: value for name, value in found.items() if name != "_bridge"} == row(number)
        assert await log.engine.mget(log.name, ["by-hand"]) == {}
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


async def test_without_a_reader_it_compares_up_to_where_that_one_stopped(quick: Log) -> None:
    await quick.posts(1, 20)
    async with quick.reading():
        await quick.done()
    await delete(quick, 3)
    await delete(quick, 4)
    behind = quick.last
    await quick.put("update", *post(4))
    await quick.put("insert", *post(30))
    report = await compared(quick)
    assert (report.seq, report.end, report.behind, report.reader) == (behind, quick.last, 2, False)
    assert (kinds(report), report.changed) == ({"missing": ["3"]}, 1)
    assert (await compared(quick, repair=True)).same
    async with quick.reading():
        await quick.done()
        assert (await compared(quick)).same
        assert len(await quick.documents()) == 21


async def test_what_is_mended_during_a_complete_read_is_still_swept_at_its_end(quick: Log) -> None:
    await quick.posts(1, 4)
    async with quick.reading():
        await quick.done()
        await delete(quick, 1)
        await delete(quick, 2)
        await quick.put("snapshot", phase="begin")
        await quick.put("read", *post(3))
        assert (await compared(quick, repair=True)).repaired == 2
        assert sorted(await quick.documents()) == ["1", "2", "3", "4"]
        await quick.put("read", *post(2))
        await quick.put("snapshot", phase="end")
        await quick.done()
        assert sorted(await quick.documents()) == ["2", "3"]
        assert (await compared(quick)).same


async def test_a_write_by_hand_behind_a_quiet_log_is_mended_after_the_next_event(quick: Log) -> None:
    """Its version is one that the log has not reached: what is written over it would win over the next event."""
    await quick.put("insert", *post(1))
    await quick.put("insert", *post(2))
    async with quick.reading():
        await quick.done()
        await overwrite(quick, 2, **{**await source(quick, 2), "title": "by hand"})
        report = await compared(quick, repair=True)
        assert (report.counts, report.refused) == ({"different": 1}, {verifying.HELD: 1})
        assert "0 of 1 mended" in shown(report)
        await quick.put("insert", *post(3))
        report = await compared(quick, repair=True)
        assert (report.counts, report.repaired) == ({}, 1)


def several(found: dict[str, Any]) -> list[dict[str, Any]] | None:
    """So many documents as the row's price says; none for a draft."""
    if found["title"] == "draft":
        return None
    if found["title"] == "unfit":
        raise ValueError
    return [{"title": f"{found['title']} {number}"} for number in range(int(found["price"]))]


async def test_lists_of_documents_and_rows_without_one_are_compared(nats: NatsServer, engine_url: str) -> None:
    async with fed(nats.url, engine_url, transform="tests.integration.test_verify:several") as log:
        for number in range(1, 400):
            await log.put("insert", *post(number, price=4))
        await log.put("insert", *post(900, title="draft"))
        await log.put("update", *post(7, price=2))
        async with log.reading():
            await log.done()
            assert (await compared(log)).same
            await delete(log, "5||2")
            await delete(log, "6")
            await overwrite(log, "7||3", **await source(log, "7||1"))
            await overwrite(log, "8||1", **await source(log, "8||2"))
            await overwrite(log, "900", title="draft")
            await log.put("schema")
            report = await compared(log)
            assert kinds(report) == {"missing": ["5||2", "6"], "extra": ["7||3", "900"], "different": ["8||1"]}
            assert report.documents == 399 * 4 - 2
            assert (await compared(log, repair=True)).same
            found = await log.documents()
            assert "7||3" not in found
            assert "900" not in found
            await log.put("delete", {"id": 5})
            await log.put("update", *post(6, price=1))
            await log.done()
            assert [one for one in await log.documents() if one.split("||")[0] in ("5", "6")] == ["6"]
            assert (await compared(log)).same


async def test_documents_of_a_row_whose_newest_event_was_rejected_are_neither_extra_nor_deleted(quick: Log) -> None:
    quick.with_index(transform="tests.integration.test_verify:several")
    await quick.put("insert", *post(1, price=3))
    await quick.put("insert", *post(2, price=2))
    async with quick.reading():
        await quick.done()
        await quick.put("update", *post(1, title="unfit", price=3))
        await overwrite(quick, "2||7", **await source(quick, "2||1"))
        report = await compared(quick)
        assert kinds(report) == {"refused": ["1", "1||1", "1||2"], "extra": ["2||7"]}
        report = await compared(quick, repair=True)
        assert (report.counts, report.repaired, report.mended) == ({"refused": 3}, 1, 1)
        assert "1 of 1 mended, 1 rows written anew" in shown(report)
        assert sorted(await quick.documents()) == ["1", "1||1", "1||2", "2", "2||1"]


async def test_it_is_said_how_many_are_not_listed(quick: Log) -> None:
    await quick.posts(1, 30)
    async with quick.reading():
        await quick.done()
        for number in range(1, 8):
            await delete(quick, number)
        for number in range(8, 11):
            await overwrite(quick, number, id=number)
        [report] = await verify(quick.config, quick.name, quick.servers, limit=2)
        assert len(report.findings) == 4
        assert "… and 6 more: 5 missing, 1 different (--limit)" in shown(report)
        [report] = await verify(quick.config, quick.name, quick.servers, limit=0)
        assert "… and 10 more: 7 missing, 3 different (--limit)" in shown(report)
        [report] = await verify(quick.config, quick.name, quick.servers, limit=7)
        assert "more" not in shown(report)


async def test_tables_partitions_and_routing_are_compared(nats: NatsServer, engine_url: str) -> None:
    of = {"public.posts": Part(routing="title"), "public.notes": Part(rename={"title": "name"})}
    async with fed(nats.url, engine_url, table="", tables=["public.posts", "public.notes"], of=of) as log:
        await log.columns(COLUMNS, table="notes")
        for number in range(1, 6):
            await log.put("insert", *post(number, title=f"route {number % 2}"), partition="public.posts_a")
            await log.put("insert", *post(number), table="notes")
        await log.put("update", *post(2, title="route 1"), before=row(2, title="route 0"), partition="public.posts_a")
        await log.put("delete", {"id": 3}, table="notes")
        async with log.reading():
            await log.done()
            report = await compared(log)
            assert (report.same, report.rows) == (True, 9)
            physical = f"/{log.name}-000001/_doc"
            await log.engine.ask("DELETE", f"{physical}/public.posts|1?routing=route%201")
            await log.engine.ask("DELETE", f"{physical}/public.notes|1")
            await log.engine.ask("PUT", f"{physical}/public.posts|44?routing=elsewhere", {"id": 44})
            report = await compared(log)
            assert kinds(report) == {"missing": ["public.notes|1", "public.posts|1"], "extra": ["public.posts|44"]}
            assert {finding.routing for finding in report.findings} == {"", "route 1", "elsewhere"}
            assert (await compared(log, repair=True)).same
            assert len(await log.documents()) == 9


async def test_a_kept_generation_is_compared_with_its_own_configuration(quick: Log) -> None:
    await quick.posts(1, 5)
    async with quick.reading():
        await quick.done()
        quick.with_index(exclude=["body"])
        await quick.rebuild(keep_old=True)
        await quick.done()
        await delete(quick, 2)
        await quick.put("insert", *post(9))
        old, live = await verify(quick.config, quick.name, quick.servers)
        assert [(one.generation, one.state, one.counts) for one in (old, live)] == [
            (1, "kept", {"missing": 1}),
            (2, "live", {}),
        ]
        assert all(report.same for report in await verify(quick.config, quick.name, quick.servers, repair=True))


async def test_a_cancelled_comparison_leaves_nothing_behind(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 50)
    async with quick.reading():
        await quick.done()

        async def stuck(*_: Any) -> Any:
            scope.cancel()
            await anyio.sleep_forever()

        monkeypatch.setattr(type(quick.engine), "mget", stuck)
        with anyio.CancelScope() as scope:
            await verify(quick.config, quick.name, quick.servers)
        assert scope.cancelled_caught
        assert not [link for link in Path("/proc/self/fd").iterdir() if "etilqs" in os.path.realpath(link)]  # noqa: ASYNC240


async def test_on_the_command_line(quick: Log, tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").write_text(toml(quick.config))

    async def bridge(*arguments: str) -> tuple[int, str]:
        with anyio.fail_after(90):
            done = await anyio.run_process(
                [sys.executable, "-m", "bridge", *arguments],
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
            )  # fmt: skip
        assert b"planted" not in done.stdout + done.stderr
        return done.returncode, (done.stdout + done.stderr).decode()

    await quick.columns({**COLUMNS, "score": "integer"})
    await quick.put("insert", *post(1, body="planted"))
    await quick.put("insert", *post(2, score="planted"))
    name = quick.name
    async with quick.reading():
        await quick.done()
        await overwrite(quick, 1, id=1, title="planted")
        await quick.put("insert", *post(3))
        code, output = await bridge("verify", "--index", name)
        assert code == 1
        assert "differs from the log" in output
        assert "1 documents with other content than their row's" in output
        assert "1 rows that the index refused" in output
        assert '{"id": 1}' in output
        code, output = await bridge("dlq", name)
        assert code == 0
        assert '{"id": 2}' in output
        assert (await bridge("dlq", name, "retry", "--all"))[0] == 1
        code, output = await bridge("dlq", name, "drop", "--all")
        assert (code, "add --yes" in output) == (2, True)
        await quick.put("update", *post(2, score=2))
        await quick.done()
        assert (await bridge("dlq", name, "retry", "1"))[0] == 0
        code, output = await bridge("verify", "--index", name, "--repair", "--json")
        found = json.loads(output)
        assert (code, found["same"], found["generations"][0]["found"]) == (0, True, {"different": 1})
        assert (await bridge("verify", "--index", name))[0] == 0
    assert (await bridge("verify", "public.posts", "--index", name))[0] == 2
    assert (await bridge("verify", "--index", "nobody"))[0] == 2
    assert (await bridge("dlq", name, "retry"))[0] == 2
    assert (await bridge("dlq", name, "show", "7"))[0] == 2
