"""The bridge over HTTP: /healthz, /readyz, /metrics, and the page with its stream of events and its actions.

    bridge run      [operate] http         all of it
    bridge index    [operate] index_http   /healthz, /readyz and /metrics of the indexes that it feeds

What is served runs beside the bridge, and nothing of it in the bridge: it asks the servers itself, as `status` does.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from socket import socket
from urllib.parse import parse_qs

import anyio
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from bridge import config, log
from bridge.config import Config
from bridge.errors import ServerRefused
from bridge.operate.http import metrics, ready
from bridge.operate.http.actions import Actions
from bridge.operate.http.answer import HEADERS, json, text
from bridge.operate.http.door import listening, served
from bridge.operate.http.recent import Recent
from bridge.operate.http.site import Answer, Refused, Request, Site
from bridge.operate.http.streams import Streams
from bridge.operate.lasting import lasting
from bridge.operate.rebuilds import Rebuilds
from bridge.operate.status.health import span
from bridge.operate.status.live import Live
from bridge.stream.server import Servers
from bridge.structured import group
from bridge.waiting import until

DEFAULT = "127.0.0.1:9300"
FREE_EVERY = 5.0
# A look ends within its own time limits, or something in this process is stuck.
STUCK_AFTER = 60.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ASSETS = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/draw.js": ("draw.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

Reasons = Callable[[float], list[str]]


class _Figures(Collector):
    """What prometheus-client asks for at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        return []


@contextlib.asynccontextmanager
async def bound(address: str, key: str) -> AsyncIterator[list[socket]]:
    """Sockets at a configured address, before anything else is begun: one that cannot be had is a configuration that
    cannot work. None where nothing is to be served, or the default is, which is waited for.

    Raises:
        ServerRefused: the port is in use, or the address is not this machine's.
    """
    if address in ("", "auto"):
        yield []
        return
    async with listening(address, key) as sockets:
        yield sockets


@contextlib.asynccontextmanager
async def beside_indexes(
    settings: Config, servers: Servers, sockets: list[socket], names: list[str]
) -> AsyncIterator[None]:
    """Serve /healthz, /readyz and /metrics of these indexes while the block feeds them; arguments as above."""

    async def serve() -> None:
        live = Live(settings, servers, database_too=False)

        def reasons(within: float) -> list[str]:
            return ready.of_indexes(live.latest, live.age, within, names)

        def figures() -> Iterable[Metric]:
            why = reasons(config.duration(settings.operate.ready_within))
            return metrics.collected_of_indexes(live.latest, live.age, why, names)

        here = Site(settings.operate, _common(settings, live, reasons, figures))
        async with group() as tasks:
            tasks.start_soon(lasting, "status", "nothing is looked at", live.run)
            await _answering(sockets, here, indexes=names)

    async with group() as tasks:
        if sockets:
            tasks.start_soon(serve)
        yield
        tasks.cancel_scope.cancel()


async def _answering(sockets: list[socket], here: Site, **said: object) -> None:
    async with served(sockets, here.door):
        log.get().info("serving", url=f"http://{_shown(sockets)}/", **said)
        if not all(ipaddress.ip_address(one.getsockname()[0].partition("%")[0]).is_loopback for one in sockets):
            why = "whoever reaches this address sees names of tables and servers, and what is sent is not encrypted"
            log.get().warning("serving a network", why=why, next="a proxy with TLS and a login, or a loopback address")
        await anyio.sleep_forever()


async def _default(stack: contextlib.AsyncExitStack) -> list[socket]:
    """The default address as soon as it is free: nobody has asked for it, so that nothing else waits for it."""
    found, said = list[list[socket]](), list[str]()

    async def free() -> bool:
        try:
            found.append(await stack.enter_async_context(listening(DEFAULT, "http")))
        except ServerRefused as error:
            if not said:
                said.append(error.what)
                next_ = "waiting for the port, which Elasticsearch and OpenSearch use, too; [operate] http sets another"
                log.get().warning("no page yet", why=error.what, next=next_)
            return False
        return True

    await until(free, seconds=float("inf"), every=FREE_EVERY)
    return found[0]


async def page(settings: Config, servers: Servers, live: Live, rebuilds: Rebuilds, sockets: list[socket]) -> None:
    """Serve the page, health and metrics until cancelled.

    Args:
        sockets: what `bound` gave.
    """
    async with contextlib.AsyncExitStack() as stack:
        await _page(settings, servers, live, rebuilds, sockets or await _default(stack))


async def _page(settings: Config, servers: Servers, live: Live, rebuilds: Rebuilds, sockets: list[socket]) -> None:
    recent = Recent(settings, servers, live)

    def reasons(within: float) -> list[str]:
        return ready.reasons(live.latest, live.age, within)

    def figures() -> Iterable[Metric]:
        bound = config.duration(settings.operate.ready_within)
        return metrics.collected(live.latest, live.age, reasons(bound), most=settings.operate.table_metrics)

    async with group() as tasks:
        actions = Actions(settings, servers, rebuilds)
        streams = Streams(live, recent, actions.jobs, actions=bool(settings.operate.token))
        here: Site

        async def events(request: Request) -> web.StreamResponse:
            return await streams.answer(request, here)

        async def act(request: Request) -> web.StreamResponse:
            here.allowed(request)
            return await actions.answer(request)

        async def unlock(request: Request) -> web.StreamResponse:
            here.allowed(request)
            return json({"unlocked": True})

        routes = {
            **_common(settings, live, reasons, figures), **_assets(),
            ("GET", "/events"): events, ("POST", "/actions"): act, ("POST", "/unlock"): unlock,
        }  # fmt: skip
        here = Site(settings.operate, routes)
        tasks.start_soon(lasting, "last events", "they are not read", recent.run)
        await _answering(sockets, here, actions=bool(settings.operate.token))


def _common(
    settings: Config, live: Live, reasons: Reasons, figures: Callable[[], Iterable[Metric]]
) -> dict[tuple[str, str], Answer]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(figures))
    ProcessCollector(registry=registry)

    async def healthz(_: Request) -> web.StreamResponse:
        if live.age > STUCK_AFTER:
            return text(f"no look at the servers has ended for {span(live.age)}\n", 503)
        return text("ok\n")

    async def readyz(request: Request) -> web.StreamResponse:
        bound = within(request, settings.operate.ready_within)
        await live.fresh()
        why = reasons(bound)
        if "application/json" in request.headers.get("Accept", ""):
            return json({"ready": not why, "within_seconds": bound, "reasons": why}, 503 if why else 200)
        return text("".join(f"{line}\n" for line in why) or f"in step within {span(bound)}\n", 503 if why else 200)

    async def figured(_: Request) -> web.StreamResponse:
        await live.fresh()
        return web.Response(body=generate_latest(registry), headers={**HEADERS, "Content-Type": METRICS_TYPE})

    return {("GET", "/healthz"): healthz, ("GET", "/readyz"): readyz, ("GET", "/metrics"): figured}


def within(request: Request, default: str) -> float:
    """The bound that a request asks for, in seconds."""
    try:
        return config.duration(parse_qs(request.query_string, max_num_fields=10).get("within", [default])[-1])
    except ValueError as error:
        raise Refused(400, f"within: {error}") from None


def _assets() -> Mapping[tuple[str, str], Answer]:
    folder = Path(__file__).parent / "page"

    def of(file: str, kind: str) -> Answer:
        content = (folder / file).read_text(encoding="utf-8")

        async def asset(_: Request) -> web.StreamResponse:
            return text(content, kind=kind)

        return asset

    return {("GET", path): of(*what) for path, what in ASSETS.items()}


def _shown(sockets: list[socket]) -> str:
    host, port = sockets[0].getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
