"""Standard output that may be a pipe whose reader takes its time: signals are answered while it is full.

A write to a full pipe blocks the process in the kernel, and with it the event loop that would hear SIGTERM. A pipe that
can be written to at all takes `PIPE_BUF` bytes at once.
"""

from __future__ import annotations

import os
import select
import stat
import sys

import anyio

CHUNK = 64 << 10
# So long a reader has, once a signal has come, for what is held: the end of a line, perhaps.
LAST_SECONDS = 1.0


class Out:
    """Bytes for standard output. Leave it with `async with`: what is held then goes out, too.

    Args:
        held: how many bytes may be held before they are written.
    """

    def __init__(self, held: int = CHUNK) -> None:
        self._held = held
        self._bytes = bytearray()
        sys.stdout.flush()
        self._fd = sys.stdout.fileno()
        mode = os.fstat(self._fd).st_mode
        self._waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    async def __aenter__(self) -> Out:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or (issubclass(kind, Exception) and not issubclass(kind, OSError)):
            await self.flush()
        elif not issubclass(kind, OSError):
            with anyio.move_on_after(LAST_SECONDS, shield=True):
                await self.flush()

    async def write(self, line: bytes) -> None:
        """Take a line.

        Raises:
            OSError: nobody reads any more, or there is no room.
        """
        self._bytes += line
        if len(self._bytes) > self._held:
            await self.flush()

    async def flush(self) -> None:
        """Write what is held."""
        while self._bytes:
            if self._waits and not self._poll.poll(0):
                await anyio.wait_writable(self._fd)
            with memoryview(self._bytes) as held:
                done = os.write(self._fd, held[: select.PIPE_BUF] if self._waits else held)
            del self._bytes[:done]
