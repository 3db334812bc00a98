"""The initial snapshot: every row that the slot's exported snapshot shows, as `read` events between two markers.

    for one table after another: begin marker → its ranges, on several connections → end marker → acked → noted as done

Rows take their positions (`sub` counts on) where they are handed to the publisher. A partitioned table is one unit.
What cannot be seen any more, because it was rewritten after the export, is left to be read while the stream flows; so
is what an attempt that was interrupted leaves (`bridge.pipeline.unfinished`).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import psycopg
from anyio.abc import TaskGroup

from bridge import event, log, structured
from bridge.config import Config
from bridge.event import Position
from bridge.failpoints import reach
from bridge.pipeline import watch
from bridge.pipeline.announce import Announcing
from bridge.pipeline.checkpoint import now
from bridge.pipeline.plans import Plans
from bridge.source import connection, export, lsn, rows, unreadable
from bridge.source.catalog import Relation
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.export import Moved, Part
from bridge.source.slot import Created
from bridge.stream import subjects
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher
from bridge.stream.state import Again, Conflict, SnapshotStatus, State

STATUS_EVERY = 1.0
LOG_EVERY = 10.0
UNDEFINED_COLUMN = "42703"
_SUB = 8  # hexadecimal digits at a position's end

Shown = Callable[[dict[tuple[str, str], SnapshotStatus]], None]


class _Table:
    """A table while it is read. `left`: of its ranges those that are not read yet; `moved`: why not all of its rows can
    be seen, empty while they can; `noted`: its status as the state bucket has it."""

    def __init__(self, root: tuple[str, str], relations: list[Relation], parts: list[Part], point: int) -> None:
        self.root = root
        self.relations = relations
        self.parts = parts
        self.left = len(parts)
        self.plans: dict[int, rows.Plan] = {}
        self.opening = anyio.Lock()
        self.noting = anyio.Lock()
        self.revision = 0
        self.began = 0.0
        self.moved = ""
        estimate = sum(relation.estimate for relation in relations)
        self.status = self.noted = SnapshotStatus(state="waiting", estimate=estimate, lsn=lsn.show(point))

    @property
    def name(self) -> str:
        return ".".join(self.root)

    @property
    def again(self) -> bool:
        """Whether it can be read once more by itself, while the stream flows."""
        return all(relation.key for relation in self.relations)

    def change(self, **fields: Any) -> SnapshotStatus:
        self.status = msgspec.structs.replace(self.status, **fields)
        return self.status

    def took(self, count: int) -> None:
        """So many more of its rows are with the publisher."""
        rows = self.status.rows + count
        rate = rows / max(time.monotonic() - self.began, 0.001)
        left = max(self.status.estimate - rows, 0) / rate
        self.change(rows=rows, rate=round(rate, 1), eta=round(left, 1) if self.status.estimate else None)


class Initial:
    """One attempt at the initial snapshot: `prepare`, then `read`. `rows` tells how many there were so far.

    Args:
        show: told about once a second how far the tables are.
    """

    def __init__(
        self,
        config: Config,
        plans: Plans,
        announcing: Announcing,
        publisher: Publisher,
        claims: Claims,
        state: State,
        created: Created,
        timeline: int,
        show: Shown | None = None,
    ) -> None:
        self._config = config
        self._plans = plans
        self._announcing = announcing
        self._publisher = publisher
        self._claims = claims
        self._state = state
        self._created = created
        self._show = show
        self._storing = anyio.Lock()
        self._sub = itertools.count(1)
        self._place = str(Position(timeline, created.consistent_point, 0, 0, 0))[:-_SUB].encode()
        point = lsn.show(created.consistent_point)
        self._point, self._transaction = point.encode(), event.transaction(point, None, None)
        self._closing = b',"lsn":"%b"' % self._point + self._transaction
        self._tables: list[_Table] = []
        self._log = log.get()
        self.rows = 0

    async def prepare(self, sql: psycopg.AsyncConnection[Any], relations: list[Relation]) -> None:
        """Note every table as one that waits: who takes up an attempt that was interrupted knows them by that."""
        point = self._created.consistent_point
        for root, group in itertools.groupby(relations, key=lambda r: r.root):
            members = list(group)
            table = _Table(root, members, await export.parts(sql, members), point)
            self._tables.append(table)
            await self._first(table)

    async def read(self) -> None:
        """Read every table and return once the stream has the last row.

        Raises:
            Unavailable: take it up again. ServerRefused: a table may not be read.
        """
        # First what cannot be taken up after an interruption, then the small ones: what is truncated often is small,
        # and must not be so between the export and its reading.
        order = sorted(self._tables, key=lambda t: (t.again, t.status.estimate))
        queue = deque((table, part) for table in order for part in table.parts)
        started = time.monotonic()
        async with structured.group() as tasks:
            tasks.start_soon(self._report)
            async with structured.group() as noting:
                async with structured.group() as workers:
                    for _ in range(min(self._config.snapshot.workers, len(queue))):
                        workers.start_soon(self._work, queue, noting)
                reach("snapshot.read")
                await self._publisher.drain()
                reach("snapshot.drained")
            tasks.cancel_scope.cancel()
        reach("snapshot.noted")
        seconds = time.monotonic() - started
        self._tell()
        self._log.info("snapshot done", tables=len(self._tables), rows=self.rows, seconds=round(seconds, 1))

    async def _work(self, queue: deque[tuple[_Table, Part]], noting: TaskGroup) -> None:
        async with connection.connect(self._config.source.dsn) as sql:
            while queue:
                table, part = queue.popleft()
                async with table.opening:
                    if not table.began:
                        await self._begin(table)
                if not table.moved:
                    await self._part(sql, table, part)
                table.left -= 1
                if not table.left:
                    await self._end(table, noting)

    async def _begin(self, table: _Table) -> None:
        plans = [await self._plans.of(relation, whole=True) for relation in table.relations]
        table.plans = {plan.relation.oid: plan for plan in plans}
        table.began = time.monotonic()
        # Written before, so that it is there whenever a part of the table is in the stream; the others may have
        # published meanwhile.
        first = self._publisher.next_seq
        table.change(state="running", first_seq=first, complete_from=first, started_at=now())
        await self._note(table)
        whole = msgspec.structs.replace(plans[0], closing=b"")
        await self._announce(plans[0])
        begin = await self._add(whole.subject, b"snapshot", rows.marker(whole, "begin", self._closing))
        table.change(first_seq=begin, complete_from=begin)
        reach("table.began")

    async def _end(self, table: _Table, noting: TaskGroup) -> None:
        if table.moved:
            # It looks empty to the snapshot. What follows in PostgreSQL's log is published, and what that does not
            # tell comes with the rows as they will be then.
            self._log.warning(
                "table moved", table=table.name, why=table.moved, next="it is read while the stream flows"
            )
            table.change(state="incomplete", complete_from=0, error=table.moved, again=Again(state="requested"))
            await self._note(table)
            return
        whole = msgspec.structs.replace(table.plans[table.relations[0].oid], closing=b"")
        last = await self._add(whole.subject, b"snapshot", rows.marker(whole, "end", self._closing))
        self._publisher.divide()
        self._publisher.flush()
        noting.start_soon(self._done, table, last)
        await self._publisher.room()

    async def _done(self, table: _Table, last: int) -> None:
        await self._publisher.reached(last)
        table.change(state="done", last_seq=last, eta=None, finished_at=now())
        await self._note(table)
        reach("table.done")

    async def _part(self, sql: psycopg.AsyncConnection[Any], table: _Table, part: Part) -> None:
        plan = table.plans[part.relation.oid]
        try:
            await export.begin(sql, self._created.snapshot, part.relation)
            await self._rows(sql, table, plan, part)
            reach("table.read")
            await sql.execute("COMMIT")
        except Moved as error:
            if not table.again:
                raise
            table.moved = error.what
            await sql.execute("ROLLBACK")

    async def _rows(self, sql: psycopg.AsyncConnection[Any], table: _Table, plan: rows.Plan, part: Part) -> None:
        pgconn, reader = sql.pgconn, rows.Reader(plan, self._closing)
        try:
            for result in await connection.command(pgconn, part.statement(reader.columns)):
                connection.check(pgconn, result)
            copy = CopyReader(pgconn)
            try:
                async with structured.group() as tasks:
                    tasks.start_soon(watch.hearing, copy, pgconn)
                    while lines := await copy.take():
                        await self._lines(plan, reader, lines)
                        self.rows += len(lines)
                        table.took(len(lines))
                        reach("table.rows")
                    tasks.cancel_scope.cancel()
            finally:
                copy.close()
            await connection.finish(pgconn)
        except CommandError as error:
            if error.sqlstate == UNDEFINED_COLUMN:
                raise export.moved(plan.name, "had a column dropped or renamed") from None
            raise connection.server_error(error.sqlstate, error.message, f"reading {plan.name}") from None

    async def _lines(self, plan: rows.Plan, reader: rows.Reader, lines: list[memoryview | Notice]) -> None:
        publisher, subject, largest, storing = self._publisher, plan.subject, self._claims.largest, self._storing
        for line in lines:
            if isinstance(line, Notice):
                continue
            try:
                payload = reader.payload(bytes(line))
            except unreadable.ERRORS:
                raise unreadable.row(plan, bytes(line)) from None
            # Nearly every row needs no waiting.
            if len(payload) <= largest and not storing.locked():
                publisher.add(subject, b"read", self._position(), payload)
            else:
                await self._add(subject, b"read", payload)
            if publisher.full:
                await publisher.room()

    async def _add(self, subject: bytes, op: bytes, payload: bytes) -> int:
        """Hand over one event; its sequence. Nobody takes a position while a large row is being stored under an
        earlier one: they are the stream's order."""
        async with self._storing:
            position = self._position()
            if len(payload) > self._claims.largest:
                payload = await self._claims.put(subject, position.decode(), payload)
            seq = self._publisher.next_seq
            self._publisher.add(subject, op, position, payload)
            return seq

    async def _announce(self, plan: rows.Plan) -> None:
        """Say that a table has other columns than an earlier log's events had that goes on here, where it has."""
        async with self._storing:
            position = self._position()
            payload = await self._announcing.due(plan, position.decode(), self._point, self._transaction)
            if payload:
                if len(payload) > self._claims.largest:
                    payload = await self._claims.put(plan.subject, position.decode(), payload)
                self._publisher.add(plan.subject, b"schema", position, payload)

    def _position(self) -> bytes:
        return b"%b%08x" % (self._place, next(self._sub))

    async def _note(self, table: _Table) -> None:
        """Store how far a table is, and keep what somebody has asked for meanwhile.

        Raises:
            Conflict: another bridge has stored something. At a revision, as what is sent by one who is killed may come
                in late: after what his successor stores it must not.
        """
        async with table.noting:
            while True:
                status = table.status
                try:
                    table.revision = await self._state.put(self._key(table), status, table.revision)
                except Conflict:
                    found = await self._state.get(self._key(table), SnapshotStatus)
                    if found is None or msgspec.structs.replace(found[0], again=table.noted.again) != table.noted:
                        raise
                    table.noted, table.revision = found
                    table.change(again=found[0].again)
                    continue
                table.noted = status
                return

    async def _first(self, table: _Table) -> None:
        while True:
            found = await self._state.get(self._key(table), SnapshotStatus)
            table.revision = found[1] if found is not None else 0
            try:
                await self._note(table)
                return
            except Conflict:
                continue  # what a predecessor had sent has come in

    def _key(self, table: _Table) -> str:
        return subjects.snapshot_key(self._config.source.name, *table.root)

    async def _report(self) -> None:
        """Progress in the state bucket about once a second, and a log line now and then."""
        said = time.monotonic()
        written: dict[str, SnapshotStatus] = {}
        while True:
            await anyio.sleep(STATUS_EVERY)
            for table in self._tables:
                if table.status.state == "running" and written.get(table.name) != table.status:
                    written[table.name] = table.status
                    await self._note(table)
            self._tell()
            if self._show is None and time.monotonic() - said >= LOG_EVERY:
                said = time.monotonic()
                done = sum(table.status.state == "done" for table in self._tables)
                estimate = sum(table.status.estimate for table in self._tables)
                self._log.info("snapshot", tables=done, of=len(self._tables), rows=self.rows, of_about=estimate)

    def _tell(self) -> None:
        if self._show is not None:
            self._show({table.root: table.status for table in self._tables})
