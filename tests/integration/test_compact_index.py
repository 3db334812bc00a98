"""An index built from a compacted log, and a reader that stays behind its tombstones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, SearchEngine, until
from bridge.errors import IndexMismatch, OtherStream
from bridge.index.apply import Applier
from bridge.index.bases import Job
from bridge.index.engine import Engine, opened
from bridge.index.generation import Generation, IndexRecord
from bridge.index.indexer import run_index
from bridge.index.rebuild import rebuild
from bridge.stream.state import State
from bridge.stream.subjects import index_key
from tests.faults import Answer, faulty
from tests.running import bridge, broker_of, execute, messages, settled, source, streaming

pytestmark = pytest.mark.anyio

TABLES = [
    "CREATE TABLE days (day date, n int, note text, PRIMARY KEY (day, n)) PARTITION BY RANGE (day)",
    "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
    "CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')",
    "ALTER TABLE days_1 REPLICA IDENTITY FULL",
    "ALTER TABLE days_2 REPLICA IDENTITY FULL",
    "INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, 'day ' || g FROM generate_series(1, 2000) g",
]
CHANGES = [
    "UPDATE days SET note = 'changed' WHERE n % 3 = 0",
    "UPDATE days SET day = day + 28 WHERE n % 10 = 1 AND day < '2026-02-01'",
    "UPDATE days SET n = n + 5000 WHERE n % 10 = 2",
    "DELETE FROM days WHERE n % 10 = 4",
    "TRUNCATE days_2",
    "INSERT INTO days SELECT '2026-02-01'::date + g % 20, g, NULL FROM generate_series(1, 50) g",
]


def configured(dsn: str, nats: NatsServer, osmem: SearchEngine, ttl: str = "7d", mode: str = "compact") -> Config:
    config = source(dsn, nats.url, stream={"mode": mode, "tombstone_ttl": ttl})
    name = config.source.name
    return msgspec.structs.replace(config, index={name: Index(table="public.days", url=[osmem.url], alias=name)})


@asynccontextmanager
async def searched(config: Config) -> AsyncIterator[Engine]:
    """The engine; the test's indexes are removed at the end."""
    async with opened(config.index[config.source.name]) as engine:
        yield engine
        with anyio.CancelScope(shield=True):
            for name in await engine.indexes(f"{config.source.name}*"):
                await engine.delete(name)


async def indexed(config: Config, engine: Engine) -> set[tuple[Any, ...]]:
    """What searches see."""
    await engine.refresh(config.source.name)
    body = {"size": 5000, "query": {"match_all": {}}}
    found = await engine.json("POST", f"/{config.source.name}/_search", body)
    return {(hit["_id"], hit["_source"]["note"]) for hit in found["hits"]["hits"]}


async def table(config: Config) -> set[tuple[Any, ...]]:
    """What it should be."""
    rows = await execute(str(config.source.dsn), "SELECT day || '|' || n, note FROM days")
    return set(rows)


async def generation(config: Config) -> Generation | None:
    """The newest generation of the index, as recorded."""
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        found = await state.get(index_key(config.source.name, config.source.name), IndexRecord)
    return found[0].generations[-1] if found is not None and found[0].generations else None


async def test_an_index_is_rebuilt_from_a_compacted_log_and_follows_it(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    await execute(pg_db, *TABLES)
    config = configured(pg_db, nats, osmem)
    name = config.source.name

    async def begins_behind(seq: int) -> None:
        async def later() -> bool:
            return (await messages(config))[0][0].seq > seq

        await until(later, 30, "what a truncate left behind is purged")

    async def follows(*statements: str) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_index, config, [name], [nats.url])
            await execute(pg_db, *statements)
            await settled(config)

            async def same() -> bool:
                return await indexed(config, engine) == await table(config)

            await until(same, 60, "the index has what the table has")
            tasks.cancel_scope.cancel()

    async with searched(config) as engine, bridge(config):
        await settled(config)
        await execute(pg_db, "TRUNCATE days", TABLES[-1], *CHANGES[:3])
        await settled(config)
        await begins_behind(2000)
        await rebuild(config, name, [nats.url])
        assert await indexed(config, engine) == await table(config)
        await follows(*CHANGES[3:], *CHANGES[:2])
        # Compaction goes past what the reader has read: it has missed nothing that still stands.
        left = await generation(config)
        assert left is not None
        await execute(pg_db, "TRUNCATE days, mark", TABLES[-1])
        await settled(config)
        await begins_behind(left.seq + 1)
        await follows("DELETE FROM days WHERE n = 7")
        summary = await rebuild(config, name, [nats.url])
        assert summary.generation == 2
        assert await indexed(config, engine) == await table(config)


async def test_rows_from_before_a_second_snapshot_are_swept_where_their_purge_is_still_to_come(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attempt at the snapshot that did not end has left: here its rows are put in by hand."""
    await execute(pg_db, *TABLES)
    config = configured(pg_db, nats, osmem)
    async with searched(config) as engine:
        async with bridge(config):
            await settled(config)
        found = [(m, e) for m, e in await messages(config) if e.table == "days"]
        [end] = [e for _, e in found if e.phase == "end"]
        [begin] = [m for m, e in found if e.phase == "begin"]
        assert end.begin_seq == begin.seq
        rows = {m.subject for m, e in found if e.op == "read"}
        assert len(rows) == 2000
        # Its own begin is gone: a later one has taken its place, say. The end alone must do.
        async with broker_of(config) as broker:
            await broker.api(f"STREAM.MSG.DELETE.{config.stream.name}", {"seq": begin.seq})
        swept: list[int] = []
        purge = Applier._purge

        async def watched(self: Applier, job: Job, before: int, at: int, partition: str | None) -> None:
            swept.append(before & ((1 << 42) - 1))
            await purge(self, job, before, at, partition)

        monkeypatch.setattr(Applier, "_purge", watched)
        await rebuild(config, config.source.name, [nats.url])
        assert swept == [begin.seq]
        assert await indexed(config, engine) == await table(config)


async def test_an_index_that_may_have_missed_tombstones_stops_and_a_rebuild_mends_it(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    await execute(pg_db, *TABLES)
    config = configured(pg_db, nats, osmem, ttl="2m")
    name = config.source.name
    async with searched(config) as engine, bridge(config):
        await settled(config)
        await rebuild(config, name, [nats.url])
        built = await generation(config)
        assert built is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_index, config, [name], [nats.url])

            async def kept() -> bool:
                now = await generation(config)
                return now is not None and now.fresh > built.fresh + 5

            await until(kept, 60, "an idle reader stays fresh")
            tasks.cancel_scope.cancel()
        await execute(pg_db, "DELETE FROM days WHERE n <= 100")
        await settled(config)
        await later(config, 100)
        with pytest.raises(IndexMismatch, match="behind a compacted log") as error, anyio.fail_after(60):
            await run_index(config, [name], [nats.url])
        assert f"bridge reindex {name}" in error.value.remedy
        assert len(await indexed(config, engine)) == 2000
        await rebuild(config, name, [nats.url])
        assert await indexed(config, engine) == await table(config)


@pytest.mark.parametrize("how", ["blocked", "away"])
async def test_tombstones_that_went_while_a_reader_waited_for_the_engine_are_missed_aloud(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, how: str
) -> None:
    await execute(pg_db, *TABLES[:5], TABLES[5].replace("2000", "200"))
    config = configured(pg_db, nats, osmem, ttl="8s")
    name = config.source.name
    async with faulty(osmem.port) as front, searched(config) as engine, bridge(config):
        await settled(config)
        await rebuild(config, name, [nats.url])
        blocks = f"/{name}-000001/_settings"
        if how == "blocked":
            await engine.json("PUT", blocks, {"index.blocks.read_only": True})
        else:
            front.before = lambda _: Answer(503, b"")
        asked = len(front.seen)
        reading = msgspec.structs.replace(config.index[name], url=[front.url])
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                with pytest.raises(IndexMismatch, match="behind a compacted log"), anyio.fail_after(120):
                    await run_index(msgspec.structs.replace(config, index={name: reading}), [name], [nats.url])

            tasks.start_soon(read)
            await until(lambda: len(front.seen) > asked, 20, "the reader asks the engine")
            await anyio.sleep(1.0)
            await execute(pg_db, "DELETE FROM days WHERE n <= 50")

            await settled(config)

            async def forgotten() -> bool:
                return not [message for message, _ in await messages(config) if message.op == "delete"]

            assert not await forgotten()
            await until(forgotten, 60, "the tombstones are gone")
            front.before = lambda _: None
            if how == "blocked":
                await engine.json("PUT", blocks, {"index.blocks.read_only": None})
        assert len(await indexed(config, engine)) == 200
        await rebuild(config, name, [nats.url])
        assert await indexed(config, engine) == await table(config)


async def later(config: Config, seconds: float) -> None:
    """Makes the newest generation's record look as if it had been written so long ago."""
    name = config.source.name
    async with broker_of(config) as broker:
        state = await State.open(broker, config.state.bucket)
        kept = await state.get(index_key(name, name), IndexRecord)
        assert kept is not None
        last = kept[0].generations[-1]
        await state.put(index_key(name, name), kept[0].having_changed(last.number, fresh=last.fresh - seconds))


async def test_a_rebuild_that_lay_still_for_too_long_begins_anew(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    await execute(pg_db, *TABLES)
    config = configured(pg_db, nats, osmem)
    name = config.source.name
    async with searched(config) as engine, bridge(config):
        await settled(config)
        with pytest.raises(RuntimeError, match="enough"):
            await rebuild(config, name, [nats.url], progress=enough)
        old = await generation(config)
        assert old is not None
        assert old.state == "building"
        await later(config, 4 * 86400)
        summary = await rebuild(config, name, [nats.url])
        assert summary.generation == old.number + 1
        assert await indexed(config, engine) == await table(config)


def enough(_: object) -> None:
    """Ends a rebuild while it replays."""
    raise RuntimeError("enough")


async def test_a_reader_configured_for_the_other_mode_is_told_so(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    await execute(pg_db, *TABLES)
    config = configured(pg_db, nats, osmem)
    async with bridge(config):
        await streaming(config)
    other = msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, mode="log"))
    with pytest.raises(OtherStream, match='mode = "compact"'), anyio.fail_after(30):
        await rebuild(other, config.source.name, [nats.url])
