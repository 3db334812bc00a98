"""The hot path: from the replication connection's messages to events at the publisher, and feedback to PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import psycopg
from psycopg import pq

from bridge import event, log
from bridge.config import Config
from bridge.errors import BadRecord, MissingIdentity, Unavailable
from bridge.failpoints import reach
from bridge.pipeline.altering import Altering
from bridge.pipeline.between import Between
from bridge.pipeline.checkpoint import Progress
from bridge.pipeline.plans import Plans
from bridge.pipeline.recover import timeline_of
from bridge.source import connection, frames, lsn, rows, slot, unreadable, wal2json
from bridge.source.altering import may_alter
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.pattern import Patterns
from bridge.source.rows import Plan, Stale
from bridge.source.slot import Identity
from bridge.source.wal2json import Record
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher

FEEDBACK_EVERY = 1.0
FEEDBACK_REPEATED = 10
UTF8 = "utf-8"  # as psycopg names Python's codec for the database encoding UTF8
ACTION_AT = len('{"action":"')
OPS = {"I": b"insert", "U": b"update", "D": b"delete", "T": b"truncate"}


class Feedback:
    """What PostgreSQL is told: always how far we have received, and only now and then what it may forget."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._socket = pgconn.socket
        self._loop = asyncio.get_running_loop()
        self._waits = False
        self.received = 0

    def send(self, flush: int = 0, *, ask: bool = False) -> None:
        """One status update, `ask` for an answer. Never waits: what the socket does not take goes out when it can."""
        try:
            self._pgconn.put_copy_data(frames.status(max(self.received, flush), flush, ask=ask))
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
        """Send on a timer, whatever the stream does, until cancelled; seldom while there is nothing new.

        A walsender that decodes for an hour without reading must not find its receive window full: a connection that
        cannot send ends by `tcp_user_timeout`.
        """
        said, ticks = -1, 0
        while True:
            await anyio.sleep(FEEDBACK_EVERY)
            ticks += 1
            if self.received != said or ticks % FEEDBACK_REPEATED == 0:
                said = self.received
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
        claims: Claims,
        plans: Plans,
        identity: Identity,
        history: list[tuple[int, int]],
        after: str,
        between: Between,
        altering: Altering,
        codec: str = UTF8,
    ) -> None:
        self._config = config
        self._reader = reader
        self._feedback = feedback
        self._publisher = publisher
        self._claims = claims
        self._plans = plans
        self._patterns = Patterns(plans.known)
        self._identity = identity
        self._history = history
        self._codec = codec
        self._after = after.encode()
        self._between = between
        self._altered = altering
        self._merges = between.merges
        self._xid = 0
        self._done = 0
        self._end = 0
        self._prefix = b""
        self._fresh = False
        self._closing = b""
        self._lsn = b""
        self._hex = b""
        self._k = 0
        self._uncommitted = False
        # The last transaction that may have altered tables, until the plans have been compared with the catalogue.
        self._altering: int | None = None
        self._garbled: Record | None = None
        self.published = 0
        self.skipped = 0
        self.unlogged: dict[str, int] = {}

    def progress(self) -> Progress:
        """How far the stream is: where nothing is on its way, as far as PostgreSQL has sent; else the last whole
        transaction that it has."""
        idle = self._publisher.idle and not self._uncommitted
        reached = self._done if idle else self._publisher.acked_end
        return Progress(reached, self._publisher.acked.position, self._publisher.acked.seq)

    async def run(self, pgconn: pq.abc.PGconn) -> None:
        """Stream until cancelled.

        Raises:
            Unavailable: PostgreSQL ended the stream. Contradiction: a change cannot be published.
        """
        while True:
            messages = await self._reader.take()
            if not messages:
                await self._ended(pgconn)
            between = self._between
            async with between.turn:
                for message in messages:
                    if isinstance(message, Notice):
                        await self._notice(message)
                    elif message[0] == frames.DATA:
                        # Most changes need no waiting: a coroutine for each would cost more than decoding it.
                        later = self._record(message[frames.HEADER :])
                        if later is not None:
                            await self._slowly(later)
                        if self._publisher.full:
                            self._received(message)
                            await self._publisher.room()
                    else:
                        self._keepalive(frames.parse(message))
                    if between.queue and not self._end and between.due:
                        await between.some(self._done)
                self._received(messages[-1])
                if not self._reader.waiting:
                    self._publisher.flush()

    async def rest(self) -> bool:
        """Publish some of what waits for a place between transactions, where there is one now; whether there was
        anything to publish."""
        async with self._between.turn:
            return not self._end and await self._between.some(self._done)

    @property
    def passed(self) -> int:
        """Everything up to this LSN is with the publisher."""
        return self._done

    def _received(self, message: memoryview | Notice) -> None:
        if not isinstance(message, Notice):
            found = frames.parse(message)
            reached = found.start if isinstance(found, frames.Data) else found.end
            self._feedback.received = max(self._feedback.received, reached)

    def _keepalive(self, found: frames.Data | frames.Keepalive) -> None:
        if isinstance(found, frames.Keepalive):
            self._feedback.received = max(self._feedback.received, found.end)
            if not self._end:
                self._done = max(self._done, found.end)
            if found.reply:
                self._feedback.send()

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

    def _record(self, payload: memoryview) -> Record | None:
        """Take one record; given back if it needs waiting or care: its table is not known or was altered, it has no
        text, it is too large for a message."""
        data = bytes(payload)
        if data.startswith(wal2json.COMMIT):
            self._commit()
            return None
        if not data.isascii():
            try:
                text = data.decode(self._codec)
            except UnicodeDecodeError:
                return self._undecodable(data)
            if self._codec != UTF8:
                data = text.encode()
        if self._fresh and self._altering is None and self._matched(data):
            return None
        record = wal2json.decode(data)
        if record.action == "B":
            self._begin(record)
            return None
        if record.action == "C":
            self._commit()
            return None
        return self._change(record, data)

    def _matched(self, data: bytes) -> bool:
        """Whether the record was a usual change of a busy table, and is with the publisher."""
        try:
            found = self._patterns.read(data, self._closing)
        except unreadable.ERRORS:
            return False
        if found is None or len(found[2]) > self._claims.largest:
            return False
        plan, at, payload = found
        if self._merges and plan.subject in self._merges:
            return False
        self._count(at)
        self._publish(plan, chr(data[ACTION_AT]), payload)
        return True

    def _change(self, record: Record, data: bytes) -> Record | None:
        if record.action == "T":
            self._altered.truncate(record.schema, record.table, self._xid)
        if self._passed(record):
            return record if wal2json.weight(record) * 4 > self._claims.largest else None
        if self._altering is not None:
            return record
        name = (record.schema, record.table)
        try:
            plan = self._plans.known[name]
            payload = rows.change(plan, record, self._closing) if plan is not None else b""
        except (KeyError, Stale, *unreadable.ERRORS):
            return record
        if plan is not None:
            if len(payload) > self._claims.largest or (self._merges and plan.subject in self._merges):
                return record
            self._publish(plan, record.action, payload)
            self._patterns.learn(name, plan, data)
        return None

    def _undecodable(self, data: bytes) -> Record | None:
        """A record that is not valid in the database's encoding. It does no harm where it is not published: logical
        messages, tables and columns that are left out."""
        if self._codec != UTF8:
            # Where a byte could not be decoded, this is no UTF-8 either.
            data = data.decode(self._codec, "surrogateescape").encode(errors="surrogatepass")
        record = wal2json.decode(data)
        if self._passed(record):
            return None
        self._garbled = record
        return record

    def _payload(self, plan: Plan, record: Record) -> bytes:
        """The event of a change. Stale: it does not fit the plan; BadRecord: a published value cannot be read."""
        if record is not self._garbled:
            with contextlib.suppress(*unreadable.ERRORS):
                return rows.change(plan, record, self._closing)
        return unreadable.change(plan, record, self._closing, self._position().decode())

    def _begin(self, record: Record) -> None:
        self._end = lsn.parse(record.nextlsn)
        if record.xid is not None:
            self._xid, begins = record.xid, lsn.parse(record.lsn)
            self._between.delivered.add(record.xid, begins)
            if may_alter(begins, self._end):
                self._altered.began(record.xid)
                if self._plans.stale(record.xid):
                    self._altering = record.xid
        timeline = timeline_of(self._end, self._identity, self._history) if self._history else self._identity.timeline
        self._prefix = b"%08x-%016x-" % (timeline, self._end)
        # All of a later transaction is new: its changes need no look at the position.
        self._fresh = self._prefix > self._after
        at = wal2json.timestamp(record.timestamp)
        self._closing = event.transaction(record.nextlsn, record.xid, at)
        self._lsn = b""
        reach("transaction.began")

    def _commit(self) -> None:
        if self._uncommitted:
            self._publisher.commit(self._end)
            self._uncommitted = False
        self._done = max(self._done, self._end)
        self._end = 0
        reach("transaction.ended")

    def _passed(self, record: Record) -> bool:
        """Whether a record is no change of a row, or one that the stream has; counts it into the position."""
        if record.action == "M" and not record.transactional:
            return True
        self._count(record.lsn.encode())
        if record.action == "M":
            return True
        if self._fresh or self._position() > self._after:
            return False
        self.skipped += 1
        return True

    def _count(self, at: bytes) -> None:
        """Count a record with this LSN into the position."""
        if at == self._lsn:
            self._k += 1
        else:
            self._lsn, self._k = at, 0
            high, _, low = at.partition(b"/")
            self._hex = (high.rjust(8, b"0") + low.rjust(8, b"0")).lower()

    def _position(self) -> bytes:
        return b"%b%b-%08x-00000000" % (self._prefix, self._hex, self._k)

    def _publish(self, plan: Plan, action: str, payload: bytes) -> None:
        self._publisher.add(plan.subject, OPS[action], self._position(), payload)
        self._uncommitted = True
        self.published += 1

    async def _slowly(self, record: Record) -> None:
        """Take a change of a table that is not known yet, or was altered before or since, or of a large row."""
        await self._compared()
        key = (record.schema, record.table)
        if key not in self._plans.known and await self._plans.load(*key, record, self._position().decode()) is None:
            return
        plan = self._plans.known[key]
        if plan is None:
            return
        try:
            payload = self._payload(plan, record)
        except Stale:
            fitted = await self._refit(record)
            if fitted is None:
                return
            plan, payload = fitted
        position = self._position()
        passed = not self._fresh and position <= self._after
        merge = self._merges.get(plan.subject)
        if merge is not None:
            payload = merge.see(record.action, self._xid, key, payload)
        if len(payload) > self._claims.largest:
            payload = await self._large(plan, position.decode(), payload, passed=passed)
        if not passed:
            self._publish(plan, record.action, payload)

    async def _compared(self) -> None:
        """Bring the plans in step with what transactions up to this one may have altered."""
        if self._altering is not None:
            await self._plans.compare(self._altering)
            self._altering = None

    async def _large(self, plan: Plan, position: str, payload: bytes, *, passed: bool) -> bytes:
        """The event to publish in the place of one that is too large for a message. Where the stream has it already, a
        power failure may have taken its object and left it."""
        if passed:
            await self._claims.again(plan.subject, position, payload)
            return payload
        self._publisher.flush()
        return await self._claims.put(plan.subject, position, payload)

    async def _refit(self, record: Record) -> tuple[Plan, bytes] | None:
        """The event of a change that does not fit the known plan: the table was altered before or since."""
        before, at = self._plans.known.get((record.schema, record.table)), self._position().decode()
        try:
            plan = await self._plans.load(record.schema, record.table, record, at)
            if plan is None:
                return None
            return plan, self._payload(plan, record)
        except Stale:
            self._plans.known[record.schema, record.table] = before
        plan = await self._plans.refit(record, at)
        if plan is None:
            return None
        try:
            return plan, self._payload(plan, record)
        except Stale:
            raise BadRecord(
                f"a change of {record.schema}.{record.table} at {self._position().decode()} has columns that do not "
                "fit the table",
                "report the statements that altered the table",
            ) from None

    async def _notice(self, text: str) -> None:
        """wal2json drops an update or delete of a table without replica identity; that must not pass in silence."""
        found = wal2json.missing_identity(text)
        if found is None:
            log.get().debug("server notice")
            return
        statement, schema, table = found
        if not self._prefix or self._prefix + b"g" <= self._after:
            return
        await self._compared()
        key = (schema, table)
        at = self._position().decode()
        plan = self._plans.known[key] if key in self._plans.known else await self._plans.load(*key, at=at)
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
