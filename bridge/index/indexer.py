"""`bridge index NAME`: the reader that is always on.

It follows the live generation (and those that are kept) from their consumers; when a rebuild has switched the alias,
the record in KV changes, and it goes on with the new generation exactly where the rebuild stopped. A lease lets one
reader work and the next stand by.
"""

from __future__ import annotations

import math
from uuid import uuid4

from bridge import log, structured
from bridge.config import Config
from bridge.errors import BridgeError, ConfigError, Fenced, IndexMismatch, Overtaken, ServerRefused, Unavailable
from bridge.index import rebuild, switch
from bridge.index.bulk import Tally
from bridge.index.circuit import Circuit
from bridge.index.engine import EngineError
from bridge.index.feed import Feed, Place, Site, site, working
from bridge.index.generation import FOLLOWED, IndexRecord, differences
from bridge.index.watch import watch
from bridge.stream.lease import Busy
from bridge.stream.server import Servers
from bridge.waiting import Backoff, until

# How often the record is asked for a switch: until then what is written after it is not in the new generation.
LOOK_EVERY = 0.2


async def run_index(config: Config, names: list[str], servers: Servers) -> None:
    """Keep indexes up to date until cancelled; one that cannot go on is logged, and the others do.

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
        try:
            await _always(where, servers)
        except Exception as error:
            left.discard(where.name)
            if not left:
                raise
            what, remedy = (error.what, error.remedy) if isinstance(error, BridgeError) else (type(error).__name__, "")
            log.get().error("index stopped", index=where.name, why=what, next=remedy, going_on=sorted(left))

    async with structured.group() as group:
        for where in sites:
            group.start_soon(one, where)


async def _always(where: Site, servers: Servers) -> None:
    backoff = Backoff(f"index {where.name}")
    # Longer than a session: a connection that is lost must not let a circuit bury more.
    circuits: dict[int, Circuit] = {}
    holder = uuid4().hex
    while True:
        try:
            await _session(where, servers, holder, backoff, circuits)
        except Fenced as error:
            await backoff.wait(Unavailable(error.what, "standing by"))
        except Unavailable as error:
            await backoff.wait(error)


async def _session(where: Site, servers: Servers, holder: str, backoff: Backoff, circuits: dict[int, Circuit]) -> None:
    """Work over one connection, as long as it lasts."""
    async with working(where, servers, "index", holder, patient=True) as place:
        await _begin(place, servers, backoff)
        while True:
            await _follow(place, backoff, circuits)


async def _begin(place: Place, servers: Servers, backoff: Backoff) -> None:
    """Make the first generation where there is none, and end a switch that was cut short."""
    if (await place.record()).having("switching"):
        await _settled(place)
    record = await place.record()
    if record.generation == 0:
        log.get().info("first build", index=place.site.name)
        try:
            await rebuild.first(place.site, servers, backoff)
        except Busy as error:
            raise Unavailable(f"index {place.site.name} is being built: {error.what}", "waiting for that") from None


async def _settled(place: Place) -> None:
    """End a switch that was cut short, unless the rebuild that began it is alive."""
    async with place.undisturbed() as free:
        if free:
            await switch.settle(place)


def _followed(record: IndexRecord) -> set[tuple[int, str]]:
    return {(g.number, g.state) for g in record.having(*FOLLOWED)}


async def _follow(place: Place, backoff: Backoff, circuits: dict[int, Circuit]) -> None:
    """Feed the live and the kept generations until the record names others."""
    record = await place.record()
    generations = record.having(*FOLLOWED)
    if not record.generation:
        raise IndexMismatch(
            f"the record of index {place.site.name} names no live generation",
            f"build it: bridge reindex {place.site.name}",
        )
    changed = differences(place.site.index, record)
    if changed:
        log.get().warning(
            "configuration differs", index=place.site.name, keys=changed, next=f"bridge reindex {place.site.name}"
        )
    try:
        async with structured.group() as group:
            for generation in generations:
                circuit = circuits.setdefault(generation.number, Circuit(place.site.index.reject_limit))
                feed = Feed(place, generation, Tally(), circuit)
                group.start_soon(feed.run)
            group.start_soon(watch, place)
            backoff.over()
            log.get().info("following", index=place.site.name, generations=[g.number for g in generations])
            await _moved(place, record)
            group.cancel_scope.cancel()
    except (EngineError, IndexMismatch, Overtaken, ServerRefused, Unavailable):
        # A rebuild deletes the old generation under its reader: then the record has moved on already.
        if place.broker.closed.is_set() or _followed(await place.record()) == _followed(record):
            raise


async def _moved(place: Place, record: IndexRecord) -> None:
    """Return once the record names other generations to follow; end a switch whose rebuild has died."""

    async def other() -> bool:
        now = await place.record()
        if now.having("switching"):
            await _settled(place)
        return _followed(now) != _followed(record)

    await until(other, seconds=math.inf, every=LOOK_EVERY)
