"""Whose writes an engine takes: those of the reader that began last, through a write alias of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
from structlog.testing import capture_logs

from bridge.embedded import NatsServer, SearchEngine
from bridge.errors import IndexMismatch
from bridge.index import belonging, feed, watch
from bridge.index.bulk import Tally
from bridge.index.indexer import run_index
from bridge.index.mending import Mending
from bridge.index.place import site
from bridge.index.rereading import looking, rereading
from bridge.stream.reader import consumers
from bridge.waiting import until
from tests.faults import Answer, Front, Request, faulty
from tests.integration.feeding import Log, fed, row

pytestmark = pytest.mark.anyio
ENGINES = pytest.mark.parametrize("engine_url", ["osmem", "opensearch", "elasticsearch"], indirect=True)


@pytest.fixture
async def fronted(nats: NatsServer, engine_url: str) -> AsyncIterator[tuple[Log, Front]]:
    port = urlsplit(engine_url).port
    assert port is not None
    async with faulty(port) as front, fed(nats.url, front.url) as log:
        yield log, front


def send(engine_url: str, late: Request) -> None:
    """A request that reaches the engine now."""
    where = urlsplit(engine_url)
    direct = HTTPConnection(where.hostname or "", where.port, timeout=30)
    direct.request(late.method, late.path, late.body, {"content-type": "application/x-ndjson"})
    direct.getresponse().read()
    direct.close()


async def aliases(log: Log) -> list[str]:
    """What the first generation is called, but for its own name."""
    found = await log.engine.indexes(f"{log.name}-000001")
    return sorted(found[f"{log.name}-000001"])


@ENGINES
async def test_what_a_reader_has_on_its_way_when_another_one_begins_is_refused(
    fronted: tuple[Log, Front], engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, front = fronted
    monkeypatch.setattr(watch, "EVERY", 0.1)
    late: list[Request] = []

    def hold(request: Request) -> Answer | None:
        if "/_bulk" not in request.path:
            return None
        late.append(request)
        return Answer(503, b"")

    async def held() -> bool:
        return len(late) > 0

    await log.put("insert", {"id": 1}, row(1))
    async with log.reading():
        await log.done()
        old = await log.writing()
        front.before = hold
        await log.put("insert", {"id": 2}, row(2))
        assert await until(held, seconds=30)
    front.before = lambda _: None
    await log.put("truncate")
    async with log.reading():
        await log.done()
        assert await log.documents() == {}
        removal = b'{"delete":{"_id":"4","version":7,"version_type":"external"}}\n'
        # As of a row whose events a truncate has purged from a compacted log: the engine has no version of it.
        unseen = late[0].body.replace(b'"_id":"2"', b'"_id":"9"')
        assert unseen != late[0].body
        send(engine_url, late[0]._replace(body=unseen + removal))
        assert await log.documents() == {}
        await log.put("insert", {"id": 5}, row(5))
        await log.done()
        assert sorted(await log.documents()) == ["5"]

        async def gone() -> bool:
            return not await log.engine.exists(old)

        assert await until(gone, seconds=30)
        assert await aliases(log) == [log.name, f"{log.name}-000001-w3"]
    assert await log.letters() == []


async def test_an_engine_that_does_not_list_its_indexes_yet_is_waited_for(
    nats: NatsServer, osmem: SearchEngine
) -> None:
    left = [b"{}"]

    def unlisted(request: Request) -> Answer | None:
        asked = request.path.startswith(f"/{log.name}-000001/_alias")
        return Answer(200, left.pop()) if left and asked else None

    async with faulty(osmem.port) as front, fed(nats.url, front.url) as log:
        await log.put("insert", {"id": 1}, row(1))
        await log.rebuild()
        front.before = unlisted
        with capture_logs() as said:
            async with log.reading():
                await log.put("insert", {"id": 2}, row(2))
                await log.done()
                opened = (await log.record()).generations[0].opened
                assert await aliases(log) == [log.name, f"{log.name}-000001-w{opened}"]
        assert left == []
        assert [one["event"] for one in said if "does not list" in str(one)] == ["waiting"]
        assert not [one for one in said if one["event"] == "alias put back"]


async def test_an_alias_of_a_former_reader_that_comes_back_late_is_taken_away(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.1)
    await quick.put("insert", {"id": 1}, row(1))
    async with quick.reading():
        await quick.done()
        own = await quick.writing()
        late = {"add": {"index": f"{quick.name}-000001", "alias": f"{quick.name}-000001-w"}}
        await quick.engine.json("POST", "/_aliases", {"actions": [late]})

        async def gone() -> bool:
            return await aliases(quick) == [quick.name, own]

        assert await until(gone, seconds=30)


async def test_a_reader_whose_write_alias_went_to_another_one_does_not_take_it_back(log: Log) -> None:
    await log.put("insert", {"id": 1}, row(1))
    with capture_logs() as said:
        async with log.reading():
            await log.done()
            old = await log.writing()
            assert old == f"{log.name}-000001-w2"
            found = await log.state.get(site(log.config, log.name).key, type(await log.record()))
            assert found is not None
            await log.state.put(site(log.config, log.name).key, found[0].having_opened(1), found[1])
            moved = [
                {"remove": {"index": f"{log.name}-000001", "alias": old}},
                {"add": {"index": f"{log.name}-000001", "alias": f"{log.name}-000001-w3"}},
            ]
            await log.engine.json("POST", "/_aliases", {"actions": moved})
            await log.put("insert", {"id": 2}, row(2))
            await log.put("delete", {"id": 1})
            await log.done()
            assert sorted(await log.documents()) == ["2"]
            assert await aliases(log) == [log.name, f"{log.name}-000001-w4"]
    assert "another process feeds" in str([one for one in said if one["event"] == "waiting"])
    assert not [one for one in said if one["event"] == "alias put back"]


@pytest.mark.parametrize("how", ["alias", "index"])
async def test_a_name_that_somebody_has_is_left_to_them(quick: Log, how: str) -> None:
    await quick.put("insert", {"id": 1}, row(1))
    await quick.rebuild()
    taken, theirs = f"{quick.name}-000001-w2", f"{quick.name}x"
    if how == "alias":
        await quick.engine.create(theirs, {"aliases": {taken: {"is_write_index": True}}})
    else:
        await quick.engine.json("PUT", f"/{taken}/_doc/7", {"of": "somebody"})
    with pytest.raises(IndexMismatch, match=f"write alias {taken}"):
        await run_index(quick.config, [], quick.servers)
    async with quick.reading():
        await quick.put("insert", {"id": 2}, row(2))
        await quick.done()
        assert sorted(await quick.documents()) == ["1", "2"]
        assert await aliases(quick) == [quick.name, f"{quick.name}-000001-w3"]
    kept = await quick.documents(taken)
    assert sorted(kept) == ([] if how == "alias" else ["7"])
    await quick.engine.delete(theirs if how == "alias" else taken)


async def test_a_reader_that_is_replaced_while_it_waits_takes_nothing_away(
    quick: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quick.put("insert", {"id": 1}, row(1))
    await quick.rebuild()
    take, waits, goes_on = belonging.take_writes, anyio.Event(), anyio.Event()

    async def slowly(*arguments: Any) -> None:
        if not waits.is_set():
            waits.set()
            await goes_on.wait()
        await take(*arguments)

    monkeypatch.setattr(feed, "take_writes", slowly)
    async with (
        looking(site(quick.config, quick.name), quick.servers, "slow") as place,
        anyio.create_task_group() as group,
    ):
        [generation] = (await place.record()).generations
        group.start_soon(feed.Feed(place, generation, Tally())._open)
        await waits.wait()
        async with quick.reading():
            await quick.put("insert", {"id": 2}, row(2))
            await quick.done()
            [fed] = (await quick.record()).generations
            goes_on.set()
            await quick.put("insert", {"id": 3}, row(3))
            await quick.done()
            assert sorted(await quick.documents()) == ["1", "2", "3"]
            assert fed.opened == 3
            assert fed.consumer in await consumers(quick.broker, quick.config.stream.name)
            assert fed.write_alias in await aliases(quick)
            assert (await quick.record()).generations[0].opened == 3


async def test_what_mends_rows_leaves_no_alias_of_a_former_reader(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    await quick.put("insert", {"id": 1}, row(1))
    await quick.rebuild()
    put_back = belonging.regain

    async def late(*arguments: Any) -> bool:
        if "again" not in done:
            done.append("again")
            async with quick.reading():
                await quick.put("insert", {"id": 2}, row(2))
                await quick.done()
        return await put_back(*arguments)

    done: list[str] = []
    monkeypatch.setattr(feed, "regain", late)
    async with looking(site(quick.config, quick.name), quick.servers, "verify") as place:
        [generation] = (await place.record()).generations
        mending = feed.Feed(place, generation, Tally())
        assert await mending.regain()
        assert mending.write_alias == f"{quick.name}-000001-w2"
    assert await aliases(quick) == [quick.name, f"{quick.name}-000001-w2"]


async def test_what_mends_rows_goes_on_where_a_reader_begins_meanwhile(quick: Log) -> None:
    await quick.posts(1, 3)
    await quick.rebuild()
    await quick.engine.json("DELETE", f"/{quick.name}-000001/_doc/2")
    async with looking(site(quick.config, quick.name), quick.servers, "verify") as place:
        [generation] = (await place.record()).generations
        async with rereading(place, generation) as reading:
            await reading.draw_all()
            mending = Mending(place, reading)
            async with anyio.create_task_group() as group:
                group.start_soon(_read, quick)
                assert await quick.writing() == f"{quick.name}-000001-w2"
                outcome = await mending.write(["2"])
                assert outcome.written == {"2"}
                assert await aliases(quick) == [quick.name, f"{quick.name}-000001-w2"]
                group.cancel_scope.cancel()
    assert sorted(await quick.documents()) == ["1", "2", "3"]


async def _read(log: Log) -> None:
    async with log.reading():
        await anyio.sleep_forever()
