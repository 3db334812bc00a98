"""One generation of an index, fed from its consumer: what the always-on reader and the rebuild share.

Here the stream and the search engine meet. Acks follow the engine's answers; the KV record holds what is known to be
done, at most a second behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import msgspec

from bridge import log, structured
from bridge.config import Config, Index, duration, split_name
from bridge.errors import ConfigError, ServerRefused, Unavailable
from bridge.index import mapping
from bridge.index.apply import Applier
from bridge.index.belonging import belongs
from bridge.index.bulk import Mark, Tally
from bridge.index.columns import grow
from bridge.index.document import Builder
from bridge.index.engine import Engine, opened
from bridge.index.generation import Generation, IndexRecord
from bridge.index.ground import Label, Letter
from bridge.stream import claims, deadletters
from bridge.stream.durable import ACK_WAIT, Durable, Seen
from bridge.stream.freshness import Freshness
from bridge.stream.lease import lease_key, take
from bridge.stream.pull import Message
from bridge.stream.reader import delete_consumer, existing, read
from bridge.stream.server import Broker, Servers, check_mode, connect
from bridge.stream.state import Column, Conflict, State, TableRecord, Writer
from bridge.stream.subjects import epochs_key, index_key, table_filter, table_key

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
        """The subjects of the table's events."""
        stream = self.config.stream
        return table_filter(stream.prefix, self.config.source.name, self.schema, self.table, compact=stream.compact)

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


def freshness(where: Site, generation: Generation) -> Freshness:
    """How far a generation is behind a compacted log."""
    return Freshness(where.name, duration(where.config.stream.tombstone_ttl), generation.fresh)


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

    async def key(self) -> list[str]:
        """The columns of the table's key; ServerRefused where it is recorded that there is none."""
        found = await self.state.get(self.site.table_key, TableRecord)
        if found is None:
            raise Unavailable(f"the table {self.site.index.table} is not recorded", "waiting for the bridge")
        if not found[0].key:
            table = f"{self.site.schema}.{self.site.table}"
            raise ServerRefused(
                f"{table} has no key that identifies a row, so it cannot be indexed",
                f"give it a primary key, or: ALTER TABLE {table} REPLICA IDENTITY USING INDEX …",
            )
        return found[0].key

    async def writers(self) -> list[Writer]:
        """The bridges that have written to the stream."""
        found = await self.state.get(epochs_key(self.site.config.source.name), list[Writer])
        return found[0] if found is not None else []


@contextlib.asynccontextmanager
async def working(where: Site, servers: Servers, role: str, holder: str, *, patient: bool) -> AsyncIterator[Place]:
    """Work on an index over one connection and under the lease of `role`, which is kept meanwhile and given back.

    Args:
        patient: wait for the lease; else Busy is raised where another process has it.

    Raises:
        Unavailable: a server is away, or the connection to NATS is lost. Fenced: the lease is.
    """
    config, name = where.config, f"bridge {role} {where.name}"
    async with connect(config.stream, servers, name=name) as broker, opened(where.index) as engine:
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        hold = await take(state, where.lease(role), holder, patient=patient)
        try:
            async with structured.group() as group:
                group.start_soon(hold.keep)
                group.start_soon(broker.watch)
                yield Place(where, broker, state, engine)
                group.cancel_scope.cancel()
        finally:
            await hold.release()


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
            parts=self._whole,
        )
        self._fresh = freshness(place.site, generation) if place.site.config.stream.compact else None
        self._applier: Applier | None = None
        self._types: dict[str, str] = {}
        self._lock = anyio.Lock()
        self._stored = (self.done, generation.fresh)
        self.taken = 0

    async def run(self, between: Callable[[bool], Awaitable[bool]] | None = None) -> None:
        """Feed until `between` says so (asked after every batch, told whether nothing is left to read), or for ever.

        Raises:
            IndexMismatch: index and stream do not belong together. Overtaken: retention has removed unread events.
            OtherStream: the stream is of the other mode.
            Unavailable: the connection to NATS is gone.
        """
        stream = await existing(self.place.broker, self.generation.stream)
        check_mode(stream, self.place.site.config.stream)
        if self._fresh is not None and stream.last_seq > self.done.seq:
            self._fresh.check()
        await belongs(self.place.engine, self.place.site.name, self.generation.physical, stream.name, stream.created)
        self._types = {column.name: column.type for column in await self.place.columns()}
        builder = Builder(self.generation.shape, self.place.site.index.table, self._toastable)
        rejected = await self._rejected()
        await self.durable.open(self.done)
        async with structured.group() as group:
            label = Label(self.place.site.name, self.generation.number, self.place.site.index.table)
            self._applier = Applier(
                self.place.engine, self.generation.write_alias, self.generation.physical, label, builder, self, group,
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
        if self._fresh is not None and batch:
            self._fresh.taken(batch[-1].seq, batch[-1].at)
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
            try:
                letter = msgspec.json.decode(data, type=Letter)
            except (msgspec.DecodeError, ValueError):
                continue
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
            began = time.time()
            rest = await self.durable.look()
            if rest is not None and self._applier.idle:
                self.done = rest if rest.seq > self.done.seq else self.done
                if self._fresh is not None:
                    self._fresh.caught_up(began)
            if self._fresh is not None:
                self._fresh.check()
            await self.store()
            if time.monotonic() - told > ACK_WAIT / 3:
                await self.durable.progress()
                told = time.monotonic()

    async def store(self) -> None:
        """Write how far everything is done into the record."""
        done, fresh = self.done, self._stored[1]
        if self._fresh is not None and (done != self._stored[0] or self._fresh.since - fresh > self._fresh.remember):
            fresh = self._fresh.since
        if (done, fresh) == self._stored:
            return
        number = self.generation.number
        changes = {"seq": done.seq, "epoch": done.epoch, "position": done.position, "fresh": fresh}
        await self.place.change(lambda record: record.having_changed(number, **changes))
        self._stored = (done, fresh)

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
                async with contextlib.aclosing(self._whole(batch)) as parts:
                    async for part in parts:
                        yield part

    def _whole(self, batch: list[Message]) -> AsyncGenerator[list[Message], None]:
        """A batch with its large rows; one whose object is missing becomes a dead letter as it is."""
        return claims.whole(self.place.broker, self.generation.stream, batch, lenient=True)

    async def key(self) -> list[str]:
        """The columns of the table's key as they are recorded now."""
        return await self.place.key()

    async def reached(self, mark: Mark) -> None:
        """Ack everything up to a place."""
        self.done = Seen(mark.epoch, mark.seq, mark.position)
        if self._fresh is not None:
            self._fresh.done(mark.seq)
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
