"""Rebuilding an index from the log: searches never miss, and a rebuild that dies goes on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs

from bridge.embedded import NatsServer
from bridge.errors import ConfigError, Gap, IndexMismatch, ServerRefused
from bridge.index import rebuild as rebuilding
from bridge.index.indexer import run_index
from bridge.index.rebuild import Progress, Summary
from bridge.stream.lease import Busy
from bridge.waiting import until
from tests.integration.feeding import COLUMNS, Log, fed, row

pytestmark = pytest.mark.anyio

REBUILD = """
import os, sys, uvloop
from bridge.index import feed, rebuild
from tests.integration.feeding import configured
tag, nats, engine, step = sys.argv[1:]

def dies(owner, name):
    async def die(*args, **kwargs):
        print("there", flush=True)
        os.kill(os.getpid(), 9)
    setattr(owner, name, die)

owner, _, name = step.partition(".")
if name:
    dies({"rebuild": rebuild, "steps": rebuild._Rebuild, "place": feed.Place}[owner], name)
config = configured(tag, nats, engine)
uvloop.run(rebuild.rebuild(config, f"posts{tag}", [nats]))
"""


async def killed(log: Log, step: str = "", *, when: Callable[[], Awaitable[bool]] | None = None) -> None:
    """A rebuild in a process of its own, killed at a step or once `when` holds."""
    tag = log.name.removeprefix("posts")
    url = log.config.index[log.name].url[0]
    command = [sys.executable, "-c", REBUILD, tag, log.servers[0], url, step]
    async with await anyio.open_process(command, stderr=None, stdout=subprocess.PIPE) as process:
        try:
            if when is not None:
                assert await until(when, seconds=60, every=0.01)
                process.kill()
            with anyio.fail_after(60):
                assert await process.wait() == -9
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def alias_holders(log: Log) -> list[str]:
    return sorted(await log.engine.indexes(log.name))


# The switch


async def test_a_rebuild_makes_the_next_generation_and_removes_the_old_one(log: Log) -> None:
    await log.posts(1, 200)
    await log.put("delete", {"id": 5})
    first = await log.rebuild()
    assert (first.generation, first.documents, first.before, first.rejected) == (1, 199, None, 0)
    told: list[Progress] = []
    second = await log.rebuild(progress=told.append)
    assert (second.generation, second.documents, second.before) == (2, 199, 199)
    assert told[-1].phase == "done"
    assert told[-1].done == told[-1].total == 201
    assert await alias_holders(log) == [f"{log.name}-000002"]
    assert list(await log.engine.indexes(f"{log.name}-0*")) == [f"{log.name}-000002"]
    consumers = await log.broker.api(f"CONSUMER.NAMES.{log.config.stream.name}")
    assert consumers["consumers"] == [f"{log.name}-000002"]
    record = await log.record()
    assert (record.generation, record.state, record.physical) == (2, "live", f"{log.name}-000002")
    assert [g.number for g in record.generations] == [2]
    assert len(await log.documents()) == 199


async def test_its_log_says_what_was_done_in_the_order_in_which_it_was(quick: Log) -> None:
    await quick.put("snapshot", phase="begin")
    await quick.posts(1, 20)
    await quick.put("snapshot", phase="end")
    with capture_logs() as said:
        await quick.rebuild()
    first = [line for line in said if line["log_level"] != "debug"]
    # The reading left nothing behind that would have had to be removed.
    assert [line["event"] for line in first] == ["rebuild", "alias switched"]
    await quick.put("truncate")
    with capture_logs() as said:
        await quick.rebuild()
    second = [line for line in said if line["log_level"] != "debug"]
    assert [line["event"] for line in second] == [
        "rebuild",
        "documents removed",
        "alias switched",
        "generation removed",
    ]
    [removed, switched, gone] = second[1:]
    assert {key: removed[key] for key in removed if key != "log_level"} == {
        "event": "documents removed", "index": f"{quick.name}-000002", "count": 20,
    }  # fmt: skip
    assert (switched["index"], switched["alias"], switched["to"]) == (quick.name, quick.name, f"{quick.name}-000002")
    assert gone["physical"] == f"{quick.name}-000001"


async def test_settings_are_as_configured_after_the_replay(log: Log) -> None:
    log.with_index(settings={"number_of_replicas": 0, "index.refresh_interval": "7s"})
    await log.posts(1, 3)
    await log.rebuild()
    found = await log.engine.json("GET", f"/{log.name}/_settings")
    settings = next(iter(found.values()))["settings"]["index"]
    assert (settings["number_of_replicas"], settings["refresh_interval"]) == ("0", "7s")
    assert settings["gc_deletes"] == "1h"
    meta = await log.engine.meta(log.name)
    assert meta["source"] == log.config.source.name
    assert (meta["stream"], meta["generation"]) == (log.config.stream.name, 1)


async def test_a_searcher_never_misses_while_an_index_is_rebuilt_under_writes(log: Log) -> None:
    await log.posts(1, 2_000)
    answers: list[int] = []
    async with log.reading():
        await log.done()
        stop = anyio.Event()

        async def search() -> None:
            while not stop.is_set():
                raw = await log.engine.ask("POST", f"/{log.name}/_search", {"track_total_hits": True, "size": 1})
                answers.append(json.loads(raw)["hits"]["total"]["value"])

        async def write() -> None:
            number = 10_000
            while not stop.is_set():
                number += 1
                await log.put("insert", {"id": number}, row(number))
                if number % 100 == 0:
                    # No faster than the engine: else nothing that is built from the log ever catches up with it.
                    await log.done(log.last - 300)

        async with anyio.create_task_group() as group:
            group.start_soon(search)
            group.start_soon(write)
            await log.rebuild()
            await log.rebuild()
            stop.set()
        await log.done()
        await log.engine.refresh(log.name)
        assert await log.engine.count(log.name) == log.last
    assert len(answers) > 10
    assert min(answers) >= 2_000


async def test_the_running_reader_goes_on_exactly_where_the_rebuild_stopped(log: Log) -> None:
    await log.posts(1, 300)
    async with log.reading():
        await log.done()
        async with anyio.create_task_group() as group:
            group.start_soon(log.rebuild)
            for number in range(1_000, 1_200):
                await log.put("insert", {"id": number}, row(number))
                await log.put("update", {"id": 1}, {"id": 1, "title": str(number), "price": 1}, unchanged=["body"])
        await log.put("insert", {"id": 9_999}, row(9_999))
        await log.done()
        found = await log.documents()
    assert (await log.record()).generation == 2
    assert len(found) == 501
    assert found["1"] == {"id": 1, "title": "1199", "price": 1, "body": row(1)["body"]}
    assert await log.letters() == []


async def test_a_kept_generation_stays_and_is_kept_up_to_date(log: Log) -> None:
    await log.posts(1, 5)
    async with log.reading():
        await log.done()
        await log.rebuild(keep_old=True)
        await log.put("insert", {"id": 6}, row(6))
        await log.done()
        old = f"{log.name}-000001"

        async def there() -> bool:
            return "6" in await log.engine.mget(old, ["6"])

        assert await until(there, seconds=20)
        assert "6" in await log.documents()
        await log.rebuild()
        assert list(await log.engine.indexes(f"{log.name}-0*")) == [f"{log.name}-000003"]


async def test_a_changed_configuration_takes_effect_with_the_rebuild_and_not_before(log: Log) -> None:
    await log.put("insert", {"id": 1}, row(1))
    async with log.reading():
        await log.done()
    log.with_index(columns=["id", "title"])
    async with log.reading():
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert await log.documents() == {"1": row(1), "2": row(2)}
        await log.rebuild()
        assert await log.documents() == {n: {"id": int(n), "title": f"post {n}"} for n in ("1", "2")}


async def test_a_mapping_of_ones_own_is_used_whole(log: Log, tmp_path: Path) -> None:
    file = tmp_path / "mapping.json"
    file.write_text('{"mappings": {"dynamic": false, "properties": {"title": {"type": "keyword"}}}}')
    log.with_index(mapping=str(file))
    await log.put("insert", {"id": 1}, row(1))
    await log.rebuild()
    found = next(iter((await log.engine.json("GET", f"/{log.name}/_mapping")).values()))["mappings"]
    assert sorted(found["properties"]) == ["_bridge", "title"]
    assert found["properties"]["title"] == {"type": "keyword"}
    file.write_text("no json")
    with pytest.raises(ConfigError, match=r"mapping\.json"):
        await log.rebuild()


async def test_an_index_with_the_alias_name_is_replaced_only_when_asked(log: Log) -> None:
    await log.posts(1, 3)
    await log.engine.create(log.name, {})
    with pytest.raises(IndexMismatch, match="--replace-index"):
        await log.rebuild()
    assert await log.engine.count(log.name) == 0
    await log.rebuild(replace_index=True)
    assert await alias_holders(log) == [f"{log.name}-000001"]
    assert len(await log.documents()) == 3


async def test_a_template_of_opensearch_cannot_show_an_index_that_is_being_built(
    nats: NatsServer, opensearch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    replay = rebuilding._Rebuild._replay

    async with fed(nats.url, opensearch.url) as log:

        async def watched(self: Any, feed: Any) -> None:
            seen.append(await alias_holders(log))
            await replay(self, feed)

        monkeypatch.setattr(rebuilding._Rebuild, "_replay", watched)
        template = {"index_patterns": [f"{log.name}-0*"], "template": {"aliases": {log.name: {}}}}
        await log.engine.json("PUT", f"/_index_template/{log.name}", template)
        try:
            await log.posts(1, 3)
            await log.rebuild()
            await log.rebuild()
        finally:
            await log.engine.json("DELETE", f"/_index_template/{log.name}")
        assert seen == [[], [f"{log.name}-000001"]]
        assert await alias_holders(log) == [f"{log.name}-000002"]


async def test_numbers_of_generations_are_never_used_twice(log: Log) -> None:
    await log.posts(1, 3)
    await log.engine.create(f"{log.name}-000007", {})
    assert (await log.rebuild()).generation == 8


# Killed


@pytest.mark.crash
@pytest.mark.parametrize(
    "step",
    [
        "steps._make",
        "steps._replay",
        "steps._restore",
        "steps._count",
        "steps._switch",
        "rebuild.move_alias",
        "rebuild.finish",
        "place.remove_consumer",
    ],
)
async def test_a_rebuild_killed_at_any_step_is_resumed(log: Log, step: str) -> None:
    await log.posts(1, 50)
    await log.rebuild()
    await log.put("insert", {"id": 60}, row(60))
    await killed(log, step)
    assert len(await log.documents()) in (50, 51)
    await log.put("insert", {"id": 61}, row(61))
    async with log.reading():
        await log.done()
        assert len(await log.documents()) == 52
    await log.rebuild()
    assert len(await log.documents()) == 52
    record = await log.record()
    assert [g.state for g in record.generations] == ["live"]
    assert list(await log.engine.indexes(f"{log.name}-0*")) == [record.physical]


@pytest.mark.crash
async def test_a_rebuild_killed_while_it_replays_goes_on_from_there(log: Log) -> None:
    await log.posts(1, 12_000)

    async def replaying() -> bool:
        building = (await log.record()).having("building")
        return bool(building) and building[0].seq > 2_000

    await killed(log, when=replaying)
    begun = (await log.record()).having("building")[0]
    summary = await log.rebuild()
    assert summary.generation == begun.number
    assert summary.events < 12_000
    assert summary.documents == 12_000


async def test_a_rebuild_that_was_begun_with_another_configuration_is_begun_anew(quick: Log) -> None:
    await quick.posts(1, 10)
    await killed(quick, "steps._count")
    quick.with_index(exclude=["body"])
    summary = await quick.rebuild()
    assert summary.generation == 2
    assert list(await quick.engine.indexes(f"{quick.name}-0*")) == [f"{quick.name}-000002"]
    assert "body" not in (await quick.documents())["1"]


async def test_a_second_rebuild_is_refused_while_one_is_alive(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.posts(1, 10)
    inside, go_on = anyio.Event(), anyio.Event()
    whole = rebuilding._Rebuild._count

    async def slow(self: Any, *args: Any, **kwargs: Any) -> int:
        inside.set()
        await go_on.wait()
        return await whole(self, *args, **kwargs)

    monkeypatch.setattr(rebuilding._Rebuild, "_count", slow)
    done: list[Summary] = []

    async def first() -> None:
        done.append(await quick.rebuild())

    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await inside.wait()
        with pytest.raises(Busy, match="is being rebuilt by process"):
            await quick.rebuild()
        go_on.set()
    assert done[0].documents == 10


# Refusals


async def test_a_count_that_is_not_what_was_written_keeps_the_alias_where_it_is(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.posts(1, 10)
    await quick.rebuild()
    whole = type(quick.engine).count

    async def one_less(self: Any, index: str) -> int:
        return await whole(self, index) - (index != quick.name)

    monkeypatch.setattr(type(quick.engine), "count", one_less)
    with pytest.raises(IndexMismatch, match="holds 9 documents, 10 were written"):
        await quick.rebuild()
    assert await alias_holders(quick) == [f"{quick.name}-000001"]


async def test_a_log_that_no_longer_holds_the_whole_table_is_refused(quick: Log) -> None:
    await quick.posts(1, 10)
    await quick.snapshot(state="done", complete_from=3)
    await quick.broker.api(f"STREAM.PURGE.{quick.config.stream.name}", {"seq": 3})
    assert (await quick.rebuild()).documents == 8
    await quick.broker.api(f"STREAM.PURGE.{quick.config.stream.name}", {"seq": 4})
    with pytest.raises(Gap, match="bridge drop --stream --state"):
        await quick.rebuild()
    assert (await quick.record()).generation == 1


async def test_a_snapshot_that_is_not_complete_is_waited_for(quick: Log) -> None:
    await quick.posts(1, 10)
    await quick.snapshot(state="running")
    async with anyio.create_task_group() as group:
        group.start_soon(quick.rebuild)
        await anyio.sleep(1)
        assert (await quick.record()).generations == []
        await quick.snapshot(state="done", complete_from=1)
    assert (await quick.record()).generation == 1


@pytest.mark.parametrize("state", ["incomplete", "failed"])
async def test_a_table_whose_earlier_rows_are_not_in_the_log_is_refused(quick: Log, state: str) -> None:
    await quick.posts(1, 10)
    await quick.snapshot(state=state, first_seq=4)
    with pytest.raises(Gap, match=r"rows of public\.posts from before sequence 4 are not in the log"):
        await quick.rebuild()
    assert (await quick.record()).generations == []


async def test_a_first_build_leaves_the_alias_with_what_another_stream_has_built(quick: Log) -> None:
    await quick.posts(1, 3)
    await quick.rebuild()
    await quick.state.delete(f"index.{quick.config.source.name}.{quick.name}")
    async with quick.reading():
        await quick.done()
        assert await alias_holders(quick) == [f"{quick.name}-000002"]
    body = {"mappings": {"_meta": {"source": "other", "stream_created": "then"}}, "aliases": {quick.name: {}}}
    await quick.engine.delete(f"{quick.name}-000002")
    await quick.engine.create("others", body)
    try:
        await quick.state.delete(f"index.{quick.config.source.name}.{quick.name}")
        with pytest.raises(IndexMismatch, match=f"others, which .*\n.*bridge reindex {quick.name}"):
            await run_index(quick.config, [], quick.servers)
        assert await alias_holders(quick) == ["others"]
        await quick.rebuild()
        assert await alias_holders(quick) == [f"{quick.name}-000002"]
    finally:
        await quick.engine.delete("others")


async def test_a_table_of_many_columns_is_indexed(log: Log) -> None:
    wide = {f"c{n}": "text" for n in range(1_200)}
    await log.columns({"id": "bigint", **wide})
    await log.put("insert", {"id": 1}, {"id": 1, **dict.fromkeys(wide, "x")})
    assert (await log.rebuild()).documents == 1
    assert await log.letters() == []


async def test_a_table_without_a_key_is_refused(quick: Log) -> None:
    await quick.columns(COLUMNS, key=())
    with pytest.raises(ServerRefused, match="primary key"):
        await quick.rebuild()


async def test_a_setting_that_the_engine_refuses_is_named(log: Log) -> None:
    await log.posts(1, 1)
    log.with_index(settings={"index.number_of_shards": -3})
    with pytest.raises(ServerRefused, match="settings and mapping") as refused:
        await log.rebuild()
    assert "number_of_shards" in refused.value.what


async def test_a_stream_made_again_is_answered_by_a_rebuild(quick: Log) -> None:
    await quick.posts(1, 10)
    await quick.rebuild()
    name = quick.config.stream.name
    state = await quick.broker.stream(name)
    assert state is not None
    await quick.broker.api(f"STREAM.DELETE.{name}")
    wanted = {key: state.config[key] for key in ("name", "subjects", "allow_atomic")}
    await quick.broker.api(f"STREAM.CREATE.{name}", wanted)
    quick.last = 0
    await quick.posts(1, 4)
    assert (await quick.rebuild()).documents == 4
    assert len(await quick.documents()) == 4
    assert msgspec.json.encode(await quick.record())


@pytest.mark.crash
async def test_a_running_reader_ends_the_switch_of_a_rebuild_that_died(quick: Log) -> None:
    await quick.posts(1, 50)
    async with quick.reading():
        await quick.done()
        await killed(quick, "rebuild.finish")
        assert await alias_holders(quick) == [f"{quick.name}-000002"]

        async def moved() -> bool:
            return (await quick.record()).generation == 2

        assert await until(moved, seconds=30)
        await quick.put("insert", {"id": 60}, row(60))
        await quick.done()
        assert len(await quick.documents()) == 51
