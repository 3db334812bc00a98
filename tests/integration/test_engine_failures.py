"""What a search engine does when it is in trouble or somebody works on it: seen, named, and healed."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from bridge.embedded import NatsServer, SearchEngine
from bridge.errors import IndexMismatch
from bridge.index import watch
from bridge.index.engine import EngineError
from bridge.index.indexer import run_index
from bridge.stream.lease import Hold, Lost
from bridge.waiting import until
from tests.faults import Answer, Front, Request, faulty
from tests.integration.feeding import COLUMNS, Log, fed, row

pytestmark = pytest.mark.anyio
REAL = pytest.mark.parametrize("engine_url", ["opensearch", "elasticsearch"], indirect=True)


@pytest.fixture
def said() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases are looked at ten times a second."""
    monkeypatch.setattr(watch, "EVERY", 0.1)


async def line(said: list[Any], event: str, *words: str, seconds: float = 60) -> dict[str, Any]:
    """The first log line of an event that has all of these words."""

    def matching() -> list[Any]:
        return [one for one in said if one["event"] == event and all(word in str(one) for word in words)]

    async def there() -> bool:
        return bool(matching())

    assert await until(there, seconds=seconds), (event, words, said)
    found: dict[str, Any] = matching()[0]
    return found


async def holders(log: Log, name: str = "") -> list[str]:
    return sorted(await log.engine.indexes(name or log.name))


async def aliases(log: Log, *actions: dict[str, Any]) -> None:
    await log.engine.json("POST", "/_aliases", {"actions": list(actions)})


@asynccontextmanager
async def troubled(nats: NatsServer, engine: SearchEngine) -> AsyncIterator[tuple[Log, Front]]:
    """A reader that has one document, behind a front."""
    async with faulty(engine.port) as front, fed(nats.url, front.url) as log:
        await log.put("insert", {"id": 1}, row(1))
        async with log.reading():
            await log.done()
            yield log, front


def is_bulk(request: Request) -> bool:
    return "/_bulk" in request.path


async def test_nothing_is_sent_once_the_lease_has_run_out(
    nats: NatsServer, osmem: SearchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with troubled(nats, osmem) as (log, front):
        asked, check = 0, Hold.check

        def run_out(_: Hold) -> None:
            nonlocal asked
            asked += 1
            raise Lost("planted", "taking it again")

        async def twice() -> bool:
            return asked > 1

        before = len([one for one in front.seen if is_bulk(one)])
        with monkeypatch.context() as patched:
            patched.setattr(Hold, "check", run_out)
            await log.put("insert", {"id": 2}, row(2))
            assert await until(twice, seconds=20)
            assert len([one for one in front.seen if is_bulk(one)]) == before
        assert Hold.check is check
        await log.done()
        assert sorted(await log.documents()) == ["1", "2"]


# Answers


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, b'{"error":{"type":"rejected_execution_exception","reason":"planted"},"status":429}'),
        (429, b'{"error":{"type":"circuit_breaking_exception","reason":"[parent] planted"},"status":429}'),
        (500, b"<html>planted</html>"),
        (502, b""),
        (503, b'{"error":{"type":"unavailable_shards_exception","reason":"planted"},"status":503}'),
        (200, b"<html>planted</html>"),
        (200, b'{"errors":false,"items":[]}'),
        (200, b'{"errors":false,"items":[{}]}'),
        (200, b""),
    ],
)
async def test_a_request_that_fails_as_a_whole_is_sent_again_until_it_works(
    nats: NatsServer, osmem: SearchEngine, said: list[Any], status: int, body: bytes
) -> None:
    async with troubled(nats, osmem) as (log, front):
        left = [Answer(status, body)] * 3
        front.before = lambda request: left.pop() if left and is_bulk(request) else None
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert left == []
        assert sorted(await log.documents()) == ["1", "2"]
        assert await log.letters() == []
    assert len([one for one in said if one["event"] == "waiting"]) == 1
    assert "planted" not in str(said)


async def test_an_answer_that_is_cut_off_in_the_middle_is_asked_for_again(
    nats: NatsServer, osmem: SearchEngine, said: list[Any]
) -> None:
    async with troubled(nats, osmem) as (log, front):
        cuts = [1, 20, 60]
        front.after = lambda request, answer: (
            answer._replace(cut=min(cuts.pop(), len(answer.body))) if cuts and is_bulk(request) else answer
        )
        await log.posts(2, 50)
        await log.done()
        assert cuts == []
        assert len(await log.documents()) == 51
    await line(said, "back")


@pytest.mark.parametrize("status", [429, 503])
async def test_operations_that_are_refused_for_now_are_sent_again_and_the_others_are_not(
    nats: NatsServer, osmem: SearchEngine, said: list[Any], status: int
) -> None:
    async with troubled(nats, osmem) as (log, front):
        rounds = [0]

        def partly(request: Request, answer: Answer) -> Answer:
            if not is_bulk(request) or rounds[0] >= 3:
                return answer
            rounds[0] += 1
            found = json.loads(answer.body)
            refused = {"_index": "", "status": status, "error": {"type": "es_rejected_execution_exception"}}
            found["items"] = [{"index": refused} if i % 2 else item for i, item in enumerate(found["items"])]
            return Answer(200, json.dumps(found).encode())

        front.after = partly
        await log.posts(2, 40)
        await log.done()
        assert len(await log.documents()) == 41
        assert await log.letters() == []
    waits = [one for one in said if one["event"] == "waiting"]
    assert len(waits) == 1
    assert "es_rejected_execution_exception" in waits[0]["why"]


async def test_a_request_that_is_too_large_is_halved(nats: NatsServer, osmem: SearchEngine) -> None:
    async with troubled(nats, osmem) as (log, front):
        front.before = lambda request: Answer(413, b"") if is_bulk(request) and len(request.body) > 3_000 else None
        await log.posts(2, 100)
        await log.put("insert", {"id": 200}, row(200, body="x" * 4_000))
        await log.done()
        assert len(await log.documents()) == 101
        [letter] = await log.letters()
        assert (letter["key"], letter["reason"]) == ({"id": 200}, "status_413")


@pytest.mark.parametrize("what", ["_mget", "_search", "_refresh"])
async def test_an_answer_of_a_part_of_the_shards_is_none(
    nats: NatsServer, osmem: SearchEngine, said: list[Any], what: str
) -> None:
    async with troubled(nats, osmem) as (log, front):
        left = [1, 1]

        def partly(request: Request, answer: Answer) -> Answer:
            if what not in request.path or not left:
                return answer
            left.pop()
            found = json.loads(answer.body)
            if what == "_mget":
                error = {"type": "no_shard_available_action_exception", "reason": "planted"}
                found["docs"] = [{"_index": "x", "_id": doc["_id"], "error": error} for doc in found["docs"]]
            else:
                found |= {"_shards": {"total": 2, "successful": 1, "failed": 1}}
                if what == "_search":
                    found["hits"]["hits"] = []
            return Answer(200, json.dumps(found).encode())

        front.after = partly
        if what == "_mget":
            await log.put("update", {"id": 1}, {"id": 1, "title": "new", "price": 1}, unchanged=["body"])
            await log.done()
            assert (await log.documents())["1"]["body"] == row(1)["body"]
        else:
            await log.put("truncate")
            await log.done()
            assert await log.documents() == {}
        assert left == []
        assert await log.letters() == []
    assert "rows rebuilt from the log" not in str(said)
    assert "planted" not in str(said)


# What is done to an index


@REAL
async def test_a_read_only_index_is_named_waited_for_and_goes_on(log: Log, said: list[Any]) -> None:
    await log.put("insert", {"id": 1}, row(1))
    async with log.reading():
        await log.done()
        setting = f"/{log.name}/_settings"
        await log.engine.json("PUT", setting, {"index.blocks.read_only_allow_delete": True})
        last = await log.put("insert", {"id": 2}, row(2))
        found = await line(said, "waiting", "flood-stage")
        assert f"PUT /{log.name}-000001/_settings" in found["next"]
        assert (await log.record()).seq < last
        await log.engine.json("PUT", setting, {"index.blocks.read_only_allow_delete": None})
        await log.done()
        assert sorted(await log.documents()) == ["1", "2"]
        await log.engine.json("PUT", setting, {"index.blocks.read_only_allow_delete": True})
        async with anyio.create_task_group() as group:
            group.start_soon(log.rebuild)
            # OpenSearch does not take an alias off a blocked index: the switch waits for that, too.
            assert await until(lambda: _switched_or_said(log, said), seconds=120)
            with contextlib.suppress(EngineError):
                await log.engine.json("PUT", f"/{log.name}-000001/_settings", LIFTED)
        await log.done()
        assert await holders(log) == [f"{log.name}-000002"]
        assert f"{log.name}-000001" not in await log.engine.indexes(f"{log.name}-0*")
    assert await log.letters() == []


LIFTED = {"index.blocks.read_only_allow_delete": None}


async def _switched_or_said(log: Log, said: list[Any]) -> bool:
    return await holders(log) == [f"{log.name}-000002"] or "refuses POST /_aliases: the index takes" in str(said)


@REAL
async def test_a_closed_index_is_named_waited_for_and_goes_on(log: Log, said: list[Any]) -> None:
    await log.put("insert", {"id": 1}, row(1))
    async with log.reading():
        await log.done()
        await log.engine.json("POST", f"/{log.name}-000001/_close")
        await log.put("insert", {"id": 2}, row(2))
        found = await line(said, "waiting", "the index is closed")
        assert f"POST /{log.name}-000001/_open" in found["next"]
        await log.engine.json("POST", f"/{log.name}-000001/_open")
        await log.done()
        assert sorted(await log.documents()) == ["1", "2"]
    assert await log.letters() == []


async def test_a_write_alias_that_is_removed_is_put_back_by_the_next_write(log: Log, said: list[Any]) -> None:
    await log.put("insert", {"id": 1}, row(1))
    physical = f"{log.name}-000001"
    async with log.reading():
        await log.done()
        writing = await log.writing()
        await aliases(log, {"remove": {"index": physical, "alias": writing}})
        await log.put("insert", {"id": 2}, row(2))
        await log.put("delete", {"id": 1})
        await log.done()
        assert await holders(log, writing) == [physical]
        assert sorted(await log.documents()) == ["2"]
    await line(said, "alias put back", writing)
    assert await log.letters() == []


async def test_an_index_that_a_delete_makes_while_its_write_alias_is_put_back_is_no_loss(
    nats: NatsServer, osmem: SearchEngine, said: list[Any]
) -> None:
    async with troubled(nats, osmem) as (log, front):
        physical, writing = f"{log.name}-000001", await log.writing()
        asked: list[str] = []

        def taken(request: Request) -> Answer | None:
            if request.path.startswith(f"/{writing}/_alias"):
                asked.append(request.path)
                if len(asked) == 2:
                    return Answer(200, json.dumps({writing: {"aliases": {}}}).encode())
            return None

        await aliases(log, {"remove": {"index": physical, "alias": writing}})
        front.before = taken
        await log.put("insert", {"id": 1}, row(1))
        await log.done()
        assert len(asked) > 2
        assert await holders(log, writing) == [physical]
        assert sorted(await log.documents()) == ["1"]
        assert await log.letters() == []
    await line(said, "alias put back", writing)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("conflict", [False, True])
async def test_a_delete_that_an_index_in_the_alias_place_took_is_sent_again_though_that_index_is_gone_by_now(
    nats: NatsServer, osmem: SearchEngine, said: list[Any], times: int, conflict: bool
) -> None:
    async with troubled(nats, osmem) as (log, front):
        left = [1] * times
        writing = await log.writing()

        def elsewhere(request: Request) -> Answer | None:
            if not is_bulk(request) or not left:
                return None
            left.pop()
            item: dict[str, Any] = {"_index": writing, "status": 404, "result": "not_found"}
            if conflict:
                item |= {"status": 409, "error": {"type": "version_conflict_engine_exception", "reason": "planted"}}
            return Answer(200, json.dumps({"errors": conflict, "items": [{"delete": item}]}).encode())

        front.before = elsewhere
        await log.put("delete", {"id": 1})
        await log.done()
        assert left == []
        assert await log.documents() == {}
        assert await log.letters() == []
    assert len([one for one in said if "taken by another index" in str(one)]) == (times > 1)


async def test_an_index_in_the_alias_place_that_somebody_else_removes_first_is_no_error(
    nats: NatsServer, osmem: SearchEngine
) -> None:
    async with troubled(nats, osmem) as (log, front):
        physical, writing = f"{log.name}-000001", await log.writing()
        overtaken: list[str] = []

        def first(request: Request) -> Answer | None:
            if request.method != "DELETE" or request.path != f"/{writing}" or overtaken:
                return None
            overtaken.append(request.path)
            add = json.dumps({"actions": [{"add": {"index": physical, "alias": writing, "is_write_index": True}}]})
            for method, path, body in (("DELETE", f"/{writing}", None), ("POST", "/_aliases", add.encode())):
                direct = HTTPConnection("127.0.0.1", osmem.port)
                direct.request(method, path, body, {"content-type": "application/json"})
                assert direct.getresponse().status == 200
                direct.close()
            return None

        await aliases(log, {"remove": {"index": physical, "alias": writing}})
        await log.engine.create(writing, {})
        front.before = first
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert overtaken
        assert sorted(await log.documents()) == ["1", "2"]
        assert await holders(log, writing) == [physical]


@pytest.mark.usefixtures("often")
async def test_aliases_that_are_removed_are_put_back_without_a_write(log: Log, said: list[Any]) -> None:
    await log.put("insert", {"id": 1}, row(1))
    physical = f"{log.name}-000001"
    async with log.reading():
        await log.done()
        writing = await log.writing()
        for alias in (log.name, writing):
            await aliases(log, {"remove": {"index": physical, "alias": alias}})
        await line(said, "alias put back", f"'alias': '{log.name}'")
        await line(said, "alias put back", writing)
        assert await holders(log) == await holders(log, writing) == [physical]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("of", ["", "12"])
async def test_an_index_that_a_late_delete_has_made_in_place_of_a_write_alias_is_removed(log: Log, of: str) -> None:
    await log.put("insert", {"id": 1}, row(1))
    await log.engine.json("PUT", f"/{log.name}-000001-w9/_doc/1", {"of": "somebody"})
    async with log.reading():
        await log.done()
        await log.writing()
        late = f"{(await log.record()).physical}-w{of}"
        others = [f"{log.name}-007-w", f"{log.name}-202601-w3", f"{log.name}-000001-w9"]
        for one in others[:2]:
            await log.engine.create(one, {})
        await log.engine.create(late, {})

        async def gone() -> bool:
            return not await log.engine.exists(late)

        assert await until(gone, seconds=30)
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert [await log.engine.exists(one) for one in others] == [True] * 3
        for one in others:
            await log.engine.delete(one)


@pytest.mark.usefixtures("often")
async def test_an_index_in_the_alias_place_is_named_and_left_while_the_reader_goes_on(
    log: Log, said: list[Any]
) -> None:
    await log.put("insert", {"id": 1}, row(1))
    physical = f"{log.name}-000001"
    async with log.reading():
        await log.done()
        await until_taken(log)
        found = await line(said, "alias astray", "--replace-index")
        assert found["still_feeding"] == physical
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert sorted(await log.documents(physical)) == ["1", "2"]
        assert await holders(log) == [log.name]
        await log.rebuild(replace_index=True)
        await log.done()
        assert await holders(log) == [f"{log.name}-000002"]
        assert sorted(await log.documents()) == ["1", "2"]
        assert len([one for one in said if one["event"] == "alias astray"]) == 1


async def until_taken(log: Log) -> None:
    """Make an index of the alias' name: in the moment before the reader puts the alias back, or by taking it away."""

    async def made() -> bool:
        there = await holders(log)
        if there == [log.name]:
            return True
        for holder in there:
            await aliases(log, {"remove": {"index": holder, "alias": log.name}})
        with contextlib.suppress(EngineError):
            await log.engine.create(log.name, {})
        return False

    assert await until(made, seconds=60, every=0)


@pytest.mark.usefixtures("often")
async def test_an_alias_moved_by_hand_is_named_and_not_touched(log: Log, said: list[Any]) -> None:
    await log.put("insert", {"id": 1}, row(1))
    physical, other = f"{log.name}-000001", f"{log.name}x"
    await log.engine.create(other, {})
    async with log.reading():
        await log.done()
        move = [{"remove": {"index": physical, "alias": log.name}}, {"add": {"index": other, "alias": log.name}}]
        await aliases(log, *move)
        found = await line(said, "alias astray", other)
        assert f"bridge reindex {log.name}" in found["next"]
        await log.put("insert", {"id": 2}, row(2))
        await log.done()
        assert sorted(await log.documents(physical)) == ["1", "2"]
        assert await holders(log) == [other]
        await aliases(log, {"add": {"index": physical, "alias": log.name}})
        await line(said, "alias astray", "as well")
        await aliases(log, {"remove": {"index": other, "alias": log.name}})
        await line(said, "alias right again")
        await aliases(log, *move)
        await log.rebuild()
        assert await holders(log) == [f"{log.name}-000002"]


@pytest.mark.usefixtures("often")
async def test_an_index_deleted_under_an_idle_reader_ends_it_with_the_remedy_that_mends_it(log: Log) -> None:
    await log.posts(1, 5)

    async def lose() -> None:
        await log.done()
        await log.engine.delete(f"{log.name}-000001")

    async with anyio.create_task_group() as group:
        group.start_soon(lose)
        with pytest.raises(IndexMismatch, match=f"bridge reindex {log.name}"):
            await run_index(log.config, [], log.servers)
    assert (await log.rebuild()).documents == 5
    async with log.reading():
        await log.put("insert", {"id": 9}, row(9))
        await log.done()
        assert len(await log.documents()) == 6


@pytest.mark.usefixtures("often")
async def test_an_index_made_again_or_restored_in_place_is_no_longer_the_one_that_was_fed(log: Log) -> None:
    await log.posts(1, 5)
    physical = f"{log.name}-000001"

    async def restore() -> None:
        await log.done()
        found = (await log.engine.json("GET", f"/{physical}/_mapping"))[physical]
        await log.engine.delete(physical)
        body = {"mappings": found["mappings"], "aliases": {log.name: {}, f"{physical}-w": {}}}
        await log.engine.create(physical, body)

    async with anyio.create_task_group() as group:
        group.start_soon(restore)
        with pytest.raises(IndexMismatch, match=r"reindex"):
            await run_index(log.config, [], log.servers)
    with pytest.raises(IndexMismatch, match="restored from a backup or made again"):
        await run_index(log.config, [], log.servers)
    assert (await log.rebuild()).documents == 5


async def test_an_index_that_goes_while_it_is_looked_at_is_gone(nats: NatsServer, osmem: SearchEngine) -> None:
    async with faulty(osmem.port) as front, fed(nats.url, front.url) as log:
        await log.posts(1, 2)
        await log.rebuild()
        physical, known = f"{log.name}-000001", (await log.record()).generations[0].uuid
        assert known

        def gone(request: Request) -> Answer | None:
            error = {"error": {"type": "index_not_found_exception", "reason": "planted"}, "status": 404}
            return Answer(404, json.dumps(error).encode()) if request.path == f"/{physical}/_settings" else None

        front.before = gone
        with pytest.raises(IndexMismatch, match="is gone"):
            await run_index(log.config, [], log.servers)
        assert (await log.record()).generations[0].uuid == known


async def test_an_engine_that_comes_back_empty_is_named_and_filled_by_a_rebuild(nats: NatsServer) -> None:
    async with SearchEngine.throwaway() as own, fed(nats.url, own.url) as log:
        await log.posts(1, 20)
        async with anyio.create_task_group() as group:

            async def replace() -> None:
                await log.done()
                await own.kill()
                await own.start()
                await log.put("insert", {"id": 21}, row(21))

            group.start_soon(replace)
            with pytest.raises(IndexMismatch, match=f"bridge reindex {log.name}"), anyio.fail_after(60):
                await run_index(log.config, [], log.servers)
        assert (await log.rebuild()).documents == 21
        async with log.reading():
            await log.put("insert", {"id": 22}, row(22))
            await log.done()
            assert len(await log.documents()) == 22


# Most documents rejected


async def storm(log: Log, count: int, **changes: Any) -> None:
    for number in range(1_000, 1_000 + count):
        await log.publish("insert", log.wire("insert", {"id": number}, row(number, **changes)))


async def test_a_storm_of_rejected_documents_pauses_and_goes_on_with_a_rebuild_of_another_mapping(
    log: Log, said: list[Any], tmp_path: Path
) -> None:
    await log.columns({**COLUMNS, "score": "integer"})
    await log.put("insert", {"id": 1}, row(1, score=1))
    async with log.reading():
        await log.done()
        await storm(log, 250, score="planted words")
        found = await line(said, "waiting", "documents were rejected", "[score")
        assert "reject_limit" in found["next"]
        assert "planted" not in str(said)
        buried = len(await log.letters())
        assert buried < 200
        assert (await log.record()).seq < log.last
        with pytest.raises(IndexMismatch, match=r"of the last \d+ documents were rejected"):
            await log.rebuild()
        record = await log.record()
        assert [(g.number, g.state) for g in record.generations] == [(1, "live")]
        assert await holders(log) == [f"{log.name}-000001"]
        file = tmp_path / "mapping.json"
        file.write_text('{"mappings": {"properties": {"score": {"type": "text"}}}}')
        log.with_index(mapping=str(file))
        assert (await log.rebuild()).documents == 251
        await log.put("insert", {"id": 2}, row(2, score=1))
        await log.done()
        assert len(await log.documents()) == 252
    assert len([one for one in said if "documents were rejected" in str(one)]) == 1


async def test_a_pause_ends_by_itself_once_the_engine_takes_the_documents(
    nats: NatsServer, osmem: SearchEngine, said: list[Any]
) -> None:
    async with troubled(nats, osmem) as (log, front):
        refusing = [True]

        def refused(request: Request) -> Answer | None:
            if not refusing or not is_bulk(request):
                return None
            error = {"type": "mapper_parsing_exception", "reason": "failed to parse field [title]: planted"}
            count = request.body.count(b'{"index":')
            item = {"index": {"_index": "", "status": 400, "error": error}}
            return Answer(200, json.dumps({"errors": True, "items": [item] * count}).encode())

        front.before = refused
        await log.posts(2, 3_000)
        found = await line(said, "waiting", "documents were rejected")
        assert "mapper_parsing_exception [title]" in found["why"]
        assert "bridge reindex" in found["next"]
        sent = len(front.seen)

        async def tried_again() -> bool:
            return len([request for request in front.seen[sent:] if is_bulk(request)]) > 2

        assert await until(tried_again, seconds=60)
        buried = len(await log.letters())
        assert buried < 500
        refusing.clear()
        await log.done(seconds=120)
        await line(said, "back", f"index {log.name}")
        assert len(await log.letters()) == buried
        assert len(await log.documents()) == 3_001 - buried
    assert len([one for one in said if "documents were rejected" in str(one)]) == 1


async def test_a_transform_that_fails_for_most_rows_pauses_until_a_restart_with_a_corrected_one(
    quick: Log, said: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes_that_fail.py").write_text(
        "broken = False\n"
        "def make(row):\n"
        "    if broken: raise ValueError(row['title'])\n"
        "    return {'text': row['title']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    shapes = importlib.import_module("shapes_that_fail")
    quick.with_index(transform="shapes_that_fail:make")
    await quick.put("insert", {"id": 1}, row(1))
    async with quick.reading():
        await quick.done()
        monkeypatch.setattr(shapes, "broken", True)
        await quick.posts(2, 1_500)
        await line(said, "waiting", "the transform raised ValueError")
        buried = len(await quick.letters())
        assert buried < 500
        assert (await quick.record()).seq < quick.last
    monkeypatch.setattr(shapes, "broken", False)
    consumer = (await quick.record()).consumer
    info = await quick.broker.api(f"CONSUMER.INFO.{quick.config.stream.name}.{consumer}")
    floor = min((await quick.record()).seq, info["ack_floor"]["stream_seq"])
    letters = await quick.letters()
    async with quick.reading():
        await quick.done()
        # What was buried past the floor is read once more.
        passed = {str(letter["key"]["id"]) for letter in letters if letter["seq"] <= floor}
        assert set(await quick.documents()) == {str(n) for n in range(1, 1_502)} - passed
    assert await quick.letters() == letters


@pytest.mark.parametrize("limit", [0.9, 1.0])
async def test_below_the_limit_rejected_documents_are_buried(quick: Log, said: list[Any], limit: float) -> None:
    quick.with_index(reject_limit=limit)
    await quick.columns({**COLUMNS, "score": "integer"})
    for start in range(0, 300, 10):
        for number in range(start, start + 10):
            score: Any = 1 if limit < 1 and number % 5 == 0 else "words"
            await quick.publish("insert", quick.wire("insert", {"id": number}, row(number, score=score)))
    summary = await quick.rebuild()
    assert summary.rejected == len(await quick.letters()) == (240 if limit < 1 else 300)
    assert summary.documents == 300 - summary.rejected
    assert "documents were rejected" not in str(said)


async def test_a_rebuild_of_few_rows_is_not_switched_to_where_most_were_rejected(quick: Log) -> None:
    await quick.columns({**COLUMNS, "score": "integer"})
    for number in range(1, 9):
        await quick.put("insert", {"id": number}, row(number, score="words" if number > 3 else 1))
    await quick.put("delete", {"id": 8})
    await quick.put("insert", {"id": 9}, row(9, score=1))
    async with quick.reading():
        await quick.done()
        assert sorted(await quick.documents()) == ["1", "2", "3", "9"]
    assert (await quick.rebuild()).documents == 4
    await quick.put("insert", {"id": 10}, row(10, score="words"))
    with pytest.raises(IndexMismatch, match="5 of 9 documents") as refused:
        await quick.rebuild()
    assert "reject_limit" in refused.value.remedy
    assert [(g.number, g.state) for g in (await quick.record()).generations] == [(2, "live")]
    assert await holders(quick) == [f"{quick.name}-000002"]
    quick.with_index(reject_limit=0.6)
    assert (await quick.rebuild()).documents == 4
    quick.with_index(reject_limit=0.5)
    await quick.put("update", {"id": 10}, row(10, score=2))
    assert (await quick.rebuild()).documents == 5


async def test_a_rebuild_that_would_show_nothing_because_all_was_rejected_is_not_switched_to(quick: Log) -> None:
    await quick.columns({**COLUMNS, "score": "integer"})
    await quick.put("insert", {"id": 1}, row(1, score="words"))
    with pytest.raises(IndexMismatch, match="1 of 1 documents"):
        await quick.rebuild()
    assert (await quick.record()).generations == []
    assert await holders(quick) == []
    await quick.put("truncate")
    assert (await quick.rebuild()).documents == 0


async def test_rows_whose_older_document_stays_count_as_rejected_too(quick: Log) -> None:
    await quick.columns({**COLUMNS, "score": "integer"})
    for number in range(1, 5):
        await quick.put("insert", {"id": number}, row(number, score=1))
    assert (await quick.rebuild()).documents == 4
    for number in range(1, 4):
        await quick.put("update", {"id": number}, row(number, score="words"))
    with pytest.raises(IndexMismatch, match="3 of 4 documents"):
        await quick.rebuild()
    assert await holders(quick) == [f"{quick.name}-000001"]
