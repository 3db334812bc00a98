"""What is connected while an index is worked on: its site in the configuration, NATS, the engine, and the lease.

Records of the index in KV are read and changed here alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from uuid import uuid4

import msgspec

from bridge import log, structured
from bridge.config import Config, Index, duration, past_name
from bridge.errors import ConfigError, Fenced, ServerRefused, Unavailable
from bridge.failpoints import reach
from bridge.index.document import version
from bridge.index.engine import Engine, opened
from bridge.index.generation import Generation, IndexRecord, Member, is_consumer, members, numbered, shapes
from bridge.index.ground import Letter
from bridge.index.naming import address
from bridge.stream import deadletters
from bridge.stream.freshness import Freshness
from bridge.stream.lease import Busy, Hold, Holder, Lease, Taken, lease_key, same_process, take, whose
from bridge.stream.reader import consumers, delete_consumer
from bridge.stream.server import Broker, Servers, connect
from bridge.stream.state import Conflict, SnapshotStatus, State, TableRecord, Writer
from bridge.stream.subjects import epochs_key, index_key, snapshot_key, table_filter, table_key


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
        """Delete a generation's consumers."""
        await self._remove_consumers(generation, before=0)

    async def remove_older_consumers(self, generation: Generation) -> None:
        """Delete the consumers from which a generation was fed before."""
        await self._remove_consumers(generation, before=max(generation.opened, 1))

    async def remove_stray_consumers(self, record: IndexRecord) -> None:
        """Delete the consumers of generations that are long forgotten: a reader of theirs may have made one just when
        they were removed."""
        stream = self.site.config.stream.name
        for name in await consumers(self.broker, stream):
            number = numbered(name, self.site.name)
            if 0 < number < record.newest and record.get(number) is None:
                log.get().info("consumer removed", index=self.site.named, consumer=name, why="its generation is gone")
                await delete_consumer(self.broker, stream, name)

    async def _remove_consumers(self, generation: Generation, *, before: int) -> None:
        for name in await consumers(self.broker, generation.stream):
            if is_consumer(name, generation.physical, before=before):
                await delete_consumer(self.broker, generation.stream, name)

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

    async def refused(self, number: int) -> dict[str, int]:
        """The documents of a generation that are among the dead letters, each with the last version that was refused,
        by their addresses."""
        config, found = self.site.config, dict[str, int]()
        async for data in deadletters.letters(self.broker, config.stream, config.source.name, self.site.name):
            try:
                letter = msgspec.json.decode(data, type=Letter)
            except (msgspec.DecodeError, ValueError):
                continue
            if letter.generation == number:
                where = address(letter.id, letter.routing)
                found[where] = max(found.get(where, 0), version(letter.epoch, letter.seq))
        return found

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
