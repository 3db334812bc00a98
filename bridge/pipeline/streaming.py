"""The hot path: from the replication connection's messages to events at the publisher, and feedback to PostgreSQL."""

from __future__ import annotations

import asyncio

import anyio
import psycopg
from psycopg import pq

from bridge import event, log
from bridge.config import Config
from bridge.errors import BadRecord, MissingIdentity, Unavailable
from bridge.pipeline.checkpoint import Progress
from bridge.pipeline.plans import Plans
from bridge.pipeline.recover import timeline_of
from bridge.source import connection, frames, lsn, rows, slot, wal2json
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.rows import Plan, Stale
from bridge.source.slot import Identity
from bridge.source.wal2json import Record
from bridge.stream.publisher import Publisher

FEEDBACK_EVERY = 1.0
UTF8 = "utf-8"  # as psycopg names Python's codec for the database encoding UTF8
OPS = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}


class Feedback:
    """What PostgreSQL is told: always how far we have received, and only now and then what it may forget."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._socket = pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._waits = False
        self.received = 0

    def send(self, flush: int = 0) -> None:
        """One status update. Never waits: what the socket does not take goes out when it can."""
        try:
            self._pgconn.put_copy_data(frames.status(max(self.received, flush), flush))
            self._flush()
        except (psycopg.Error, OSError) as error:
            raise connection.refusal(error, "feedback") from None

    def confirm(self, reached: int) -> None:
        """PostgreSQL may forget what is at or before `reached`; at once after, flush = 0 again."""
        self.send(reached)
        self.send()

    def _flush(self) -> None:
        if self._pgconn.flush() and not self._waits:
            self._waits = True
            self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        try:
            done = not self._pgconn.flush()
        except (psycopg.Error, OSError):
            done = True  # the reader meets the same error and raises it
        if done:
            self._loop.remove_writer(self._socket)
            self._waits = False

    async def run(self) -> None:
        """Send on a timer, whatever the stream does, until cancelled."""
        while True:
            await anyio.sleep(FEEDBACK_EVERY)
            self.send()

    def close(self) -> None:
        """Stop watching the socket."""
        if self._waits:
            self._loop.remove_writer(self._socket)
            self._waits = False


class Streaming:
    """Decodes wal2json's records in order and gives the publisher every event after `after`.

    published: events handed to the publisher; skipped: changes that the stream already had.
    """

    def __init__(
        self,
        config: Config,
        reader: CopyReader,
        feedback: Feedback,
        publisher: Publisher,
        plans: Plans,
        identity: Identity,
        history: list[tuple[int, int]],
        after: str,
        codec: str = UTF8,
    ) -> None:
        self._config = config
        self._reader = reader
        self._feedback = feedback
        self._publisher = publisher
        self._plans = plans
        self._identity = identity
        self._history = history
        self._after = after
        self._codec = codec
        self._done = 0
        self._end = 0
        self._prefix = ""
        self._closing = b""
        self._lsn = ""
        self._hex = ""
        self._k = 0
        self._pending: tuple[bytes, str, str, bytes] | None = None
        self.published = 0
        self.skipped = 0
        self.unlogged: dict[str, int] = {}

    def progress(self) -> Progress:
        """How far the stream is: where nothing is on its way, as far as PostgreSQL has sent; else the last whole
        transaction that it has."""
        idle = self._publisher.idle and self._pending is None
        reached = self._done if idle else self._publisher.acked_end
        return Progress(reached, self._publisher.acked.position, self._publisher.acked.seq)

    async def run(self, pgconn: pq.abc.PGconn) -> None:
        """Stream until cancelled.

        Raises:
            Unavailable: PostgreSQL ended the stream. Contradiction: a change cannot be published.
        """
        publisher, feedback = self._publisher, self._feedback
        while True:
            messages = await self._reader.take()
            if not messages:
                await self._ended(pgconn)
            for message in messages:
                if isinstance(message, Notice):
                    await self._notice(message)
                    continue
                found = frames.parse(message)
                if isinstance(found, frames.Keepalive):
                    feedback.received = max(feedback.received, found.end)
                    if not self._end:
                        self._done = max(self._done, found.end)
                    if found.reply:
                        feedback.send()
                    continue
                if found.start > feedback.received:
                    feedback.received = found.start
                await self._record(found.payload)
                if publisher.full:
                    await publisher.room()
            if not self._reader.waiting:
                publisher.flush()

    async def _ended(self, pgconn: pq.abc.PGconn) -> None:
        try:
            await connection.finish(pgconn)
        except CommandError as error:
            if error.sqlstate == "55000" or "has already been removed" in error.message:
                raise slot.lost(self._config.source.slot) from None
            raise Unavailable(
                f"PostgreSQL ended the stream: {error.message} (SQLSTATE {error.sqlstate})", "starting it again"
            ) from None
        raise Unavailable("PostgreSQL ended the stream", "starting it again")

    async def _record(self, payload: memoryview) -> None:
        record = wal2json.decode(payload if self._codec == UTF8 else self._transcoded(bytes(payload)))
        action = record.action
        if action == "B":
            self._begin(record)
        elif action == "C":
            self._commit()
        else:
            await self._change(record)

    def _transcoded(self, payload: bytes) -> bytes:
        """A record of a database in another encoding as UTF-8. Only a logical message can hold what is no text."""
        errors = "replace" if payload.startswith(b'{"action":"M"') else "strict"
        try:
            return payload.decode(self._codec, errors).encode()
        except UnicodeDecodeError as error:
            raise BadRecord(
                f"a record of {len(payload)} bytes is not valid {self._codec} at byte {error.start}",
                "find the row whose text is not valid in the database's encoding",
            ) from None

    def _begin(self, record: Record) -> None:
        self._end = lsn.parse(record.nextlsn)
        timeline = timeline_of(self._end, self._identity, self._history)
        self._prefix = f"{timeline:08x}-{self._end:016x}-"
        at = wal2json.timestamp(record.timestamp)
        self._closing = event.transaction(record.nextlsn, record.xid, at)
        self._lsn = ""

    def _commit(self) -> None:
        if self._pending is not None:
            self._publisher.add(*self._pending, self._end, last=True)
            self._pending = None
        self._done = max(self._done, self._end)
        self._end = 0

    async def _change(self, record: Record) -> None:
        if record.action == "M" and not record.transactional:
            return
        if record.lsn == self._lsn:
            self._k += 1
        else:
            self._lsn, self._k = record.lsn, 0
            high, _, low = record.lsn.partition("/")
            self._hex = f"{high:0>8}{low:0>8}".lower()
        if record.action == "M":
            return
        position = f"{self._prefix}{self._hex}-{self._k:08x}-00000000"
        if position <= self._after:
            self.skipped += 1
            return
        try:
            plan = self._plans.known[record.schema, record.table]
        except KeyError:
            plan = await self._plans.load(record.schema, record.table, record)
        if plan is None:
            return
        try:
            payload = rows.change(plan, record, self._closing)
        except Stale:
            fitted = await self._refit(record, position)
            if fitted is None:
                return
            plan, payload = fitted
        if self._pending is not None:
            self._publisher.add(*self._pending, 0, last=False)
        self._pending = (plan.subject, OPS[record.action], position, payload)
        self.published += 1

    async def _refit(self, record: Record, position: str) -> tuple[Plan, bytes] | None:
        """The event of a change that does not fit the known plan: the table was altered before or since."""
        before = self._plans.known.get((record.schema, record.table))
        try:
            plan = await self._plans.load(record.schema, record.table, record)
            if plan is None:
                return None
            return plan, rows.change(plan, record, self._closing)
        except Stale:
            self._plans.known[record.schema, record.table] = before
        plan = await self._plans.refit(record)
        if plan is None:
            return None
        try:
            return plan, rows.change(plan, record, self._closing)
        except Stale:
            raise BadRecord(
                f"a change of {record.schema}.{record.table} at {position} has columns that do not fit the table",
                "report the statements that altered the table",
            ) from None

    async def _notice(self, text: str) -> None:
        """wal2json drops an update or delete of a table without replica identity; that must not pass in silence."""
        found = wal2json.missing_identity(text)
        if found is None:
            log.get().debug("server notice")
            return
        statement, schema, table = found
        if not self._prefix or self._prefix + "g" <= self._after:
            return
        key = (schema, table)
        plan = self._plans.known[key] if key in self._plans.known else await self._plans.load(*key)
        if plan is None:
            return
        name, article = f"{schema}.{table}", "an" if statement == "UPDATE" else "a"
        if self._config.source.on_missing_identity == "stop":
            raise MissingIdentity(
                f"{article} {statement} of {name} in the transaction that ends at {lsn.show(self._end)} is not in "
                "PostgreSQL's log: the table has no replica identity",
                f"ALTER TABLE {name} REPLICA IDENTITY FULL (or give it a primary key); to go on without that change, "
                'start once with [source] on_missing_identity = "warn"',
            )
        self.unlogged[name] = self.unlogged.get(name, 0) + 1
        if self.unlogged[name] == 1:
            log.get().warning("change not logged", table=name, statement=statement, next="REPLICA IDENTITY FULL")
