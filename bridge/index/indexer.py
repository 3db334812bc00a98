"""`bridge index NAME`: the reader that is always on.

It follows the live generation (and those that are kept) from their consumers; when a rebuild has switched the alias,
the record in KV changes, and it goes on with the new generation exactly where the rebuild stopped. A lease lets one
reader work and the next stand by. Where several indexes are kept and one of them stops, a rebuild of it lets it begin
again.
"""

from __future__ import annotations

import math

from bridge import log, structured
from bridge.config import Config
from bridge.errors import BridgeError, ConfigError, Fenced, IndexMismatch, Overtaken, ServerRefused, Unavailable
from bridge.index import plan, rebuild, switch
from bridge.index.bulk import Tally
from bridge.index.circuit import Circuit
from bridge.index.engine import EngineError
from bridge.index.feed import Feed
from bridge.index.generation import FOLLOWED, Generation, IndexRecord, Standing
from bridge.index.own import differing
from bridge.index.place import Place, Site, site, working
from bridge.index.watch import watch
from bridge.stream.lease import Busy, Holder
from bridge.stream.server import Servers
from bridge.waiting import Backoff, forever, until

# How often the record is asked for a switch: until then what is written after it is not in the new generation.
LOOK_EVERY = 0.2
UNSETTLED: tuple[Standing, ...] = ("switching", "retired")
STOPPED_EVERY = 1.0


async def run_index(config: Config, names: list[str], servers: Servers) -> None:
    """Keep indexes up to date until cancelled; one that cannot go on is logged, and begins again once it is rebuilt.

    Args:
        names: the configured indexes; none means all of them.
        servers: urls of NATS, or who tells them.

    Raises: what ended the last one.
        ConfigError: an index is not configured.
        IndexMismatch, Overtaken: an index does not belong to the stream, or fell behind it; `reindex` mends it.
        ServerRefused: credentials, privileges, or a table without a key.
    """
    sites = [site(config, name) for name in (names or sorted(config.index))]
    if not sites:
        raise ConfigError("there is no index in the configuration", "add [index.NAME]")
    left = {where.name for where in sites}

    async def one(where: Site) -> None:
        reader = _Reader(where, servers)
        while True:
            try:
                await reader.run()
            except Exception as error:
                left.discard(where.name)
                if not left:
                    raise
                _say_stopped(where.name, error, sorted(left))
            await reader.rebuilt()
            left.add(where.name)
            log.get().info("index begins again", index=where.name, why="it was rebuilt")

    async with structured.group() as group:
        for where in sites:
            group.start_soon(one, where)


def _say_stopped(name: str, error: Exception, left: list[str]) -> None:
    what, remedy = (error.what, error.remedy) if isinstance(error, BridgeError) else (type(error).__name__, "")
    log.get().error("index stopped", index=name, why=what, next=remedy, going_on=left)


class _Reader:
    """One index, over as many connections as it takes."""

    def __init__(self, where: Site, servers: Servers) -> None:
        self._where = where
        self._servers = servers
        self._holder = Holder()
        self._builder = Holder()
        self._followed = 0
        # Longer than a session: a connection that is lost must not let a circuit bury more.
        self._circuits: dict[int, Circuit] = {}

    async def run(self) -> None:
        """Keep it up to date until something ends that."""

        async def session(backoff: Backoff) -> None:
            try:
                await self._session(backoff)
            except Fenced as error:
                raise Unavailable(error.what, "standing by") from None

        await forever(f"index {self._where.name}", session)

    async def _session(self, backoff: Backoff) -> None:
        """Work over one connection, as long as it lasts."""
        async with working(self._where, self._servers, "index", self._holder, patient=True) as place:
            await _begin(place, self._servers, backoff, self._builder)
            while True:
                record = await place.record()
                self._followed = record.generation
                await _follow(place, record, backoff, self._circuits)

    async def rebuilt(self) -> None:
        """Return once the record names another live generation than the one that was followed last."""

        async def look(backoff: Backoff) -> None:
            async with plan.looking(self._where, self._servers) as place:
                backoff.over()

                async def other() -> bool:
                    return (await place.record()).generation not in (0, self._followed)

                await until(other, seconds=math.inf, every=STOPPED_EVERY)

        await forever(f"index {self._where.name}, which has stopped", look)


async def _begin(place: Place, servers: Servers, backoff: Backoff, builder: Holder) -> None:
    """Make the first generation where there is none, and end a switch that was cut short."""
    if (await place.record()).having(*UNSETTLED):
        await _settled(place)
    record = await place.record()
    if record.generation == 0:
        log.get().info("first build", index=place.site.name)
        try:
            await rebuild.first(place.site, servers, backoff, builder)
        except Busy as error:
            raise Unavailable(error.what, "waiting for that") from None


async def _settled(place: Place) -> None:
    """End a switch that was cut short, unless the rebuild that began it is alive."""
    async with place.undisturbed() as free:
        if free:
            await switch.settle(place)


def _followed(record: IndexRecord) -> set[tuple[int, str]]:
    return {(g.number, g.state) for g in record.having(*FOLLOWED)}


async def _follow(place: Place, record: IndexRecord, backoff: Backoff, circuits: dict[int, Circuit]) -> None:
    """Feed the live and the kept generations until the record names others."""
    generations = record.having(*FOLLOWED)
    if not record.generation:
        raise IndexMismatch(
            f"the record of index {place.site.name} names no live generation",
            f"build it: bridge reindex {place.site.name}",
        )
    changed = differing(place.site.index, record)
    if changed:
        log.get().warning(
            "configuration differs", index=place.site.name, keys=changed, next=f"bridge reindex {place.site.name}"
        )
    feeds = []
    for generation in generations:
        circuit = circuits.setdefault(generation.number, Circuit(place.site.index.reject_limit))
        feeds.append(Feed(place, generation, Tally(), circuit))

    async def say() -> None:
        for feed in feeds:
            await feed.ready.wait()
        backoff.over()
        log.get().info("following", index=place.site.name, generations=[g.number for g in generations])

    try:
        async with structured.group() as group:
            for feed in feeds:
                group.start_soon(feed.run)
            group.start_soon(watch, place)
            group.start_soon(say)
            await _moved(place, record)
            group.cancel_scope.cancel()
    except (EngineError, IndexMismatch, Overtaken, ServerRefused, Unavailable):
        # A rebuild deletes the old generation under its reader: then the record has moved on already.
        if place.broker.closed.is_set() or _followed(await place.record()) == _followed(record):
            raise
    await _forget(place, generations)


async def _forget(place: Place, generations: list[Generation]) -> None:
    """A feed that worked while its generation was being removed may have made its consumer or index anew."""
    record = await place.record()
    for generation in generations:
        now = record.get(generation.number)
        if now is None or now.state == "retired":
            await place.remove_consumer(generation)
            await switch.remove_impostors(place, generation.number)


async def _moved(place: Place, record: IndexRecord) -> None:
    """Return once the record names other generations to follow; end a switch whose rebuild has died."""

    async def other() -> bool:
        now = await place.record()
        if _followed(now) != _followed(record):
            # First of all: what is retired is not to be deleted under a feed of this reader's own.
            return True
        if now.having(*UNSETTLED):
            await _settled(place)
        return False

    await until(other, seconds=math.inf, every=LOOK_EVERY)
