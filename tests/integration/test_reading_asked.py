"""Asking for a table to be read while it is being read, resting, ending or failing; and what a broken reading keeps."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.errors import Unavailable
from bridge.pipeline import reading
from bridge.pipeline.asked import Asked
from bridge.pipeline.merge import Delivered
from bridge.pipeline.plans import Plans
from bridge.pipeline.reading import Reading
from bridge.pipeline.shapes import Shapes
from bridge.source import chunks, connection
from bridge.source.catalog import Catalog
from bridge.stream import asking, subjects
from bridge.stream.state import TableRecord
from bridge.waiting import until
from tests.reading.steps import EXTERNAL, ROWS, WIDE, again, ask, chunks_of, held, judged, read_again, status
from tests.running import bridge, execute, messages, settled, source, state_of

pytestmark = pytest.mark.anyio

ROOT = ("public", "t")
NEVER = 1 << 30


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 rows."""
    chunks_of(monkeypatch, 50)


@pytest.fixture
async def config(pg_db: str, nats: NatsServer) -> Config:
    """A table t of 300 rows, each with a large column."""
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    return source(pg_db, nats.url)


async def act(config: Config, action: Any) -> bool:
    async with state_of(config) as state:
        return bool(await action(state, config.source.name, ROOT))


async def test_rows_that_moved_are_read_although_the_connection_breaks_meanwhile(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ended = chunks.read, 0

    async def breaking(sql: Any, catalog: Any, oid: int, planned: Any, where: chunks.Where) -> chunks.Chunk:
        nonlocal ended
        if where.among and not ended:
            ended = sql.info.backend_pid
            await execute(pg_db, f"SELECT pg_terminate_backend({ended})")
        return await read(sql, catalog, oid, planned, where)

    monkeypatch.setattr(chunks, "read", breaking)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, "UPDATE t SET id = -5, v = 1000 WHERE id = 290")
        await settled(config)
        on.set()
        await read_again(config)
        await settled(config)
    assert ended
    await judged(config, pg_db)


async def test_rows_that_moved_are_not_forgotten_where_no_connection_can_be_had(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bridge(config), held(monkeypatch, "published", 2) as (there, on):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, "UPDATE t SET id = -5, v = 1000 WHERE id = 290")
        await settled(config)
        await act(config, asking.pause)
        on.set()
        await again(config, state="paused")
    tries = 0

    def refusing(dsn: str) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Unavailable("too many connections", "waiting")
        return connection.connect(dsn)

    monkeypatch.setattr(reading, "connection", SimpleNamespace(connect=refusing))
    await act(config, asking.resume)
    async with bridge(config):
        await read_again(config)
        await settled(config)
    assert tries == 3
    await judged(config, pg_db)


async def test_more_rows_move_than_the_state_bucket_is_told(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOVED_BYTES", 100)
    async with bridge(config), held(monkeypatch, "published", 2) as (there, _):
        await settled(config)
        await ask(config)
        await there.wait()
        await execute(pg_db, "UPDATE t SET id = -id, v = v + 1000 WHERE id > 200")
        await settled(config)
        # The next note must not say that the log is known up to here.
        kept = await again(config)
    async with held(monkeypatch, "published", 2) as (there, _), bridge(config):
        await there.wait()
        found = await again(config)
        assert (found.seq, found.moved) == (kept.seq, [])
    async with bridge(config):
        await read_again(config)
        await settled(config)
    await judged(config, pg_db)


async def test_a_chunk_that_must_wait_is_not_read_meanwhile_and_can_be_left(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending, reads, unseen = Delivered.pending, Counter[int](), True
    read = chunks.read

    async def counted(*arguments: Any) -> chunks.Chunk:
        reads[0] += 1
        return await read(*arguments)

    monkeypatch.setattr(chunks, "read", counted)
    monkeypatch.setattr(Delivered, "pending", lambda self: [*pending(self), *([NEVER] if unseen else [])])
    async with bridge(config):
        await settled(config)
        await ask(config)
        await again(config, state="waiting")
        await anyio.sleep(0.5)
        assert reads[0] == 1
        monkeypatch.setattr(reading, "UNSEEN_PAUSE", 3600)
        await anyio.sleep(0.6)
        await act(config, asking.pause)
        await act(config, asking.resume)
        assert (await again(config, state="waiting")).after == []
        unseen = False
        await act(config, asking.pause)
        await act(config, asking.resume)
        assert (await read_again(config)).rows == 300
        await settled(config)
    await judged(config, pg_db)


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_table_that_is_asked_for_anew_is_read_from_its_beginning(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    pending, unseen = Delivered.pending, waiting
    async with held(monkeypatch, "published", 2) as (there, on), bridge(config):
        await settled(config)
        await ask(config)
        await there.wait()
        monkeypatch.setattr(Delivered, "pending", lambda self: [*pending(self), *([NEVER] if unseen else [])])
        if waiting:
            on.set()
            await again(config, state="waiting")
        await ask(config)
        unseen = False
        on.set()
        assert await until(partial(read_so_far, config, 100), seconds=20, every=0.02)
    async with bridge(config):
        done = await read_again(config)
        await settled(config)
    assert done.rows == 300
    await judged(config, pg_db)


async def read_so_far(config: Config, rows: int) -> bool:
    """Whether so many rows of what is asked for last are read, or all."""
    found = (await status(config)).again
    return found is None or found.rows >= rows


async def test_a_part_that_is_being_read_gives_way_to_the_whole(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bridge(config), held(monkeypatch, "published", 1) as (there, on):
        await settled(config)
        before = await status(config)
        await ask(config, where="id > 10")
        await there.wait()
        await ask(config)
        on.set()
        done = await read_again(config)
        await settled(config)
    assert done.rows == 300
    assert done.complete_from > before.complete_from
    await judged(config, pg_db)


async def test_what_is_cancelled_while_it_fails_is_no_harm(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Asked.note

    async def cancelled(self: Asked, **changes: Any) -> None:
        if changes.get("state") == "failed":
            await act(config, asking.cancel)
        await note(self, **changes)

    monkeypatch.setattr(Asked, "note", cancelled)
    async with bridge(config):
        await settled(config)
        await ask(config, where="nothing = 1")
        await read_again(config)
        await settled(config)


@pytest.mark.parametrize("late", [True, False])
async def test_a_table_is_read_once_at_a_time_and_no_wish_is_overlooked(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    wanted, run, running, most, wishes = Reading.wanted, Reading.run, 0, 0, [1]
    seen = anyio.Event()
    look = Reading.look

    async def counted(self: Reading) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await run(self)
        running -= 1

    def looked(self: Reading) -> None:
        look(self)
        seen.set()

    async def asked_then(self: Reading) -> bool:
        nonlocal seen
        found = await wanted(self) if late else None
        if wishes:
            wishes.clear()
            seen = anyio.Event()
            await ask(config)
            with anyio.move_on_after(2):
                await seen.wait()
        return await wanted(self) if found is None else found

    monkeypatch.setattr(Reading, "run", counted)
    monkeypatch.setattr(Reading, "look", looked)
    monkeypatch.setattr(Reading, "wanted", asked_then)
    async with bridge(config):
        await settled(config)
        await ask(config)
        await read_again(config)
        await settled(config)
        await read_again(config)
    begins = [one for _, one in await messages(config) if one.phase == "begin" and one.table == "t"]
    assert (most, len(begins)) == (1, 3)
    await judged(config, pg_db)


async def test_one_worker_reads_one_table_after_the_other(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"other_{n}" for n in range(4)]
    await execute(
        pg_db,
        *(f"CREATE TABLE {name} AS SELECT id, v FROM t; ALTER TABLE {name} ADD PRIMARY KEY (id)" for name in names),
    )
    config = msgspec.structs.replace(config, snapshot=msgspec.structs.replace(config.snapshot, workers=1))
    async with bridge(config), held(monkeypatch, "published", 1) as (there, on):
        await settled(config)
        for name in ["t", *names]:
            await ask(config, name)
        await there.wait()
        states = [(await status(config, name)).again for name in ["t", *names]]
        assert sorted(one.state for one in states if one) == ["requested"] * 4 + ["running"]
        on.set()
        for name in ["t", *names]:
            assert (await read_again(config, name)).rows == 300
        await settled(config)
    markers = [(one.table, one.phase) for _, one in await messages(config) if one.phase][-10:]
    assert [table for table, _ in markers[::2]] == [table for table, _ in markers[1::2]]


async def test_what_may_not_be_published_any_more_is_in_no_row_of_the_picture(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bridge(config), held(monkeypatch, "published", 2) as (there, _):
        await settled(config)
        await ask(config)
        await there.wait()
    without = msgspec.structs.replace(
        config, source=msgspec.structs.replace(config.source, table={"public.t": Table(exclude=["body"])})
    )
    for changed, columns in ((without, {"id", "v"}), (config, {"id", "v", "body"})):
        async with bridge(changed), held(monkeypatch, "published", 2) as (there, on):
            if changed is without:
                await there.wait()
            else:
                on.set()
                await read_again(config)
                await settled(config)
        rows = [one for _, one in await messages(config) if one.op == "read"][-50:]
        assert {frozenset(msgspec.json.decode(one.after)) for one in rows} == {frozenset(columns)}
    await judged(config, pg_db)


async def test_columns_are_recorded_by_several_at_a_time(pg_db: str, config: Config) -> None:
    async with bridge(config):
        await settled(config)
    async with state_of(config) as state, connection.connect(pg_db) as sql:
        catalog = Catalog(sql, config.source)
        plans = Plans(config, catalog, state, Shapes(sql, config.source.name, catalog.filter, state))
        await execute(pg_db, "ALTER TABLE t ADD COLUMN more int")
        relation = await catalog.relation("public", "t")
        assert relation is not None
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(partial(plans.of, relation, whole=True))
        kept = await state.get(subjects.table_key(config.source.name, "public", "t"), TableRecord)
        assert kept is not None
        assert [column.name for column in kept[0].columns] == ["id", "v", "body", "more"]


async def test_a_table_that_is_not_published_any_more_stays_out_of_the_log(
    pg_db: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bridge(config), held(monkeypatch, "published", 2) as (there, _):
        await settled(config)
        await ask(config)
        await there.wait()
    last = (await messages(config))[-1][0].seq
    narrowed = msgspec.structs.replace(
        config, source=msgspec.structs.replace(config.source, tables=["public.*", "!public.t"])
    )
    async with bridge(narrowed):
        failed = await again(config, state="failed")
        await settled(narrowed)
    assert failed.why.startswith("public.t is not published")
    assert {one.table for message, one in await messages(config) if message.seq > last} == {"mark"}
    async with bridge(config):
        await settled(config)
        await act(config, asking.resume)
        assert (await read_again(config)).state == "done"
        await settled(config)
    await judged(config, pg_db)
