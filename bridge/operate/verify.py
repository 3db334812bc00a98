"""`bridge verify [TABLE…]`: whether a replay of the log gives PostgreSQL's tables, while both are in use.

    the log replayed into a picture → all rows read, a chunk at a time, and compared with it as it is then
    → what differs is read once more, by its key, with a snapshot S at the WAL's end H → the bridge passes H
    → the log read on → differing still, and no change in the log that S does not show: that is a finding

Rows that something changes at each look are counted as such. Nothing is written, no transaction is longer than a chunk.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import anyio.to_thread
import msgspec
import psycopg

from bridge import event
from bridge.config import Config, join_name, split_name
from bridge.errors import Gap, ServerRefused, Unavailable
from bridge.event import Event
from bridge.index.document import Builder, Shape
from bridge.index.document import read as read_event
from bridge.index.generation import members
from bridge.index.naming import UNREADABLE, Rejected, row
from bridge.index.picture import Note, Picture, Standing
from bridge.operate.agreement import Compared, Finding, Kind, Phase, Recent, Report, differing
from bridge.operate.snapshot import chosen_of
from bridge.source import chunks, connection, lsn
from bridge.source.altering import Snapshot
from bridge.source.catalog import Catalog, Relation
from bridge.source.chunks import Chunk, Gone, Passing, Where
from bridge.source.leaving import leaving
from bridge.source.rows import Plan, plan
from bridge.stream import claims, server, subjects
from bridge.stream.asking import Root
from bridge.stream.intake import Message
from bridge.stream.lease import Lease, alive, lease_key
from bridge.stream.reach import complete_from
from bridge.stream.reader import existing, overtaken, read
from bridge.stream.server import Broker, Servers
from bridge.stream.state import Checkpoint, SnapshotStatus, State, TableRecord, Writer
from bridge.waiting import Backoff, forever, until

CHUNK_BYTES, MOST, FEWEST, UNKNOWN = 2 << 20, 5_000, 10, 500
AMONG = 500
HELD = 5_000
ROUNDS = 5
PASSED_WITHIN = 60.0
NUDGE_AFTER = 1.0


class Look(NamedTuple):
    """A row as it was read (None: there is none), and what the snapshot showed; `unread` where there is one that is
    nested too deep to be compared."""

    found: Event | None
    shown: Snapshot
    unread: bool = False


class _There(NamedTuple):
    config: Config
    broker: Broker
    state: State
    sql: psycopg.AsyncConnection[Any]
    catalog: Catalog
    show: Show


Show = Callable[[Compared], None]


async def verify(
    config: Config, servers: Servers, tables: Sequence[str], *, limit: int = 20, show: Show = lambda _: None
) -> list[Report]:
    """Compare tables (by name or pattern; none: all that are published) with the log.

    Args:
        limit: how many findings of each kind are listed.
        show: called with how far each table is.

    Raises:
        UsageError: no such table. Gap: the log does not reach back to a complete picture of one.
        ServerRefused: no bridge runs; credentials, privileges, no room for a temporary file.
        Overtaken: retention is faster than the comparison.
    """

    async def attempt(backoff: Backoff) -> list[Report]:
        async with _there(config, servers, show) as there:
            published: dict[Root, list[Relation]] = {}
            for relation in await there.catalog.published():
                published.setdefault(relation.root, []).append(relation)
            reports = []
            parts = {r.name: root for root, found in published.items() for r in found if (r.schema, r.table) != root}
            for name in tables:
                if name not in parts:
                    await _refuse_unlogged(there, name, published)
            for root in chosen_of(published.keys(), tables, parts):
                backoff.over()
                named = join_name(*root) in tables
                reports.append(await _compared(there, root, published[root], limit, named=named))
            return reports

    return await forever("verify", attempt)


@contextlib.asynccontextmanager
async def _there(config: Config, servers: Servers, show: Show) -> AsyncIterator[_There]:
    async with (
        server.connect(config.stream, servers, name="bridge verify") as broker,
        connection.connect(config.source.dsn) as sql,
    ):
        await existing(broker, config.stream.name)
        state = await State.open(broker, config.state.bucket, config.stream.replicas)
        lease = await state.get(lease_key("bridge", config.source.name), Lease)
        if lease is None or not alive(lease[0]):
            raise ServerRefused(
                f"no bridge runs for source {config.source.name}: what the log lacks may still be on its way",
                "start it (`bridge run`), and compare then",
            )
        yield _There(config, broker, state, sql, Catalog(sql, config.source), show)


async def _refuse_unlogged(there: _There, name: str, published: Mapping[Root, Any]) -> None:
    """Raise ServerRefused where a table is named that is there, but whose changes are in no log."""
    with contextlib.suppress(ValueError, Gone):
        schema, table = split_name(name)
        if (schema, table) not in published and there.catalog.filter.matches(schema, table):
            await chunks.leaves(there.catalog, schema, table)


async def _compared(there: _There, root: Root, parts: list[Relation], limit: int, *, named: bool) -> Report:
    """One table. One without a key is refused where it was named, else passed over with the reason."""
    name, estimate = join_name(*root), sum(part.estimate for part in parts)
    try:
        for part in parts:
            chunks.refuse_keyless(name, part.key)
    except ServerRefused as error:
        if named:
            raise
        return Report(table=name, why=error.what, estimate=estimate)
    stream = await existing(there.broker, there.config.stream.name)
    kept = await there.state.get(subjects.snapshot_key(there.config.source.name, *root), SnapshotStatus)
    try:
        start = complete_from(kept[0] if kept else None, 0 if stream.compacted else stream.first_seq, stream.name, name)
    except Gap as error:
        if named:
            raise
        return Report(table=name, why=f"{error.what} → {error.remedy}", estimate=estimate)
    found = await there.state.get(subjects.epochs_key(there.config.source.name), list[Writer])
    epoch = max((writer.epoch for writer in (found[0] if found else []) if writer.first_seq < start), default=0)
    [member] = members({name: Shape()}).values()
    builder = Builder(member.shape, member.name, member.naming, lambda _: False)
    with Picture({root: builder}, lambda _: parts[0].key, epoch=epoch) as picture:
        comparison = _Comparison(there, root, picture, builder, await there.catalog.snapshot(), start)
        return await comparison.run(limit)


class _Comparison:
    """The steps, in order, for one table."""

    def __init__(
        self, there: _There, root: Root, picture: Picture, builder: Builder, seen: Snapshot, start: int
    ) -> None:
        self._there = there
        self._root = root
        self._picture = picture
        self._naming = builder.naming
        self._recent = Recent(seen)
        self._next = self._first = start
        stream = there.config.stream
        self._subject = subjects.table_filter(stream.prefix, there.config.source.name, *root, compact=stream.compact)
        self._report = Report(table=join_name(*root))
        self._backoff = Backoff(f"verify {join_name(*root)}")
        self._counts = Counter[str]()

    async def run(self, limit: int) -> Report:
        """Compare; the report."""
        report = self._report
        await self._advance(telling=True)
        report.logged = await anyio.to_thread.run_sync(self._picture.count)
        await self._first_look()
        for _ in range(ROUNDS):
            if not (noted := sum(self._picture.noted().values())):
                break
            self._tell("looking again", 0, noted)
            await self._look_again(limit)
        report.changing = sum(self._picture.noted().values())
        report.counts, report.lost, report.seq = dict(self._counts), self._picture.lost, self._picture.seq
        return report

    def _tell(self, phase: Phase, done: int, of: int) -> None:
        self._there.show(Compared(self._report.table, phase, done, of))

    # The log

    async def _advance(self, *, telling: bool = False) -> None:
        """Read the log on to its end of now."""
        name = self._there.config.stream.name
        state = await existing(self._there.broker, name)
        if not state.compacted and state.messages and state.first_seq > self._next:
            raise overtaken(name, state.first_seq, self._next - 1)
        if state.last_seq < self._next:
            return
        async with contextlib.aclosing(self._batches(state.last_seq)) as batches:
            async for batch in batches:
                await anyio.to_thread.run_sync(self._take, batch)
                self._next = batch[-1].seq + 1
                if telling:
                    self._tell("replaying", self._next - self._first, state.last_seq + 1 - self._first)
        self._next = max(self._next, state.last_seq + 1)

    async def _batches(self, upto: int) -> AsyncGenerator[list[Message], None]:
        broker, name = self._there.broker, self._there.config.stream.name
        async with contextlib.aclosing(
            read(broker, name, subjects=[self._subject], start=self._next, last=upto)
        ) as batches:
            async for batch in batches:
                async with contextlib.aclosing(claims.whole(broker, name, batch, lenient=True)) as parts:
                    async for part in parts:
                        if part:
                            yield part

    def _take(self, batch: Sequence[Message]) -> None:
        self._picture.take(batch)
        for message in batch:
            with contextlib.suppress(Rejected, *UNREADABLE):
                found = event.decode(message.data)
                self._recent.take(found, self._addresses(found))

    def _addresses(self, found: Event) -> list[str]:
        if found.op in ("truncate", "snapshot"):
            return []
        return [one for one in self._naming.identity(found) if one is not None]

    # The table

    async def _first_look(self) -> None:
        """Compare all rows with the log as it is just then, and note those that differ."""
        for part in await chunks.leaves(self._there.catalog, *self._root):
            async for chunk in self._chunks(part):
                await self._advance()
                looks = self._looks(chunk)
                await anyio.to_thread.run_sync(self._note, looks)
                self._report.rows += len(chunk.rows)
                self._tell("comparing", self._report.rows, max(self._report.rows, self._report.logged))
                self._report.unread += sum(look.unread for look in looks.values())
                self._recent.forget(chunk.snapshot)
        await anyio.to_thread.run_sync(self._note_strangers)

    def _note(self, looks: Mapping[str, Look]) -> None:
        self._picture.expect(looks)
        self._picture.note(
            Note(address, "", bytes(look.found.key).decode())
            for address, look in looks.items()
            if look.found is not None and differing(row(look.found.after), self._picture.get(address)) is not None
        )

    def _note_strangers(self) -> None:
        for standings in self._picture.unexpected(AMONG):
            self._picture.note(Note(one.id, "", one.key.decode()) for one in standings)

    async def _look_again(self, limit: int) -> None:
        """Read the rows that are noted once more, and settle what can be."""
        parts = await chunks.leaves(self._there.catalog, *self._root)
        looks = self._asked(parts) if all(map(chunks.plain, parts)) else self._among_all(parts)
        held, high = dict[str, Look](), 0
        async with contextlib.aclosing(looks):
            async for found, upto in looks:
                held, high = held | found, max(high, upto)
                if len(held) >= HELD:
                    await self._settle(held, high, limit)
                    held = {}
        await self._settle(held, high, limit)

    async def _asked(self, parts: list[Relation]) -> AsyncGenerator[tuple[dict[str, Look], int]]:
        """The rows that are noted, asked for by their keys."""
        for notes in self._picture.notes(AMONG):
            shown, high = await self._now()
            found = {note.id: Look(None, shown) for note in notes}
            for part in parts:
                keys = [chunks.texts(note.note.encode(), part.key) for note in notes]
                among = [key for key in keys if key is not None]
                if not among:
                    continue
                async for chunk in self._chunks(part, Where(among=among)):
                    found |= self._looks(chunk)
                    high = max(high, chunk.high)
            yield found, high

    async def _among_all(self, parts: list[Relation]) -> AsyncGenerator[tuple[dict[str, Look], int]]:
        """The rows that are noted, found among all: their keys as JSON are not what PostgreSQL reads."""
        present = set[str]()
        shown, high = await self._now()
        for part in parts:
            async for chunk in self._chunks(part):
                noted = {a: look for a, look in self._looks(chunk).items() if self._picture.noted_as(a)}
                present |= noted.keys()
                yield noted, chunk.high
        for notes in self._picture.notes(AMONG):
            yield {note.id: Look(None, shown) for note in notes if note.id not in present}, high

    async def _settle(self, held: Mapping[str, Look], high: int, limit: int) -> None:
        """Compare rows with the log once it has passed `high`."""
        if held:
            await self._passed(high)
            await self._advance()
            await anyio.to_thread.run_sync(self._judge, held, limit)

    def _judge(self, held: Mapping[str, Look], limit: int) -> None:
        settled = []
        for address, look in held.items():
            if look.unread:
                settled.append(address)
                continue
            standing = self._picture.get(address)
            wrong = differing(row(look.found.after) if look.found is not None else None, standing)
            if wrong is not None and self._recent.newer(address, look.shown):
                continue
            settled.append(address)
            if wrong is None:
                continue
            kind, columns = wrong
            self._counts[kind] += 1
            if self._counts[kind] <= limit:
                self._report.findings.append(_finding(kind, columns, look.found, standing))
        self._picture.forget(settled)

    async def _now(self) -> tuple[Snapshot, int]:
        """A snapshot, and the WAL's end after it."""
        shown = await self._there.catalog.snapshot()
        return shown, await chunks.end(self._there.sql)

    async def _passed(self, high: int) -> None:
        """Return once everything before an LSN is in the log; an idle server is given something to pass.

        Raises:
            Unavailable: the bridge does not get there.
        """
        key = subjects.checkpoint_key(self._there.config.source.name)

        async def there() -> bool:
            kept = await self._there.state.get(key, Checkpoint)
            return kept is not None and kept[0].phase == "stream" and lsn.parse(kept[0].lsn) >= high

        if await until(there, seconds=NUDGE_AFTER, every=0.2):
            return
        await chunks.nudge(self._there.sql)
        if not await until(there, seconds=PASSED_WITHIN, every=0.2):
            raise Unavailable(
                f"the bridge has not come past {lsn.show(high)} for {PASSED_WITHIN:.0f} s",
                "see what it waits for: bridge status",
            )

    async def _chunks(self, part: Relation, where: Where | None = None) -> AsyncGenerator[Chunk]:
        """All rows of a part, or some."""
        if where is None:
            wide = await chunks.width(self._there.sql, part.oid)
            where = Where(limit=int(min(max(CHUNK_BYTES / wide, FEWEST), MOST)) if wide else UNKNOWN)
        while True:
            chunk = await self._read(part, where)
            yield chunk
            if chunk.whole:
                return
            where = where._replace(key=chunk.key, after=chunk.after)

    async def _read(self, part: Relation, where: Where) -> Chunk:
        while True:
            try:
                chunk = await chunks.read(self._there.sql, self._there.catalog, part.oid, self._planned, where)
            except Passing as error:
                await self._backoff.wait(error)
            else:
                self._backoff.over()
                return chunk

    def _looks(self, chunk: Chunk) -> dict[str, Look]:
        """A chunk's rows by their addresses, as the log would tell them."""
        found = {}
        for key, payload in chunk.rows.items():
            try:
                look = Look(read_event(payload + b"}"), chunk.snapshot)
            except Rejected:
                look = Look(None, chunk.snapshot, unread=True)
            one = look.found or Event("read", "", *self._root, key=msgspec.Raw(key))
            found[self._naming.identity(one)[0]] = look
        return found

    async def _planned(self, relation: Relation) -> Plan:
        config = self._there.config
        kept = await self._there.state.get(subjects.table_key(config.source.name, *relation.root), TableRecord)
        codecs = {column.oid: await self._there.catalog.codec(column.oid) for column in relation.columns}
        hidden = set(kept[0].hidden) - {column.name for column in relation.columns} if kept else set()
        chosen = leaving(config.source, relation.root)
        return plan(relation, config.source.name, self._subject, codecs, hidden, chosen=chosen)


def _finding(kind: Kind, columns: list[str], found: Event | None, logged: Standing | None) -> Finding:
    key = found.key if found is not None else msgspec.Raw(logged.key if logged is not None else b"null")
    return Finding(
        kind, key, columns, found.after if found is not None else None,
        msgspec.Raw(logged.data) if logged is not None and logged.data else None,
    )  # fmt: skip
