"""Indexes and tables that are read while the stream flows: an index may begin there, or be in the midst of its life."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from bridge.config import Index
from bridge.embedded import NatsServer, SearchEngine
from bridge.index.engine import opened
from bridge.index.indexer import run_index
from bridge.index.rebuild import rebuild
from bridge.index.verify import verify
from bridge.operate import snapshot as commands
from bridge.operate.snapshot import Asked
from tests.integration.feeding import Log, row
from tests.running import bridge, execute, settled, source

pytestmark = pytest.mark.anyio


async def test_an_update_that_leaves_columns_out_may_come_before_its_row_is_read(quick: Log) -> None:
    begin = await quick.put("snapshot", phase="begin")
    lacking = {name: value for name, value in row(1, title="new").items() if name != "body"}
    await quick.put("update", {"id": 1}, lacking, unchanged=["body"])
    await quick.put("update", {"id": 2}, {**lacking, "id": 2}, unchanged=["body"])
    await quick.put("read", {"id": 1}, row(1, title="new"))
    await quick.put("delete", {"id": 2})
    await quick.put("snapshot", phase="end")
    await quick.snapshot(state="done", mode="incremental", first_seq=begin, complete_from=begin)
    async with quick.reading():
        await quick.done()
        assert await quick.documents() == {"1": row(1, title="new")}
        assert await quick.letters() == []
        # Behind the end nothing is to come that would have them.
        await quick.put("update", {"id": 3}, {**lacking, "id": 3}, unchanged=["body"])
        await quick.done()
        assert [letter["id"] for letter in await quick.letters()] == ["3"]


async def test_what_stands_before_a_table_is_whole_is_made_good_by_its_rows(quick: Log) -> None:
    lacking = {name: value for name, value in row(1).items() if name != "body"}
    await quick.put("update", {"id": 1}, lacking, unchanged=["body"])
    begin = await quick.put("snapshot", phase="begin")
    await quick.put("read", {"id": 1}, row(1))
    await quick.put("snapshot", phase="end")
    await quick.snapshot(state="done", mode="incremental", first_seq=begin, complete_from=begin)
    generation = await _begun_at(quick, 1)
    assert generation == []


async def _begun_at(quick: Log, first: int) -> list[object]:
    """The dead letters of an index of two tables, the other of which is whole from a sequence on."""
    await quick.columns({"id": "bigint"}, table="others")
    other = await quick.put("insert", {"id": 9}, {"id": 9}, table="others")
    assert other > first
    quick.with_index(table="", tables=["public.posts", "public.others"])
    async with quick.reading():
        await quick.done()
        found = await quick.documents()
        assert sorted(len(document) for document in found.values()) == [1, len(row(1))]
    return list(await quick.letters())


async def test_an_index_is_built_from_a_trimmed_log_and_kept_while_tables_are_read_again(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = source(pg_db, nats.url)
    name, servers = config.source.name, list(config.stream.servers)
    index = Index(table="public.t", url=[osmem.url], alias=name)
    config = msgspec.structs.replace(config, index={name: index})
    await execute(
        pg_db, "CREATE TABLE t (id int PRIMARY KEY, v int, body text)", "ALTER TABLE t ALTER body SET STORAGE EXTERNAL",
        "INSERT INTO t SELECT g, g, repeat('x', 2100) || g FROM generate_series(1, 300) g",
    )  # fmt: skip
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)

        async def write() -> None:
            for n in range(150):
                await execute(pg_db, f"UPDATE t SET v = v + 1 WHERE id % 97 = {n % 97}")
                await execute(
                    pg_db, f"UPDATE t SET id = id + 1000 WHERE id = {n + 1}", f"DELETE FROM t WHERE id = {n * 2}"
                )
                await anyio.sleep(0.005)
            writing.set()

        writing = anyio.Event()
        tasks.start_soon(write)
        told = await commands.snapshot(config, servers, Asked())
        assert told.running
        await commands.follow(config, servers, list(told.tables), lambda _: None)
        trimmed = await commands.trimmed(config, servers, force=True)
        assert trimmed.first > 300
        made = await rebuild(config, name, servers)
        assert made.rejected == 0
        tasks.start_soon(run_index, config, [name], servers)
        told = await commands.snapshot(config, servers, Asked())
        await commands.follow(config, servers, list(told.tables), lambda _: None)
        await writing.wait()
        await settled(config)
        [report] = await verify(config, name, servers)
        assert report.same, report
        rows = await execute(pg_db, "SELECT count(*) FROM t")
        assert report.rows == report.documents == rows[0][0]
        tasks.cancel_scope.cancel()
    async with opened(index) as engine:
        await engine.delete(made.physical)
