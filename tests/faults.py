"""An HTTP proxy before a search engine that answers some requests itself, as an engine or a balancer in trouble does.

Each fault is asked for every request and gives the answer to send in place of the engine's, or None to pass it on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple


class Request(NamedTuple):
    """What came in."""

    method: str
    path: str
    body: bytes


class Answer(NamedTuple):
    """What goes out; `cut` bytes of the body are left out though they are announced, and the connection ends."""

    status: int
    body: bytes
    cut: int = 0


Fault = Callable[[Request], Answer | None]
After = Callable[[Request, Answer], Answer]


class Front:
    """The proxy: `before` may answer in the engine's place, `after` may change its answer."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = 0
        self.before: Fault = lambda _: None
        self.after: After = lambda _, answer: answer
        self.seen: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head, body = await _message(reader)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        request = Request(method, path, body)
        self.seen.append(request)
        answer = self.before(request)
        if answer is None:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            back.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
            found, content = await _message(there)
            back.close()
            answer = self.after(request, Answer(int(found.split(b" ", 2)[1]), content))
        writer.write(b"HTTP/1.1 %d Fault\r\ncontent-type: application/json\r\n" % answer.status)
        writer.write(b"content-length: %d\r\n\r\n" % len(answer.body))
        writer.write(answer.body[: len(answer.body) - answer.cut])
        await writer.drain()
        return not answer.cut


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    fields = {name.lower(): value.strip() for name, _, value in lines}
    if fields.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return head, body
    return head, await reader.readexactly(int(fields.get(b"content-length", b"0")))


@asynccontextmanager
async def faulty(target: int) -> AsyncIterator[Front]:
    """A front before `target` on 127.0.0.1, with no fault yet."""
    front = Front(target)
    server = await asyncio.start_server(front.serve, "127.0.0.1", 0, limit=1 << 24)
    front.port = server.sockets[0].getsockname()[1]
    try:
        yield front
    finally:
        server.close()
