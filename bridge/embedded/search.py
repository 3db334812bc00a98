"""A throwaway search engine for demo and quick tests: osmem-server, in memory, with OpenSearch's API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

import anyio

from bridge.embedded.process import Keeper, Server, throwaway_folder
from bridge.errors import ServerMissing

HTTP_DEADLINE = 5.0
MISSING = ServerMissing("osmem-server is not installed", "pip install 'bridge-cdc[demo]'")


async def http_get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of one plain HTTP/1.0 request; (0, b"") while nobody answers.

    Children are polled with it before any client library has a reason to exist.
    """
    try:
        with anyio.fail_after(HTTP_DEADLINE):
            async with await anyio.connect_tcp(host, port) as stream:
                await stream.send(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                answer = b"".join([chunk async for chunk in stream])
    except (OSError, TimeoutError, anyio.BrokenResourceError):
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body


class SearchEngine(Server):
    """One osmem-server; what it holds is gone when it stops."""

    name = "osmem-server"

    @classmethod
    @asynccontextmanager
    async def throwaway(cls) -> AsyncIterator[SearchEngine]:
        """A running, empty engine; stopped and deleted at the end."""
        find_program()
        home = throwaway_folder()
        async with cls(home, Keeper(home)) as server:
            yield server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _command(self) -> list[str | Path]:
        # Its own watch over stdin is off: the keeper does that for every server alike.
        return [find_program(), "-addr", f"{self.host}:{self.port}", "-no-stdin-watch"]

    async def _ready(self) -> bool:
        status, body = await http_get(self.host, self.port, "/")
        return status == 200 and "version" in json.loads(body)


def find_program() -> Path:
    """The program of the wheel.

    Raises:
        ServerMissing: the wheel is not installed, or has no program for this platform.
    """
    try:
        return Path(import_module("osmem_server").resolve_binary())
    except (ImportError, RuntimeError):
        raise MISSING from None
