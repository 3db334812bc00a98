"""The publisher on a real server: what another connection still had on its way gets in between, or it does not."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import anyio
import pytest

from bridge.config import Stream
from bridge.embedded import NatsServer
from bridge.event import Position
from bridge.stream import batch as wire
from bridge.stream import server
from bridge.stream.mode import Publishing
from bridge.stream.publisher import Publisher, StreamChanged, Tail
from bridge.stream.server import Broker
from bridge.structured import group

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stream(nats: NatsServer) -> AsyncIterator[tuple[Broker, str]]:
    """A connection, and an empty stream that holds `late.<its name>`."""
    name = f"late_{secrets.token_hex(4)}"
    config = Stream(servers=[nats.url], name=name)
    async with server.connect(config, [nats.url]) as broker:
        await server.ensure_stream(broker, config, f"late.{name}")
        yield broker, name


def position(attempt: int, number: int) -> bytes:
    return str(Position(1, attempt, 0, 0, number)).encode()


def late(name: str, expected: int) -> bytes:
    """One message of an earlier attempt, whose events are others."""
    lines = b"Bridge-Op: read\r\nBridge-Epoch: 1\r\nBridge-Position: %b\r\n" % position(1, expected)
    return wire.chain([wire.item(f"late.{name}".encode(), lines, b"old", position(1, expected))], expected, b"nowhere")


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
