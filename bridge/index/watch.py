"""The aliases and indexes of a running reader, looked at every few seconds.

What only lost its alias gets it back. An alias that somebody has moved, and an index in the alias' place, are named
with the command that takes the place back, and left alone: searches are what their owner decided. The reader goes on
feeding its generations meanwhile; only an index that is gone, or is another one now, ends it.
"""

from __future__ import annotations

import anyio

from bridge import log
from bridge.index.belonging import NAME_TAKEN, belongs, drop_outdated, regain
from bridge.index.engine import EngineError
from bridge.index.generation import FOLLOWED, Generation, IndexRecord
from bridge.index.place import Place
from bridge.index.reason import GONE
from bridge.index.sight import Astray, astray
from bridge.index.switch import remove_impostors

EVERY = 5.0


async def watch(place: Place) -> None:
    """Look for ever.

    Raises:
        IndexMismatch: an index that is fed is gone, or another is in its place.
    """
    look = _Look(place)
    while True:
        await anyio.sleep(EVERY)
        await look.once()


class _Look:
    """What is looked at, and what was said of it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._name = place.site.name
        self._said = ""
        self._due = ""

    async def once(self) -> None:
        record = await self._place.record()
        await remove_impostors(self._place, record.newest)
        await self._place.remove_stray_consumers(record)
        for generation in record.having(*FOLLOWED):
            await self._indexes(generation)
        live = record.get(record.generation)
        if live is None:
            return
        holders = sorted(await self._place.engine.indexes(record.alias))
        if not _still(record, await self._place.record()):
            return
        if not holders:
            await self._put_back()
        elif (wrong := astray(self._name, record.alias, live.physical, holders)) is not None:
            self._say(wrong, live.physical)
        elif self._said:
            self._said = ""
            log.get().info("alias right again", index=self._name, alias=record.alias, on=live.physical)

    async def _indexes(self, generation: Generation) -> None:
        engine = self._place.engine
        await belongs(
            engine,
            self._name,
            generation.physical,
            generation.stream,
            generation.stream_created,
            generation.uuid,
        )
        listed = await engine.indexes(generation.physical)
        if generation.physical not in listed:
            return  # of an engine that has just started; the next look tells
        had = listed[generation.physical]
        outdated = any(map(generation.outdated, had))
        if generation.write_alias in had:
            if outdated:
                # A replaced reader's request came late; what it still had on its way would be taken again.
                self._place.still_allowed()
                await drop_outdated(engine, generation)
        elif outdated and self._due != generation.write_alias:
            # This reader's feed is just about to take the former one's place; by the next look it has.
            self._due = generation.write_alias
        else:
            self._place.still_allowed()
            await regain(engine, self._name, generation)

    async def _put_back(self) -> None:
        """Searches see the live generation again, unless a rebuild is about to show them another one."""
        place = self._place
        async with place.undisturbed() as free:
            record = await place.record()
            live = record.get(record.generation)
            if not free or live is None or record.having("switching") or await place.engine.indexes(record.alias):
                return
            try:
                await place.engine.alias(live.physical, record.alias)
            except EngineError as error:
                # Somebody has just made an index of that name, or deleted the live one; the next look says so.
                if error.kind not in (NAME_TAKEN, *GONE):
                    raise
                return
            log.get().warning("alias put back", index=self._name, alias=record.alias, on=live.physical)

    def _say(self, wrong: Astray, physical: str) -> None:
        if wrong.why != self._said:
            self._said = wrong.why
            log.get().warning(
                "alias astray", index=self._name, why=wrong.why, next=wrong.remedy, still_feeding=physical
            )


def _still(before: IndexRecord, after: IndexRecord) -> bool:
    """Whether no switch was under way between two readings."""
    states = [[(g.number, g.state) for g in record.generations] for record in (before, after)]
    return states[0] == states[1] and not after.having("switching")
