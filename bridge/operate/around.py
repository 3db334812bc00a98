"""What runs around a bridge for its operators: the page with health and metrics, and requests over NATS.

Both show one and the same look at everything, of just now for who asks, and share one rebuild at a time. They have
connections of their own, and the bridge knows nothing of them: whatever happens here is logged, tried again, and ends
nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from socket import socket

from bridge.config import Config
from bridge.operate.lasting import lasting
from bridge.operate.rebuilds import Rebuilds
from bridge.operate.status.live import Live
from bridge.stream.server import Servers
from bridge.structured import group


@asynccontextmanager
async def bound(address: str) -> AsyncIterator[list[socket]]:
    """What `web.bound` gives for `[operate] http`; what is not served is not loaded, either."""
    if not address:
        yield []
        return
    from bridge.operate.http import web

    async with web.bound(address, "http") as sockets:
        yield sockets


@asynccontextmanager
async def around(
    settings: Config, servers: Servers, sockets: list[socket], options: Sequence[str]
) -> AsyncIterator[None]:
    """Serve while the block runs the bridge; at its end a rebuild that runs is cancelled, too.

    Args:
        sockets: what `bound` gave.
        options: how a command of the same configuration is started: ["--config", "bridge.toml"].
    """
    operate = settings.operate
    if not operate.http and not operate.service:
        yield
        return
    async with group() as tasks:
        live = Live(settings, servers, itself=True)
        rebuilds = Rebuilds(tasks, options, list(settings.index))
        tasks.start_soon(lasting, "status", "nothing is looked at", live.run)
        if operate.http:
            from bridge.operate.http import web

            page = partial(web.page, settings, servers, live, rebuilds, sockets)
            tasks.start_soon(lasting, "page", "no page is served", page)
        if operate.service:
            from bridge.operate import service

            endpoints = service.Endpoints(settings, servers, live, rebuilds)
            answer = partial(service.answering, settings, servers, endpoints)
            tasks.start_soon(lasting, "requests", "no requests are answered", answer)
        yield
        tasks.cancel_scope.cancel()
