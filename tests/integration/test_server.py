"""The connection to NATS: whatever happens to it, nothing is left open."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import anyio
import nats.errors
import pytest

from bridge.config import Stream
from bridge.embedded import NatsServer, free_port, until
from bridge.errors import Unavailable
from bridge.stream import server
from bridge.stream.state import Conflict, State
from tests.proxy import Proxy

pytestmark = pytest.mark.anyio


async def test_a_connection_that_is_cancelled_at_any_moment_leaves_nothing_open(nats: NatsServer) -> None:
    # An open socket is a ResourceWarning when it is collected, and warnings are errors here.
    for step in range(60):
        with anyio.move_on_after(0.0002 * step):
            async with server.connect(Stream(servers=[nats.url]), [nats.url]):
                await anyio.sleep_forever()
    gc.collect()


async def test_a_connection_that_breaks_while_something_is_pending_is_told_and_leaves_nothing(
    nats: NatsServer, proxied: Callable[[int], Proxy]
) -> None:
    # The client writes what is pending to the closed socket, which is an error in the middle of its closing.
    proxy = proxied(nats.port)
    url = f"nats://127.0.0.1:{proxy.port}"
    before = clients_tasks()
    async with server.connect(Stream(servers=[url]), [url]) as broker:
        await broker.api("INFO")
        client: Any = broker.nc
        client._pending, client._pending_data_size = [b"PING\r\n"], 6
        await proxy.cut()
        with anyio.fail_after(5), pytest.raises(Unavailable):
            await broker.watch()
    await until(lambda: clients_tasks() <= before, 5, "the client's tasks are gone")


async def test_an_answer_that_nobody_waits_for_any_more_ends_nothing(nats: NatsServer) -> None:
    async with server.connect(Stream(servers=[nats.url]), [nats.url]) as broker:
        client: Any = broker.nc
        given_up = asyncio.get_running_loop().create_future()
        given_up.cancel()
        await client._send_ping(given_up)
        await client.flush()
        await broker.api("INFO")
        assert not broker.closed.is_set()


def clients_tasks() -> set[asyncio.Task[Any]]:
    """What runs for the clients of this process."""
    return {task for task in asyncio.all_tasks() if "nats/aio/" in repr(task)}


async def test_any_server_that_answers_will_do(nats: NatsServer, proxied: Callable[[int], Proxy]) -> None:
    down, held = proxied(nats.port), proxied(nats.port)
    await down.refuse()
    held.hold()
    urls = [f"nats://127.0.0.1:{down.port}", f"nats://127.0.0.1:{held.port}", nats.url]
    for _ in range(3):
        async with server.connect(Stream(servers=urls), urls) as broker:
            assert broker.where == nats.url
            await broker.api("INFO")


async def test_why_a_server_cannot_be_reached_is_said_in_words() -> None:
    async def leaves(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def speaks_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with (
        await asyncio.start_server(leaves, "127.0.0.1", 0) as shut,
        await asyncio.start_server(speaks_http, "127.0.0.1", 0) as web,
    ):
        silent = "who answers there does not speak NATS"
        said = {
            f"nats://127.0.0.1:{free_port()}": "connection refused",
            f"nats://localhost:{free_port()}": "connection refused",
            "nats://nobody.invalid:4222": "there is no such host",
            **{f"nats://127.0.0.1:{one.sockets[0].getsockname()[1]}": silent for one in (shut, web)},
        }
        for url, why in said.items():
            with pytest.raises(Unavailable) as found:
                async with server.connect(Stream(servers=[url]), [url]):
                    pass
            assert found.value.what == f"NATS at {url} cannot be reached ({why})"


async def test_a_write_whose_answer_was_lost_is_no_conflict(nats: NatsServer) -> None:
    async with server.connect(Stream(servers=[nats.url]), [nats.url]) as broker:
        state = await State.open(broker, "lost_answers")
        first = await state.put("key", {"n": 1}, 0)
        bucket: Any = state._bucket
        state._bucket = Forgetful(bucket)  # type: ignore[assignment]
        second = await state.put("key", {"n": 2}, first)
        assert second == first + 1
        assert await state.get("key", dict[str, int]) == ({"n": 2}, second)
        state._bucket = Forgetful(bucket, intruder=b'{"n": 9}')  # type: ignore[assignment]
        with pytest.raises(Conflict):
            await state.put("key", {"n": 3}, second)
        assert (await state.get("key", dict[str, int]) or ({}, 0))[0] == {"n": 9}


async def test_the_keys_of_a_bucket_are_those_that_are_not_removed_and_no_consumer_is_asked(nats: NatsServer) -> None:
    # A consumer's count is no end of a list: under load it says that nothing is pending before anything has come.
    async with server.connect(Stream(servers=[nats.url]), [nats.url]) as broker:
        state = await State.open(broker, "listed")
        asked = await broker.nc.subscribe("$JS.API.CONSUMER.>")
        assert await state.keys("") == await state.keys("a.") == []
        for key in ("a.b.1", "a.b.2", "a.c", "ab.d", "a.gone", "a.back", "a.purged"):
            await state.put(key, {"n": 1}, 0)
        await state.delete("a.gone")
        await state.delete("a.back")
        await state.put("a.back", {"n": 2}, 0)
        await state._bucket.purge("a.purged")
        assert await state.keys("a.") == ["a.b.1", "a.b.2", "a.back", "a.c"]
        assert await state.keys("") == ["a.b.1", "a.b.2", "a.back", "a.c", "ab.d"]
        assert asked.pending_msgs == 0


class Forgetful:
    """A bucket whose first answer is lost on its way; an intruder's write comes before the second try."""

    def __init__(self, bucket: Any, intruder: bytes = b"") -> None:
        self.get = bucket.get
        self._bucket = bucket
        self._intruder = intruder
        self._lost = False

    async def update(self, key: str, value: bytes, last: int) -> int:
        if self._lost:
            return int(await self._bucket.update(key, value, last=last))
        self._lost = True
        await self._bucket.update(key, value, last=last)
        if self._intruder:
            await self._bucket.put(key, self._intruder)
        raise nats.errors.TimeoutError
