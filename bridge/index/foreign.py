"""What stands where an index wants to be: whether it is its own, another index's of a bridge, or a user's.

The names of the engine are everybody's. A bridge's own indexes say in their mapping's `_meta` who has built them; what
another index has built is never taken over or deleted in passing, only with the command that is for it.
"""

from __future__ import annotations

from typing import Any

from bridge.config import PAST
from bridge.errors import IndexMismatch
from bridge.index.belonging import belongs
from bridge.index.generation import Generation
from bridge.index.place import Place


async def its_own(place: Place, generation: Generation) -> bool:
    """Whether the index that has a generation's name is one that this index has built."""
    if generation.physical not in await place.engine.indexes(generation.physical):
        return False
    meta = await place.engine.meta(generation.physical)
    return (meta.get("source"), meta.get("index")) == (place.site.config.source.name, place.site.name)


async def displaced(place: Place, generation: Generation) -> bool:
    """Whether something else has got a name of a generation that was begun, so that it cannot be gone on with."""
    engine = place.engine
    physical, writes = generation.physical, generation.write_alias
    holders = await engine.indexes(physical)
    if holders.keys() - {physical} or (await engine.indexes(writes)).keys() - {physical, writes}:
        return True
    try:
        if holders:
            await belongs(engine, place.site.named, physical, generation.stream, generation.stream_created)
    except IndexMismatch:
        return True
    return False


async def may_take_from(place: Place, holder: str, stream: str, created: str) -> None:
    """Raise where an index that has the alias was not built by this index from today's stream: nobody has asked by
    name for the alias to leave it."""
    meta, site = await place.engine.meta(holder), place.site
    source, alias = site.config.source.name, site.index.alias
    remedy = f"let a new index take its place: bridge reindex {site.name}; or give the index another alias"
    if site.until:
        remedy = f"take the alias {alias} off {holder}, or name another sequence"
    elif (meta.get("source"), meta.get("stream_created")) != (source, created):
        raise IndexMismatch(
            f"the alias {alias} is on the index {holder}, which was not built from today's stream"
            f" {stream} of source {source}",
            remedy,
        )
    if (meta.get("source"), meta.get("index")) != (source, site.name):
        by = f"index {meta['index']} has built" if made(meta) else "no index of this bridge has built"
        raise IndexMismatch(
            f"the alias {alias} is on the index {holder}, which {by}, not index {site.named} (or it had that name"
            " before)",
            remedy,
        )


async def may_replace(place: Place) -> None:
    """Raise where the index that has the alias' name is one that a bridge has built."""
    alias = place.site.index.alias
    meta = await place.engine.meta(alias)
    if made(meta):
        undone = await _undone(place, meta)
        raise IndexMismatch(
            f"the alias {alias} cannot be made: the index of that name was built by a bridge, for index"
            f" {meta['index']} of source {meta['source']}",
            f"give index {place.site.name} another alias; or, where that index is not needed, {undone}",
        )


def made(meta: dict[str, Any]) -> bool:
    """Whether a bridge has built the index with this `_meta`."""
    return {"source", "stream", "index"} <= meta.keys()


async def _undone(place: Place, meta: dict[str, Any]) -> str:
    """How an index that a bridge has built goes in an orderly way."""
    source, name, index = str(meta["source"]), str(meta["index"]), place.site.index.alias
    where = f"with the configuration of [index.{name}]"
    if past := PAST.fullmatch(name):
        where = f"with the configuration of [index.{past[1]}]"
        return f"delete it {where}: bridge reindex {past[1]} --until {past[2]} --drop-old"
    states = {one.physical: one.state for one in (await place.record_of(source, name)).generations}
    if index not in states:
        return f"delete it: DELETE /{index}"
    if states[index] == "kept":
        return f"delete it {where}: bridge reindex {name} --drop-old"
    return f"let a new one take its place {where}: bridge reindex {name}"
