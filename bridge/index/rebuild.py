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
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import uuid4

import anyio

from bridge import log, structured
from bridge.config import Config
from bridge.errors import ConfigError, IndexMismatch, ServerRefused, Unavailable
from bridge.index import mapping
from bridge.index.bulk import Tally, remove_impostor
from bridge.index.circuit import Circuit
from bridge.index.columns import joined
from bridge.index.design import design, own_mapping
from bridge.index.engine import EngineError
from bridge.index.feed import Feed, Place, Site, freshness, site, working
from bridge.index.generation import Generation, Member, origin, physical, shapes
from bridge.index.naming import Template
from bridge.index.switch import finish, forget_retired, move_alias, restate, settle
from bridge.stream.reach import complete_from
from bridge.stream.server import Servers, StreamState, check_mode
from bridge.stream.state import SnapshotStatus
from bridge.stream.subjects import snapshot_key
from bridge.waiting import Backoff

NEARLY = 1_000
PATIENCE = 5.0
REPLICAS_WITHIN = 300.0
SAY_EVERY = 0.5


class Progress(NamedTuple):
    """How far a rebuild is: events done of those known, events a second, seconds left; `phase` is what it does now."""

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


class Options(NamedTuple):
    """What was asked for on the command line."""

    keep_old: bool = False
    replace_index: bool = False
    first: bool = False


async def rebuild(
    config: Config,
    name: str,
    servers: Servers,
    *,
    keep_old: bool = False,
    replace_index: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Build the next generation of an index and switch its alias to it.

    Args:
        keep_old: keep the generation that was live; its reader keeps it up to date.
        replace_index: an index that has the alias' name is removed in the call that makes the alias.

    Raises:
        Busy: another rebuild of this index is alive.
        ConfigError: no such index, or its mapping file cannot be read.
        Gap: the stream no longer reaches back to a complete picture of the table.
        IndexMismatch: the alias' name is taken, or the documents counted are not those written.
        ServerRefused: credentials, privileges, or a table without a key.
    """
    where = site(config, name)
    return await _until_done(where, servers, Options(keep_old, replace_index), progress, Backoff(f"reindex {name}"))


async def first(where: Site, servers: Servers, backoff: Backoff) -> None:
    """The generation that an index reader makes when there is none."""
    await _until_done(where, servers, Options(first=True), lambda _: None, backoff)


async def _until_done(
    where: Site, servers: Servers, options: Options, progress: Callable[[Progress], None], backoff: Backoff
) -> Summary:
    holder = uuid4().hex
    while True:
        try:
            return await _attempt(where, servers, options, progress, holder, backoff)
        except Unavailable as error:
            await backoff.wait(error)


async def _attempt(
    where: Site,
    servers: Servers,
    options: Options,
    progress: Callable[[Progress], None],
    holder: str,
    backoff: Backoff,
) -> Summary:
    """One try over one connection."""
    async with working(where, servers, "reindex", holder, patient=False) as place:
        return await _Rebuild(place, options, progress, backoff).run()


class _Rebuild:
    """The steps, in order."""

    def __init__(self, place: Place, options: Options, progress: Callable[[Progress], None], backoff: Backoff) -> None:
        self._place = place
        self._options = options
        self._progress = progress
        self._backoff = backoff
        self._name = place.site.name
        self._alias = place.site.index.alias
        self._tally = Tally()
        self._began = time.monotonic()
        self._told = 0.0
        self._ready = False
        self._near = False
        self._ready_at = 0.0

    async def run(self) -> Summary:
        """All steps; picks up where an earlier one was killed."""
        await settle(self._place)
        stream, start = await self._complete_from()
        before = await self._target_is_free(stream)
        generation, resumed = await self._generation(stream, start)
        await self._make(generation)
        self._backoff.over()
        log.get().info("rebuild", index=self._name, generation=generation.number, resumed=resumed)
        circuit = Circuit(self._place.site.index.reject_limit, ends=True)
        feed = Feed(self._place, generation, self._tally, circuit)
        try:
            await self._replay(feed)
        except IndexMismatch:
            if circuit.open:
                # The next one begins anew: what this one has buried would be missing in it.
                await restate(self._place, generation.number, "retired")
                await forget_retired(self._place)
            raise
        documents = await self._count(feed.generation, exact=self._tally.exact and not resumed)
        await self._switch(feed.generation)
        self._say("done", feed.taken, 0, force=True)
        log.get().info("alias switched", index=self._name, alias=self._alias, to=generation.physical)
        return Summary(
            self._name, generation.number, generation.physical, self._alias, documents, before,
            feed.taken, self._tally.refused, time.monotonic() - self._began,
        )  # fmt: skip

    # Before

    async def _complete_from(self) -> tuple[StreamState, int]:
        """The stream, and the sequence from which on it holds every row of the tables."""
        where, place = self._place.site, self._place
        stream = await place.broker.stream(where.config.stream.name)
        if stream is None:
            raise Unavailable(f"there is no stream {where.config.stream.name} yet", "waiting for the bridge to make it")
        check_mode(stream, where.config.stream)
        # What is gone from a compacted log's beginning has a later message.
        first = 0 if stream.compacted else stream.first_seq
        starts = []
        for member in where.members:
            _can_be_named(member, await place.primary(*member.key))
            status = await place.state.get(
                snapshot_key(where.config.source.name, member.schema, member.table), SnapshotStatus
            )
            starts.append(complete_from(status[0] if status is not None else None, first, stream.name, member.name))
        return stream, min(starts)

    async def _is_ours(self, holder: str, stream: StreamState) -> None:
        """A first build, which nobody has asked for by name, takes the alias only from what this stream has built."""
        meta = await self._place.engine.meta(holder)
        source = self._place.site.config.source.name
        if (meta.get("source"), meta.get("stream_created")) != (source, stream.created):
            raise IndexMismatch(
                f"the alias {self._alias} is on the index {holder}, which was not built from today's stream"
                f" {stream.name} of source {source}",
                f"let a new index take its place: bridge reindex {self._name}; or give the index another alias",
            )

    async def _target_is_free(self, stream: StreamState) -> int | None:
        """The documents that the alias shows now; refuses where its name is an index of the user's."""
        holders = await self._place.engine.indexes(self._alias)
        if self._alias in holders:
            if not self._options.replace_index:
                raise IndexMismatch(
                    f"the alias {self._alias} cannot be made: an index has that name",
                    f"let it be replaced at the switch: bridge reindex {self._name} --replace-index",
                )
            return await self._place.engine.count(self._alias)
        if self._options.first:
            for holder in holders:
                await self._is_ours(holder, stream)
        return await self._place.engine.count(self._alias) if holders else None

    async def _generation(self, stream: StreamState, start: int) -> tuple[Generation, bool]:
        """The generation to build: one that was begun with today's configuration, or a new one."""
        own = own_mapping(self._place.site.index.mapping)
        wanted = origin(self._place.site.index, own)
        record = await self._place.record()
        for begun in record.having("building"):
            stale = stream.compacted and freshness(self._place.site, begun).lost
            if begun.origin == wanted and begun.stream_created == stream.created and not stale:
                return begun, True
            await restate(self._place, begun.number, "retired")
            await forget_retired(self._place)
        made = await self._place.engine.indexes(f"{self._name}-*")
        numbers = [g.number for g in record.generations] + [_number(self._name, index) for index in made]
        number = max(numbers, default=0) + 1
        generation = await self._new(number, wanted, own, stream, start)
        await self._place.change(lambda r: r.of([*r.generations, generation]))
        return generation, False

    async def _new(
        self, number: int, wanted: dict[str, Any], own: dict[str, Any] | None, stream: StreamState, start: int
    ) -> Generation:
        index, members = self._place.site.index, self._place.site.members
        columns = await self._place.columns(members)
        designed = await design(self._place.engine, index, own, physical(self._name, number))
        properties = joined(members, columns, designed.choices) if own is None else {}
        for warning in designed.warnings:
            log.get().warning("mapping", index=self._name, what=warning)
        meta = {
            "source": self._place.site.config.source.name,
            "stream": stream.name,
            "stream_created": stream.created,
            "index": self._name,
            "generation": number,
        }
        named = physical(self._name, number)
        writers = await self._place.writers()
        return Generation(
            number=number,
            physical=named,
            consumer=named,
            state="building",
            shapes=shapes(index),
            settings=designed.settings,
            mapping=designed.mapping(properties, meta),
            choices=designed.choices,
            types={name: {column.name: column.type for column in own} for name, own in columns.items()},
            origin=wanted,
            stream=stream.name,
            stream_created=stream.created,
            first=start,
            seq=start - 1,
            epoch=max((w.epoch for w in writers if w.first_seq < start), default=0),
            fresh=time.time(),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    async def _make(self, generation: Generation) -> None:
        """The physical index with its write alias; one that was lost since is made and filled from the beginning."""
        engine = self._place.engine
        if await engine.exists(generation.physical):
            return
        await remove_impostor(engine, generation.write_alias)
        await self._place.remove_consumer(generation)
        await self._place.change(
            lambda r: r.having_changed(
                generation.number, seq=generation.first - 1, position="", begins={}, uuid="", fresh=time.time()
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
                f"the index {generation.physical} cannot be made: {error.what}",
                "correct settings and mapping of the index in the configuration",
            ) from None

    # The replay

    async def _replay(self, feed: Feed) -> None:
        """Feed until caught up; then restore the settings while still feeding, and catch up to the end."""
        async with structured.group() as group:

            async def between(at_end: bool) -> bool:
                pending = feed.durable.pending
                self._say("replaying" if not self._ready else "catching up", feed.taken, pending)
                near = at_end or pending < NEARLY
                if near and not self._near:
                    self._near = True
                    group.start_soon(self._restore, feed.generation)
                if not self._ready:
                    return False
                return at_end or (near and time.monotonic() - self._ready_at > PATIENCE)

            await feed.run(between)

    async def _restore(self, generation: Generation) -> None:
        """Replicas and refresh as configured, and wait for the replicas where there are nodes for them."""
        engine = self._place.engine
        await engine.json("PUT", f"/{generation.physical}/_settings", mapping.restored(generation.settings))
        health = await engine.json("GET", f"/_cluster/health/{generation.physical}")
        if health.get("number_of_data_nodes", 1) > 1 and health.get("status") != "green":
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
            elapsed = now - self._began
            self._progress(Progress(phase, done, done + pending, done / elapsed if elapsed > 0 else 0.0))

    async def _count(self, generation: Generation, *, exact: bool) -> int:
        """The documents that searches will see; they must be those that were written."""
        await self._place.engine.refresh(generation.physical)
        found = await self._place.engine.count(generation.physical)
        expected = self._tally.created - self._tally.deleted
        if exact and found != expected:
            raise IndexMismatch(
                f"{generation.physical} holds {found} documents, {expected} were written: the alias stays where it is",
                f"see the engine's log, then build again: bridge reindex {self._name}",
            )
        return found

    # The switch

    async def _switch(self, generation: Generation) -> None:
        keep = self._options.keep_old
        await restate(self._place, generation.number, "switching", keeps=keep)
        await move_alias(self._place, generation, replace=self._options.replace_index)
        await finish(self._place, generation.number, keep_old=keep)
        await forget_retired(self._place)


def _can_be_named(member: Member, key: list[str]) -> None:
    """Whether every row has an id of its own, and one that its delete tells as well."""
    if not member.shape.id:
        return
    columns = Template(member.shape.id).columns
    if set(columns) != set(key):
        raise ConfigError(
            f"the id {member.shape.id!r} of {member.name} must hold all columns of its key and no others: "
            f"{', '.join(key)}",
            "correct `id` of the index: rows that differ elsewhere would be one document",
        )


def _number(name: str, index: str) -> int:
    tail = index.removeprefix(f"{name}-")
    return int(tail) if tail.isdigit() and physical(name, int(tail)) == index else 0
