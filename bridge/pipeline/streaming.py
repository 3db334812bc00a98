"""The hot path: from the replication connection's messages to events at the publisher."""

from __future__ import annotations

import contextlib

from psycopg import pq

from bridge import event, log
from bridge.config import Config
from bridge.errors import Unavailable
from bridge.failpoints import reach
from bridge.pipeline import messages
from bridge.pipeline.altering import Altering
from bridge.pipeline.announce import Announcing
from bridge.pipeline.between import Between
from bridge.pipeline.checkpoint import Progress
from bridge.pipeline.feedback import Feedback
from bridge.pipeline.messages import Messages
from bridge.pipeline.plans import Plans
from bridge.pipeline.recover import timeline_of
from bridge.pipeline.unlogged import Unlogged
from bridge.pipeline.untold import doubt, unfit
from bridge.source import connection, frames, lsn, rows, slot, unreadable, wal2json
from bridge.source.altering import may_alter
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.pattern import Patterns
from bridge.source.place import Place
from bridge.source.rows import Plan, Stale
from bridge.source.slot import Identity
from bridge.source.wal2json import Record
from bridge.stream.claims import Claims
from bridge.stream.publisher import Publisher

UTF8 = "utf-8"  # as psycopg names Python's codec for the database encoding UTF8
ACTION_AT = len('{"action":"')
OPS = {"I": b"insert", "U": b"update", "D": b"delete", "T": b"truncate", "M": b"message"}


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
        unlogged: Unlogged,
        announcing: Announcing,
        codec: str,
        doubted: set[str],
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
        self._doubted = doubted
        self._after = after.encode()
        self._between = between
        self._altered = altering
        self._merges = between.merges
        self._messages = Messages(config.stream.prefix, config.source.name, config.source.messages)
        self._unlogged = unlogged
        self._announcing = announcing
        # Tables whose plan has come without an event that was published by it, or with events that show only the key.
        self._unannounced: set[tuple[str, str]] = set()
        self._rowless: set[tuple[str, str]] = set()
        self._place = Place()
        self._origins: dict[int, str] = {}
        self._xid = 0
        self._done = 0
        self._fresh = False
        # Of a transaction that was replicated into this database, where such are left out.
        self._foreign = False
        self._closing = b""
        self._committed_at = ""
        self._uncommitted = False
        # The last transaction that may have altered tables, until the plans have been compared with the catalogue.
        self._altering: int | None = None
        self._garbled: Record | None = None
        self.published = 0
        self.skipped = 0

    def progress(self) -> Progress:
        """How far the stream is: where nothing is on its way, as far as PostgreSQL has sent; else the last whole
        transaction that it has."""
        idle = self._publisher.idle and not self._uncommitted
        reached = self._done if idle else self._publisher.acked_end
        acked = self._publisher.acked
        altered = self._plans.past.latest()
        return Progress(reached, acked.position, acked.seq, self._unlogged.upto(reached), altered)

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
                    if between.queue and not self._place.end and between.due:
                        await between.some(self._done)
                self._received(messages[-1])
                if not self._reader.waiting:
                    self._publisher.flush()

    async def rest(self) -> bool:
        """Publish some of what waits for a place between transactions, where there is one now; whether there was
        anything to publish."""
        async with self._between.turn:
            return not self._place.end and await self._between.some(self._done)

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
            if not self._place.end:
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
        """Take one record; given back if it needs waiting or care: its table or origin is not known, or the table was
        altered, it has no text, it is too large for a message."""
        data = bytes(payload)
        if data.startswith(wal2json.COMMIT):
            self._commit()
            return None
        if data.startswith(wal2json.BEGIN):
            begun = wal2json.begin(data)
            if begun is not None:
                self._began(begun.xid, begun.start, begun.end)
                self._entered(begun.end, begun.closing, begun.committed_at, "")
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
            return self._begin(record)
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
        self._place.count(at)
        self._publish(plan.subject, chr(data[ACTION_AT]), payload)
        return True

    def _change(self, record: Record, data: bytes) -> Record | None:
        if record.action == "M":
            return self._message(record)
        if record.action == "T":
            self._altered.truncate(record.schema, record.table, self._xid)
        if self._passed(record):
            large = wal2json.weight(record) * 4 > self._claims.largest
            return record if large and not self._foreign else None
        name = (record.schema, record.table)
        if self._altering is not None or name in self._unannounced:
            return record
        if name in self._rowless and record.action != "D":
            return record
        try:
            plan = self._plans.known[name]
            payload = rows.change(plan, record, self._closing) if plan is not None else b""
        except (KeyError, Stale, *unreadable.ERRORS):
            return record
        if plan is not None:
            if plan.dropped and record.action in plan.dropped:
                return None
            if len(payload) > self._claims.largest or (self._merges and plan.subject in self._merges):
                return record
            self._publish(plan.subject, record.action, payload)
            self._patterns.learn(name, plan, data)
        return None

    def _message(self, record: Record) -> Record | None:
        """Take a logical message; given back if it cannot be published as it is."""
        subject, transactional = self._messages.subject(record.prefix), record.transactional
        if not transactional:
            if not subject:
                return None
            # A transaction of its own, for nothing stands between it and the commits before and after it.
            self._enter(lsn.parse(record.lsn), event.transaction(record.lsn, None, None))
        passed = self._passed(record)
        if subject and not self._foreign:
            payload = self._messages.payload(record, self._closing)
            if len(payload) > self._claims.largest or (record is self._garbled and not passed):
                return record
            if not passed:
                self._publish(subject, "M", payload)
        if not transactional:
            self._commit()
        return None

    def _undecodable(self, data: bytes) -> Record | None:
        """A record that is not valid in the database's encoding. It does no harm where it is not published: logical
        messages, tables and columns that are left out."""
        if self._codec != UTF8:
            # Where a byte could not be decoded, this is no UTF-8 either.
            data = data.decode(self._codec, "surrogateescape").encode(errors="surrogatepass")
        record = wal2json.decode(data)
        if record.action == "M":
            self._garbled = record
            return self._message(record)
        if self._passed(record):
            return None
        self._garbled = record
        return record

    def _payload(self, plan: Plan, record: Record) -> bytes:
        """The event of a change. Stale: it does not fit the plan; BadRecord: a published value cannot be read."""
        if record is not self._garbled:
            with contextlib.suppress(*unreadable.ERRORS):
                return rows.change(plan, record, self._closing)
        return unreadable.change(plan, record, self._closing, self._place.position().decode())

    def _begin(self, record: Record) -> Record | None:
        """Begin a transaction; given back if it comes from an origin whose name is not known."""
        if record.origin and record.origin not in self._origins:
            return record
        origin = self._origins[record.origin] if record.origin else ""
        end = lsn.parse(record.nextlsn)
        if record.xid is not None:
            self._began(record.xid, lsn.parse(record.lsn), end)
        at = wal2json.timestamp(record.timestamp)
        self._entered(end, event.transaction(record.nextlsn, record.xid, at, origin), at or "", origin)
        return None

    def _began(self, xid: int, begins: int, end: int) -> None:
        """Note what has to be known of a transaction, by where its commit record begins and ends."""
        self._xid = xid
        self._between.delivered.add(xid, begins)
        if may_alter(begins, end):
            self._altered.began(xid, begins)
            self._plans.past.passes(xid, end)
            if self._plans.stale(xid):
                self._altering = xid

    def _entered(self, end: int, closing: bytes, committed_at: str, origin: str) -> None:
        if self._plans.past.behind:
            self._plans.advance(end)
        self._enter(end, closing)
        self._committed_at = committed_at
        self._foreign = bool(origin) and self._config.source.only_local
        self._fresh = self._fresh and not self._foreign
        reach("transaction.began")

    def _enter(self, end: int, closing: bytes) -> None:
        history = self._history
        self._place.enter(timeline_of(end, self._identity, history) if history else self._identity.timeline, end)
        # All of a later transaction is new: its changes need no look at the position.
        self._fresh = self._place.prefix > self._after
        self._closing = closing
        self._committed_at = ""
        self._foreign = False

    def _commit(self) -> None:
        if self._uncommitted:
            self._publisher.commit(self._place.end, self._committed_at)
            self._uncommitted = False
        self._done = max(self._done, self._place.end)
        self._place.leave()
        reach("transaction.ended")

    def _passed(self, record: Record) -> bool:
        """Whether a record is one that the stream has, or is not to have; counts it into the position."""
        self._place.count(record.lsn.encode())
        if self._fresh:
            return False
        if not self._foreign and self._place.position() > self._after:
            return False
        self.skipped += 1
        return True

    def _publish(self, subject: bytes, action: str, payload: bytes) -> None:
        self._publisher.add(subject, OPS[action], self._place.position(), payload)
        self._uncommitted = True
        self.published += 1

    async def _slowly(self, record: Record) -> None:
        """Take what needs waiting or care."""
        if record.action == "B":
            origin = record.origin or 0
            self._origins[origin] = await self._plans.origin(origin)
            self._begin(record)
            return
        if record.action == "M":
            await self._slow_message(record)
            return
        await self._compared()
        key = (record.schema, record.table)
        if key not in self._plans.known and await self._plans.load(*key, record, str(self._place)) is None:
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
        if record.action in plan.dropped:
            return
        position = self._place.position()
        passed = not self._fresh and position <= self._after
        if passed or record.action == "T":
            self._unannounced.add(key)
        else:
            await self._announce(plan, record)
        merge = self._merges.get(plan.subject)
        if merge is not None:
            payload = merge.see(record.action, self._xid, key, payload)
        if len(payload) > self._claims.largest:
            payload = await self._large(plan.subject, position.decode(), payload, passed=passed)
        if not passed:
            self._publish(plan.subject, record.action, payload)

    async def _slow_message(self, record: Record) -> None:
        """A logical message that is too large for one of NATS, or no text."""
        position = self._place.position()
        if record is self._garbled:
            raise messages.unreadable(record, position.decode())
        subject, payload = self._messages.subject(record.prefix), self._messages.payload(record, self._closing)
        passed = not self._fresh and position <= self._after
        payload = await self._large(subject, position.decode(), payload, passed=passed)
        if not passed:
            self._publish(subject, record.action, payload)
        if not record.transactional:
            self._commit()

    async def _announce(self, plan: Plan, record: Record) -> None:
        """Say before a change that its table has other columns than the log's events had so far, where it has."""
        at, lsn_text = self._place.before(), record.lsn.encode()
        row = record.action != "D"
        shown = {c.name for c in (*record.columns, *record.identity)} if record.action == "U" else None
        payload = await self._announcing.due(plan, at.decode(), lsn_text, self._closing, row=row, shown=shown)
        if payload:
            if len(payload) > self._claims.largest:
                payload = await self._large(plan.subject, at.decode(), payload, passed=False)
            self._publisher.add(plan.subject, b"schema", at, payload)
            self._uncommitted = True
            self.published += 1
        key = (record.schema, record.table)
        self._unannounced.discard(key)
        (self._rowless.discard if row else self._rowless.add)(key)

    async def _compared(self) -> None:
        """Bring the plans in step with what transactions up to this one may have altered."""
        if self._altering is not None:
            await self._plans.compare(self._altering)
            self._altering = None
            self._origins.clear()

    async def _large(self, subject: bytes, position: str, payload: bytes, *, passed: bool) -> bytes:
        """The event to publish in the place of one that is too large for a message. Where the stream has it already, a
        power failure may have taken its object and left it."""
        if passed:
            await self._claims.again(subject, position, payload)
            return payload
        self._publisher.flush()
        return await self._claims.put(subject, position, payload)

    async def _refit(self, record: Record) -> tuple[Plan, bytes] | None:
        """The event of a change that does not fit the known plan: the table was altered before or since."""
        before, at = self._plans.known.get((record.schema, record.table)), str(self._place)
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
        doubt(plan, record, at, self._doubted)
        try:
            return plan, self._payload(plan, record)
        except Stale:
            self._plans.refuse_unnamed(plan, record, at)
            raise unfit(
                f"a change of {record.schema}.{record.table} at {at} has columns that do not fit the table"
            ) from None

    async def _notice(self, text: str) -> None:
        """wal2json drops an update or delete of a table without replica identity; that must not pass in silence."""
        found = wal2json.missing_identity(text)
        if found is None:
            log.get().debug("server notice")
            return
        statement, schema, table = found
        if not self._place.prefix or self._place.prefix + b"g" <= self._after or self._foreign:
            return
        await self._compared()
        key = (schema, table)
        if key not in self._plans.known:
            self._unannounced.add(key)
            await self._plans.load(*key, at=str(self._place))
        plan = self._plans.known[key]
        if plan is not None and statement[0] not in plan.dropped:
            self._unlogged.met(plan.relation, statement, self._place.end, self._publisher.next_seq)
