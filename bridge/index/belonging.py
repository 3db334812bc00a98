"""Whether an index was built from the stream that there is now: its mapping's `_meta` says which one that was.

The engine's own id of an index says whether it is still the one that was fed: one that came back from a backup lacks
what was written since, though nothing else tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from bridge import log
from bridge.errors import IndexMismatch, Unavailable
from bridge.index.bulk import remove_impostor
from bridge.index.engine import Engine, EngineError
from bridge.index.generation import Generation
from bridge.waiting import Backoff

NAME_TAKEN = "invalid_alias_name_exception"
TRIES = 10


async def belongs(engine: Engine, name: str, physical: str, stream: str, created: str, uuid: str = "") -> str:
    """Return where it was. A stream that was made again begins at 1: all its writes would lose against old versions.

    Args:
        name: the index as it is configured.
        created: when the stream was made; that is its identity.
        uuid: the engine's id of the index that was fed so far; empty: not known.

    Returns:
        The engine's id of the index.

    Raises:
        IndexMismatch: the index is gone, not ours, or built from another stream.
    """
    meta, found = await engine.meta(physical), ""
    try:
        found = await engine.uuid(physical) if meta else ""
    except EngineError as error:
        if error.status != 404:
            raise
        meta = {}  # gone between the two
    remedy = f"build it anew: bridge reindex {name}"
    if not meta:
        raise IndexMismatch(f"the index {physical} is gone or was not made by the bridge", remedy)
    if meta.get("stream") != stream or meta.get("stream_created") != created:
        raise IndexMismatch(
            f"the index {physical} was built from another stream than today's {stream}, made at {created}", remedy
        )
    if uuid and found and found != uuid:
        raise IndexMismatch(
            f"the index {physical} is not the one that was fed until now: it was restored from a backup or made again",
            remedy,
        )
    return found


async def take_writes(engine: Engine, name: str, generation: Generation, allowed: Callable[[], None]) -> None:
    """In one call: the generation's index has its write alias, and none that was for a reader before this one.

    Args:
        allowed: called before each try; raises where this reader may have been replaced.

    Raises:
        IndexMismatch: the index is gone or another, or something else has the alias' name.
        Unavailable: the engine does not know all of its indexes yet.
    """
    physical, alias = generation.physical, generation.write_alias
    for _ in range(TRIES):
        holders, listed = await engine.indexes(alias), await engine.indexes(physical)
        if physical not in listed:
            await belongs(engine, name, physical, generation.stream, generation.stream_created, generation.uuid)
            # As engines do for moments after a start: what they do not list would be left on it.
            raise Unavailable(f"the search engine at {engine.where} does not list {physical}, which it has", "waiting")
        had = listed[physical]
        if others := holders.keys() - {physical, alias}:
            raise IndexMismatch(
                f"the write alias {alias} of {physical} cannot be made: {', '.join(sorted(others))} has an alias of"
                " that name",
                "start again: another name is taken then",
            )
        older = [one for one in had if generation.outdated(one)]
        if alias in had and not older:
            return
        if alias in holders:
            await remove_impostor(engine, alias)
        actions: list[dict[str, Any]] = [{"add": {"index": physical, "alias": alias}}]
        actions += [{"remove": {"index": physical, "alias": one}} for one in older]
        try:
            await _moved(engine, physical, actions, allowed)
        except EngineError as error:
            if error.status == 404:
                # The index, which is said so here; or an older alias that somebody has removed just now.
                await belongs(engine, name, physical, generation.stream, generation.stream_created, generation.uuid)
            elif error.kind != NAME_TAKEN:
                raise
        else:
            return
    raise IndexMismatch(
        f"the write alias {alias} of {physical} cannot be made: an index has that name",
        "find out what makes it; or start again: another name is taken then",
    )


async def _moved(engine: Engine, physical: str, actions: list[dict[str, Any]], allowed: Callable[[], None]) -> None:
    """Move write aliases; waits, with the index named, where it is blocked (some engines refuse that then)."""
    body, backoff = msgspec.json.encode({"actions": actions}), Backoff(f"write alias of {physical}")

    async def attempt() -> None:
        await engine.ask("POST", "/_aliases", body, index=physical)

    await engine.patiently(attempt, backoff, before=allowed)
    backoff.over()


async def drop_outdated(engine: Engine, generation: Generation) -> None:
    """Take the write aliases of former readers off a generation's index."""
    physical = generation.physical
    had = (await engine.indexes(physical)).get(physical, [])
    actions = [{"remove": {"index": physical, "alias": one}} for one in had if generation.outdated(one)]
    if actions:
        try:
            await engine.json("POST", "/_aliases", {"actions": actions})
        except EngineError as error:
            # Gone by now.
            if error.status != 404:
                raise


async def regain(engine: Engine, name: str, generation: Generation) -> bool:
    """Put the write alias back on its index, where that is there and only the alias is gone; whether it is there now.

    Raises:
        IndexMismatch: the index is gone or another.
    """
    physical, alias = generation.physical, generation.write_alias
    await belongs(engine, name, physical, generation.stream, generation.stream_created, generation.uuid)
    for _ in range(TRIES):
        await remove_impostor(engine, alias)
        holders = list(await engine.indexes(alias))
        if alias in holders:
            continue  # a delete of another bulk has just made it
        if holders:
            return holders == [physical]
        try:
            await engine.alias(physical, alias)
        except EngineError as error:
            # A delete of another bulk has made an index of that name just now.
            if error.kind != NAME_TAKEN:
                raise
        else:
            log.get().warning("alias put back", index=name, alias=alias, on=physical)
            return True
    return False
