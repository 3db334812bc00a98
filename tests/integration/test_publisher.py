"""The publisher on a real server: what another connection still had on its way gets in between, or it does not."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import anyio
import pytest
from nats.aio.msg import Msg

from bridge.config import Stream
from bridge.embedded import NatsServer, until
from bridge.errors import EventLost
from bridge.event import Position
from bridge.stream import batch as wire
from bridge.stream import definition, server
from bridge.stream.mode import Publishing
from bridge.stream.publisher import Publisher
from bridge.stream.server import Broker
from bridge.stream.tail import StreamChanged, Tail
from bridge.structured import group

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stream(nats: NatsServer) -> AsyncIterator[tuple[Broker, str]]:
    """A connection, and an empty stream that holds `late.<its name>`."""
    name = f"late_{secrets.token_hex(4)}"
    config = Stream(servers=[nats.url], name=name)
    async with server.connect(config, [nats.url]) as broker:
        await definition.ensure_stream(broker, config, f"late.{name}")
        yield broker, name


def position(attempt: int, number: int) -> bytes:
    return str(Position(1, attempt, 0, 0, number)).encode()


def late(name: str, expected: int) -> bytes:
    """One message of an earlier attempt, whose events are others."""
    lines = b"Bridge-Op: read\r\nBridge-Epoch: 1\r\nBridge-Position: %b\r\n" % position(1, expected)
    return wire.chain(
        [wire.Item(f"late.{name}".encode(), lines, b"old", position(1, expected))],
        expected,
        wire.Link(b"old.", expected + 1, expected > 0),
        b"nowhere",
    )


async def published(broker: Broker, name: str, publishing: Publishing, events: int) -> None:
    """Publishes so many events of a second attempt to a stream that looked empty, right after a late message."""
    publisher = Publisher(broker, name, 2, Tail(0, "", 0), publishing)
    await publisher.open()
    async with group() as tasks:
        tasks.start_soon(publisher.watch)
        broker.write(late(name, 0))
        broker.write(late(name, 0))
        for number in range(1, events + 1):
            publisher.add(f"late.{name}".encode(), b"read", position(2, number), b"new")
        with anyio.fail_after(20):
            await publisher.drain()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("publishing", ["batch", "chain"])
async def test_a_late_message_of_another_attempt_never_takes_the_place_of_an_event(
    stream: tuple[Broker, str], publishing: Publishing
) -> None:
    broker, name = stream
    with pytest.raises(StreamChanged):
        await published(broker, name, publishing, 3)


@pytest.mark.parametrize("place", range(1, 5))
async def test_behind_a_foreign_message_nothing_of_a_chain_gets_in(stream: tuple[Broker, str], place: int) -> None:
    broker, name = stream
    subject = f"late.{name}".encode()
    items = [wire.Item(subject, b"Bridge-Op: insert\r\n", b"%d" % n, b"") for n in range(5)]
    answers: list[bytes] = []

    async def answered(message: Msg) -> None:
        answers.append(message.data)

    await broker.nc.subscribe("answers", cb=answered)
    await broker.nc.flush()
    commands = wire.chain(items, 0, wire.Link(b"me.", 1, False), b"answers").split(b"HPUB ")[1:]
    for number, command in enumerate(commands):
        if number == place:
            await broker.nc.flush()
            await broker.request(subject.decode(), b"foreign")
        broker.write(b"HPUB " + command)
    await until(lambda: bool(answers), 10, "the chain is answered")
    assert b"10070" in answers[0]
    state = await broker.stream(name)
    assert state is not None
    assert state.last_seq == place + 1


async def pairs_behind_two_foreign_messages(broker: Broker, name: str) -> None:
    """Publishes two atomic batches of two events each; the first one's place is taken."""
    publisher = Publisher(broker, name, 2, Tail(0, "", 0), "batch")
    await publisher.open()
    subject = f"late.{name}".encode()
    async with group() as tasks:
        broker.write(b"PUB %b 1\r\nx\r\nPUB %b 1\r\ny\r\n" % (subject, subject))
        for number in range(1, 5):
            publisher.add(subject, b"insert", str(Position(1, 9, number, 0, 0)).encode(), b"new")
            if number % 2 == 0:
                publisher.commit(9)
                publisher.flush()

        async def second_is_in() -> bool:
            state = await broker.stream(name)
            return state is not None and state.last_seq == 4

        await until(second_is_in, 10, "the second batch is in, behind the foreign messages")
        tasks.start_soon(publisher.watch)
        with anyio.fail_after(20):
            await publisher.drain()
        tasks.cancel_scope.cancel()


async def test_a_lost_batch_whose_place_is_taken_is_noticed(stream: tuple[Broker, str]) -> None:
    broker, name = stream
    with pytest.raises(EventLost, match="instead of the event at"):
        await pairs_behind_two_foreign_messages(broker, name)


@pytest.mark.parametrize("publishing", ["batch", "chain"])
async def test_a_stop_sends_nothing_of_a_transaction_whose_end_is_not_known(
    stream: tuple[Broker, str], publishing: Publishing
) -> None:
    broker, name = stream
    publisher = Publisher(broker, name, 1, Tail(0, "", 0), publishing)
    await publisher.open()
    async with group() as tasks:
        tasks.start_soon(publisher.watch)
        for number in (1, 2, 3):
            publisher.add(f"late.{name}".encode(), b"insert", position(1, number), b"{}")
            if number == 2:
                publisher.commit(100)
        publisher.drop_unfinished()
        with anyio.fail_after(20):
            await publisher.drain()
        tasks.cancel_scope.cancel()
    last = await broker.message(name, seq=2)
    assert last is not None
    assert last.headers["Bridge-Last"] == "1"
    assert publisher.acked.seq == 2
    assert await broker.message(name, seq=3) is None
