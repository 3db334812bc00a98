"""The initial snapshot: every row that the slot's exported snapshot shows, as `read` events between two markers.

Tables are read by several connections that all import the snapshot, one table at a time each; a partitioned table is
one unit, its partitions in turn. Rows take their positions (`sub` counts on) where they are handed to the publisher.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import anyio
import msgspec
import psycopg

from bridge import event, log, structured
from bridge.config import Config
from bridge.errors import Unavailable
from bridge.event import Position
from bridge.failpoints import reach
from bridge.pipeline import watch
from bridge.pipeline.checkpoint import now
from bridge.pipeline.plans import Plans
from bridge.source import connection, lsn, rows, unreadable
from bridge.source.catalog import Catalog, Relation, quote_name
from bridge.source.connection import CopyReader, Notice
from bridge.source.slot import Created
from bridge.stream import subjects
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher
from bridge.stream.state import SnapshotStatus, State

STATUS_EVERY = 1.0
LOG_EVERY = 10.0
UNDEFINED_COLUMN = "42703"


class Moved(Unavailable):
    """A table was rewritten, truncated or dropped between the export and its reading: its old rows cannot be seen any
    more. The whole snapshot starts over from a new slot."""


class Initial:
    """One attempt at the initial snapshot. `rows` and `tables` tell how far it is."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        plans: Plans,
        publisher: Publisher,
        claims: Claims,
        state: State,
        timeline: int,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._plans = plans
        self._publisher = publisher
        self._claims = claims
        self._storing = anyio.Lock()
        self._state = state
        self._timeline = timeline
        self._sub = itertools.count(1)
        self._created = Created(0, "")
        self._status: dict[tuple[str, str], SnapshotStatus] = {}
        self._groups: list[tuple[tuple[str, str], list[Relation]]] = []
        self._log = log.get()
        self.rows = 0

    async def run(self, created: Created, relations: list[Relation]) -> None:
        """Read every table and return once the stream has the last row.

        Raises:
            Moved, Unavailable: start over. ServerRefused: a table may not be read.
        """
        self._created = created
        self._groups = [(root, list(group)) for root, group in itertools.groupby(relations, key=lambda r: r.root)]
        for root, group in self._groups:
            await self._note(root, SnapshotStatus(state="waiting", estimate=sum(r.estimate for r in group)))
        # The small ones first: what is truncated often is small, and must not be so between the export and its reading.
        queue = sorted(self._groups, key=lambda g: sum(r.estimate for r in g[1]))
        started = time.monotonic()
        async with anyio.create_task_group() as group_:
            group_.start_soon(self._report)
            async with anyio.create_task_group() as workers:
                for _ in range(min(self._config.snapshot.workers, len(queue))):
                    workers.start_soon(self._work, queue)
            group_.cancel_scope.cancel()
        reach("snapshot.read")
        await self._publisher.drain()
        reach("snapshot.drained")
        for root, _ in self._groups:
            status = self._status[root]
            await self._note(root, msgspec.structs.replace(status, state="done", finished_at=now()))
        reach("snapshot.noted")
        seconds = time.monotonic() - started
        self._log.info("snapshot done", tables=len(self._groups), rows=self.rows, seconds=round(seconds, 1))

    async def _work(self, queue: list[tuple[tuple[str, str], list[Relation]]]) -> None:
        async with connection.connect(self._config.source.dsn) as sql:
            while queue:
                root, relations = queue.pop(0)
                await self._table(sql, root, relations)

    async def _table(self, sql: psycopg.AsyncConnection[Any], root: tuple[str, str], relations: list[Relation]) -> None:
        point = lsn.show(self._created.consistent_point)
        closing = b',"lsn":"%s"' % point.encode() + event.transaction(point, None, None)
        plans = [await self._plans.of(relation, whole=True) for relation in relations]
        whole = msgspec.structs.replace(plans[0], closing=b"")
        first = self._publisher.next_seq
        await self._note(
            root,
            msgspec.structs.replace(
                self._status[root], state="running", lsn=point, first_seq=first, complete_from=first, started_at=now()
            ),
        )
        # Other workers may have published while the status was written.
        begin = await self._add(whole.subject, b"snapshot", rows.marker(whole, "begin", closing))
        self._status[root] = msgspec.structs.replace(self._status[root], first_seq=begin, complete_from=begin)
        reach("table.began")
        for plan in plans:
            await self._copy(sql, plan, closing)
        last = await self._add(whole.subject, b"snapshot", rows.marker(whole, "end", closing))
        await self._publisher.room()
        self._status[root] = msgspec.structs.replace(self._status[root], last_seq=last)

    async def _copy(self, sql: psycopg.AsyncConnection[Any], plan: rows.Plan, closing: bytes) -> None:
        """Read one table in a transaction of its own, so that it is locked no longer than it is read."""
        relation = plan.relation
        name = f"{quote_name(relation.schema)}.{quote_name(relation.table)}"
        try:
            await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            await sql.execute(f"SET TRANSACTION SNAPSHOT '{self._created.snapshot}'")
            await sql.execute(f"LOCK TABLE ONLY {name} IN ACCESS SHARE MODE")
            cursor = await sql.execute(
                "SELECT relfilenode = pg_relation_filenode(oid) FROM pg_class WHERE oid = %s", (relation.oid,)
            )
            same = await cursor.fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            same = None
        except (psycopg.errors.InvalidParameterValue, psycopg.errors.ObjectNotInPrerequisiteState):
            raise Moved("the exported snapshot is gone with its connection", "the snapshot starts over") from None
        except psycopg.Error as error:
            raise connection.refusal(error, f"reading {relation.name}") from None
        if same is None or not same[0]:
            raise Moved(
                f"the table {relation.name} was rewritten, truncated or dropped after the snapshot was taken",
                "the snapshot starts over",
            )
        reader = rows.Reader(plan, closing)
        statement = f"COPY (SELECT {reader.columns} FROM ONLY {name}) TO STDOUT"
        await self._rows(sql, plan, reader, statement)
        reach("table.read")
        await sql.execute("COMMIT")

    async def _rows(
        self, sql: psycopg.AsyncConnection[Any], plan: rows.Plan, reader: rows.Reader, statement: str
    ) -> None:
        pgconn = sql.pgconn
        for result in await connection.command(pgconn, statement.encode()):
            _checked(pgconn, result, plan)
        copy = CopyReader(pgconn)
        publisher, root = self._publisher, plan.relation.root
        try:
            async with structured.group() as tasks:
                tasks.start_soon(watch.hearing, copy, pgconn)
                while lines := await copy.take():
                    for line in lines:
                        if isinstance(line, Notice):
                            continue
                        try:
                            payload = reader.payload(bytes(line))
                        except unreadable.ERRORS:
                            raise unreadable.row(plan, bytes(line)) from None
                        await self._add(plan.subject, b"read", payload)
                        if publisher.full:
                            await publisher.room()
                    self.rows += len(lines)
                    reach("table.rows")
                    status = self._status[root]
                    self._status[root] = msgspec.structs.replace(status, rows=status.rows + len(lines))
                tasks.cancel_scope.cancel()
        finally:
            copy.close()
        try:
            await connection.finish(pgconn)
        except connection.CommandError as error:
            raise connection.server_error(error.sqlstate, error.message, f"reading {plan.name}") from None

    async def _add(self, subject: bytes, op: bytes, payload: bytes) -> int:
        """Hand over one event; its sequence. Nobody takes a position while a large row is being stored under an
        earlier one: they are the stream's order."""
        if len(payload) <= self._claims.largest and not self._storing.locked():
            return self._take(subject, op, self._position(), payload)
        async with self._storing:
            position = self._position()
            if len(payload) > self._claims.largest:
                payload = await self._claims.put(subject, position, payload)
            return self._take(subject, op, position, payload)

    def _take(self, subject: bytes, op: bytes, position: str, payload: bytes) -> int:
        seq = self._publisher.next_seq
        self._publisher.add(subject, op, position.encode(), payload)
        return seq

    def _position(self) -> str:
        return str(Position(self._timeline, self._created.consistent_point, 0, 0, next(self._sub)))

    async def _note(self, root: tuple[str, str], status: SnapshotStatus) -> None:
        self._status[root] = status
        await self._state.put(subjects.snapshot_key(self._config.source.name, *root), status)

    async def _report(self) -> None:
        """Progress in the state bucket about once a second, and a log line now and then."""
        said = time.monotonic()
        written: dict[tuple[str, str], SnapshotStatus] = {}
        while True:
            await anyio.sleep(STATUS_EVERY)
            for root, status in list(self._status.items()):
                if status.state == "running" and written.get(root) != status:
                    written[root] = status
                    await self._state.put(subjects.snapshot_key(self._config.source.name, *root), status)
            if time.monotonic() - said >= LOG_EVERY:
                said = time.monotonic()
                estimate = sum(s.estimate for s in self._status.values())
                self._log.info("snapshot", rows=self.rows, of_about=estimate)


def _checked(pgconn: Any, result: Any, plan: rows.Plan) -> None:
    try:
        connection.check(pgconn, result)
    except connection.CommandError as error:
        if error.sqlstate == UNDEFINED_COLUMN:
            raise Moved(f"a column of {plan.name} was dropped or renamed", "the snapshot starts over") from None
        raise connection.server_error(error.sqlstate, error.message, f"reading {plan.name}") from None
