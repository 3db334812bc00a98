"""The state that is looked at each second: what breaks shows in one of the next two looks, and holds up nobody else."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import msgspec
import psycopg
import pytest

from bridge.config import Config, Index, Secret
from bridge.embedded import NatsServer, Postgres, SearchEngine, until
from bridge.index import engine
from bridge.index.indexer import run_index
from bridge.index.rebuild import rebuild
from bridge.operate.http import ready
from bridge.operate.show.status import page
from bridge.operate.status.collect import collect
from bridge.operate.status.history import Sample
from bridge.operate.status.live import Live
from bridge.operate.status.parts import NATS, POSTGRES, Status
from bridge.stream.state import Checkpoint, State
from bridge.stream.subjects import checkpoint_key
from tests.proxy import Proxy
from tests.running import Process, bridge, broker_of, execute, settled, source, toml, writers

pytestmark = pytest.mark.anyio

TABLE = "CREATE TABLE t (id int PRIMARY KEY, body text)"
ROWS = "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g"


class Looks:
    """Every look of a Live, in order."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.seen: list[Status] = []

    async def follow(self) -> None:
        number = 0
        while True:
            number = await self.live.next(number)
            assert self.live.latest is not None
            self.seen.append(self.live.latest)

    async def until(self, right: Callable[[Status], bool], seconds: float = 30) -> Status:
        """The first look from now on that is as wanted."""
        at = len(self.seen)
        try:
            with anyio.fail_after(seconds):
                while True:
                    await self.live.next(at)
                    for one in self.seen[at:]:
                        if right(one):
                            return one
                    at = len(self.seen)
                    await anyio.lowlevel.checkpoint()
        except TimeoutError:
            last = self.seen[-1] if self.seen else None
            pytest.fail(f"the last look: {msgspec.json.encode(last).decode()}")

    async def soon(self, right: Callable[[Status], bool]) -> Status:
        """The look that shows what has happened just now: the one that was under way, or the one after it."""
        number = self.seen[-1].number
        found = await self.until(right)
        assert found.number <= number + 2, f"it took {found.number - number} looks"
        return found


@asynccontextmanager
async def watching(config: Config, *, itself: bool = False) -> AsyncIterator[Looks]:
    live = Live(config, list(config.stream.servers), itself=itself)
    looks = Looks(live)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live.run)
        tasks.start_soon(looks.follow)
        yield looks
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def reading(config: Config) -> AsyncIterator[None]:
    """A bridge and the readers of its indexes."""
    async with bridge(config), anyio.create_task_group() as tasks:
        await settled(config)
        tasks.start_soon(run_index, config, list(config.index), list(config.stream.servers))
        yield
        tasks.cancel_scope.cancel()


def indexed(config: Config, engine: str) -> Config:
    """With an index of t, called as the source is."""
    name = config.source.name
    return msgspec.structs.replace(config, index={name: Index(table="public.t", url=[engine], alias=name)})


def level(last: Sample | None, index: str) -> bool:
    """Whether an index has all of the stream."""
    return last is not None and last.events is not None and last.indexed == {index: last.events}


def good(found: Status) -> bool:
    return found.in_step


def problems(found: Status) -> str:
    return "\n".join(finding.what for finding in found.findings if finding.level == "problem")


async def test_a_look_each_second_tells_how_fast_everything_goes_and_for_how_long(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = indexed(source(pg_db, nats.url), osmem.url)
    await execute(pg_db, TABLE, ROWS)
    async with reading(config), watching(config) as looks:
        await looks.until(good)
        await looks.until(lambda s: s.rates is not None and s.rates.events_10 is not None)
        await execute(pg_db, *[f"UPDATE t SET body = '{n}'" for n in range(5)])
        await settled(config)
        found = await looks.until(
            lambda s: s.rates is not None and bool(s.rates.events_10) and any(s.rates.indexed.values()) and good(s)
        )
        # The index's record, which the sample is of, follows its reader.
        await looks.until(lambda _: level(looks.live.history.last, config.source.name))
    assert [one.number for one in looks.seen] == list(range(1, len(looks.seen) + 1))
    assert found.rates is not None
    assert found.rates.events_10 is not None
    assert found.rates.events_10 * 10 >= 400
    assert found.slot is not None
    assert found.process.since
    assert found.slot.since
    [index] = found.indexes
    [live] = index.generations
    assert index.reader_since >= found.process.since
    assert (live.behind, live.behind_seconds) == (0, 0.0)
    assert index.engine is not None
    assert (index.engine.where, index.engine.away) == (osmem.url, "")


async def test_what_is_killed_shows_in_one_of_the_next_two_looks_and_so_does_its_return(
    own_pg: Postgres, own_nats: NatsServer
) -> None:
    async with SearchEngine.throwaway() as searcher:
        config = indexed(source(own_pg.dsn(), own_nats.url), searcher.url)
        where = f"search engine at {searcher.url}"
        await execute(own_pg.dsn(), TABLE, ROWS)
        async with watching(config) as looks:
            async with reading(config):
                await looks.until(good)
                await searcher.kill()
                found = await looks.soon(lambda s: where in s.away)
                assert where in problems(found)
                assert found.indexes[0].engine is not None
                assert found.indexes[0].engine.away
                assert found.process.state == "streaming", "nothing else is"
                await own_nats.kill()
                found = await looks.soon(lambda s: NATS in s.away)
                assert (found.stream, POSTGRES in found.away, found.slot is not None) == (None, False, True)
                since = found.away_since[NATS]
                await own_pg.stop()
                found = await looks.soon(lambda s: POSTGRES in s.away)
                assert list(found.away) == [POSTGRES, NATS, where]
                assert found.away_since[NATS] == since
                assert found.slot is None
                await own_pg.start()
                await looks.until(lambda s: POSTGRES not in s.away and NATS in s.away)
                await own_nats.start()
                found = await looks.until(lambda s: NATS not in s.away)
                assert NATS not in found.away_since
            # It comes back empty, at which a reader ends.
            await searcher.start()
            await looks.until(lambda s: not s.away)


async def test_a_bridge_without_nats_is_not_called_stopped_and_knows_itself_that_it_runs(
    pg_db: str, own_nats: NatsServer
) -> None:
    config = source(pg_db, own_nats.url)
    await execute(pg_db, TABLE, ROWS)
    async with bridge(config), watching(config) as looks, watching(config, itself=True) as own:
        await settled(config)
        await looks.until(lambda s: s.process.state == "streaming")
        await own.until(lambda s: s.process.state == "streaming")
        await own_nats.kill()
        found = await looks.until(lambda s: NATS in s.away and s.process.state != "streaming")
        known = await own.until(lambda s: NATS in s.away and s.process.state != "streaming")
        await looks.until(partial(later, looks.seen[-1].number + 2))
        assert (found.process.state, known.process.state) == ("unknown", "running")
        assert {s.process.state for s in looks.seen if NATS in s.away} <= {"streaming", "unknown"}
        assert {s.process.state for s in own.seen if NATS in s.away} <= {"streaming", "running"}
        assert known.process.who.startswith(f"process {os.getpid()} on ")
        assert "no bridge is running" not in problems(found) + problems(known)
        assert ready.reasons(found, 0.0, 60.0)[0].startswith("NATS cannot be asked")
        await own_nats.start()
        await looks.until(good)


async def test_who_is_silent_is_away_after_a_look_and_the_others_are_shown_meanwhile(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, proxied: Callable[[int], Proxy]
) -> None:
    near = source(pg_db, nats.url)
    database, broker, engine = proxied(port_of(pg_db)), proxied(nats.port), proxied(osmem.port)
    far = indexed(
        msgspec.structs.replace(
            near,
            source=msgspec.structs.replace(
                near.source, dsn=Secret(pg_db.replace(str(port_of(pg_db)), str(database.port)))
            ),
            stream=msgspec.structs.replace(near.stream, servers=[f"nats://127.0.0.1:{broker.port}"]),
        ),
        f"http://127.0.0.1:{engine.port}",
    )
    await execute(pg_db, TABLE, ROWS)
    async with bridge(near), watching(far) as looks:
        await settled(near)
        await looks.until(lambda s: s.number > 0 and s.process.state == "streaming" and not s.away)
        where = f"search engine at {far.index[near.source.name].url[0]}"
        for proxy, what in ((database, POSTGRES), (broker, NATS), (engine, where)):
            proxy.hold()
            held = time.monotonic()
            found = await looks.soon(partial(alone_away, what))
            assert time.monotonic() - held < 2.3, "a look each second, and 0.9 s for its answer"
            assert "no answer within" in found.away[what] or "does not answer" in found.away[what]
            await looks.until(partial(later, looks.seen[-1].number + 1))
            proxy.release()
            await looks.until(lambda s: not s.away)
        database.hold()
        broker.hold()
        found = await looks.soon(lambda s: {POSTGRES, NATS} <= s.away.keys())
        database.release()
        broker.release()
        await looks.until(lambda s: not s.away and s.process.state == "streaming")
        # A connection that somebody cuts is no outage.
        number = looks.seen[-1].number
        await database.cut()
        await broker.cut()
        await looks.until(lambda s: s.number >= number + 3)
        assert not any(one.away for one in looks.seen if one.number > number)


async def test_one_look_does_not_wait_long_for_an_engine_that_is_frozen(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, proxied: Callable[[int], Proxy]
) -> None:
    front = proxied(osmem.port)
    config = indexed(source(pg_db, nats.url), f"http://127.0.0.1:{front.port}")
    front.hold()
    began = time.monotonic()
    found = await collect(config, list(config.stream.servers))
    assert time.monotonic() - began < 2
    front.release()
    assert "does not answer within 1 s" in problems(found)


def alone_away(what: str, found: Status) -> bool:
    """Whether that server is away, and the others are shown."""
    return list(found.away) == [what] and (found.slot is None, found.stream is None) == (what == POSTGRES, what == NATS)


def later(number: int, found: Status) -> bool:
    return found.number > number


def port_of(dsn: str) -> int:
    found = re.search(r":(\d+)/", dsn)
    assert found is not None, dsn
    return int(found[1])


async def test_a_rebuild_is_shown_with_who_does_it_and_how_far_it_is(
    pg_db: str, nats: NatsServer, osmem: SearchEngine, tmp_path: Path
) -> None:
    config = indexed(source(pg_db, nats.url), osmem.url)
    name = config.source.name
    await execute(pg_db, TABLE, ROWS.replace("100", "5000"))
    text = f'[index.{name}]\ntable = "public.t"\nurl = ["{osmem.url}"]\n'
    rebuilding = Process(tmp_path, toml(config) + text)
    try:
        async with reading(config), watching(config) as looks:
            await looks.until(good)
            rebuilding.start("reindex", name, failpoint="index.acked:stop:2")
            assert rebuilding.process is not None
            pid = rebuilding.process.pid
            await rebuilding.said("failpoint index.acked")
            found = await looks.until(lambda s: any(g.done for g in s.indexes[0].generations))
            [index] = found.indexes
            [one] = [g for g in index.generations if g.state == "building"]
            assert index.builder.startswith(f"process {pid} on ")
            assert one.number == 2
            assert one.since
            assert one.behind is not None
            assert 0 < one.behind < 5000
            assert one.done is not None
            assert 0.1 < one.done < 1
            page(found, shown := io.StringIO())
            assert f"{one.physical}: building by {index.builder}, for " in shown.getvalue()
            assert f"{one.done:.0%} of the log, {one.behind:,} events behind" in shown.getvalue()
            rebuilding.process.send_signal(signal.SIGCONT)
            assert await rebuilding.wait() == 0
            found = await looks.until(lambda s: good(s) and s.indexes[0].generation == 2 and not s.indexes[0].builder)
            assert [(g.state, g.done) for g in found.indexes[0].generations] == [("live", None)]
    finally:
        rebuilding.close()


async def moved(config: Config, *actions: Mapping[str, object]) -> None:
    """Change aliases by hand."""
    [index] = config.index.values()
    async with engine.opened(index) as client:
        await client.json("POST", "/_aliases", {"actions": list(actions)})


async def test_an_alias_that_somebody_moved_shows_in_one_of_the_next_two_looks(
    pg_db: str, nats: NatsServer, engine_url: str
) -> None:
    config = indexed(source(pg_db, nats.url), engine_url)
    name = config.source.name
    on, off = ({action: {"index": f"{name}-000001", "alias": name}} for action in ("add", "remove"))
    await execute(pg_db, TABLE, ROWS)
    async with reading(config), watching(config) as looks:
        assert (await looks.until(good)).indexes[0].astray is None
        async with engine.opened(config.index[name]) as client:
            await client.create(f"other-{name}", {})
        await moved(config, off, {"add": {"index": f"other-{name}", "alias": name}})
        found = await looks.soon(lambda s: s.indexes[0].astray is not None)
        assert problems(found) == f"somebody has put the alias {name} on other-{name}: searches see that"
        assert ready.reasons(found, 0.0, 60.0) == ready.of_indexes(found, 0.0, 60.0, [name]) == [problems(found)]
        page(found, shown := io.StringIO())
        assert shown.getvalue().count(problems(found)) == 2
        await moved(config, on)
        found = await looks.soon(lambda s: "as well" in problems(s))
        await moved(config, {"remove": {"index": f"other-{name}", "alias": name}})
        await looks.soon(good)
        # A reader puts an alias back that is on nothing, after some seconds.
        await moved(config, off)
        found = await looks.soon(lambda s: not good(s))
        assert problems(found) == f"no index has the alias {name}: searches find nothing"
        once = await collect(config, list(config.stream.servers))
        await looks.until(good)
        assert good(await collect(config, list(config.stream.servers)))
        assert once.indexes[0].astray in (None, found.indexes[0].astray)


async def test_an_index_that_somebody_deleted_is_called_gone_with_the_command_that_builds_it_anew(
    pg_db: str, nats: NatsServer, engine_url: str
) -> None:
    config = indexed(source(pg_db, nats.url), engine_url)
    name = config.source.name
    await execute(pg_db, TABLE, ROWS)
    async with reading(config), watching(config) as looks:
        await looks.until(good)
        async with engine.opened(config.index[name]) as client:
            await client.ask("DELETE", f"/{name}-000001")
        found = await looks.soon(lambda s: s.indexes[0].astray is not None)
        once = await collect(config, list(config.stream.servers))
        for one in (found, once):
            assert problems(one) == f"the index {name}-000001 is gone: searches find nothing"
            [problem] = [f for f in one.findings if f.level == "problem"]
            assert problem.next == f"build it anew from the log: bridge reindex {name}"
            page(one, shown := io.StringIO())
            assert f"{name}: gone, fed by process" in shown.getvalue()
            assert f"  {name}-000001: gone, its reader was at sequence" in shown.getvalue()
            assert "live" not in shown.getvalue()
        await rebuild(config, name, list(config.stream.servers))
        await looks.until(good)


async def test_a_rebuild_that_moves_the_alias_is_never_taken_for_somebody_else(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = indexed(source(pg_db, nats.url), osmem.url)
    servers = list(config.stream.servers)
    await execute(pg_db, TABLE, ROWS)
    async with reading(config), watching(config) as looks:
        await looks.until(good)
        number, seen = looks.seen[-1].number, list[Status]()

        async def look() -> None:
            while True:
                seen.append(await collect(config, servers))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            for _ in range(8):
                await rebuild(config, config.source.name, servers)
            tasks.cancel_scope.cancel()
        await looks.until(lambda s: good(s) and s.indexes[0].generation == 9)
    assert len(seen) > 8
    assert [one.indexes[0].astray for one in seen + looks.seen[number:] if one.indexes[0].astray is not None] == []


async def test_a_slot_that_is_gone_shows_in_one_of_the_next_two_looks(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, ROWS)
    async with bridge(config):
        await settled(config)
    async with watching(config) as looks:
        found = await looks.until(lambda s: s.process.state == "stopped")
        assert found.slot is not None
        assert found.slot.exists
        await execute(pg_db, f"SELECT pg_drop_replication_slot('{config.source.slot}')")
        found = await looks.soon(lambda s: s.slot is not None and not s.slot.exists)
        assert f"PostgreSQL has no slot {config.source.slot}" in problems(found)


async def test_a_standby_is_shown_and_so_is_its_takeover_in_one_of_the_next_two_looks(
    pg_db: str, nats: NatsServer, osmem: SearchEngine
) -> None:
    config = indexed(source(pg_db, nats.url), osmem.url)
    await execute(pg_db, TABLE, ROWS)
    async with watching(config) as looks, bridge(config) as first:
        await settled(config)
        before = await looks.until(lambda s: s.process.state == "streaming")
        assert before.process.standby == []
        async with bridge(config), anyio.create_task_group() as tasks:
            tasks.start_soon(run_index, config, list(config.index), list(config.stream.servers))
            await looks.until(lambda s: bool(s.indexes and s.indexes[0].reader))
            tasks.start_soon(run_index, config, list(config.index), list(config.stream.servers))
            found = await looks.until(lambda s: bool(s.process.standby and s.indexes[0].standby))
            [waits] = found.process.standby
            assert waits.who == found.process.who, "both are of this process"
            assert waits.since >= found.process.since
            first.stop.set()
            await until(lambda: another_writes(config, found.process.epoch), 30, "the other one has taken over")
            await looks.soon(lambda s: s.process.epoch > found.process.epoch and s.process.state != "stopped")
            await looks.until(lambda s: s.process.standby == [] and s.process.since > found.process.since)
            tasks.cancel_scope.cancel()


async def another_writes(config: Config, epoch: int) -> bool:
    return max(writer.epoch for writer in await writers(config)) > epoch


async def test_values_in_the_bucket_that_nobody_can_read_are_said(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, TABLE, ROWS)
    async with bridge(config):
        await settled(config)
    async with watching(config) as looks, broker_of(config) as broker:
        await looks.until(lambda s: s.checkpoint is not None)
        state = await State.open(broker, config.state.bucket)
        key = checkpoint_key(config.source.name)
        kept = await state.get(key, Checkpoint)
        assert kept is not None
        await state.put(key, "nonsense")
        found = await looks.soon(lambda s: NATS in s.away)
        assert "no bridge has written" in problems(found)
        await state.put(key, kept[0])
        await looks.until(lambda s: not s.away and s.checkpoint is not None)


async def test_a_watcher_keeps_one_connection_to_postgresql(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    async with watching(config) as looks:
        await looks.until(lambda s: s.number >= 3)
        async with await psycopg.AsyncConnection.connect(pg_db) as sql:
            query = (
                "SELECT pid, backend_start FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            before = await (await sql.execute(query)).fetchall()
            await looks.until(lambda s: s.number >= 5)
            assert await (await sql.execute(query)).fetchall() == before
        assert len(before) == 1


async def test_where_nobody_watches_looks_are_seldom_and_who_asks_gets_a_new_one(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.operate.status.live.SELDOM", 300.0)
    config = source(pg_db, nats.url)
    live = Live(config, list(config.stream.servers))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live.run)
        await live.next(0, watching=False)
        with anyio.move_on_after(2.5) as scope:
            await live.next(1, watching=False)
        assert scope.cancelled_caught
        await live.fresh()
        assert live.latest is not None
        assert live.latest.number == 2
        assert live.age < 1.0
        with anyio.fail_after(10):
            await live.next(4, watching=False)
        tasks.cancel_scope.cancel()
