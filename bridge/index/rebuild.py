"""`bridge reindex NAME`: a new generation built from the log beside the live one, and the alias switched in one call.

    record: building → index and consumer made → log replayed → settings restored, replicas waited for → refresh, counts
    → record: switching → one `_aliases` call → record: live (the reader moves over) → old ones deleted

Each step can be repeated: killed anywhere, the next `reindex` (or the reader, from "switching" on) goes on from what
the record says. A lease keeps a second rebuild of the same index away. Searches see the old generation until the one
call, and the new one from it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import anyio

from bridge import log, structured
from bridge.config import Config
from bridge.errors import IndexMismatch, ServerRefused
from bridge.failpoints import reach
from bridge.index import mapping, plan
from bridge.index.bulk import Tally, remove_impostor
from bridge.index.cancel import tidy
from bridge.index.circuit import Circuit
from bridge.index.engine import EngineError
from bridge.index.feed import Feed
from bridge.index.generation import Generation
from bridge.index.own import own_mapping
from bridge.index.pace import Pace
from bridge.index.place import Place, Site, site, working
from bridge.index.plan import Options
from bridge.index.sample import Sample
from bridge.index.switch import finish, forget_retired, move_alias, restate, settle
from bridge.stream.lease import Holder
from bridge.stream.server import Servers, StreamState
from bridge.waiting import Backoff, forever

NEARLY = 1_000
PATIENCE = 5.0
REPLICAS_WITHIN = 300.0
SAY_EVERY = 0.5
JUDGED = 500


class Progress(NamedTuple):
    """How far a rebuild is: events done of those known, events a second of late; `phase` is what it does now."""

    phase: str
    done: int
    total: int
    rate: float

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while there is none."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class Summary(NamedTuple):
    """What a rebuild has made."""

    name: str
    generation: int
    physical: str
    alias: str
    documents: int
    before: int | None
    events: int
    rejected: int
    seconds: float


async def rebuild(
    config: Config,
    name: str,
    servers: Servers,
    *,
    keep_old: bool = False,
    replace_index: bool = False,
    mapping: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
    awaited: plan.Awaited | None = None,
) -> Summary:
    """Build the next generation of an index and switch its alias to it. Cancelled, it takes away what it has begun.

    Args:
        keep_old: keep the generation that was live; its reader keeps it up to date.
        replace_index: an index that has the alias' name is removed in the call that makes the alias.
        mapping: a mapping file in place of the configured one, for this generation.
        awaited: says whether a table that is not recorded can be waited for; by default each is.

    Raises: what `awaited` does.
        Busy: another rebuild of this index is alive.
        ConfigError: no such index, or its mapping file cannot be read.
        Gap: the stream no longer reaches back to a complete picture of the table.
        IndexMismatch: the alias' name is taken, or the index does not hold what was written.
        ServerRefused: credentials, privileges, or a table without a key.
    """
    options = Options(keep_old=keep_old, replace_index=replace_index, mapping=mapping, awaited=awaited)
    return await build(site(config, name), servers, options, progress)


async def build(where: Site, servers: Servers, options: Options, progress: Callable[[Progress], None]) -> Summary:
    """As `rebuild`, for an index that may be none of the configured ones."""
    holder = Holder()
    try:
        backoff = Backoff(f"reindex {where.named}")
        return await _until_done(where, servers, options, progress, holder, backoff)
    except anyio.get_cancelled_exc_class():
        await tidy(where, servers, holder, replace=options.replace_index)
        raise


async def first(where: Site, servers: Servers, backoff: Backoff, holder: Holder) -> None:
    """The generation that an index reader makes when there is none."""
    await _until_done(where, servers, Options(first=True), lambda _: None, holder, backoff)


async def _until_done(
    where: Site,
    servers: Servers,
    options: Options,
    progress: Callable[[Progress], None],
    holder: Holder,
    backoff: Backoff,
) -> Summary:
    """One rebuild, over as many connections as it takes; no other one can have come in between."""
    switching: list[Summary] = []

    async def attempt(backoff: Backoff) -> Summary:
        async with working(where, servers, "reindex", holder, patient=False) as place:
            await plan.still_to_come(place, options)
            return await _Rebuild(place, options, progress, backoff, switching).run()

    return await forever(f"reindex {where.named}", attempt, backoff=backoff)


class _Rebuild:
    """The steps, in order.

    Args:
        switching: what this command has made in an earlier try that lost its connection when the alias was to move.
    """

    def __init__(
        self,
        place: Place,
        options: Options,
        progress: Callable[[Progress], None],
        backoff: Backoff,
        switching: list[Summary],
    ) -> None:
        self._place = place
        self._options = options
        self._progress = progress
        self._backoff = backoff
        self._switching = switching
        self._name = place.site.name
        self._alias = place.site.index.alias
        self._tally = Tally(sample=Sample())
        self._began = time.monotonic()
        self._told = 0.0
        self._pace = Pace()
        self._total = 0
        self._ready = False
        self._near = False
        self._ready_at = 0.0

    async def run(self) -> Summary:
        """All steps; picks up where an earlier one was killed."""
        place, options = self._place, self._options
        await settle(place)
        live = (await place.record()).generation
        for made in self._switching:
            if made.generation == live:
                self._backoff.over()
                return made
        stream, start = await plan.whole_from(place, options.upto)
        before = await plan.target_is_free(place, options, stream)
        generation, resumed = await self._generation(stream, start)
        await self._make(generation)
        reach("rebuild.made")
        self._backoff.over()
        log.get().info("rebuild", index=self._name, generation=generation.number, resumed=resumed)
        if options.upto:
            self._total = await plan.count_events(place, stream, generation.seq + 1, options.upto)
        circuit = Circuit(place.site.index.reject_limit, ends=True)
        feed = Feed(place, generation, self._tally, circuit, upto=options.upto)
        try:
            await self._replay(feed)
        except IndexMismatch:
            if circuit.open:
                # The next one begins anew: what this one has buried would be missing in it.
                await restate(place, generation.number, "retired")
                await forget_retired(place)
            raise
        documents = await self._check(feed, exact=self._tally.exact and not resumed)
        reach("rebuild.counted")
        summary = Summary(
            self._name, generation.number, generation.physical, self._alias, documents, before,
            feed.taken, self._tally.refused, time.monotonic() - self._began,
        )  # fmt: skip
        self._switching.append(summary)
        await self._switch(feed.generation)
        self._say("done", feed.taken, 0, force=True)
        return summary

    async def _generation(self, stream: StreamState, start: int) -> tuple[Generation, bool]:
        """The generation to build: one that was begun with today's configuration, or a new one."""
        place = self._place
        own = own_mapping(self._options.mapping or place.site.index.mapping)
        record = await place.record()
        for begun in record.having("building"):
            if await plan.resumed(place, begun, stream, own):
                return begun, True
            await restate(place, begun.number, "retired")
            await forget_retired(place)
        generation = await plan.drafted(place, await plan.next_number(place, record), own, stream, start)
        await place.change(lambda r: r.of([*r.generations, generation]))
        reach("rebuild.recorded")
        return generation, False

    async def _make(self, generation: Generation) -> None:
        """The physical index with its write alias; one that was lost since is made and filled from the beginning."""
        engine = self._place.engine
        if generation.physical in await engine.indexes(generation.physical):
            return
        await remove_impostor(engine, generation.write_alias)
        await self._place.remove_consumer(generation)
        await self._place.change(
            lambda r: r.having_changed(
                generation.number, seq=generation.first - 1, position="", begins={}, ends={}, uuid="", fresh=time.time()
            )
        )
        body = {
            "settings": mapping.settings(generation.settings, replaying=True, fields=mapping.count(generation.mapping)),
            "mappings": generation.mapping,
            "aliases": {generation.write_alias: {}},
        }
        try:
            await engine.create(generation.physical, body)
        except EngineError as error:
            if error.kind == "resource_already_exists_exception":
                return
            raise ServerRefused(
                f"the index {generation.physical} cannot be made: {error.what}"
                + (f" ({error.words})" if error.words else ""),
                "correct settings and mapping of the index in the configuration",
            ) from None
        await self._hide(generation)

    async def _hide(self, generation: Generation) -> None:
        """An index template may have put the alias of searches on it already: nobody is to see it half-built."""
        engine = self._place.engine
        if self._alias in (await engine.indexes(generation.physical)).get(generation.physical, []):
            actions = [{"remove": {"index": generation.physical, "alias": self._alias}}]
            await engine.json("POST", "/_aliases", {"actions": actions})
            log.get().warning(
                "alias of a template taken off", index=self._name, alias=self._alias, physical=generation.physical,
                next="take the alias out of the index template: searches saw an empty index for a moment",
            )  # fmt: skip

    # The replay

    async def _replay(self, feed: Feed) -> None:
        """Feed until caught up; then restore the settings while still feeding, and catch up to the end."""
        async with structured.group() as group:

            async def between(at_end: bool) -> bool:
                reach("rebuild.replaying")
                pending = max(self._total - feed.taken, 0) if self._options.upto else feed.durable.pending
                self._say("replaying" if not self._ready else "catching up", feed.taken, pending)
                near = at_end or pending < NEARLY
                if near and not self._near:
                    self._near = True
                    group.start_soon(self._restore, feed.generation)
                if not self._ready:
                    return False
                # Nobody reads on where an index of the past ends; what searches see goes on with its reader.
                patience_ends = not self._options.upto and near
                return at_end or (patience_ends and time.monotonic() - self._ready_at > PATIENCE)

            await feed.run(between)

    async def _restore(self, generation: Generation) -> None:
        """Replicas and refresh as configured, and wait for the replicas where there are nodes for them."""
        engine = self._place.engine
        reach("rebuild.restoring")
        await engine.json("PUT", f"/{generation.physical}/_settings", mapping.restored(generation.settings))
        reach("rebuild.restored")
        health = await engine.json("GET", f"/_cluster/health/{generation.physical}")
        if health.get("number_of_data_nodes", 1) != 1 and health.get("status") != "green":
            with anyio.move_on_after(REPLICAS_WITHIN) as scope:
                while health.get("status") != "green":
                    await anyio.sleep(SAY_EVERY)
                    health = await engine.json("GET", f"/_cluster/health/{generation.physical}")
            if scope.cancelled_caught:
                log.get().warning("replicas not complete", index=generation.physical, status=health.get("status"))
        self._ready_at = time.monotonic()
        self._ready = True

    def _say(self, phase: str, done: int, pending: int, *, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._told >= SAY_EVERY or force:
            self._told = now
            self._progress(Progress(phase, done, done + pending, self._pace.at(now, done)))

    # The check

    async def _check(self, feed: Feed, *, exact: bool) -> int:
        """The documents that searches will see; what is not as it was written is removed, and the alias stays."""
        generation = feed.generation
        try:
            documents = await self._count(generation, exact=exact)
            await self._compare(generation)
            await self._judge(feed, documents)
        except IndexMismatch:
            # Resumed, it would be taken for complete.
            await restate(self._place, generation.number, "retired")
            await forget_retired(self._place)
            raise
        return documents

    async def _count(self, generation: Generation, *, exact: bool) -> int:
        await self._place.engine.refresh(generation.physical)
        found = await self._place.engine.count(generation.physical)
        expected = self._tally.created - self._tally.deleted
        if exact and found != expected:
            raise self._mismatch(f"{generation.physical} holds {found} documents, {expected} were written")
        return found

    async def _compare(self, generation: Generation) -> None:
        """Some hundred documents, one by one, with what the log's last event on each has made of it."""
        sample = self._tally.sample
        if sample is None or not sample.ids:
            return
        found = await self._place.engine.mget(generation.physical, sample.ids)
        wrong = sample.differing(found, verbatim=generation.verbatim)
        log.get().debug("documents compared", index=self._name, count=len(sample.ids), differing=len(wrong))
        if wrong:
            raise self._mismatch(
                f"{len(wrong)} of {len(sample.ids)} documents compared with the log are not in {generation.physical} "
                "as they were written"
            )

    async def _judge(self, feed: Feed, documents: int) -> None:
        """Whether enough was taken for searches to be shown it: few rows are too few for the circuit.

        A first build hides nothing from anybody: its reader says what was rejected and goes on.
        """
        limit, generation = self._place.site.index.reject_limit, feed.generation
        if self._options.first or len(feed.rejected) <= limit * documents:
            return
        rejected, wrong, rows = list(feed.rejected.items()), 0, documents
        for start in range(0, len(rejected), JUDGED):
            chunk = rejected[start : start + JUDGED]
            found = await self._place.engine.mget(generation.physical, [address for address, _ in chunk])
            wrong += sum(one not in found or found[one].version < at for one, at in chunk)
            # Where an older document stands under the id, that row is among the documents.
            rows += sum(one not in found for one, _ in chunk)
        if wrong > limit * rows:
            raise IndexMismatch(
                f"{wrong} of {rows} documents of {generation.physical} were rejected: the alias stays where it is",
                f"see why: bridge dlq {self._name}; correct the mapping or the transform, or raise its reject_limit,"
                f" then: bridge reindex {self._name}",
            )

    def _mismatch(self, what: str) -> IndexMismatch:
        return IndexMismatch(
            f"{what}: the alias stays where it is",
            f"see the engine's log, then build again: bridge reindex {self._place.site.named}",
        )

    # The switch

    async def _switch(self, generation: Generation) -> None:
        keep = self._options.keep_old
        await restate(self._place, generation.number, "switching", keeps=keep)
        reach("switch.recorded")
        await move_alias(self._place, generation, replace=self._options.replace_index)
        await finish(self._place, generation.number, keep_old=keep)
        await forget_retired(self._place)
