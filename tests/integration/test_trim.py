"""`bridge snapshot --all --trim`: what it removes, what it leaves, and what can still be built from the log then."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from bridge.config import Config, Index
from bridge.embedded import NatsServer, SearchEngine
from bridge.errors import Gap, Overtaken
from bridge.index import flight
from bridge.index import rebuild as rebuilding
from bridge.index.engine import opened
from bridge.index.rebuild import rebuild
from bridge.index.verify import verify
from bridge.operate import snapshot as commands
from bridge.operate.snapshot import Asked
from bridge.stream import asking
from bridge.stream.consumer import events
from bridge.waiting import until
from tests.reading.checker import from_last_begin, same
from tests.reading.steps import EXTERNAL, ROWS, WIDE, again, ask, read_again, status
from tests.running import Process, bridge, broker_of, command, execute, messages, settled, source, state_of, toml

pytestmark = pytest.mark.anyio

OTHER = [
    "CREATE TABLE other (id int PRIMARY KEY, v int, body text)",
    "INSERT INTO other SELECT g, g, 'x' FROM generate_series(1, 50) g",
]

run = partial(command, "snapshot", seconds=60)


def indexed(config: Config, engine: SearchEngine) -> Config:
    """The configuration with an index of the table t that is called as the source is."""
    name = config.source.name
    return msgspec.structs.replace(config, index={name: Index(table="public.t", url=[engine.url], alias=name)})


async def trimmed(config: Config, *, force: bool = False) -> Any:
    """As `--all --trim` does it."""
    servers = list(config.stream.servers)
    told = await commands.snapshot(config, servers, Asked(trim=True))
    await commands.follow(config, servers, list(told.tables), lambda _: None)
    return await commands.trimmed(config, servers, force=force)


async def first_of(config: Config) -> int:
    return (await messages(config))[0][0].seq


async def test_a_rebuild_that_is_under_way_keeps_what_it_needs(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = indexed(source(pg_db, nats.url), osmem)
    name, servers = config.source.name, [nats.url]
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    made: list[Any] = []
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)
        before = await first_of(config)

        async def build() -> None:
            made.append(await rebuild(config, name, servers))

        def stopped(point: str) -> None:
            if point == "index.sending" and not sending.is_set():
                osmem.signal(signal.SIGSTOP)
                sending.set()

        sending = anyio.Event()
        monkeypatch.setattr(flight, "reach", stopped)
        try:
            tasks.start_soon(build)
            with anyio.fail_after(20):
                await sending.wait()
            done = await trimmed(config)
        finally:
            osmem.signal(signal.SIGCONT)
        assert [one.startswith(name) for one in done.behind] == [True]
        assert await first_of(config) == before
        assert await until(lambda: _ready(made), seconds=30)
        [report] = await verify(config, name, servers)
        assert report.same, report
        assert (await trimmed(config)).first > before
    async with opened(config.index[name]) as engine:
        await engine.delete(made[0].physical)


async def _ready(made: list[Any]) -> bool:
    return bool(made)


@pytest.mark.parametrize("point", ["recorded", "made"])
async def test_a_rebuild_that_a_trim_came_before_begins_at_what_is_left(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    config = indexed(source(pg_db, nats.url), osmem)
    name, servers = config.source.name, [nats.url]
    await execute(pg_db, WIDE, EXTERNAL, ROWS)
    step = {"recorded": "_make", "made": "_replay"}[point]
    original = getattr(rebuilding._Rebuild, step)

    async def late(self: Any, argument: Any) -> None:
        monkeypatch.setattr(rebuilding._Rebuild, step, original)
        await trimmed(config, force=True)
        await original(self, argument)

    monkeypatch.setattr(rebuilding._Rebuild, step, late)
    async with bridge(config):
        await settled(config)
        with pytest.raises(Overtaken, match="bridge reindex"):
            await rebuild(config, name, servers)
        made = await rebuild(config, name, servers)
        [report] = await verify(config, name, servers)
        assert report.same, report
        assert report.documents == 300
    async with opened(config.index[name]) as engine:
        await engine.delete(made.physical)


async def test_where_no_complete_picture_is_left_reader_and_rebuild_say_what_mends_it(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = indexed(source(pg_db, nats.url), osmem)
    name, servers = config.source.name, [nats.url]
    await execute(pg_db, WIDE, EXTERNAL, ROWS, *OTHER)
    reader = partial(
        events, nats.url, source=name, stream=config.stream.name, bucket=config.state.bucket, follow=False,
        tables=["public.t"],
    )  # fmt: skip
    async with bridge(config):
        await settled(config)
        async with broker_of(config) as broker:
            await broker.api(f"STREAM.PURGE.{config.stream.name}", {"seq": 100})
        with pytest.raises(Gap, match=r"bridge snapshot public\.t;"):
            await rebuild(config, name, servers)
        with pytest.raises(Overtaken, match="bridge snapshot"):
            async with reader(start=5) as log:
                await anext(log)
        with pytest.raises(Gap, match="nothing is removed: the stream"):
            await commands.trimmed(config, servers, force=False)
        done = await trimmed(config)
        begin = (await status(config)).complete_from
        assert done.first <= begin
        async with reader(start=begin) as log:
            items = [item async for item in log]
        assert [item.op for item in items] == ["snapshot", *["read"] * 300, "snapshot"]
        made = await rebuild(config, name, servers)
        assert made.documents == 300
    async with opened(config.index[name]) as engine:
        await engine.delete(made.physical)


async def test_a_table_that_fails_keeps_its_picture_and_one_that_was_dropped_needs_none(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *OTHER, WIDE, ROWS, "CREATE TABLE gone (id int PRIMARY KEY)", "INSERT INTO gone VALUES (1)")
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "ALTER TABLE other DROP CONSTRAINT other_pkey", "DROP TABLE gone")
        done = await run(config, tmp_path, "--all", "--trim")
        assert done.code == 1, done
        kept = (await status(config, "other")).complete_from
        assert kept
        assert await first_of(config) == kept
        assert "the oldest complete picture is that of public.other" in done.out
        lines = {line.split()[0]: line for line in done.out.splitlines() if line.startswith("public.")}
        assert "failed" in lines["public.other"]
        assert "has no key" in lines["public.other"]
        assert "done" in lines["public.t"]
        await execute(pg_db, "ALTER TABLE other ADD PRIMARY KEY (id)")
    # The next one knows that the table is gone.
    async with bridge(config):
        await settled(config)
        again_ = await run(config, tmp_path, "--all", "--trim")
        assert again_.code == 0, again_
        assert "public.gone" not in again_.out
        assert await first_of(config) > kept
    found = await messages(config)
    for table in ("t", "other"):
        await same(pg_db, table, from_last_begin(found, table)[1])


async def test_nothing_is_trimmed_while_a_table_has_never_been_read(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, mode="never")
    await execute(pg_db, WIDE, ROWS, "CREATE TABLE nokey (id int)", "INSERT INTO nokey VALUES (1)")
    stopped = await run(config, tmp_path, "--all", "--trim")
    assert stopped.code == 4
    async with bridge(config):
        await settled(config)
        last = (await messages(config))[-1][0].seq
        done = await run(config, tmp_path, "--all", "--trim")
        assert done.code == 3
        assert "public.nokey" in done.out
        assert "nothing is removed: the reading of public.nokey has failed" in done.err
        assert "bridge snapshot public.nokey --resume" in done.err
        assert await first_of(config) <= last
    asked = (await status(config)).again
    assert asked is None
    none = await run(config, tmp_path, "--all", "--trim")
    assert (none.code, "no bridge is running" in none.err) == (4, True)
    # Where it is refused nothing is asked for either.
    assert (await status(config)).again is None


async def test_a_compacted_log_is_not_read_again_only_to_be_told_that_there_is_nothing_to_trim(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, stream={"mode": "compact"})
    await execute(pg_db, *OTHER, "ALTER TABLE other REPLICA IDENTITY FULL")
    async with bridge(config):
        await settled(config)
        before = await status(config, "other")
        done = await run(config, tmp_path, "--all", "--trim")
        assert (done.code, "nothing to trim" in done.err) == (4, True)
        assert await status(config, "other") == before
        # But it can be read again.
        await execute(pg_db, "UPDATE other SET v = v + 100 WHERE id < 10")
        await ask(config, "other")
        assert (await read_again(config, "other")).complete_from >= before.complete_from
        await settled(config)


async def test_a_trim_that_is_killed_leaves_a_log_from_which_all_can_be_built(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, WIDE, EXTERNAL, ROWS, *OTHER)
    async with bridge(config):
        await settled(config)
        process = Process(tmp_path, toml(config))
        process.start("snapshot", "--all", "--trim")
        try:
            await again(config, state="running")
            await process.end(signal.SIGKILL)
        finally:
            process.close()
        assert await first_of(config) == 1
        await read_again(config)
        process.start("snapshot", "--all", "--trim")
        try:

            async def read() -> bool:
                async with state_of(config) as state:
                    known = await asking.tables(state, config.source.name)
                return known["public", "t"].complete_from > before and all(one.again is None for one in known.values())

            before = (await status(config)).complete_from
            assert await until(read, seconds=20, every=0.005)
            await process.end(signal.SIGKILL)
        finally:
            process.close()
        assert await first_of(config) <= (await status(config)).complete_from
        await same(pg_db, "t", from_last_begin(await messages(config), "t")[1])
        done = await trimmed(config)
        assert done.messages > 300
        assert await first_of(config) == done.first
        await settled(config)
    for table in ("t", "other"):
        await same(pg_db, table, from_last_begin(await messages(config), table)[1])
