"""`bridge index NAME`: the reader that is always on. It joins the stream and the search engine.

It follows the live generation (and those that are kept) from their consumers; when a rebuild has switched the alias,
the record in KV changes, and it goes on with the new generation exactly where the rebuild stopped. Acks follow the
engine's answers; the KV record holds what is known to be done, at most a second behind. A lease lets one reader work
and the next stand by. `Feed` is shared with the rebuild.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import anyio
import msgspec

from bridge import log, structured
from bridge.config import Config, Index, split_name
from bridge.errors import ConfigError, Fenced, IndexMismatch, ServerRefused, Unavailable
from bridge.index import mapping
from bridge.index.apply import Applier
from bridge.index.belonging import belongs
from bridge.index.bulk import Mark, Tally
from bridge.index.columns import grow
from bridge.index.document import Builder
from bridge.index.engine import Engine, EngineError, opened
from bridge.index.generation import FOLLOWED, Generation, IndexRecord, differences
from bridge.index.ground import Label, Letter
from bridge.stream import deadletters
from bridge.stream.lease import Busy, lease_key, take
from bridge.stream.reader import ACK_WAIT, Durable, Message, Seen, delete_consumer, existing, read
from bridge.stream.server import Broker, connect
from bridge.stream.state import Column, Conflict, State, TableRecord, Writer
from bridge.stream.subjects import epochs_key, index_key, table_key, table_subject
from bridge.waiting import Backoff, until

EVERY = 1.0


class Site(msgspec.Struct, frozen=True):
    """One configured index, and the names that follow."""

    config: Config
    name: str
    index: Index
    schema: str
    table: str

    @property
    def subject(self) -> str:
        """The subject of the table's events."""
        return table_subject(self.config.stream.prefix, self.config.source.name, self.schema, self.table)

    @property
    def key(self) -> str:
        """KV key of the index's record."""
        return index_key(self.config.source.name, self.name)

    @property
    def table_key(self) -> str:
        """KV key of the table's columns."""
        return table_key(self.config.source.name, self.schema, self.table)

    def lease(self, role: str) -> str:
        """KV key of the lease for a role ("index" or "reindex")."""
        return lease_key(role, self.config.source.name, self.name)


def site(config: Config, name: str) -> Site:
    """The configured index `name`; ConfigError where there is none."""
    index = config.index.get(name)
    if index is None:
        known = ", ".join(sorted(config.index)) or "none"
        raise ConfigError(f"there is no index {name} in the configuration (there is: {known})", f"add [index.{name}]")
    return Site(config, name, index, *split_name(index.table))


class Place:
    """What is connected while an index is worked on."""

    def __init__(self, where: Site, broker: Broker, state: State, engine: Engine) -> None:
        self.site = where
        self.broker = broker
        self.state = state
        self.engine = engine

    async def record(self) -> IndexRecord:
        """The index's record; an empty one where there is none yet."""
        found = await self.state.get(self.site.key, IndexRecord)
        return found[0] if found is not None else IndexRecord(alias=self.site.index.alias)

    async def change(self, edit: Callable[[IndexRecord], IndexRecord]) -> IndexRecord:
        """Edit the record by compare-and-set, again and again until nobody was in between."""
        while True:
            found = await self.state.get(self.site.key, IndexRecord)
            before = found[0] if found is not None else IndexRecord(alias=self.site.index.alias)
            after = edit(before)
            if after == before:
                return after
            with contextlib.suppress(Conflict):
                await self.state.put(self.site.key, after, found[1] if found is not None else 0)
                return after

    async def remove_consumer(self, generation: Generation) -> None:
        """Delete a generation's consumer."""
        await delete_consumer(self.broker, generation.stream, generation.consumer)

    async def columns(self) -> list[Column]:
        """The table's columns as the bridge last recorded them."""
        found = await self.state.get(self.site.table_key, TableRecord)
        return found[0].columns if found is not None else []

    async def writers(self) -> list[Writer]:
        """The bridges that have written to the stream."""
        found = await self.state.get(epochs_key(self.site.config.source.name), list[Writer])
        return found[0] if found is not None else []


class Feed:
    """One generation, fed from its consumer over one connection."""

    def __init__(self, place: Place, generation: Generation, tally: Tally) -> None:
        self.place = place
        self.generation = generation
        self.tally = tally
        self.done = Seen(generation.epoch, generation.seq, generation.position)
        self.durable = Durable(
            place.broker,
            generation.stream,
            generation.consumer,
            [place.site.subject],
            first=generation.first,
            epochs=place.writers,
        )
        self._applier: Applier | None = None
        self._types: dict[str, str] = {}
        self._lock = anyio.Lock()
        self._stored = self.done
        self.taken = 0

    async def run(self, between: Callable[[bool], Awaitable[bool]] | None = None) -> None:
        """Feed until `between` says so (asked after every batch, told whether nothing is left to read), or for ever.

        Raises:
            IndexMismatch: index and stream do not belong together, or retention has overtaken the consumer.
            Unavailable: the connection to NATS is gone.
        """
        stream = await existing(self.place.broker, self.generation.stream)
        await belongs(self.place.engine, self.place.site.name, self.generation.physical, stream.name, stream.created)
        self._types = {column.name: column.type for column in await self.place.columns()}
        builder = Builder(self.generation.shape, self.place.site.index.table, self._toastable)
        rejected = await self._rejected()
        await self.durable.open(self.done)
        async with structured.group() as group:
            label = Label(self.place.site.name, self.generation.number, self.place.site.index.table)
            self._applier = Applier(
                self.place.engine, self.generation.write_alias, label, builder, self, group,
                tally=self.tally, rejected=rejected,
            )  # fmt: skip
            group.start_soon(self._watch)
            async with contextlib.aclosing(self.durable.batches()) as batches:
                async for batch in batches:
                    if await self._step(batch, between):
                        break
            group.cancel_scope.cancel()
        await self.store()

    async def _step(self, batch: list[Message], between: Callable[[bool], Awaitable[bool]] | None) -> bool:
        assert self._applier is not None
        await self._applier.take(batch)
        self.taken += len(batch)
        if not self.durable.waiting:
            await self._applier.flush()
        if between is not None and await between(self.durable.pending == 0 and not self.durable.waiting):
            await self._applier.settle()
            return True
        return False

    async def _rejected(self) -> dict[str, int]:
        """The documents of this generation that are among the dead letters, with the version that was refused."""
        config, found = self.place.site.config, dict[str, int]()
        async for data in deadletters.letters(
            self.place.broker, config.stream, config.source.name, self.place.site.name
        ):
            letter = msgspec.json.decode(data, type=Letter)
            if letter.generation == self.generation.number:
                found[letter.id] = max(found.get(letter.id, 0), letter.epoch << 42 | letter.seq)
        return found

    def _toastable(self, column: str) -> bool:
        return mapping.toastable(self._types.get(column, ""))

    async def _watch(self) -> None:
        """Once a second: keep the record, compare with the stream, and keep the server from sending again."""
        assert self._applier is not None
        told = time.monotonic()
        while True:
            await anyio.sleep(EVERY)
            rest = await self.durable.look()
            if rest is not None and self._applier.idle and rest.seq > self.done.seq:
                self.done = rest
            await self.store()
            if time.monotonic() - told > ACK_WAIT / 3:
                await self.durable.progress()
                told = time.monotonic()

    async def store(self) -> None:
        """Write how far everything is done into the record."""
        done = self.done
        if done == self._stored:
            return
        number = self.generation.number
        await self.place.change(
            lambda record: record.having_changed(number, seq=done.seq, epoch=done.epoch, position=done.position)
        )
        self._stored = done

    # What the applier needs of the stream

    async def bury(self, letter: Letter) -> None:
        """Store a dead letter."""
        config, name = self.place.site.config, self.place.site.name
        log.get().warning("dead letter", index=name, seq=letter.seq, op=letter.op, reason=letter.reason)
        unique = f"{name}-{letter.generation}-{letter.epoch}-{letter.seq}"
        await deadletters.bury(self.place.broker, config.stream, config.source.name, name, letter, unique)

    async def history(self, upto: int) -> AsyncIterator[list[Message]]:
        """The table's messages from where the generation began."""
        batches = read(
            self.place.broker,
            self.generation.stream,
            subjects=[self.place.site.subject],
            start=self.generation.first,
            last=upto,
        )
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch

    async def reached(self, mark: Mark) -> None:
        """Ack everything up to a place."""
        self.done = Seen(mark.epoch, mark.seq, mark.position)
        await self.durable.ack(mark.seq)

    def beginning(self) -> int:
        """The version of the last begin marker."""
        return self.generation.begin

    async def begun(self, at: int) -> None:
        """Remember a begin marker before anything behind it is acked."""
        await self._changed(begin=at)

    async def learn(self, documents: list[dict[str, Any]]) -> bool:
        """Add the columns that the mapping lacks; whether these documents now fit."""
        async with self._lock:
            columns = await self.place.columns()
            self._types = {column.name: column.type for column in columns}
            grown = await grow(self.place.engine, self.place.site.name, self.generation, columns, documents)
            if grown is not None:
                await self._changed(mapping=grown)
            return grown is not None

    async def _changed(self, **changes: Any) -> None:
        number = self.generation.number
        record = await self.place.change(lambda record: record.having_changed(number, **changes))
        self.generation = record.get(number) or self.generation


# The reader


async def run_index(config: Config, names: list[str], servers: list[str]) -> None:
    """Keep indexes up to date until cancelled.

    Args:
        names: the configured indexes; none means all of them.
        servers: urls of NATS.

    Raises:
        ConfigError: an index is not configured.
        IndexMismatch: an index does not belong to the stream, or was overtaken; `reindex` mends it.
        ServerRefused: credentials, privileges, or a table without a key.
    """
    sites = [site(config, name) for name in (names or sorted(config.index))]
    if not sites:
        raise ConfigError("there is no index in the configuration", "add [index.NAME]")
    async with structured.group() as group:
        for where in sites:
            group.start_soon(_always, where, servers)


async def _always(where: Site, servers: list[str]) -> None:
    backoff = Backoff(f"index {where.name}")
    holder = uuid4().hex
    while True:
        try:
            await _session(where, servers, holder, backoff)
        except Fenced as error:
            await backoff.wait(Unavailable(error.what, "standing by"))
        except Unavailable as error:
            await backoff.wait(error)


async def _session(where: Site, servers: list[str], holder: str, backoff: Backoff) -> None:
    """Work over one connection, as long as it lasts."""
    config = where.config
    async with (
        connect(config.stream, servers, name=f"bridge index {where.name}") as broker,
        opened(where.index) as engine,
    ):
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        hold = await take(state, where.lease("index"), holder, patient=True)
        try:
            async with structured.group() as group:
                group.start_soon(hold.keep)
                group.start_soon(broker.watch)
                place = Place(where, broker, state, engine)
                await _begin(place, servers, backoff)
                while True:
                    await _follow(place, backoff)
        finally:
            await hold.release()


async def _begin(place: Place, servers: list[str], backoff: Backoff) -> None:
    """Make the first generation where there is none, and end a switch that was cut short."""
    from bridge.index import rebuild  # it builds on this module

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
    from bridge.index import switch  # it builds on this module

    try:
        hold = await take(place.state, place.site.lease("reindex"), uuid4().hex, patient=False)
    except Busy:
        return
    try:
        await switch.settle(place)
    finally:
        await hold.release()


def _followed(record: IndexRecord) -> set[tuple[int, str]]:
    return {(g.number, g.state) for g in record.having(*FOLLOWED)}


async def _follow(place: Place, backoff: Backoff) -> None:
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
                feed = Feed(place, generation, Tally())
                group.start_soon(feed.run)
            backoff.over()
            log.get().info("following", index=place.site.name, generations=[g.number for g in generations])
            await _moved(place, record)
            group.cancel_scope.cancel()
    except (EngineError, IndexMismatch, ServerRefused, Unavailable):
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

    await until(other, seconds=math.inf, every=EVERY)
