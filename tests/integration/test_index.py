"""An index fed from the log: on an in-memory engine always, on a real OpenSearch where one can be had."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from bridge import structured
from bridge.embedded import NatsServer
from bridge.errors import ConfigError, IndexMismatch, ServerRefused
from bridge.index import bulk, feed
from bridge.index.document import Builder
from bridge.index.indexer import run_index
from bridge.index.naming import Rejected
from bridge.stream.definition import ensure_stream
from bridge.stream.reader import delete_consumer
from bridge.stream.state import Column as StateColumn
from bridge.stream.state import TableRecord
from bridge.stream.subjects import source_subjects, table_key
from bridge.waiting import until
from tests.integration.feeding import COLUMNS, Log, fed, row
from tests.proxy import Proxy

pytestmark = pytest.mark.anyio


def post(number: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Key and row of a post."""
    return {"id": number}, row(number, **changes)


async def built(log: Log) -> dict[str, dict[str, Any]]:
    """The documents once a reader has caught up."""
    async with log.reading():
        await log.done()
        return await log.documents()


async def stored(log: Log, doc_id: str) -> dict[str, Any]:
    found = await log.engine.json("GET", f"/{log.name}/_doc/{doc_id}")
    assert isinstance(found, dict)
    return found


# Documents


async def test_inserts_updates_and_deletes_end_as_the_table(log: Log) -> None:
    await log.put("read", *post(1))
    await log.put("insert", *post(2))
    await log.put("insert", *post(3))
    await log.put("update", *post(2, title="second"))
    await log.put("delete", {"id": 3})
    await log.put("delete", {"id": 77})
    assert await built(log) == {"1": row(1), "2": row(2, title="second")}


async def test_numbers_keep_every_digit_and_documents_carry_version_and_key(log: Log) -> None:
    digits = '{"id":1,"title":"a","body":null,"price":12345678901234567890.123456789012345678901234567890}'
    seq = await log.put("insert", {"id": 1}, digits)
    await built(log)
    raw = await log.engine.ask("GET", f"/{log.name}/_doc/1")
    assert b"12345678901234567890.123456789012345678901234567890" in raw
    found = json.loads(raw)
    assert found["_version"] == found["_source"]["_bridge"]["version"] == (1 << 42) + seq
    assert found["_source"]["_bridge"]["key"] == {"id": 1}
    assert found["_source"]["_bridge"]["table"] == "public.posts"


async def test_what_a_killed_writer_sent_comes_in_late_and_still_counts_in_the_streams_order(log: Log) -> None:
    await log.writers((1, 1), (2, 1))
    log.epoch = 2
    await log.put("insert", *post(1, title="of the successor"))
    log.epoch = 1
    await log.put("update", *post(1, title="late, and next in order"))
    assert (await built(log))["1"]["title"] == "late, and next in order"
    record = await log.record()
    await delete_consumer(log.broker, log.config.stream.name, record.consumer)
    await log.state.put(f"index.{log.config.source.name}.{log.name}", record.having_changed(1, seq=1, epoch=2))
    log.epoch = 2
    await log.put("insert", *post(2))
    assert (await built(log))["1"]["title"] == "late, and next in order"


async def test_everything_delivered_again_changes_nothing(log: Log) -> None:
    await log.put("insert", *post(1))
    await log.put("insert", *post(2))
    await log.put("update", {"id": 1}, {"id": 1, "title": "t", "price": 2}, unchanged=["body"])
    await log.put("update", {"id": 9}, {"id": 9, "title": "moved", "price": 3}, before={"id": 2}, unchanged=["body"])
    await log.put("truncate")
    await log.put("insert", *post(4))
    await log.put("insert", *post(5))
    await log.put("update", {"id": 5}, {"id": 5, "title": "last", "price": 2}, unchanged=["body"])
    await log.put("delete", {"id": 4})
    wanted = {"5": {**row(5), "title": "last", "price": 2}}
    assert await built(log) == wanted
    record = await log.record()
    await delete_consumer(log.broker, log.config.stream.name, record.consumer)
    await log.state.put(f"index.{log.config.source.name}.{log.name}", record.having_changed(1, seq=0, epoch=1))
    assert await built(log) == wanted
    assert await log.letters() == []


async def test_a_truncate_that_comes_again_spares_what_came_after_it(log: Log) -> None:
    await log.posts(1, 1_500)
    await log.put("truncate")
    await log.put("insert", *post(2, title="after"))
    assert await built(log) == {"2": row(2, title="after")}


async def test_truncating_a_partition_spares_the_others(log: Log) -> None:
    await log.put("insert", *post(1), partition="public.posts_a")
    await log.put("insert", *post(2), partition="public.posts_b")
    await log.put("truncate", partition="public.posts_a")
    assert await built(log) == {"2": row(2)}


async def test_a_complete_read_sweeps_what_was_deleted_unseen(log: Log) -> None:
    await log.posts(1, 4)
    async with log.reading():
        await log.done()
        await log.put("snapshot", phase="begin")
        await log.put("read", *post(1))
        await log.put("update", *post(2, title="touched meanwhile"))
        await log.done()
    async with log.reading():
        await log.put("snapshot", phase="end")
        await log.put("insert", *post(5))
        await log.done()
        assert sorted(await log.documents()) == ["1", "2", "5"]


async def test_a_changed_key_moves_the_document_with_its_unchanged_columns(log: Log) -> None:
    await log.put("insert", *post(1, body="long text"))
    async with log.reading():
        await log.done()
        await log.put("update", {"id": 2}, {"id": 2, "title": "t", "price": 1}, before={"id": 1}, unchanged=["body"])
        await log.put("update", *post(3, title="again"), before={"id": 2})
        await log.put("insert", *post(1, title="the old key anew"))
        await log.done()
        found = await log.documents()
    assert found == {"3": row(3, title="again"), "1": row(1, title="the old key anew")}


async def test_full_identity_without_a_changed_key_is_no_move(log: Log) -> None:
    await log.put("insert", *post(1))
    await log.put("update", *post(1, title="new"), before=row(1))
    assert await built(log) == {"1": row(1, title="new")}


# Columns that PostgreSQL did not send


def moved(old: int, new: int, title: str) -> dict[str, Any]:
    """An update of a key that leaves the body alone."""
    after = {"id": new, "title": title, "price": 1}
    return {"key": {"id": new}, "after": after, "before": {"id": old}, "unchanged": ["body"]}


async def taken_alone(log: Log, seq: int, number: int, title: str) -> None:
    """Put the document of one event of a bulk into the index, as an engine does that is killed in the middle of it."""
    hidden = {"version": (1 << 42) + seq, "table": "public.posts", "key": {"id": number}}
    document = {"id": number, "title": title, "price": 1, "body": f"of {title}", "_bridge": hidden}
    path = f"/{log.name}/_doc/{number}?version={hidden['version']}&version_type=external"
    await log.engine.json("PUT", path, document)


def titled(**numbers: int) -> dict[str, Any]:
    """The documents of rows by their titles, each with its own body."""
    return {str(n): {"id": n, "title": title, "price": 1, "body": f"of {title}"} for title, n in numbers.items()}


async def test_a_row_whose_old_key_another_one_took_is_not_lost_where_a_bulk_was_taken_in_part(log: Log) -> None:
    await log.put("insert", *post(1, body="of one"))
    await log.put("insert", *post(2, body="of two"))
    await built(log)
    await log.put("update", **moved(1, 3, "one"))
    await taken_alone(log, await log.put("update", **moved(2, 1, "two")), 1, "two")
    assert await built(log) == titled(one=3, two=1)


async def test_rows_that_exchange_keys_by_way_of_a_third_keep_their_own_columns(log: Log) -> None:
    await log.put("insert", *post(1, body="of one"))
    await log.put("insert", *post(2, body="of two"))
    await built(log)
    seqs = []
    for one, two in (("one", "two"), ("two", "one")):
        seqs.append(await log.put("update", **moved(1, 3, one)))
        await log.put("update", **moved(2, 1, two))
        await log.put("update", **moved(3, 2, one))
    # The second exchange is in the index in part, the first not at all.
    await taken_alone(log, seqs[1], 3, "two")
    assert await built(log) == titled(one=1, two=2)


async def test_unchanged_columns_come_from_the_index_or_from_what_is_on_its_way(log: Log) -> None:
    await log.put("insert", *post(1, body="kept"))
    async with log.reading():
        await log.done()
        await log.put("update", {"id": 1}, {"id": 1, "title": "one", "price": 1}, unchanged=["body"])
        await log.put("update", {"id": 1}, {"id": 1, "title": "two", "price": 1}, unchanged=["body"])
        await log.put("update", *post(1, body="new body"))
        await log.put("update", {"id": 1}, {"id": 1, "title": "three", "price": 1}, unchanged=["body"])
        await log.done()
        assert await log.documents() == {"1": {"id": 1, "title": "three", "price": 1, "body": "new body"}}


async def test_a_missing_base_is_rebuilt_from_the_log(log: Log) -> None:
    await log.put("insert", *post(1, body="from the log"))
    await log.put("update", {"id": 2}, {"id": 2, "title": "moved", "price": 1}, before={"id": 1}, unchanged=["body"])
    async with log.reading():
        await log.done()
        await log.engine.ask("DELETE", f"/{log.name}/_doc/2")
        await log.engine.refresh(log.name)
        await log.put("update", {"id": 2}, {"id": 2, "title": "late", "price": 1}, unchanged=["body"])
        await log.done()
        assert await log.documents() == {"2": {"id": 2, "title": "late", "price": 1, "body": "from the log"}}
    assert await log.letters() == []


async def test_a_base_that_nobody_knows_becomes_a_dead_letter_and_never_a_null(log: Log) -> None:
    await log.put("update", {"id": 1}, {"id": 1, "title": "t", "price": 1}, unchanged=["body"])
    await log.put("insert", *post(2))
    assert await built(log) == {"2": row(2)}
    [letter] = await log.letters()
    assert letter["seq"] == 1
    assert "body" in letter["reason"]


async def test_an_update_behind_a_rejected_one_takes_its_columns_from_the_log(log: Log) -> None:
    await log.columns({**COLUMNS, "score": "integer"})
    await log.put("insert", *post(1, score=1, body="old"))
    async with log.reading():
        await log.done()
        await log.put("update", *post(1, score="no number", body="new"))
        await log.done()
        await log.put("update", {"id": 1}, {"id": 1, "title": "t", "price": 1, "score": 3}, unchanged=["body"])
        await log.done()
        assert (await log.documents())["1"]["body"] == "new"
    assert len(await log.letters()) == 1


# Dead letters


async def test_a_rejected_document_is_buried_without_its_values_and_stops_nothing(
    log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    await log.put("insert", *post(1))
    seq = await log.put("insert", {"id": 2}, {"id": "planted secret", "title": "x"})
    await log.put("insert", *post(3))
    assert sorted(await built(log)) == ["1", "3"]
    [letter] = await log.letters()
    assert (letter["seq"], letter["key"], letter["generation"]) == (seq, {"id": 2}, 1)
    assert "[id" in letter["reason"]
    assert "planted" not in letter["reason"]
    output = capfd.readouterr()
    assert "dead letter" in output.out
    assert "planted" not in output.out + output.err


async def test_what_is_no_event_is_buried(quick: Log) -> None:
    await quick.publish("insert", b"not json")
    await quick.put("insert", *post(1))
    assert await built(quick) == {"1": row(1)}
    [letter] = await quick.letters()
    assert letter["seq"] == 1


async def test_a_bulk_that_is_too_large_as_a_whole_is_halved(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    whole = type(quick.engine).bulk

    async def small_only(self: Any, alias: str, body: bytes, count: int) -> Any:
        sent.append(len(body))
        if len(body) > 4_000:
            self_error = self._refusal(413, b"", "POST /_bulk")
            raise self_error
        return await whole(self, alias, body, count)

    monkeypatch.setattr(type(quick.engine), "bulk", small_only)
    await quick.posts(1, 100)
    await quick.put("insert", *post(200, body="x" * 5_000))
    assert len(await built(quick)) == 100
    assert max(sent) > 4_000
    assert [letter["key"] for letter in await quick.letters()] == [{"id": 200}]


DEEP = "[" * 3_000 + "]" * 3_000


async def test_what_cannot_be_read_is_buried_with_its_key_and_stops_nothing(log: Log) -> None:
    await log.put("insert", *post(1, body="old"))
    values = [DEEP, '{"a":' * 600 + "1" + "}" * 600, '"\\ud800"', '{"\\udc00x":1}']
    for number, value in enumerate(values, 2):
        await log.put("insert", {"id": number}, f'{{"id":{number},"title":"t","body":{value}}}')
    await log.put("update", {"id": 1}, f'{{"id":1,"title":"lost","body":{DEEP}}}')
    last = await log.put("update", {"id": 1}, {"id": 1, "title": "t"}, unchanged=["body"])
    await log.put("insert", *post(9))
    assert await built(log) == {"1": row(1, body="old"), "9": row(9)}
    letters = await log.letters()
    keys = [{"id": 2}, {"id": 3}, {"id": 4}, {"id": 5}, {"id": 1}, {"id": 1}]
    assert [(letter["seq"], letter["key"]) for letter in letters] == list(zip(range(2, 8), keys, strict=True))
    assert [letter["id"] for letter in letters] == ["2", "3", "4", "5", "1", "1"]
    assert letters[-1]["seq"] == last
    assert "body" in letters[-1]["reason"]
    assert await built(log) == {"1": row(1, body="old"), "9": row(9)}


async def test_documents_just_as_deep_as_is_taken_are_read_back(quick: Log) -> None:
    deep = "[" * 498 + "]" * 498
    await quick.columns({"id": "bigint", "doc": "jsonb", "n": "integer"})
    await quick.put("insert", {"id": 1}, f'{{"id":1,"doc":{deep},"n":1}}')
    async with quick.reading():
        await quick.done()
        await quick.put("update", {"id": 1}, {"id": 1, "n": 2}, unchanged=["doc"])
        await quick.done()
        assert (await stored(quick, "1"))["_source"]["n"] == 2
    assert await quick.letters() == []


async def test_events_from_before_the_table_had_a_key_get_it_from_their_rows(quick: Log) -> None:
    await quick.columns(COLUMNS, key=("id",))
    await quick.put("read", None, row(1))
    await quick.put("read", None, '{"title":"no id","body":"x"}')
    await quick.publish("read", quick.wire("read", None, row(3)).replace(b'"after"', b'"key":null,"after"'))
    await quick.put("delete", None, before=row(1))
    await quick.put("update", {"id": 3}, {"id": 3, "title": "t", "price": 1}, unchanged=["body"])
    assert await built(quick) == {"3": {**row(3), "title": "t", "price": 1}}
    [letter] = await quick.letters()
    assert (letter["seq"], letter["key"]) == (2, None)
    assert "(id)" in letter["reason"]
    assert len(await built(quick)) == 1


async def test_a_table_that_lost_its_key_ends_the_reader_with_the_remedy(quick: Log) -> None:
    await quick.put("insert", *post(1))
    await built(quick)
    await quick.columns(COLUMNS, key=())
    await quick.put("insert", None, row(2))
    with pytest.raises(ServerRefused, match="give it a primary key"):
        await run_index(quick.config, [], quick.servers)


async def test_a_stale_event_without_a_base_is_dropped_when_it_comes_again(quick: Log) -> None:
    await quick.put("snapshot", phase="begin")
    await quick.put("insert", *post(1))
    await quick.put("snapshot", phase="end")
    await quick.put("update", {"id": 2}, {"id": 2, "title": "a", "price": 1}, before={"id": 1}, unchanged=["body"])
    await quick.put("update", {"id": 2}, {"id": 2, "title": "b", "price": 1}, unchanged=["body"])
    wanted = {"2": {**row(1), "id": 2, "title": "b", "price": 1}}
    assert await built(quick) == wanted
    record = await quick.record()
    await delete_consumer(quick.broker, quick.config.stream.name, record.consumer)
    await quick.state.put(f"index.{quick.config.source.name}.{quick.name}", record.having_changed(1, seq=0, epoch=1))
    assert await built(quick) == wanted
    assert await quick.letters() == []


async def test_many_bases_are_taken_from_the_log_in_one_go(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    whole = feed.Feed.history

    def counting(self: feed.Feed, upto: int) -> Any:
        passes.append(upto)
        return whole(self, upto)

    await quick.put("insert", *post(1, body="kept"))
    async with quick.reading():
        await quick.done()
    for number in range(2, 100):
        after = {"id": number, "title": "not a number" if number < 99 else "x", "price": 1}
        await quick.put("update", {"id": number}, after, before={"id": number - 1}, unchanged=["body"])
    await quick.engine.ask("DELETE", f"/{quick.name}/_doc/1")
    monkeypatch.setattr(feed.Feed, "history", counting)

    async def never(self: Any, *args: Any) -> Any:
        if args[0].op == "update" and args[1] != "99":
            raise Rejected("planted")
        return await build(self, *args)

    build = Builder.build
    monkeypatch.setattr(Builder, "build", never)
    assert await built(quick) == {"99": {"id": 99, "title": "x", "price": 1, "body": "kept"}}
    assert len(await quick.letters()) == 97
    assert len(passes) <= 4


# Columns that come later


async def test_a_column_that_came_later_is_added_with_its_type(log: Log) -> None:
    await log.put("insert", *post(1))
    async with log.reading():
        await log.done()
        await log.columns({**COLUMNS, "views": "bigint"})
        await log.put("schema")
        await log.put("insert", *post(2, views=5))
        await log.columns({**COLUMNS, "views": "bigint", "likes": "integer"})
        await log.put("insert", *post(3, views=5, likes=7))
        await log.put("insert", *post(4, nobody_said="text"))
        await log.done()
        found = await log.engine.json("GET", f"/{log.name}/_mapping")
        properties = next(iter(found.values()))["mappings"]["properties"]
    assert (properties["views"]["type"], properties["likes"]["type"]) == ("long", "integer")
    assert properties["nobody_said"]["type"] == "text"
    assert await log.letters() == []


async def test_rows_are_shaped_as_configured(log: Log) -> None:
    log.with_index(exclude=["price"], rename={"body": "text"})
    await log.put("insert", *post(1, body="kept"))
    async with log.reading():
        await log.done()
        await log.put("update", {"id": 1}, {"id": 1, "title": "new"}, unchanged=["body", "price"])
        await log.done()
        assert await log.documents() == {"1": {"id": 1, "title": "new", "text": "kept"}}


async def test_a_transform_makes_documents_and_failures_become_dead_letters(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes_of_posts.py").write_text(
        "async def make(row):\n"
        "    if row['id'] == 2: return None\n"
        "    if row['id'] == 3: raise ValueError(row['title'])\n"
        "    return {'text': row['title'] + ' ' + row['body'], 'price': row['price']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    log.with_index(transform="shapes_of_posts:make")
    for number in (1, 2, 3):
        await log.put("insert", *post(number, body="kept"))
    async with log.reading():
        await log.done()
        await log.put("update", {"id": 1}, {"id": 1, "title": "new", "price": 2}, unchanged=["body"])
        await log.done()
        assert await log.documents() == {"1": {"text": "new kept", "price": 2}}
    [letter] = await log.letters()
    assert letter["reason"] == "the transform raised ValueError"


# What goes away and comes back


async def test_an_engine_that_goes_away_is_waited_for(
    nats: NatsServer, engine_url: str, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(int(engine_url.rsplit(":", 1)[1]))
    async with fed(nats.url, f"http://127.0.0.1:{proxy.port}") as log, log.reading():
        await log.posts(1, 10)
        await log.done()
        with capture_logs() as said:
            await proxy.refuse()
            await log.posts(11, 3_000)
            assert await until(lambda: _holds(said, "waiting"), seconds=10)
            await anyio.sleep(1)
            proxy.accept()
            await log.done()
        outages = [line for line in said if line["event"] == "waiting"]
        assert len(outages) == 1
        assert await _holds(said, "back")
        assert len(await log.documents()) == 3_010


async def _holds(lines: list[Any], event: str) -> bool:
    return any(line["event"] == event for line in lines)


async def test_an_index_that_is_blocked_is_waited_for(log: Log) -> None:
    await log.put("insert", *post(1))
    async with log.reading():
        await log.done()
        block = f"/{log.name}/_settings"
        await log.engine.json("PUT", block, {"index.blocks.read_only_allow_delete": True})
        await log.put("insert", *post(2))
        await anyio.sleep(1)
        assert (await log.record()).seq == 1 or "2" in await log.documents()
        await log.engine.json("PUT", block, {"index.blocks.read_only_allow_delete": None})
        await log.done()
        assert sorted(await log.documents()) == ["1", "2"]
    assert await log.letters() == []


async def test_a_broker_that_goes_away_is_waited_for(
    own_nats: NatsServer, osmem: Any, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(own_nats.port)
    async with fed(own_nats.url, osmem.url) as log:
        log.servers = [f"nats://127.0.0.1:{proxy.port}"]
        await log.posts(1, 100)
        async with log.reading():
            await log.done()
            for turn in range(1, 4):
                await proxy.cut()
                await log.posts(1 + 1_000 * turn, 1_000)
            await log.done()
            assert len(await log.documents()) == 3_100


READER = """
import sys, uvloop
from bridge.index.indexer import run_index
from bridge.index.naming import Rejected
from tests.integration.feeding import configured
tag, nats, engine = sys.argv[1:]
config = configured(tag, nats, engine)
uvloop.run(run_index(config, [], [nats]))
"""


async def test_a_reader_killed_again_and_again_loses_nothing(nats: NatsServer, engine_url: str) -> None:
    async with fed(nats.url, engine_url, tag="killed") as log:
        await log.posts(1, 500)
        for turn in range(4):
            command = [sys.executable, "-c", READER, "killed", nats.url, engine_url]
            async with await anyio.open_process(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                try:
                    await log.posts(1 + 1_000 * (turn + 1), 1_000)
                    await log.put("delete", {"id": turn + 1})
                    await log.put(
                        "update", {"id": 1001}, {"id": 1001, "title": str(turn), "price": 1}, unchanged=["body"]
                    )
                    await log.done(500 + turn * 700, seconds=90)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
        found = await built(log)
        assert len(found) == 4_496
        assert found["1001"] == {"id": 1001, "title": "3", "price": 1, "body": row(1)["body"]}


async def test_a_second_reader_stands_by_and_takes_over(log: Log) -> None:
    await log.put("insert", *post(1))
    async with anyio.create_task_group() as both:
        async with log.reading():
            await log.done()
            both.start_soon(run_index, log.config, [], log.servers)
            await log.put("insert", *post(2))
            await log.done()
        await log.put("insert", *post(3))
        await log.done(seconds=10)
        assert sorted(await log.documents()) == ["1", "2", "3"]
        both.cancel_scope.cancel()


# Refusals


async def test_a_table_without_a_key_is_refused_with_the_remedy(quick: Log) -> None:
    await quick.columns(COLUMNS, key=())
    with pytest.raises(ServerRefused, match="REPLICA IDENTITY"):
        await run_index(quick.config, [], quick.servers)


async def test_an_unknown_index_is_named(quick: Log) -> None:
    with pytest.raises(ConfigError, match="no index other"):
        await run_index(quick.config, ["other"], quick.servers)


async def test_a_deleted_index_is_not_made_anew_by_a_write(log: Log) -> None:
    await log.put("insert", *post(1))

    async def lose() -> None:
        await log.done()
        await log.engine.delete((await log.record()).physical)
        await log.put("insert", *post(2))

    async with anyio.create_task_group() as group:
        group.start_soon(lose)
        with pytest.raises(IndexMismatch, match="reindex"):
            await run_index(log.config, [], log.servers)
    assert await log.engine.indexes(f"{log.name}-0*") == {}


async def test_a_deleted_index_is_not_made_anew_by_a_delete(log: Log) -> None:
    await log.put("insert", *post(1))

    async def lose() -> None:
        await log.done()
        await log.engine.delete((await log.record()).physical)
        await log.put("delete", {"id": 1})

    async with anyio.create_task_group() as group:
        group.start_soon(lose)
        with pytest.raises(IndexMismatch, match="reindex"):
            await run_index(log.config, [], log.servers)
    assert await log.engine.indexes(f"{log.name}-0*") == {}
    await log.rebuild()


async def test_an_index_in_the_write_alias_place_goes_with_its_generation(log: Log) -> None:
    await log.put("insert", *post(1))
    await log.rebuild()
    await log.engine.delete(f"{log.name}-000001")
    await log.engine.create(f"{log.name}-000001-w", {})
    await log.rebuild()
    assert list(await log.engine.indexes(f"{log.name}-0*")) == [f"{log.name}-000002"]


async def test_an_index_that_cannot_go_on_leaves_the_others_running(quick: Log) -> None:
    other = msgspec.structs.replace(quick.config.index[quick.name], table="public.nokey", alias="nokey")
    config = msgspec.structs.replace(quick.config, index={quick.name: quick.config.index[quick.name], "bad": other})
    key = table_key(config.source.name, "public", "nokey")
    await quick.state.put(key, TableRecord([StateColumn("a", "text", 0)], []))
    await quick.put("insert", *post(1))
    with capture_logs() as said:
        async with anyio.create_task_group() as group:
            group.start_soon(run_index, config, [], quick.servers)
            assert await until(lambda: _holds(said, "index stopped"), seconds=20)
            await quick.put("insert", *post(2))
            await quick.done()
            group.cancel_scope.cancel()
    [line] = [line for line in said if line["event"] == "index stopped"]
    assert (line["log_level"], line["index"], line["going_on"]) == ("error", "bad", [quick.name])
    assert "primary key" in line["next"]
    with pytest.raises(ServerRefused, match="primary key"):
        await run_index(config, ["bad"], quick.servers)


async def test_a_stream_that_was_made_again_is_noticed(quick: Log) -> None:
    await quick.put("insert", *post(1))
    await built(quick)
    name = quick.config.stream.name
    config = (await quick.broker.stream(name)).config  # type: ignore[union-attr]
    await quick.broker.api(f"STREAM.DELETE.{name}")
    await quick.broker.api(f"STREAM.CREATE.{name}", {"name": name, "subjects": config["subjects"]})
    with pytest.raises(IndexMismatch, match="another stream"):
        await run_index(quick.config, [], quick.servers)


async def test_a_quiet_reader_writes_a_change_within_milliseconds(quick: Log) -> None:
    await quick.put("insert", *post(1))
    async with quick.reading():
        await quick.done()
        took = []
        for number in range(2, 22):
            began = anyio.current_time()
            await quick.put("insert", *post(number))
            while not await quick.engine.mget(quick.name, [str(number)]):
                await anyio.lowlevel.checkpoint()
            took.append(anyio.current_time() - began)
    assert sorted(took)[10] < 0.05


async def test_bulks_are_large_under_load(quick: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    whole = bulk.Sender.send

    async def counting(self: bulk.Sender, ops: Any) -> Any:
        counts.append(len(ops))
        return await whole(self, ops)

    monkeypatch.setattr(bulk.Sender, "send", counting)
    await quick.posts(1, 6_000)
    await built(quick)
    assert sum(counts) == 6_000
    assert len(counts) < 20


@pytest.mark.parametrize("runs", [True, False])
async def test_a_reader_whose_stream_was_made_again_does_not_say_before_that_it_goes_on(quick: Log, runs: bool) -> None:
    await quick.posts(1, 5)
    stream, source = quick.config.stream, quick.config.source.name

    async def remade() -> None:
        await quick.broker.api(f"STREAM.DELETE.{stream.name}")
        await ensure_stream(quick.broker, stream, source_subjects(stream.prefix, source))

    async def remade_once_it_follows(said: list[EventDict]) -> None:
        await quick.done()

        async def follows() -> bool:
            return any(line["event"] == "following" for line in said)

        assert await until(follows, seconds=30)
        await remade()

    if not runs:
        async with quick.reading():
            await quick.done()
        await remade()
    # Who looks in between finds none.
    refused = pytest.raises((IndexMismatch, ServerRefused), match=r"built from another stream|there is no stream")
    with capture_logs() as said, anyio.fail_after(60), refused:
        async with structured.group() as group:
            if runs:
                group.start_soon(remade_once_it_follows, said)
            await run_index(quick.config, [quick.name], quick.servers)
    events = [line["event"] for line in said]
    assert "back" not in events, said
    assert events.count("following") == runs, said
