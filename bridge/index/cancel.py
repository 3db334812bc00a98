"""What is left to do when a command on an index is cancelled: take away what it has begun, or end its switch."""

from __future__ import annotations

import anyio

from bridge import log
from bridge.errors import BridgeError
from bridge.index.place import Place, Site, working
from bridge.index.switch import complete, forget_retired, restate
from bridge.stream.lease import Holder
from bridge.stream.server import Servers

WITHIN = 10.0


async def tidy(where: Site, servers: Servers, holder: Holder, *, replace: bool = False, building: bool = True) -> None:
    """Remove a building generation (consumer, index, record), or end a switch that was begun; say which.

    Takes ten seconds at most: where that is not enough, it says that the next `reindex` goes on with it or removes it.

    Args:
        holder: the lease's holder, whose command was cancelled.
        replace: an index that has the alias' name gives way.
        building: whether the cancelled command was one that builds.
    """
    with anyio.move_on_after(WITHIN, shield=True) as scope:
        try:
            async with working(where, servers, "reindex", holder, patient=False) as place:
                await _tidied(place, replace=replace, building=building)
        except BridgeError as error:
            _left(where, error.what)
    if scope.cancelled_caught:
        _left(where, f"that took longer than {WITHIN:g} s")


async def _tidied(place: Place, *, replace: bool, building: bool) -> None:
    name, record = place.site.name, await place.record()
    for generation in record.having("switching"):
        await complete(place, generation, replace=replace)
        log.get().info("cancelled too late", index=name, alias=record.alias, switched_to=generation.physical)
    live = record.physical if record.generation else "nothing"
    for generation in record.having("building") if building else ():
        await restate(place, generation.number, "retired")
        log.get().info("rebuild cancelled", index=name, removed=generation.physical, alias_stays_on=live)
    await forget_retired(place)


def _left(where: Site, why: str) -> None:
    next_ = f"`bridge reindex {where.named}` goes on with what was begun, or removes it"
    log.get().warning("not cleaned up", index=where.name, why=why, next=next_)
