"""The state of everything, looked at each second."""

from __future__ import annotations

import time

import anyio

from bridge.config import Config
from bridge.operate.history import History, sample
from bridge.operate.parts import Status
from bridge.operate.status import collect
from bridge.stream.server import Servers

EVERY = 1.0


class Live:
    """The state of everything, looked at each second over connections that stay open.

    latest: the newest look, with its conclusions; None before the first.
    history: samples of the last minutes, for rates and charts.
    """

    def __init__(self, config: Config, servers: Servers) -> None:
        self.latest: Status | None = None
        self.history = History()
        self._config = config
        self._servers = servers
        self._number = 0
        self._news = anyio.Event()

    async def run(self) -> None:
        """Look once a second until cancelled; a server that is away ends nothing."""
        while True:
            began = time.monotonic()
            self._publish(await collect(self._config, self._servers))
            await anyio.sleep(max(0.0, began + EVERY - time.monotonic()))

    async def next(self, after: int) -> int:
        """Wait until a look with a number over `after` is there (the first has 1); the number of the newest."""
        while self._number <= after:
            await self._news.wait()
        return self._number

    def _publish(self, found: Status) -> None:
        self.history.add(sample(found, time.time()))
        self.latest, self._number = found, self._number + 1
        self._news.set()
        self._news = anyio.Event()
