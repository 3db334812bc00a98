"""One generation of an index, fed from its consumer: what the always-on reader and the rebuild share.

Here the stream and the search engine meet. Acks follow the engine's answers; the KV record holds what is known to be
done, at most a second behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any
from uuid import uuid4

import anyio
import msgspec

from bridge import log, structured
from bridge.config import Config, Index, duration, past_name
from bridge.errors import ConfigError, Fenced, ServerRefused, Unavailable
from bridge.failpoints import reach
from bridge.index import mapping
from bridge.index.apply import Applier
from bridge.index.belonging import belongs, regain
from bridge.index.bulk import Mark, Tally
from bridge.index.circuit import Circuit
from bridge.index.columns import changed, grow, known_types, misfit, say_changed, say_left_out
from bridge.index.convert import converters
from bridge.index.document import Builder, version
from bridge.index.engine import Engine, opened
from bridge.index.generation import Generation, IndexRecord, Member, members, shapes
from bridge.index.ground import Label, Letter
from bridge.index.naming import address
from bridge.index.reason import paths
from bridge.stream import claims, deadletters
from bridge.stream.durable import ACK_WAIT, Durable, Seen
from bridge.stream.freshness import Freshness
from bridge.stream.intake import Message
from bridge.stream.lease import Busy, Hold, Holder, Lease, Taken, lease_key, same_process, take, whose
from bridge.stream.reader import delete_consumer, existing, read
from bridge.stream.server import Broker, Servers, check_mode, connect
from bridge.stream.state import Conflict, SnapshotStatus, State, TableRecord, Writer
from bridge.stream.subjects import epochs_key, index_key, snapshot_key, table_filter, table_key

EVERY = 1.0


class Site(msgspec.Struct, frozen=True):
    """One index, and the names that follow: a configured one, or with `until` one as the log had it at that sequence.

    name: what its record, its lease, its generations and its dead letters are called by.
    """

    config: Config
    name: str
    index: Index
    until: int = 0

    @property
    def configured(self) -> str:
        """What it is called in the configuration."""
        return self.name.removesuffix(past_name("", self.until)) if self.until else self.name

    @property
    def named(self) -> str:
        """What it is called on a command line."""
        return f"{self.configured} --until {self.until}" if self.until else self.name

    @property
    def members(self) -> list[Member]:
        """The tables that the next generation is built from."""
        return list(members(shapes(self.index)).values())

    def subject(self, member: Member) -> str:
        """The subjects of a table's events."""
        stream = self.config.stream
        return table_filter(stream.prefix, self.config.source.name, member.schema, member.table, compact=stream.compact)

    @property
    def key(self) -> str:
        """KV key of the index's record."""
        return index_key(self.config.source.name, self.name)

    def lease(self, role: str) -> str:
        """KV key of the lease for a role ("index" or "reindex")."""
        return lease_key(role, self.config.source.name, self.name)


def site(config: Config, name: str) -> Site:
    """The configured index `name`; ConfigError where there is none."""
    index = config.index.get(name)
    if index is None:
        known = ", ".join(sorted(config.index)) or "none"
        raise ConfigError(f"there is no index {name} in the configuration (there is: {known})", f"add [index.{name}]")
    return Site(config, name, index)


def freshness(where: Site, generation: Generation) -> Freshness:
    """How far a generation is behind a compacted log."""
    return Freshness(where.name, duration(where.config.stream.tombstone_ttl), generation.fresh)


class Place:
    """What is connected while an index is worked on, and the lease that allows it, where it takes one."""

    def __init__(self, where: Site, broker: Broker, state: State, engine: Engine, hold: Hold | None = None) -> None:
        self.site = where
        self.broker = broker
        self.state = state
        self.engine = engine
        self._hold = hold

    def still_allowed(self) -> None:
        """Raise Unavailable where the lease has run out, which this process may not have noticed yet."""
        if self._hold is not None:
            self._hold.check()

    async def record(self) -> IndexRecord:
        """The index's record; an empty one where there is none yet."""
        found = await self.state.get(self.site.key, IndexRecord)
        return found[0] if found is not None else IndexRecord(alias=self.site.index.alias)

    async def record_of(self, source: str, name: str) -> IndexRecord:
        """The record of another index; an empty one where this bucket has none."""
        found = await self.state.get(index_key(source, name), IndexRecord)
        return found[0] if found is not None else IndexRecord()

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

    @contextlib.asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[bool]:
        """Whether no rebuild of the index is alive; then none begins within the block."""
        try:
            hold = await take(self.state, self.site.lease("reindex"), uuid4().hex, patient=False)
        except Busy:
            yield False
            return
        try:
            yield True
        finally:
            await hold.release()

    async def remove_consumer(self, generation: Generation) -> None:
        """Delete a generation's consumer."""
        await delete_consumer(self.broker, generation.stream, generation.consumer)

    async def table(self, schema: str, table: str) -> TableRecord | None:
        """What the bridge last recorded of a table."""
        found = await self.state.get(table_key(self.site.config.source.name, schema, table), TableRecord)
        return found[0] if found is not None else None

    async def snapshot(self, schema: str, table: str) -> SnapshotStatus | None:
        """How far a table's snapshot is."""
        found = await self.state.get(snapshot_key(self.site.config.source.name, schema, table), SnapshotStatus)
        return found[0] if found is not None else None

    async def tables(self, members: Iterable[Member]) -> dict[str, TableRecord]:
        """What is recorded of tables, by their names; of one that is not, that it has no columns."""
        return {member.name: await self.table(*member.key) or TableRecord([], []) for member in members}

    async def primary(self, schema: str, table: str) -> list[str]:
        """The columns of a table's key; ServerRefused where it is recorded that there is none."""
        record = await self.table(schema, table)
        if record is None:
            raise Unavailable(f"the table {schema}.{table} is not recorded", "waiting; is it among [source] tables?")
        if not record.key:
            raise ServerRefused(
                f"{schema}.{table} has no key that identifies a row, so it cannot be indexed",
                f"give it a primary key, or: ALTER TABLE {schema}.{table} REPLICA IDENTITY USING INDEX …",
            )
        return record.key

    async def writers(self) -> list[Writer]:
        """The bridges that have written to the stream."""
        found = await self.state.get(epochs_key(self.site.config.source.name), list[Writer])
        return found[0] if found is not None else []


@contextlib.asynccontextmanager
async def connected(where: Site, servers: Servers, role: str) -> AsyncIterator[tuple[Broker, Engine]]:
    """Connections to NATS and to the index's engine; `role` names them to an operator."""
    name = f"bridge {role} {where.name}"
    async with connect(where.config.stream, servers, name=name) as broker, opened(where.index) as engine:
        yield broker, engine


@contextlib.asynccontextmanager
async def working(where: Site, servers: Servers, role: str, holder: Holder, *, patient: bool) -> AsyncIterator[Place]:
    """Work on an index over one connection and under the lease of `role`, which is kept meanwhile and given back.

    A command (which is not patient) keeps its lease where something is away for a while, and goes on over the next
    connection only if nobody has had it in between: else it would do over what another one has just done.

    Args:
        patient: wait for the lease; else Busy is raised where another process has it.

    Raises:
        Unavailable: a server is away, or the connection to NATS is lost. Fenced: the lease is.
    """
    config = where.config
    async with connected(where, servers, role) as (broker, engine):
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        try:
            async with _leased(state, where, role, holder, patient=patient) as hold, structured.group() as group:
                group.start_soon(hold.keep)
                group.start_soon(broker.watch)
                yield Place(where, broker, state, engine, hold)
                group.cancel_scope.cancel()
        except Taken as error:
            holder.had = False
            raise error if patient else _overtaken(where, error) from None


@contextlib.asynccontextmanager
async def _leased(state: State, where: Site, role: str, holder: Holder, *, patient: bool) -> AsyncIterator[Hold]:
    try:
        hold = await take(state, where.lease(role), holder.id, patient=patient, again=holder.had and not patient)
    except Busy:
        raise await busy(state, where) from None
    holder.had = True
    reach("index.leased")
    keeps = False
    try:
        yield hold
    except Unavailable:
        keeps = not patient
        raise
    finally:
        if not keeps:
            holder.had = not await hold.release()


def _overtaken(where: Site, error: Taken) -> Fenced:
    return Fenced(
        f"{error.what}, which was stopped or cut off meanwhile: what it was doing with index {where.named} is left to"
        " that one",
        "see what there is now (`bridge status`), and run it again where it is still wanted",
    )


async def busy(state: State, where: Site) -> Busy:
    """Who works on an index, and until when."""
    found = await state.get(where.lease("reindex"), Lease)
    reader = await state.get(where.lease("index"), Lease)
    record = await state.get(where.key, IndexRecord)
    who = whose(found[0]) if found is not None else "another process"
    built = record is not None and record[0].generation
    if not built and found is not None and reader is not None and same_process(found[0], reader[0]):
        return Busy(
            f"index {where.named} is being built for the first time, by its reader, {who}",
            "wait until `bridge status` shows it live: it gets the configuration with which that reader was started;"
            f" where that has changed since, then: bridge reindex {where.named}",
        )
    return Busy(f"index {where.named} is being rebuilt by {who}", "wait until it has ended, or stop it")


class Feed:
    """One generation, fed from its consumer over one connection; nothing behind `upto`, where that is given."""

    def __init__(
        self, place: Place, generation: Generation, tally: Tally, circuit: Circuit | None = None, *, upto: int = 0
    ) -> None:
        self.place = place
        self.circuit = circuit or Circuit(place.site.index.reject_limit)
        self.generation = generation
        self.tally = tally
        self.done = Seen(generation.epoch, generation.seq, generation.position)
        self._members = members(generation.shapes)
        self._subjects = sorted(place.site.subject(member) for member in self._members.values())
        self.durable = Durable(
            place.broker,
            generation.stream,
            generation.consumer,
            self._subjects,
            first=generation.first,
            epochs=place.writers,
            parts=self._whole,
        )
        self._fresh = freshness(place.site, generation) if place.site.config.stream.compact else None
        self._applier: Applier | None = None
        self._types: dict[str, dict[str, str]] = {}
        self._said: set[str] = set()
        self._builders = {member.key: self._builder(member) for member in self._members.values()}
        self._lock = anyio.Lock()
        self._stored = (self.done, generation.fresh)
        self.taken = 0
        self._upto = upto
        self._over = False
        self._buried = False

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
        uuid = await belongs(
            self.place.engine, self.place.site.named, self.generation.physical, stream.name, stream.created,
            self.generation.uuid,
        )  # fmt: skip
        if uuid != self.generation.uuid:
            await self._changed(uuid=uuid)
        self._fit(await self.place.tables(self._members.values()))
        rejected = await self._rejected()
        await self.durable.open(self.done)
        reach("index.opened")
        async with structured.group() as group:
            label = Label(self.place.site.name, self.generation.number, self.place.site.named)
            self._applier = Applier(
                self.place.engine, self.generation.write_alias, self.generation.physical, label, self._builders, self,
                group, tally=self.tally, rejected=rejected, circuit=self.circuit, longest=self.generation.longest,
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
        if self._upto and batch and batch[-1].seq >= self._upto:
            batch, self._over = [message for message in batch if message.seq <= self._upto], True
        if self._fresh is not None and batch:
            self._fresh.taken(batch[-1].seq, batch[-1].at)
        await self._applier.take(batch)
        self.taken += len(batch)
        if not self.durable.waiting:
            await self._applier.flush()
        at_end = self._over or (self.durable.pending == 0 and not self.durable.waiting)
        if between is not None and await between(at_end):
            await self._applier.settle()
            return True
        return False

    @property
    def rejected(self) -> dict[str, int]:
        """The documents that were rejected and not deleted since, each with the last version that was."""
        return self._applier.rejected if self._applier is not None else {}

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
                where = address(letter.id, letter.routing)
                found[where] = max(found.get(where, 0), version(letter.epoch, letter.seq))
        return found

    async def builders(self) -> dict[tuple[str, str], Builder]:
        """What makes each table's documents, by (schema, table), as the tables' columns are now."""
        self._fit(await self.place.tables(self._members.values()))
        return self._builders

    def _builder(self, member: Member) -> Builder:
        def toastable(column: str) -> bool:
            return mapping.toastable(self._types.get(member.name, {}).get(column, ""))

        def fits(field: str) -> bool:
            why = misfit(self.generation, field)
            if why and (said := f"{member.name} {field} left out") not in self._said:
                self._said.add(said)
                say_left_out(self.place.site.named, self.generation, member.name, field, why)
            return not why

        return Builder(member.shape, member.name, member.naming, toastable, fits)

    def _fit(self, tables: dict[str, TableRecord]) -> None:
        """Take up what the tables' columns are now, and say once which changed its type so that its field is wrong, or
        has a name that the index cannot have."""
        self._types = {name: {column.name: column.type for column in own.plain} for name, own in tables.items()}
        fields = self.generation.mapping["properties"]
        for member in self._members.values():
            builder = self._builders[member.key]
            builder.converters = converters(fields, self._types[member.name], member.shape.rename)
            # Rows in the log may still have columns that the table had once.
            builder.look([*self._types[member.name], *sorted(tables[member.name].former)])
            news = changed(self.generation, member.name, member.shape, tables[member.name].plain)
            say_changed(self.place.site.named, self.generation, member.name, news, self._said)

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
        reach("index.stored")

    # What the applier needs of the stream

    async def bury(self, letter: Letter) -> None:
        """Store a dead letter."""
        config, name = self.place.site.config, self.place.site.name
        log.get().warning("dead letter", index=name, seq=letter.seq, op=letter.op, reason=letter.reason)
        unique = f"{name}-{letter.generation}-{letter.epoch}-{letter.seq}"
        # The first one may have to make the stream.
        async with contextlib.nullcontext() if self._buried else self._lock:
            await deadletters.bury(self.place.broker, config.stream, config.source.name, name, letter, unique)
            self._buried = True

    async def history(self, upto: int) -> AsyncIterator[list[Message]]:
        """The tables' messages from where the generation began."""
        batches = read(
            self.place.broker,
            self.generation.stream,
            subjects=self._subjects,
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

    async def key(self, schema: str, table: str) -> list[str]:
        """The columns of a table's key as they are recorded now."""
        return await self.place.primary(schema, table)

    async def reached(self, mark: Mark) -> None:
        """Ack everything up to a place."""
        self.done = Seen(mark.epoch, mark.seq, mark.position)
        if self._fresh is not None:
            self._fresh.done(mark.seq)
        reach("index.reached")
        await self.durable.ack(mark.seq)
        reach("index.acked")

    async def regain(self) -> bool:
        """Put back a write alias that is gone while its index is there."""
        return await regain(self.place.engine, self.place.site.named, self.generation)

    def known(self) -> frozenset[str]:
        """The names of fields and columns, which reasons may show."""
        return paths(self.generation.mapping).union(*self._types.values())

    def beginning(self, table: str) -> int:
        """The version of a table's last begin marker."""
        return self.generation.begins.get(table, 0)

    async def begun(self, table: str, at: int) -> None:
        """Remember a begin marker before anything behind it is acked."""
        await self._changed(begins={**self.generation.begins, table: at})
        reach("index.begun")

    async def longest(self, documents: int) -> None:
        """Remember how many documents a row may have."""
        await self._changed(longest=max(documents, self.generation.longest))

    async def learn(self, documents: list[dict[str, Any]]) -> bool:
        """Add the columns that the mapping lacks; whether these documents now fit."""
        async with self._lock:
            tables = await self.place.tables(self._members.values())
            self._fit(tables)
            columns = {name: table.plain for name, table in tables.items()}
            grown = await grow(
                self.place.engine, self.place.site.named, self.generation, self._members.values(), columns, documents
            )
            if grown is not None:
                reach("index.grown")
                types = {name: known_types(self.generation, name, own) for name, own in columns.items()}
                await self._changed(mapping=grown, types=types)
                self._fit(tables)
            return grown is not None

    async def _changed(self, **changes: Any) -> None:
        number = self.generation.number
        record = await self.place.change(lambda record: record.having_changed(number, **changes))
        self.generation = record.get(number) or self.generation
