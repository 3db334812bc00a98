"""What the index reader itself can do: a feed reads a real stream into a stub that answers every bulk at once.

Measured from the feed's first batch until everything has been answered and acked. The reader is this process; the stub
(bench/stub.py) is one of its own, on the same processors, as nats-server is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from bench import documents, processor
from bench.documents import INDEX
from bench.ground import ROOT
from bench.result import Result, result
from bench.stream import bound
from bridge.config import Config
from bridge.embedded import Keeper, NatsServer
from bridge.embedded.process import Server, throwaway_folder
from bridge.embedded.search import http_get
from bridge.index.bulk import Tally
from bridge.index.feed import Feed
from bridge.index.place import site, working
from bridge.index.rebuild import rebuild
from bridge.stream.lease import Holder

DOCUMENTS = 200_000
FEWEST = 20_000  # below, the stub uses less processor time than /proc counts


class Stub(Server):
    """The stub in a process of its own."""

    name = "the stub of a search engine"

    @classmethod
    @asynccontextmanager
    async def throwaway(cls) -> AsyncIterator[Stub]:
        """A running, empty one; stopped at the end."""
        home = throwaway_folder()
        async with cls(home, Keeper(home)) as server:
            yield server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _command(self) -> list[str | Path]:
        return [sys.executable, str(ROOT / "bench" / "stub.py"), str(self.port)]

    async def _ready(self) -> bool:
        return (await http_get(self.host, self.port, "/_cluster/health"))[0] == 200


class Run(NamedTuple):
    """Documents a second; microseconds of processor a document, of the reader, of nats-server and of the stub."""

    rate: float
    bridge: float
    nats: float
    stub: float


async def measure(runs: int, scale: float) -> list[Result]:
    """Documents a second, and what a document costs."""
    async with NatsServer.throwaway() as nats, Stub.throwaway() as stub:
        config = documents.configured(nats.url, stub.url)
        count = max(int(DOCUMENTS * scale), FEWEST)
        await documents.begin(config, nats.url, count)
        # It makes a generation, which each run then reads anew: of an empty log, since a rebuild looks into what it has
        # written, and the stub keeps nothing.
        await rebuild(config, INDEX, [nats.url])
        await documents.fill(config, nats.url, count)
        found = [await _read(config, nats, stub, count) for _ in range(runs)]
    costs = {"bridge": "the reader", "nats": "nats-server", "stub": "the stub"}
    return [
        result("index.reader", "documents/s from the stream into a stub of an engine", [one.rate for one in found]),
        *(
            result(
                f"index.reader.cpu.{name}",
                f"µs of processor a document, {what}",
                [float(getattr(one, name)) for one in found],
            )
            for name, what in costs.items()
        ),
        result(
            "index.reader.bound",
            "documents/s that these times allow on two processors that do nothing else",
            [bound(one.stub, one.nats, one.bridge) for one in found],
        ),
    ]


async def _read(config: Config, nats: NatsServer, stub: Stub, expected: int) -> Run:
    async with working(site(config, INDEX), [nats.url], "index", Holder(), patient=True) as place:
        record = await place.record()
        live = record.having("live")[0]
        await place.remove_consumer(live)
        begun = await place.change(lambda r: r.having_changed(live.number, seq=live.first - 1, epoch=0, position=""))
        feed = Feed(place, begun.having("live")[0], Tally())
        first: list[tuple[int, float, float, float, float]] = []

        async def between(at_end: bool) -> bool:
            if not first and feed.taken:
                first.append((feed.taken, *_now(nats, stub)))
            return at_end and feed.taken > 0

        await feed.run(between)
        last = _now(nats, stub)
    taken, *before = first[0]
    if (tally := feed.tally).written != expected or tally.refused or tally.stale:
        raise RuntimeError(f"{tally.written} documents were written of {expected}")
    count = feed.taken - taken
    seconds, *used = (after - was for after, was in zip(last, before, strict=True))
    return Run(count / seconds, *(one / count * 1e6 for one in used))


def _now(nats: NatsServer, stub: Stub) -> tuple[float, float, float, float]:
    """The clock, and the processor time of the reader, of nats-server and of the stub."""
    return time.monotonic(), time.process_time(), processor.used(nats.pid), processor.used(stub.pid)
