"""What runs around a bridge for its operators: the page with health and metrics, and requests over NATS.

Both show one and the same look at everything, a second old at most, and share one rebuild at a time. They have
connections of their own, and the bridge knows nothing of them: whatever happens here is logged, tried again, and ends
nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from socket import socket

from bridge import log
from bridge.config import Config
from bridge.errors import BridgeError, Unavailable
from bridge.operate import service, web
from bridge.operate.live import Live
from bridge.operate.rebuilds import Rebuilds
from bridge.stream.server import Servers
from bridge.structured import group
from bridge.waiting import Backoff, forever

# Until the next try where a server refuses, or something is wrong here.
PAUSE = 30.0


@asynccontextmanager
async def around(
    settings: Config, servers: Servers, sockets: list[socket], options: Sequence[str]
) -> AsyncIterator[None]:
    """Serve while the block runs the bridge; at its end a rebuild that runs is cancelled, too.

    Args:
        sockets: what `web.bound` gave.
        options: how a command of the same configuration is started: ["--config", "bridge.toml"].
    """
    operate = settings.operate
    if not operate.http and not operate.service:
        yield
        return
    async with group() as tasks:
        live = Live(settings, servers)
        rebuilds = Rebuilds(tasks, options, list(settings.index))
        tasks.start_soon(_lasting, "status", "nothing is looked at", lambda _: live.run())
        if operate.http:
            work = partial(web.page, settings, servers, live, rebuilds, sockets)
            tasks.start_soon(_lasting, "page", "no page is served", lambda _: work())
        if operate.service:
            endpoints = service.Endpoints(settings, servers, live, rebuilds)
            answer = partial(service.answering, settings, servers, endpoints)
            tasks.start_soon(_lasting, "requests", "no requests are answered", answer)
        yield
        tasks.cancel_scope.cancel()


async def _lasting(what: str, broken: str, work: Callable[[Backoff], Awaitable[None]]) -> None:
    async def attempt(backoff: Backoff) -> None:
        try:
            await work(backoff)
        except Unavailable:
            raise
        except BridgeError as error:
            raise _again(f"{broken}: {error.what}", error.remedy) from None
        except Exception as error:  # noqa: BLE001 - it must not end the log's own work
            log.get().debug("operating failed", what=what, exc_info=error)
            defect = "this is a defect of bridge: report what --verbose says"
            raise _again(f"{broken}: unexpected {type(error).__name__}", defect) from None

    await forever(what, attempt)


def _again(what: str, remedy: str) -> Unavailable:
    found = Unavailable(what, remedy)
    found.pause = PAUSE
    return found
