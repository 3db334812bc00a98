"""`reindex NAME --back` and `--drop-old`: the alias back to a generation that was kept, and letting kept ones go.

The kept generation must not show older data than searches saw: it first gets everything that was in the log when the
command began, from the always-on reader where one runs, else from here under the reader's lease. Then one `_aliases`
call, with the same steps in the record as a rebuild's switch, so that it too can be killed anywhere.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import anyio
import msgspec

from bridge import log, structured
from bridge.config import Config
from bridge.errors import UsageError
from bridge.failpoints import reach
from bridge.index.belonging import belongs
from bridge.index.bulk import Tally
from bridge.index.cancel import tidy
from bridge.index.feed import Feed
from bridge.index.generation import Generation
from bridge.index.place import Place, Site, site, working
from bridge.index.switch import complete, forget_retired, restate, settle
from bridge.stream.lease import Busy, Hold, Holder, take
from bridge.stream.reader import existing
from bridge.stream.server import Servers
from bridge.waiting import Backoff, forever

LOOK_EVERY = 0.2
SAY_EVERY = 10.0


class Returned(NamedTuple):
    """Where the alias is now and where it was, and how many documents it shows."""

    alias: str
    physical: str
    before: str
    documents: int


async def back(config: Config, name: str, servers: Servers) -> Returned:
    """Switch the alias of an index to the newest generation that is kept; the live one is kept from then on.

    Raises:
        Busy: a rebuild of this index is alive.
        UsageError: nothing is kept.
        IndexMismatch: the kept index is gone, or was built from another stream.
        Overtaken: retention has removed events that the kept generation lacks.
    """
    going = _Back(site(config, name), servers)
    try:
        return await forever(f"reindex {name} --back", going.attempt)
    except anyio.get_cancelled_exc_class():
        await tidy(going.where, servers, going.holder, building=False)
        raise


class _Back:
    """One command, over as many connections as it takes: it turns to the generation that it chose first."""

    def __init__(self, where: Site, servers: Servers) -> None:
        self.where = where
        self.holder = Holder()
        self._servers = servers
        self._chosen: Generation | None = None
        self._before = ""

    async def attempt(self, backoff: Backoff) -> Returned:
        """One try over one connection."""
        async with working(self.where, self._servers, "reindex", self.holder, patient=False) as place:
            chosen = self._chosen = self._chosen or await self._choice(place)
            reach("back.chosen")
            await settle(place)
            if (await place.record()).generation != chosen.number:
                await self._turn(place, chosen)
            backoff.over()
            documents = await place.engine.count(self.where.index.alias)
            return Returned(self.where.index.alias, chosen.physical, self._before, documents)

    async def _choice(self, place: Place) -> Generation:
        """What to go back to: a generation to which a killed command was about to switch, or the newest kept."""
        record = await place.record()
        live = record.get(record.generation)
        self._before = live.physical if live is not None else "nothing"
        begun = [generation for generation in record.having("switching") if generation.served]
        if not begun:
            await settle(place)
            record = await place.record()
        kept = begun or record.having("kept")
        if not kept:
            raise UsageError(
                f"no older generation of index {place.site.name} is kept: there is only {record.physical or 'none'}",
                f"`bridge reindex {place.site.name} --keep-old` keeps the one before it at the next rebuild",
            )
        return kept[-1]

    async def _turn(self, place: Place, chosen: Generation) -> None:
        await _level(place, chosen, self.holder.id)
        await place.engine.refresh(chosen.physical)
        reach("back.level")
        await restate(place, chosen.number, "switching", keeps=True, served=True)
        reach("back.recorded")
        await complete(place, msgspec.structs.replace(chosen, keeps=True))


async def _level(place: Place, chosen: Generation, holder: str) -> None:
    """Return once a kept generation has everything that is in the log now, whoever feeds it."""
    stream = await existing(place.broker, chosen.stream)
    await belongs(place.engine, place.site.name, chosen.physical, stream.name, stream.created)
    told = -SAY_EVERY
    while True:
        now = (await place.record()).get(chosen.number) or chosen
        if now.seq >= stream.last_seq:
            return
        try:
            hold = await take(place.state, place.site.lease("index"), holder, patient=False)
        except Busy:
            if time.monotonic() - told >= SAY_EVERY:
                told = time.monotonic()
                _say(place, now, stream.last_seq, "waiting for the index reader to bring it up to date")
            await anyio.sleep(LOOK_EVERY)
            continue
        _say(place, now, stream.last_seq, "no index reader is running: bringing it up to date from here")
        reach("back.feeding")
        try:
            await _feed(place, now, hold)
        finally:
            await hold.release()
        return


def _say(place: Place, generation: Generation, end: int, what: str) -> None:
    log.get().info(
        "bringing back", index=place.site.name, what=what, physical=generation.physical, at=generation.seq, of=end
    )


async def _feed(place: Place, generation: Generation, hold: Hold) -> None:
    """Feed a generation until it is at the log's end; the caller holds the reader's lease."""

    async def between(at_end: bool) -> bool:
        return at_end

    async with structured.group() as group:
        group.start_soon(hold.keep)
        await Feed(place, generation, Tally()).run(between)
        group.cancel_scope.cancel()


async def drop_old(config: Config, name: str, servers: Servers) -> list[str]:
    """Delete the generations of an index that are kept: consumers, indexes, records; the physical names.

    Raises:
        Busy: a rebuild of this index is alive.
    """
    where, holder = site(config, name), Holder()
    doomed: list[str] = []

    async def attempt(backoff: Backoff) -> list[str]:
        async with working(where, servers, "reindex", holder, patient=False) as place:
            backoff.over()
            await settle(place)
            for old in (await place.record()).having("kept"):
                doomed.append(old.physical)
                await restate(place, old.number, "retired")
            await forget_retired(place)
        return doomed

    return await forever(f"reindex {name} --drop-old", attempt)
