"""The public reader: what an application sees of the log, whatever happens to connection, consumer and stream."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import msgspec
import pytest

from bridge import event
from bridge.embedded import NatsServer, SearchEngine
from bridge.embedded import until as until_sync
from bridge.errors import (
    ForeignWriter,
    ObjectMissing,
    OtherStream,
    Overtaken,
    ServerRefused,
    StreamHole,
    UsageError,
)
from bridge.event import Position
from bridge.pipeline.between import LAST_LSN
from bridge.stream import Item, Transaction, claims, events, following, objects
from bridge.stream import Log as Reader
from bridge.stream.claims import Claims
from bridge.stream.definition import ensure_stream
from bridge.stream.subjects import source_subjects
from bridge.waiting import until
from tests.integration.feeding import Log, fed, row
from tests.proxy import Proxy
from tests.running import bridge, execute, settled, source

pytestmark = pytest.mark.anyio

NOWHERE = "http://127.0.0.1:9"
POSTS = ["public.posts"]


@pytest.fixture
async def log(nats: NatsServer) -> AsyncIterator[Log]:
    async with fed(nats.url, NOWHERE, with_engine=False) as found:
        yield found


def reading(log: Log, url: str = "", **options: Any) -> Reader:
    """The public reader of a test's log."""
    config = log.config
    return events(
        url or log.servers,
        source=config.source.name,
        stream=config.stream.name,
        prefix=config.stream.prefix,
        bucket=config.state.bucket,
        **options,
    )


async def some(reader: Reader, count: int, *, ack: bool = False) -> list[Item]:
    """The next `count` items."""
    found: list[Item] = []
    with anyio.fail_after(60):
        while len(found) < count:
            found.append(await anext(reader))
    if ack:
        await reader.ack(found[-1])
    return found


async def everything(log: Log, **options: Any) -> list[Item]:
    async with reading(log, follow=False, **options) as reader:
        return [item async for item in reader]


def seqs(items: list[Item]) -> list[int]:
    return [item.seq for item in items]


async def floor(log: Log, name: str) -> int:
    """Up to where the server has a durable's acks."""
    info = await log.broker.api(f"CONSUMER.INFO.{log.config.stream.name}.{name}")
    return int(info["ack_floor"]["stream_seq"])


async def write(
    log: Log, end: int, tables: str, *, last: bool = True, op: event.Op = "insert", k: int = 0, body: str = ""
) -> None:
    """The events of (a piece of) one transaction, one for each letter of `tables`: p is posts, another one its own."""
    for number, letter in enumerate(tables, k):
        subject = log.subject if letter == "p" else log.subject.replace("posts", letter)
        position = Position(1, end, LAST_LSN, 0, number + 1) if op == "read" else Position(1, end, end, number, 0)
        closes = last and number - k == len(tables) - 1
        headers = event.headers(op, position, log.epoch, last=closes)
        data = log.wire(op, {"id": number}, row(number, body=body))
        answer = await log.broker.request(subject, data, headers=headers)
        log.last = int(json.loads(answer.data)["seq"])


async def test_everything_comes_once_in_order_and_ends_where_the_stream_ended(log: Log) -> None:
    await log.posts(1, 4500)
    items = await everything(log)
    assert seqs(items) == list(range(1, 4501))
    first = items[0]
    assert (first.op, first.epoch, first.last, first.subject) == ("insert", 1, True, log.subject)
    assert first.position == "00000001-0000000000000002-0000000000000002-00000000-00000000"
    assert (first.event.schema, first.event.table) == ("public", "posts")
    assert msgspec.json.decode(first.event.after) == row(1)
    assert abs((datetime.now(UTC) - first.at).total_seconds()) < 300


async def test_following_gives_what_comes_later(log: Log) -> None:
    await log.posts(1, 2)
    async with reading(log) as reader:
        assert seqs(await some(reader, 2)) == [1, 2]
        await log.posts(3, 2)
        assert seqs(await some(reader, 2)) == [3, 4]


async def test_tables_choose_what_comes(log: Log) -> None:
    await write(log, 10, "paabp")
    assert seqs(await everything(log, tables=POSTS)) == [1, 5]
    assert seqs(await everything(log, tables=["public.a", "public.b"])) == [2, 3, 4]
    assert seqs(await everything(log, tables=["public.*", "public.a"])) == [1, 2, 3, 4, 5]
    assert await everything(log, tables=["other.*", "public.none"]) == []
    with pytest.raises(UsageError, match="not a table name"):
        reading(log, tables=["posts"])


async def test_it_starts_at_a_sequence_or_a_time(log: Log) -> None:
    await log.posts(1, 5)
    await anyio.sleep(0.01)
    middle = datetime.now(UTC)
    await log.posts(6, 5)
    assert seqs(await everything(log, start=4)) == list(range(4, 11))
    assert seqs(await everything(log, start=middle)) == list(range(6, 11))
    assert await everything(log, start=11) == []
    assert await everything(log, start=datetime.now(UTC)) == []
    async with reading(log, start=12) as reader:
        await log.posts(11, 2)
        assert seqs(await some(reader, 1)) == [12]


async def test_a_start_that_retention_has_removed_is_named(log: Log) -> None:
    await log.posts(1, 10)
    await log.broker.api(f"STREAM.PURGE.{log.config.stream.name}", {"seq": 6})
    assert seqs(await everything(log)) == list(range(6, 11))
    with pytest.raises(Overtaken, match="begins at sequence 6"):
        await everything(log, start=3)


async def test_an_absent_stream_is_named(nats: NatsServer) -> None:
    with pytest.raises(ServerRefused, match="no stream cdc_absent"):
        async with events(nats.url, source="absent"):
            pass


# Durables


async def test_a_durable_goes_on_behind_what_was_acked(log: Log) -> None:
    await log.posts(1, 30)
    async with reading(log, durable="app") as reader:
        items = await some(reader, 20)
        await reader.ack(items[9])
    async with reading(log, durable="app") as reader:
        items = await some(reader, 20, ack=True)
        assert seqs(items) == list(range(11, 31))
    async with reading(log, durable="app", follow=False) as reader:
        assert [item async for item in reader] == []
    assert await floor(log, "app") == 30


async def test_acks_need_a_name_and_a_name_keeps_its_tables(log: Log) -> None:
    await log.posts(1, 2)
    async with reading(log) as reader:
        with pytest.raises(UsageError, match="durable"):
            await reader.ack((await some(reader, 1))[0])
    async with reading(log, durable="app", tables=POSTS) as reader:
        await some(reader, 1)
    with pytest.raises(UsageError, match=r"reads .*posts, not .*>"):
        async with reading(log, durable="app"):
            pass
    with pytest.raises(UsageError, match="letters"):
        reading(log, durable="my app")


async def test_a_durable_without_name_tag_starts_where_it_is_told_to_once(log: Log) -> None:
    await log.posts(1, 10)
    async with reading(log, durable="app", start=6) as reader:
        assert seqs(await some(reader, 1)) == [6]
    # Nothing was acked.
    async with reading(log, durable="app") as reader:
        assert seqs(await some(reader, 5)) == [6, 7, 8, 9, 10]


async def test_a_quiet_durable_is_not_taken_for_overtaken(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_EVERY", 0.1)
    stream = log.config.stream.name
    config = (await log.broker.api(f"STREAM.INFO.{stream}"))["config"]
    await log.broker.api(f"STREAM.UPDATE.{stream}", config | {"max_age": int(3600e9)})
    await log.posts(1, 2)
    async with reading(log, durable="app", tables=POSTS) as reader:
        await some(reader, 2, ack=True)
        await write(log, 50, "aaaaa")
        with anyio.move_on_after(3):
            await some(reader, 1)
    await log.broker.api(f"STREAM.UPDATE.{stream}", config | {"max_msgs": 2})
    async with reading(log, durable="app", tables=POSTS) as reader:
        await write(log, 60, "p")
        await write(log, 65, "a")
        assert seqs(await some(reader, 1)) == [8]
    await write(log, 70, "ap")
    with pytest.raises(Overtaken):
        async with reading(log, durable="app", tables=POSTS) as reader:
            await some(reader, 1)


# What breaks


@pytest.mark.parametrize("durable", ["", "app"])
async def test_across_broken_connections_everything_comes_once_and_acks_count(
    nats: NatsServer, proxied: Callable[[int], Proxy], durable: str
) -> None:
    proxy = proxied(nats.port)
    async with fed(nats.url, NOWHERE, with_engine=False) as log:
        await log.posts(1, 12_000)
        async with reading(log, f"nats://127.0.0.1:{proxy.port}", durable=durable) as reader:
            items = await some(reader, 1000)
            await proxy.cut()
            items += await some(reader, 5000)  # more than was on its way
            if durable:
                await reader.ack(items[499])  # given before the connection broke
                assert await until_floor(log, 500)
            await proxy.cut()
            items += await some(reader, 6000)
            assert seqs(items) == list(range(1, 12_001))
            if durable:
                await reader.ack(items[-1])
                assert await until_floor(log, 12_000)
                with anyio.move_on_after(2):
                    await some(reader, 1)
                    pytest.fail("an acked event came again")


async def until_floor(log: Log, seq: int) -> bool:
    async def there() -> bool:
        return await floor(log, "app") == seq

    return await until(there, seconds=20)


async def test_an_ack_given_while_the_server_is_away_is_sent_later(
    nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    proxy = proxied(nats.port)
    async with fed(nats.url, NOWHERE, with_engine=False) as log:
        await log.posts(1, 10)
        async with reading(log, f"nats://127.0.0.1:{proxy.port}", durable="app") as reader:
            items = await some(reader, 10)
            await proxy.refuse()
            await reader.ack(items[6])
            proxy.accept()
            await log.posts(11, 1)
            assert seqs(await some(reader, 1)) == [11]
            assert await until_floor(log, 7)


@pytest.mark.parametrize("durable", ["", "app"])
async def test_a_reader_that_is_cut_off_again_and_again_misses_nothing(
    log: Log, monkeypatch: pytest.MonkeyPatch, durable: str
) -> None:
    await log.posts(1, 300)
    whole = claims.whole

    async def slowly(*args: Any, **options: Any) -> Any:
        async for part in whole(*args, **options):
            for start in range(0, len(part), 40):
                await anyio.sleep(0.03)
                yield part[start : start + 40]

    monkeypatch.setattr(claims, "whole", slowly)
    found: list[Item] = []
    async with reading(log, durable=durable) as reader:
        for patience in [0.02, 0.1, 0.05, 0.2] * 100:
            with anyio.move_on_after(patience):
                while len(found) < 300:
                    found.append(await anext(reader))
                    if durable:
                        await reader.ack(found[-1])
            if len(found) == 300:
                break
    assert seqs(found) == list(range(1, 301))


async def test_a_consumer_that_is_deleted_underneath_is_made_again(log: Log) -> None:
    await log.posts(1, 10)
    stream = log.config.stream.name
    async with reading(log, durable="app") as reader:
        await some(reader, 10, ack=True)
        await log.broker.api(f"CONSUMER.DELETE.{stream}.app")
        await log.posts(11, 3)
        assert seqs(await some(reader, 3, ack=True)) == [11, 12, 13]
    assert await floor(log, "app") == 13


@pytest.mark.parametrize("durable", ["", "app"])
async def test_sequences_that_a_newer_writer_wrote_anew_come_again_under_its_epoch(log: Log, durable: str) -> None:
    await log.posts(1, 10)
    async with reading(log, durable=durable) as reader:
        old = await some(reader, 10)
        await log.writers((1, 1), (2, 6))
        again = await some(reader, 5)
        assert [(item.seq, item.epoch) for item in again] == [(seq, 2) for seq in range(6, 11)]
        assert [item.position for item in again] == [item.position for item in old[5:]]
        if durable:
            await reader.ack(old[9])  # of what was there before: counts for nothing
            await reader.ack(again[1])
            assert await until_floor(log, 7)
    if durable:
        async with reading(log, durable=durable) as reader:
            assert seqs(await some(reader, 3, ack=True)) == [8, 9, 10]
        await log.writers((1, 1), (2, 6), (3, 9))
        async with reading(log, durable=durable) as reader:
            assert seqs(await some(reader, 2)) == [9, 10]


async def test_a_reader_that_retention_overtakes_is_told(log: Log) -> None:
    await log.posts(1, 10)
    async with reading(log) as reader:
        await some(reader, 10)
        await reader._following._disconnect()
        await log.posts(11, 10)
        await log.broker.api(f"STREAM.PURGE.{log.config.stream.name}", {"seq": 15})
        with pytest.raises(Overtaken, match="begins at sequence 15, read is only up to 10"):
            await some(reader, 1)


@pytest.mark.parametrize("tables", [[], POSTS])
async def test_retention_that_passes_between_two_deliveries_is_noticed(
    log: Log, monkeypatch: pytest.MonkeyPatch, tables: list[str]
) -> None:
    # The looks come too late: the messages themselves must tell.
    monkeypatch.setattr(following, "LOOK_EVERY", 3600.0)
    stream = log.config.stream.name
    config = (await log.broker.api(f"STREAM.INFO.{stream}"))["config"]
    await log.broker.api(f"STREAM.UPDATE.{stream}", config | {"max_age": int(3600e9)})
    await log.posts(1, 3)
    async with reading(log, tables=tables) as reader:
        await some(reader, 3)
        consumer = reader._following._consumer
        assert consumer is not None
        name = consumer._name
        await log.broker.api(f"CONSUMER.PAUSE.{stream}.{name}", {"pause_until": "2100-01-01T00:00:00Z"})
        await log.posts(4, 5)
        await log.broker.api(f"STREAM.PURGE.{stream}", {"seq": 7})
        await log.broker.api(f"CONSUMER.PAUSE.{stream}.{name}", {})
        with pytest.raises(Overtaken, match="begins at sequence 7, read is only up to 3"):
            await some(reader, 1)


async def test_a_hole_in_the_stream_is_noticed_by_who_reads_everything(log: Log) -> None:
    await log.posts(1, 10)
    await log.broker.api(f"STREAM.MSG.DELETE.{log.config.stream.name}", {"seq": 5})
    with pytest.raises(StreamHole, match="between the sequences 4 and 6"):
        await everything(log)
    assert seqs(await everything(log, start=6)) == [6, 7, 8, 9, 10]


async def test_a_stream_that_was_made_again_is_not_read_on(log: Log) -> None:
    await log.posts(1, 3)
    stream = log.config.stream
    async with reading(log) as reader:
        await some(reader, 3)
        await log.broker.api(f"STREAM.DELETE.{stream.name}")
        await ensure_stream(log.broker, stream, source_subjects(stream.prefix, log.config.source.name))
        log.last = 0
        await log.posts(1, 5)
        with pytest.raises(OtherStream, match="made again"):
            await some(reader, 1)


async def test_a_message_that_no_bridge_wrote_is_named(log: Log) -> None:
    await log.posts(1, 2)
    await log.broker.request(log.subject, b"hello")
    with pytest.raises(ForeignWriter, match="sequence 3"):
        await everything(log)


# Transactions


def shown(transactions: list[Transaction]) -> list[tuple[list[int], int, bool]]:
    return [(seqs(list(t.items)), t.part, t.complete) for t in transactions]


async def take(reader: Reader, count: int, **options: Any) -> list[Transaction]:
    found: list[Transaction] = []
    with anyio.fail_after(30):
        async with contextlib.aclosing(reader.transactions(**options)) as transactions:
            async for transaction in transactions:
                found.append(transaction)
                if len(found) == count:
                    break
    return found


async def test_transactions_come_whole(log: Log) -> None:
    await write(log, 10, "pap")
    await write(log, 20, "a")
    await write(log, 30, "pp", last=False)
    async with reading(log, follow=False) as reader:
        found = [t async for t in reader.transactions()]
    assert shown(found) == [([1, 2, 3], 0, True), ([4], 0, True)]
    assert (found[0].txid, found[0].commit_lsn, found[0].seq) == (7, "0/2", 3)
    async with reading(log, durable="app") as reader:
        found = await take(reader, 2)
        await reader.ack(found[-1])
    await write(log, 30, "p", k=2)
    async with reading(log, durable="app") as reader:
        assert shown(await take(reader, 1)) == [([5, 6, 7], 0, True)]


async def test_a_reader_of_one_table_gets_its_transactions_once_the_log_has_gone_on(log: Log) -> None:
    await write(log, 10, "pap", last=False)
    found: list[Transaction] = []

    async def collect() -> None:
        async with reading(log, tables=POSTS) as reader, contextlib.aclosing(reader.transactions()) as transactions:
            async for transaction in transactions:
                found.append(transaction)  # noqa: PERF401 - each is looked at as it comes

    async with anyio.create_task_group() as group:
        group.start_soon(collect)
        await anyio.sleep(2)
        assert found == []  # its end is not there yet
        await write(log, 10, "pa", k=3)
        await until_sync(lambda: len(found) == 1, 20, "the transaction is complete")
        await write(log, 20, "p")
        await write(log, 30, "pa")
        await until_sync(lambda: len(found) == 3, 20, "both are complete")
        group.cancel_scope.cancel()
    assert shown(found) == [([1, 3, 4], 0, True), ([6], 0, True), ([7], 0, True)]


async def test_a_transaction_is_not_whole_while_some_of_it_is_still_to_be_delivered(log: Log) -> None:
    stream = log.config.stream.name
    await write(log, 10, "pa", last=False)
    async with reading(log, tables=POSTS) as reader, contextlib.aclosing(reader.transactions()) as transactions:
        found: list[Transaction] = []

        async def collect() -> None:
            found.append(await anext(transactions))

        async with anyio.create_task_group() as group:
            group.start_soon(collect)
            await anyio.sleep(1)
            consumer = reader._following._consumer
            assert consumer is not None
            pause = f"CONSUMER.PAUSE.{stream}.{consumer._name}"
            await log.broker.api(pause, {"pause_until": "2100-01-01T00:00:00Z"})
            await write(log, 10, "pp", k=2)
            await write(log, 20, "a")
            await anyio.sleep(2)
            assert found == []
            await log.broker.api(pause, {})
            await until_sync(lambda: len(found) == 1, 30, "it is complete")
    assert shown(found) == [([1, 3, 4], 0, True)]


async def test_a_transaction_too_large_to_hold_comes_in_parts(log: Log) -> None:
    await write(log, 10, "ppppp", body="x" * 10_000)
    await write(log, 20, "p")
    async with reading(log) as reader:
        found = await take(reader, 4, largest=25_000)
    assert shown(found) == [([1, 2], 0, False), ([3, 4], 1, False), ([5], 2, True), ([6], 0, True)]


async def test_snapshot_rows_and_markers_come_alone(log: Log) -> None:
    await write(log, 10, "p", op="read", last=False)
    await write(log, 10, "pp", op="read", last=False, k=1)
    await write(log, 20, "pp")
    async with reading(log) as reader:
        assert [t[0] for t in shown(await take(reader, 4))] == [[1], [2], [3], [4, 5]]


async def test_a_transaction_that_is_written_anew_is_not_mixed_with_the_old_one(log: Log) -> None:
    await write(log, 10, "p")
    await write(log, 20, "ppp", last=False)
    found: list[Transaction] = []

    async def collect() -> None:
        async with reading(log) as reader, contextlib.aclosing(reader.transactions()) as transactions:
            async for transaction in transactions:
                found.append(transaction)  # noqa: PERF401 - each is looked at as it comes

    async with anyio.create_task_group() as group:
        group.start_soon(collect)
        await until_sync(lambda: len(found) == 1, 20, "the first is there")
        await anyio.sleep(1)
        await log.writers((1, 1), (2, 3))
        await anyio.sleep(2)
        log.epoch = 2
        await write(log, 20, "p", k=3)
        await until_sync(lambda: len(found) == 2, 20, "the second is there")
        group.cancel_scope.cancel()
    assert [(item.seq, item.epoch) for item in found[1].items] == [(2, 1), (3, 2), (4, 2), (5, 2)]


# Compact mode


async def test_a_reader_of_a_compacted_log_stops_where_it_may_have_missed_a_deletion(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_EVERY", 0.1)
    config = source(pg_db, nats.url, stream={"mode": "compact", "tombstone_ttl": "10s"})
    await execute(pg_db, "CREATE TABLE posts (id int PRIMARY KEY, n int)", "INSERT INTO posts VALUES (1, 1), (2, 2)")

    def opened(**options: Any) -> Reader:
        return events(
            nats.url, source=config.source.name, stream=config.stream.name, bucket=config.state.bucket,
            tables=["public.posts"], durable="app", tombstone_ttl="10s", **options,
        )  # fmt: skip

    async with bridge(config):
        await settled(config)
        async with opened() as reader:
            items = await some(reader, 4, ack=True)
            assert sorted(item.subject.rpartition(".")[2] for item in items) == ["1", "2", "@begin", "@end"]
            with anyio.move_on_after(7):
                await some(reader, 1)  # an idle reader is never too late
            await execute(pg_db, "UPDATE posts SET id = 3 WHERE id = 2")
            assert [item.op for item in await some(reader, 2, ack=True)] == ["delete", "insert"]
        async with opened(follow=False) as reader:
            assert [item async for item in reader] == []
        await execute(pg_db, "DELETE FROM posts WHERE id = 1")
        await settled(config)
        await anyio.sleep(6)
        with pytest.raises(Overtaken, match="compacted log whose tombstones go after 10s"):
            async with opened() as reader:
                await some(reader, 1)


# Large rows


async def large(log: Log, number: int, size: int = 1_000_000) -> str:
    """Publish a row by claim check; its object's name."""
    body = "x" * size
    position = Position(1, log.last + 1, log.last + 1, 0, 0)
    writer = Claims(log.broker, log.config.stream.name, 1)
    short = await writer.put(
        log.subject.encode(), str(position), log.wire("insert", {"id": number}, row(number, body=body))
    )
    await log.publish("insert", short)
    return str(position)


async def test_large_rows_come_whole_or_are_left(log: Log) -> None:
    await log.posts(1, 2)
    await large(log, 3)
    await log.posts(4, 2)
    items = await everything(log)
    assert seqs(items) == [1, 2, 3, 4, 5]
    assert msgspec.json.decode(items[2].event.after)["body"] == "x" * 1_000_000
    assert items[2].event.ref is None
    async with reading(log, large="leave") as reader:
        [_, _, left, _, _] = await some(reader, 5)
        assert left.event.ref is not None
        assert bytes(left.event.after) == b""
        assert (await reader.resolve(left)).data == items[2].data


async def test_a_missing_object_is_named_and_can_be_passed(log: Log) -> None:
    await log.posts(1, 1)
    name = await large(log, 2)
    await log.posts(3, 1)
    await objects.purge(log.broker, claims.bucket_of(log.config.stream.name), ">")
    async with reading(log, durable="app") as reader:
        assert seqs(await some(reader, 1)) == [1]
        with pytest.raises(ObjectMissing, match=rf"{name} .*\n.*read on from sequence 3"):
            await some(reader, 1)
    assert seqs(await everything(log, start=3)) == [3]
    assert seqs(await everything(log, large="leave")) == [1, 2, 3]


async def test_an_index_gets_whole_rows_and_buries_those_that_are_gone(nats: NatsServer, osmem: SearchEngine) -> None:
    async with fed(nats.url, osmem.url) as log:
        await log.put("snapshot", phase="begin")
        await log.put("snapshot", phase="end")
        await log.snapshot(state="done", complete_from=1)
        await large(log, 1, 100_000)
        async with log.reading():
            await log.done()
            await large(log, 2, 100_000)
            await log.put("update", {"id": 1}, {"id": 1, "title": "t", "price": 2}, unchanged=["body"])
            await log.done()
            name = await large(log, 3, 100_000)
            await log.done()
        documents = await log.documents()
        assert [len(documents[key]["body"]) for key in ("1", "2", "3")] == [100_000] * 3
        await objects.purge(
            log.broker, claims.bucket_of(log.config.stream.name), objects.description_subject(
                claims.bucket_of(log.config.stream.name), name
            )
        )  # fmt: skip
        summary = await log.rebuild()
        assert summary.rejected == 1
        [letter] = await log.letters()
        assert (letter["seq"], letter["key"]) == (log.last, {"id": 3})
        assert "is missing" in letter["reason"]
        assert set(await log.documents()) == {"1", "2"}
