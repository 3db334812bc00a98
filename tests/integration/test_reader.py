"""Reading the stream: everything once and in order, whatever happens to the consumer underneath."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from bridge.embedded import NatsServer
from bridge.errors import Overtaken, ServerRefused, Unavailable
from bridge.stream import durable as reading
from bridge.stream import lease
from bridge.stream.durable import Durable, Seen
from bridge.stream.intake import Message
from bridge.stream.lease import Busy, take
from bridge.stream.pull import BATCH, pulling
from bridge.stream.reader import read
from bridge.stream.server import connect
from bridge.stream.state import State, Writer
from bridge.waiting import until
from tests.integration.feeding import Log, fed, row
from tests.proxy import Proxy

pytestmark = pytest.mark.anyio

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
async def log(nats: NatsServer) -> AsyncIterator[Log]:
    async with _stream(nats.url) as found:
        yield found


@contextlib.asynccontextmanager
async def _stream(url: str) -> AsyncIterator[Log]:
    """A stream without a search engine."""
    async with fed(url, NOWHERE, with_engine=False) as found:
        yield found


async def everything(log: Log, **options: Any) -> list[Message]:
    options.setdefault("subjects", [log.subject])
    batches = read(log.broker, log.config.stream.name, **options)
    return [message async for batch in batches for message in batch]


def durable(log: Log, *, first: int = 1, writers: list[Writer] | None = None, broker: Any = None) -> Durable:
    async def epochs() -> list[Writer]:
        return writers or []

    return Durable(
        broker or log.broker, log.config.stream.name, "posts-000001", [log.subject], first=first, epochs=epochs
    )


async def some(consumer: Durable, count: int, *, ack: bool = False) -> list[int]:
    """The sequences of the next `count` messages."""
    found: list[int] = []
    async with contextlib.aclosing(consumer.batches()) as batches:
        async for batch in batches:
            found += [message.seq for message in batch]
            if ack and found:
                await consumer.ack(found[-1])
            if len(found) >= count:
                return found
    return found


# read


async def test_reading_ends_with_what_the_stream_held_at_the_start(log: Log) -> None:
    count = 2 * BATCH + 7
    await log.posts(1, count)
    messages = await everything(log)
    assert [message.seq for message in messages] == list(range(1, count + 1))
    first = messages[0]
    assert (first.op, first.epoch, first.last, first.subject) == ("insert", 1, True, log.subject)
    assert first.position == "00000001-0000000000000002-0000000000000002-00000000-00000000"
    assert first.data == log.wire("insert", {"id": 1}, row(1))


async def test_reading_starts_at_a_sequence_or_a_time_and_ends_at_a_sequence(log: Log) -> None:
    await log.posts(1, 5)
    await anyio.sleep(0.01)
    middle = datetime.now(UTC)
    await log.posts(6, 5)
    assert [m.seq for m in await everything(log, start=4, last=6)] == [4, 5, 6]
    assert [m.seq for m in await everything(log, start=middle)] == [6, 7, 8, 9, 10]
    assert await everything(log, start=11) == []


async def test_reading_one_table_ends_although_the_stream_ends_with_others(log: Log) -> None:
    await log.posts(1, 3)
    other = log.subject + "_other"
    for _ in range(3):
        await log.publish("insert", b"{}", subject=other)
    assert [m.seq for m in await everything(log)] == [1, 2, 3]
    assert [m.seq for m in await everything(log, subjects=[log.subject, other])] == [1, 2, 3, 4, 5, 6]
    assert await everything(log, subjects=[log.subject + "_none"]) == []


async def test_following_gives_what_is_published_later(log: Log) -> None:
    await log.posts(1, 2)
    found: list[int] = []
    batches = read(log.broker, log.config.stream.name, subjects=[log.subject], follow=True)
    async with contextlib.aclosing(batches):
        async for batch in batches:
            found += [message.seq for message in batch]
            if len(found) == 2:
                await log.posts(3, 1)
            if len(found) == 3:
                break
    assert found == [1, 2, 3]


async def test_a_consumer_that_is_deleted_underneath_is_made_again_without_a_gap(log: Log) -> None:
    count = 5 * BATCH
    await log.posts(1, count)
    found: list[int] = []
    stream = log.config.stream.name
    deleted = False
    async for batch in read(log.broker, stream, subjects=[log.subject]):
        found += [message.seq for message in batch]
        if not deleted:
            deleted = True
            [name] = (await log.broker.api(f"CONSUMER.NAMES.{stream}"))["consumers"]
            await log.broker.api(f"CONSUMER.DELETE.{stream}.{name}")
    assert found == list(range(1, count + 1))


async def test_a_stream_that_is_not_there_is_named(log: Log) -> None:
    with pytest.raises(ServerRefused, match="no stream absent"):
        await anext(read(log.broker, "absent", subjects=["x"]))


async def test_a_lost_connection_ends_reading_at_once(nats: NatsServer, proxied: Callable[[int], Proxy]) -> None:
    proxy = proxied(nats.port)
    async with _stream(nats.url) as log:
        await log.posts(1, 3)
        async with connect(log.config.stream, [f"nats://127.0.0.1:{proxy.port}"]) as broker:
            batches = read(broker, log.config.stream.name, subjects=[log.subject], follow=True)
            assert len(await anext(batches)) > 0
            await proxy.cut()
            with anyio.fail_after(5), pytest.raises(Unavailable, match="lost"):
                await anext(batches)


async def test_memory_is_bounded_while_nobody_takes_the_messages(log: Log) -> None:
    wide = "x" * 100_000
    for number in range(400):
        await log.broker.nc.publish(log.subject, log.wire("insert", {"id": number}, row(number, body=wide)))
    await log.broker.nc.flush()
    consumer = durable(log)
    await consumer.open(Seen())
    async with pulling(log.broker, log.config.stream.name, "posts-000001") as pull:
        first = await pull.next()
        before, most = -1, 0
        while most != before:
            before = most
            await anyio.sleep(0.3)
            most = sum(len(message.data) for message in pull._got)
        assert len(first) + len(pull._got) < 400
        assert most < 20 << 20


# Durable


async def test_what_a_dead_reader_took_and_did_not_ack_comes_again(log: Log) -> None:
    await log.posts(1, 100)
    dead = durable(log)
    await dead.open(Seen())
    assert await some(dead, 100) == list(range(1, 101))
    await dead.ack(30)
    again = durable(log)
    await again.open(Seen(1, 30))
    assert await some(again, 70) == list(range(31, 101))


async def test_it_goes_back_to_what_is_recorded_even_where_somebody_acked_more(log: Log) -> None:
    await log.posts(1, 100)
    zombie = durable(log)
    await zombie.open(Seen())
    await some(zombie, 100, ack=True)
    reader = durable(log)
    await reader.open(Seen(1, 40))
    assert await some(reader, 60) == list(range(41, 101))


async def test_when_somebody_else_pulls_from_the_consumer_nothing_is_skipped(log: Log) -> None:
    await log.posts(1, 10)
    reader = durable(log)
    await reader.open(Seen())
    found: list[int] = []
    async with contextlib.aclosing(reader.batches()) as batches:
        async for batch in batches:
            found += [message.seq for message in batch]
            if len(found) == 10:
                break
    thief = await log.broker.nc.subscribe("thief")
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{log.config.stream.name}.posts-000001"
    await log.broker.nc.publish(subject, b'{"batch":5,"expires":5000000000}', reply="thief")
    await log.posts(11, 5)
    for _ in range(5):
        await thief.next_msg(timeout=5)
    await log.posts(16, 5)
    with anyio.fail_after(20):
        found += await some(reader, 10)
    assert found == list(range(1, 21))


@pytest.mark.parametrize("with_reset", [True, False])
async def test_an_older_server_without_reset_is_set_back_by_making_the_consumer_again(
    log: Log, monkeypatch: pytest.MonkeyPatch, with_reset: bool
) -> None:
    if not with_reset:
        monkeypatch.setattr(reading, "RESET_SERVER", (99, 0))
    await log.posts(1, 20)
    reader = durable(log, first=3)
    await reader.open(Seen(1, 2))
    assert await some(reader, 18, ack=True) == list(range(3, 21))
    again = durable(log, first=3)
    await again.open(Seen(1, 9))
    assert await some(again, 11) == list(range(10, 21))


async def test_sequences_that_a_newer_writer_wrote_anew_are_read_again(log: Log) -> None:
    await log.posts(1, 10)
    writers = [Writer(1, 1)]
    reader = durable(log, writers=writers)
    await reader.open(Seen())
    assert await some(reader, 10, ack=True) == list(range(1, 11))
    writers.append(Writer(2, 6))
    assert await reader.look() is None
    assert await some(reader, 5) == [6, 7, 8, 9, 10]


async def test_a_message_of_a_newer_writer_is_not_taken_before_what_it_wrote_behind_us(log: Log) -> None:
    await log.posts(1, 10)
    writers = [Writer(1, 1)]
    reader = durable(log, writers=writers)
    await reader.open(Seen())
    await some(reader, 10, ack=True)
    writers.append(Writer(2, 8))
    log.epoch = 2
    await log.posts(11, 1)
    assert await some(reader, 4) == [8, 9, 10, 11]
    assert reader.seen.epoch == 2


async def test_a_restart_after_a_newer_writer_goes_back_to_its_first_message(log: Log) -> None:
    await log.posts(1, 10)
    first = durable(log)
    await first.open(Seen())
    await some(first, 10, ack=True)

    async def acked() -> bool:
        info = await log.broker.api(f"CONSUMER.INFO.{log.config.stream.name}.posts-000001")
        return bool(info["ack_floor"]["stream_seq"] == 10)

    assert await until(acked, seconds=10)
    again = durable(log, writers=[Writer(1, 1), Writer(2, 4)])
    await again.open(Seen(1, 10))
    assert await some(again, 7) == list(range(4, 11))


async def test_a_reader_that_retention_has_overtaken_asks_for_a_rebuild(log: Log) -> None:
    await log.posts(1, 10)
    reader = durable(log)
    await reader.open(Seen())
    await log.broker.api(f"STREAM.PURGE.{log.config.stream.name}", {"seq": 6})
    with pytest.raises(Overtaken, match="overtaken"):
        await durable(log).open(Seen(1, 3))
    at_the_edge = durable(log)
    await at_the_edge.open(Seen(1, 5))
    assert await some(at_the_edge, 5) == [6, 7, 8, 9, 10]


async def test_a_reader_of_a_quiet_table_is_not_taken_for_overtaken(log: Log) -> None:
    await log.posts(1, 2)
    reader = durable(log)
    await reader.open(Seen())
    await some(reader, 2, ack=True)
    for _ in range(5):
        await log.publish("insert", b"{}", subject=log.subject + "_other")
    rests: list[Seen] = []

    async def at_rest() -> bool:
        rest = await reader.look()
        rests.extend([rest] if rest is not None else [])
        return bool(rests) and rests[-1].seq == 7

    assert await until(at_rest, seconds=10)
    await log.broker.api(f"STREAM.PURGE.{log.config.stream.name}", {"seq": 6})
    later = durable(log)
    await later.open(rests[-1])
    await log.posts(8, 1)
    assert await some(later, 1) == [8]


# Leases


async def test_a_held_lease_is_refused_and_a_released_one_is_free(log: Log) -> None:
    state = await State.open(log.broker, log.config.state.bucket)
    hold = await take(state, "lease.test", "one", patient=False)
    async with anyio.create_task_group() as group:
        group.start_soon(hold.keep)
        with pytest.raises(Busy, match="held by process"):
            await take(state, "lease.test", "two", patient=False)
        group.cancel_scope.cancel()
    await hold.release()
    await take(state, "lease.test", "two", patient=False)


async def test_the_lease_of_a_dead_process_of_this_host_is_free_at_once(log: Log) -> None:
    state = await State.open(log.broker, log.config.state.bucket)
    program = "import os; print(os.getpid())"
    dead = int((await anyio.run_process([sys.executable, "-c", program])).stdout)
    await state.put("lease.test", lease.Lease("gone", lease._host(), dead, ""))
    with anyio.fail_after(2):
        await take(state, "lease.test", "two", patient=False)


async def test_a_message_that_somebody_else_pulled_comes_though_nothing_follows_it(log: Log) -> None:
    await log.posts(1, 10)
    reader = durable(log)
    await reader.open(Seen())
    thief = await log.broker.nc.subscribe("thief")
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{log.config.stream.name}.posts-000001"
    found: list[int] = []
    async with contextlib.aclosing(reader.batches()) as batches, anyio.create_task_group() as tasks:

        async def looks() -> None:
            while True:
                await anyio.sleep(0.3)
                await reader.look()

        tasks.start_soon(looks)
        with anyio.fail_after(30):
            async for batch in batches:
                found += [message.seq for message in batch]
                if len(found) == 10 and not thief.pending_msgs:
                    # As often as the reader asks: the server takes turns.
                    for _ in range(3):
                        await log.broker.nc.publish(subject, b'{"batch":1,"expires":9000000000}', reply="thief")
                    await log.broker.nc.flush()
                    await log.posts(11, 1)
                if len(found) == 11:
                    break
        tasks.cancel_scope.cancel()
    assert found == list(range(1, 12))


@pytest.mark.parametrize("others", [0, 1])
async def test_a_consumer_that_somebody_else_sets_ahead_before_its_first_delivery_skips_nothing(
    log: Log, others: int
) -> None:
    await log.posts(1, 10)
    reader = durable(log)
    await reader.open(Seen(1, 2))
    # What a reader that was replaced while it slept had sent, and comes late.
    await log.broker.api(f"CONSUMER.RESET.{log.config.stream.name}.posts-000001", {"seq": 8 + others})
    assert await some(reader, 8) == list(range(3, 11))
