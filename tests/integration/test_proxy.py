"""The proxy that other tests break connections with does to them what it says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute

from tests.proxy import Proxy

pytestmark = pytest.mark.anyio

MakeProxy = Callable[[int], Proxy]


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    async def echo(stream: ByteStream) -> None:
        with contextlib.suppress(anyio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    await stream.send(data)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        yield int(listener.extra(SocketAttribute.local_port))  # noqa: S610 - no Django here
        tasks.cancel_scope.cancel()


async def echoes(stream: ByteStream, data: bytes = b"hello", deadline: float = 5) -> bool:
    await stream.send(data)
    received = b""
    with anyio.move_on_after(deadline):
        while len(received) < len(data):
            received += await stream.receive()
    return received == data


async def test_bytes_pass_both_ways_and_an_end_of_sending_too(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream, b"x" * 1_000_000)
            await stream.send_eof()
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        assert proxy.forwarded == 2_000_000


async def test_cut_resets_connections_and_takes_new_ones(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream)
            await proxy.cut()
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream)


async def test_a_refusing_proxy_looks_like_a_server_that_is_down(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        await proxy.refuse()
        with pytest.raises(OSError):
            await anyio.connect_tcp("127.0.0.1", proxy.port)
        proxy.accept()
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream)


async def test_held_bytes_arrive_after_the_release(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream)
            proxy.hold()
            assert not await echoes(stream, b"late", deadline=0.2)
            proxy.release()
            assert await stream.receive() == b"late"


async def test_a_stranded_connection_is_silent_for_ever_while_new_ones_work(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as old:
            assert await echoes(old)
            proxy.strand()
            assert not await echoes(old, deadline=0.2)
            async with await anyio.connect_tcp("127.0.0.1", proxy.port) as new:
                assert await echoes(new)
            assert not await echoes(old, deadline=0.1)


async def test_delay_is_added_in_each_direction(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            proxy.delay = 0.1
            started = anyio.current_time()
            assert await echoes(stream)
            assert anyio.current_time() - started >= 0.2


async def test_what_a_held_connection_carries_comes_after_what_new_ones_do(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as old:
            assert await echoes(old)
            proxy.hold_present()
            await old.send(b"late")
            async with await anyio.connect_tcp("127.0.0.1", proxy.port) as new:
                assert await echoes(new)
            before = proxy.forwarded
            proxy.release()
            assert await old.receive() == b"late"
            assert proxy.forwarded == before + 2 * len(b"late")


async def test_a_connection_stranded_in_one_direction_still_carries_the_other(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            assert await echoes(stream)
            before = proxy.forwarded
            proxy.strand(to_server=False)
            assert not await echoes(stream, deadline=0.2)
            assert proxy.forwarded == before + len(b"hello")  # to the server, whose answer is lost


async def test_a_throttled_connection_passes_so_many_bytes_a_second(proxied: MakeProxy) -> None:
    async with echo_server() as target:
        proxy = proxied(target)
        async with await anyio.connect_tcp("127.0.0.1", proxy.port) as stream:
            proxy.rate = 20_000
            started = anyio.current_time()
            assert await echoes(stream, b"x" * 10_000)
            assert anyio.current_time() - started >= 0.5
