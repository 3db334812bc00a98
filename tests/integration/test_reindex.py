"""`reindex` besides the plain rebuild: looked at before, cancelled, turned back, built as of a point of the past."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from bridge import reindex as commands
from bridge.errors import Gap, IndexMismatch, UsageError
from bridge.index import rebuild as rebuilding
from bridge.index import switch, watch
from bridge.index.back import back, drop_old
from bridge.index.engine import Engine
from bridge.index.generation import IndexRecord
from bridge.index.indexer import run_index
from bridge.index.own import differing
from bridge.index.past import There, build_until, drop_until, plan_until
from bridge.index.place import site
from bridge.index.plan import Options, Plan, plan
from bridge.index.rebuild import Summary
from bridge.operate.status.collect import collect
from bridge.stream.lease import Busy, Lease
from bridge.stream.subjects import index_key
from bridge.waiting import until
from tests.integration.feeding import Log, row

pytestmark = pytest.mark.anyio

CANCELLED = """
import sys
from bridge import log, reindex
from tests.integration.feeding import configured
tag, nats, engine = sys.argv[1:]
log.configure()
sys.exit(reindex.command(configured(tag, nats, engine), reindex.Asked(f"posts{tag}"), [nats]))
"""


async def indexes(log: Log) -> list[str]:
    return sorted(await log.engine.indexes(f"{log.name}*"))


async def consumers(log: Log) -> list[str]:
    return sorted((await log.broker.api(f"CONSUMER.NAMES.{log.config.stream.name}"))["consumers"] or [])


async def only_its_own(log: Log) -> bool:
    """Whether the stream has one consumer, that of the live generation."""
    return await consumers(log) == [(await log.record()).consumer]


async def planned(log: Log, **options: Any) -> Plan:
    return await plan(site(log.config, log.name), log.servers, Options(**options))


# Looked at before


async def test_a_dry_run_says_what_would_be_built_and_touches_nothing(quick: Log, tmp_path: Path) -> None:
    await quick.posts(1, 10)
    await quick.rebuild()
    await quick.posts(11, 5)
    before = (await quick.record(), await indexes(quick), await consumers(quick))
    file = tmp_path / "own.json"
    file.write_text('{"properties": {"title": {"type": "keyword"}}, "settings": {"number_of_replicas": 2}}')
    found = await planned(quick, mapping=str(file))
    assert (found.generation.physical, found.resumed, found.start, found.events) == (
        f"{quick.name}-000002",
        False,
        1,
        15,
    )
    assert (found.holders, found.documents, found.changed) == ([f"{quick.name}-000001"], 10, [])
    assert "title: text → keyword" in found.mapping
    assert "price.number: double, ignore_malformed True → none" in found.mapping
    assert found.settings == ["index.number_of_replicas: none → 2"]
    text = commands.planned(found, Options())
    assert f"would build {quick.name}-000002 (generation 2)" in text
    assert "15 events" in text
    assert "which would be deleted" in text
    assert (await quick.record(), await indexes(quick), await consumers(quick)) == before


async def test_a_dry_run_is_refused_as_the_rebuild_would_be(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 10)
    await quick.engine.create(quick.name, {})
    with pytest.raises(IndexMismatch, match="--replace-index"):
        await planned(quick)
    found = await planned(quick, replace_index=True)
    assert "it would be replaced" in commands.planned(found, Options(replace_index=True))
    await quick.engine.delete(quick.name)
    await quick.snapshot(state="done", complete_from=1)
    await quick.broker.api(f"STREAM.PURGE.{quick.config.stream.name}", {"seq": 4})
    with pytest.raises(Gap, match="bridge drop --stream --state"):
        await planned(quick)
    await quick.snapshot(state="done", complete_from=4)
    inside = anyio.Event()

    async def slow(*_: Any, **__: Any) -> int:
        inside.set()
        await anyio.sleep_forever()
        return 0

    monkeypatch.setattr(rebuilding._Rebuild, "_check", slow)
    async with anyio.create_task_group() as group:
        group.start_soon(quick.rebuild)
        await inside.wait()
        with pytest.raises(Busy, match="is being rebuilt by process"):
            await planned(quick)
        group.cancel_scope.cancel()


async def test_a_dry_run_names_what_would_be_gone_on_with(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 10)
    await broken_off(quick, monkeypatch)
    found = await planned(quick)
    assert (found.generation.number, found.resumed) == (1, True)
    assert f"would go on with {quick.name}-000001" in commands.planned(found, Options())


async def broken_off(log: Log, monkeypatch: pytest.MonkeyPatch, step: str = "_check") -> None:
    """A rebuild that ends at a step without cleaning up, as one that was killed."""

    async def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(rebuilding._Rebuild, step, breaks)
        with pytest.raises(RuntimeError, match="broken off"):
            await log.rebuild()


# A mapping for one rebuild


async def test_a_mapping_given_for_one_rebuild_is_kept_by_its_generation(quick: Log, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"dynamic": false, "properties": {"title": {"type": "keyword"}}}')
    await quick.put("insert", {"id": 1}, row(1))
    await quick.rebuild(mapping=str(file))
    index = quick.config.index[quick.name]
    assert differing(index, await quick.record()) == ["mapping"]
    assert differing(msgspec.structs.replace(index, mapping=str(file)), await quick.record()) == []
    assert differing(msgspec.structs.replace(index, mapping="/not/there.json"), await quick.record()) == []
    file.unlink()
    with capture_logs() as said:
        async with quick.reading():
            await quick.put("insert", {"id": 2}, row(2))
            await quick.done()
    assert [line["keys"] for line in said if line["event"] == "configuration differs"] == [["mapping"]]
    assert sorted(await quick.documents()) == ["1", "2"]
    found = next(iter((await quick.engine.json("GET", f"/{quick.name}/_mapping")).values()))["mappings"]
    assert found["properties"]["title"] == {"type": "keyword"}
    await quick.rebuild()
    assert differing(index, await quick.record()) == []


# Checked


async def test_a_document_that_is_not_as_it_was_sent_keeps_the_alias_where_it_is(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 50)
    await quick.rebuild()
    count = rebuilding._Rebuild._count

    async def spoiled(self: Any, generation: Any, **_: Any) -> int:
        body = {"id": 7, "title": "not this"}
        await quick.engine.json("PUT", f"/{generation.physical}/_doc/7", body)
        await quick.engine.json("DELETE", f"/{generation.physical}/_doc/8")
        return await count(self, generation, exact=False)

    monkeypatch.setattr(rebuilding._Rebuild, "_count", spoiled)
    with pytest.raises(IndexMismatch, match="2 of 50 documents compared") as error:
        await quick.rebuild()
    assert "not this" not in str(error.value)
    assert await indexes(quick) == [f"{quick.name}-000001"]
    assert [g.state for g in (await quick.record()).generations] == ["live"]
    monkeypatch.undo()
    assert (await quick.rebuild()).documents == 50


async def test_what_the_log_did_to_documents_passes_the_comparison(log: Log) -> None:
    await log.posts(1, 30)
    await log.put("update", {"id": 3}, {"id": 3, "title": "new", "price": 2}, unchanged=["body"])
    await log.put("delete", {"id": 4})
    await log.put("update", {"id": 500}, row(500), before={"id": 5})
    await log.put("insert", {"id": 6}, '{"id": 6, "title": {"no": "text"}}')
    await log.put("update", {"id": 7}, '{"id": 7, "title": "\\u00e9", "body": null, "price": 12345678901234567890.10}')
    summary = await log.rebuild()
    assert (summary.documents, summary.rejected) == (28, 1)
    await log.put("truncate")
    await log.posts(100, 3)
    assert (await log.rebuild()).documents == 3


# Cancelled


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_cancelled_rebuild_takes_away_what_it_began(quick: Log, number: signal.Signals) -> None:
    await quick.posts(1, 30)
    await quick.rebuild()
    await quick.posts(31, 20_000)
    tag = quick.name.removeprefix("posts")
    url = quick.config.index[quick.name].url[0]
    command = [sys.executable, "-c", CANCELLED, tag, quick.servers[0], url]
    async with await anyio.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:

        async def building() -> bool:
            found = (await quick.record()).having("building")
            return bool(found) and await quick.engine.exists(found[0].physical)

        assert await until(building, seconds=60, every=0.01)
        process.send_signal(number)
        with anyio.fail_after(60):
            assert await process.wait() == 130
        assert process.stderr is not None
        said = b"".join([part async for part in process.stderr]).decode()
    assert f"removed={quick.name}-000002" in said
    assert f"alias_stays_on={quick.name}-000001" in said
    assert await indexes(quick) == [f"{quick.name}-000001"]
    assert await consumers(quick) == [f"{quick.name}-000001"]
    assert [g.state for g in (await quick.record()).generations] == ["live"]


async def test_a_rebuild_cancelled_in_its_switch_ends_it(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 30)
    await quick.rebuild()
    async with anyio.create_task_group() as group:

        async def never(*_: Any, **__: Any) -> None:
            group.cancel_scope.cancel()
            await anyio.sleep_forever()

        monkeypatch.setattr(rebuilding, "move_alias", never)
        group.start_soon(quick.rebuild)
    assert await indexes(quick) == [f"{quick.name}-000002"]
    assert list(await quick.engine.indexes(quick.name)) == [f"{quick.name}-000002"]
    assert [(g.number, g.state) for g in (await quick.record()).generations] == [(2, "live")]


async def test_a_rebuild_cancelled_while_the_engine_is_away_says_what_it_leaves(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 30)
    monkeypatch.setattr("bridge.index.cancel.WITHIN", 0.2)
    with capture_logs() as said:
        async with anyio.create_task_group() as group:

            async def never(*_: Any, **__: Any) -> None:
                group.cancel_scope.cancel()
                await anyio.sleep_forever()

            monkeypatch.setattr(rebuilding._Rebuild, "_check", never)
            monkeypatch.setattr(Engine, "delete", never)
            group.start_soon(quick.rebuild)
    [line] = [line for line in said if line["event"] == "not cleaned up"]
    assert "bridge reindex" in line["next"]
    monkeypatch.undo()
    assert (await quick.rebuild()).documents == 30
    assert len(await indexes(quick)) == 1


# Back


@contextlib.asynccontextmanager
async def kept(log: Log) -> AsyncIterator[None]:
    """Two generations with other fields; the first is kept."""
    await log.posts(1, 5)
    await log.rebuild()
    log.with_index(exclude=["body"])
    await log.rebuild(keep_old=True)
    yield


async def test_back_and_forth_under_a_running_reader(log: Log) -> None:
    async with kept(log), log.reading():
        await log.put("insert", {"id": 6}, row(6))
        found = await back(log.config, log.name, log.servers)
        assert (found.physical, found.before) == (f"{log.name}-000001", f"{log.name}-000002")
        assert found.documents == 6
        assert (await log.documents())["6"] == row(6)
        await log.put("insert", {"id": 7}, row(7))
        await log.done()
        again = await back(log.config, log.name, log.servers)
        assert (again.physical, again.documents) == (f"{log.name}-000002", 7)
        assert "body" not in (await log.documents())["7"]
        record = await log.record()
        assert [(g.number, g.state) for g in record.generations] == [(1, "kept"), (2, "live")]


async def test_back_without_a_reader_brings_the_kept_one_up_to_date_first(quick: Log) -> None:
    async with kept(quick):
        await quick.posts(6, 5)
        with capture_logs() as said:
            found = await back(quick.config, quick.name, quick.servers)
    assert (found.physical, found.documents) == (f"{quick.name}-000001", 10)
    told = [(line["physical"], line["what"]) for line in said if line["event"] == "bringing back"]
    assert [(physical, "bringing it up to date" in what) for physical, what in told] == [(found.physical, True)]
    assert [line["to"] for line in said if line["event"] == "alias switched"] == [found.physical]
    assert len(await quick.documents()) == 10
    assert list(await quick.engine.indexes(quick.name)) == [found.physical]


async def test_back_needs_a_kept_generation_that_is_ours(quick: Log) -> None:
    await quick.posts(1, 5)
    await quick.rebuild()
    with pytest.raises(UsageError, match=f"there is only {quick.name}-000001"):
        await back(quick.config, quick.name, quick.servers)
    await quick.rebuild(keep_old=True)
    await quick.engine.delete(f"{quick.name}-000001")
    with pytest.raises(IndexMismatch, match="is gone"):
        await back(quick.config, quick.name, quick.servers)
    assert (await quick.record()).generation == 2


@pytest.mark.parametrize("step", ["move_alias", "finish"])
async def test_a_broken_way_back_is_ended_or_begun_again(
    quick: Log, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    async with kept(quick):
        with monkeypatch.context() as patch:
            patch.setattr(switch, step, breaks)
            with pytest.raises(RuntimeError, match="broken off"):
                await back(quick.config, quick.name, quick.servers)
        assert [g.state for g in (await quick.record()).generations] == ["switching", "live"]
        found = await back(quick.config, quick.name, quick.servers)
    assert found.physical == f"{quick.name}-000001"
    assert list(await quick.engine.indexes(quick.name)) == [found.physical]
    assert [(g.number, g.state) for g in (await quick.record()).generations] == [(1, "live"), (2, "kept")]


async def test_a_running_reader_settles_a_way_back_that_died_before_the_alias_moved(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    async with kept(quick):
        with monkeypatch.context() as patch:
            patch.setattr(switch, "move_alias", breaks)
            with pytest.raises(RuntimeError, match="broken off"):
                await back(quick.config, quick.name, quick.servers)
        async with quick.reading():

            async def settled() -> bool:
                return [g.state for g in (await quick.record()).generations] == ["kept", "live"]

            assert await until(settled, seconds=30)


async def test_another_alias_counts_from_the_next_rebuild_and_takes_the_place_of_the_old_one(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.1)
    await quick.put("insert", {"id": 1}, row(1))
    await quick.rebuild()
    old, new = quick.name, f"{quick.name}-by-another-name"
    quick.with_index(alias=new)
    assert differing(quick.config.index[quick.name], await quick.record()) == ["alias"]
    asked = await plan(site(quick.config, quick.name), quick.servers, Options())
    assert (asked.alias, asked.former) == (new, old)
    assert f"former   {old}: searches by that alias would find nothing" in commands.planned(asked, Options())
    async with quick.reading():
        await quick.put("insert", {"id": 2}, row(2))
        await quick.done()
        assert list(await quick.engine.indexes(old)) == [f"{quick.name}-000001"]
        await quick.rebuild(keep_old=True)
        assert (await quick.record()).alias == new
        await quick.put("insert", {"id": 3}, row(3))
        await quick.done()
        await anyio.sleep(0.5)  # the watch over aliases has looked some times
        assert await quick.engine.indexes(old) == {}
        assert list(await quick.engine.indexes(new)) == [f"{quick.name}-000002"]
    await back(quick.config, quick.name, quick.servers)
    assert list(await quick.engine.indexes(new)) == [f"{quick.name}-000001"]


async def test_kept_generations_are_let_go(quick: Log) -> None:
    async with kept(quick), quick.reading():
        assert await drop_old(quick.config, quick.name, quick.servers) == [f"{quick.name}-000001"]
        assert await indexes(quick) == [f"{quick.name}-000002"]
        await quick.put("insert", {"id": 6}, row(6))
        await quick.done()
        assert await until(partial(only_its_own, quick), seconds=20)
        assert await drop_old(quick.config, quick.name, quick.servers) == []


# The past


async def as_of(log: Log, point: int | datetime, **options: Any) -> Summary | There:
    return await build_until(log.config, log.name, log.servers, point, **options)


async def test_an_index_of_the_past_stands_beside_the_live_one(log: Log) -> None:
    await log.posts(1, 10)
    then = await log.put("delete", {"id": 3})
    await log.put("update", {"id": 4}, row(4, title="later"))
    await log.put("truncate")
    async with log.reading():
        await log.done()
        live = await log.record()
        made = await as_of(log, then)
        assert isinstance(made, Summary)
        assert (made.alias, made.physical) == (f"{log.name}-until-{then}", f"{log.name}-until-{then}-000001")
        assert (made.documents, made.events) == (9, then)
        found = await log.documents(made.alias)
        assert sorted(map(int, found)) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
        assert found["4"] == row(4)
        assert await log.documents() == {}
        await log.put("insert", {"id": 20}, row(20))
        await log.done()
    assert [g.physical for g in (await log.record()).generations] == [g.physical for g in live.generations]
    assert await only_its_own(log)
    assert await log.documents(made.alias) == found


async def test_a_time_means_everything_that_was_stored_by_then(quick: Log) -> None:
    await quick.posts(1, 4)
    await anyio.sleep(0.01)
    then = datetime.now(UTC)
    await anyio.sleep(0.01)
    await quick.posts(5, 4)
    made = await as_of(quick, then)
    assert (made.alias, made.documents) == (f"{quick.name}-until-4", 4)
    now = await as_of(quick, datetime.now(UTC))
    assert (now.alias, now.documents) == (f"{quick.name}-until-8", 8)
    with pytest.raises(UsageError, match="still to come"):
        await as_of(quick, datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(UsageError, match="nothing by 2020"):
        await as_of(quick, datetime(2020, 1, 1, tzinfo=UTC))


async def test_the_same_point_again_is_there_already_unless_the_configuration_differs(quick: Log) -> None:
    await quick.posts(1, 10)
    await as_of(quick, 6)
    assert await as_of(quick, 6) == There(f"{quick.name}-until-6", f"{quick.name}-until-6-000001", 6)
    assert isinstance(await plan_until(quick.config, quick.name, quick.servers, 6), There)
    quick.with_index(exclude=["body"])
    asked = await plan_until(quick.config, quick.name, quick.servers, 6)
    assert isinstance(asked, Plan)
    assert (asked.events, asked.generation.number) == (6, 2)
    made = await as_of(quick, 6)
    assert isinstance(made, Summary)
    assert made.physical == f"{quick.name}-until-6-000002"
    assert await indexes(quick) == [made.physical]
    assert await drop_until(quick.config, quick.name, quick.servers, 6) == [made.physical]
    assert await indexes(quick) == []
    key = index_key(quick.config.source.name, f"{quick.name}-until-6")
    assert await quick.state.get(key, IndexRecord) is None
    assert await drop_until(quick.config, quick.name, quick.servers, 6) == []


async def test_a_broken_build_of_the_past_is_gone_on_with(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 10)

    async def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(rebuilding._Rebuild, "_check", breaks)
        with pytest.raises(RuntimeError, match="broken off"):
            await as_of(quick, 6)
    made = await as_of(quick, 6)
    assert isinstance(made, Summary)
    assert (made.generation, made.documents) == (1, 6)
    assert await consumers(quick) == []


async def test_points_at_which_the_log_does_not_hold_the_whole_table_are_refused(quick: Log) -> None:
    await quick.posts(1, 10)
    await quick.snapshot(state="done", complete_from=2, last_seq=5)
    for point in (4, 11):
        with pytest.raises(UsageError, match=f"from sequence 5 to 10, but not at {point}"):
            await as_of(quick, point)
    assert (await as_of(quick, 5)).documents == 4
    compact = msgspec.structs.replace(quick.config.stream, mode="compact")
    config = msgspec.structs.replace(quick.config, stream=compact)
    with pytest.raises(UsageError, match="has no past"):
        await build_until(config, quick.name, quick.servers, 5)


# A log whose beginning is gone


async def test_a_trimmed_log_with_a_complete_snapshot_hands_over_to_the_reader(quick: Log) -> None:
    await quick.posts(1, 20)
    await quick.snapshot(state="done", complete_from=11)
    async with quick.reading():
        await quick.done()
        await quick.broker.api(f"STREAM.PURGE.{quick.config.stream.name}", {"seq": 11})
        assert (await quick.rebuild()).documents == 10
        await quick.put("insert", {"id": 99}, row(99))
        await quick.done()
        assert len(await quick.documents()) == 11


# The reader


async def test_a_reader_takes_over_from_one_that_vanished_with_its_host(quick: Log) -> None:
    await quick.posts(1, 5)
    await quick.rebuild()
    lease = Lease("gone", "elsewhere/boot/pid:[1]", 1, datetime.now(UTC).isoformat())
    await quick.state.put(site(quick.config, quick.name).lease("index"), lease)
    await quick.put("insert", {"id": 6}, row(6))
    async with quick.reading():
        await quick.done(seconds=60)
    assert len(await quick.documents()) == 6


async def test_an_index_of_the_past_is_nothing_to_status(quick: Log) -> None:
    await quick.posts(1, 5)
    await quick.rebuild()
    await as_of(quick, 3)
    found = await collect(quick.config, quick.servers)
    [index] = found.indexes
    assert [one.physical for one in index.generations] == [f"{quick.name}-000001"]
    assert index.changed == []


async def test_an_index_that_stopped_begins_again_once_it_is_rebuilt(quick: Log) -> None:
    one = quick.config.index[quick.name]
    other = f"{quick.name}b"
    config = msgspec.structs.replace(
        quick.config, index={quick.name: one, other: msgspec.structs.replace(one, alias=other)}
    )
    await quick.posts(1, 5)
    with capture_logs() as said:

        def told(event: str) -> list[str]:
            return [line["index"] for line in said if line["event"] == event]

        async with anyio.create_task_group() as group:
            group.start_soon(run_index, config, [], quick.servers)
            await quick.done()

            async def both() -> bool:
                return await quick.engine.exists(other)

            assert await until(both, seconds=30)
            await quick.engine.delete(f"{other}-000001")
            await quick.put("insert", {"id": 6}, row(6))

            async def stopped() -> bool:
                return told("index stopped") == [other]

            assert await until(stopped, seconds=30)
            await rebuilding.rebuild(config, other, quick.servers)

            async def again() -> bool:
                return told("index begins again") == [other]

            assert await until(again, seconds=30)
            await quick.put("insert", {"id": 7}, row(7))

            async def there() -> bool:
                return "7" in await quick.engine.mget(other, ["7"])

            assert await until(there, seconds=30)
            group.cancel_scope.cancel()
    assert told("index stopped") == [other]
