"""One table read while its changes stream: chunk after chunk, each published once the stream has passed its end.

    caught up → begin marker → for every partition: [chunk read → stream passes its H → rows published → noted] …
    → rows that moved → end marker → noted as done

A chunk whose snapshot lacks a transaction that the stream has had is read again. A table that is altered meanwhile is
read again from its beginning. Whatever ends this process, the next one goes on behind the last chunk that is noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from contextlib import aclosing
from typing import Any

import anyio
import msgspec
import psycopg

from bridge import event, log
from bridge.errors import BridgeError, Fenced, Unavailable
from bridge.failpoints import reach
from bridge.pipeline.between import Between, Piece
from bridge.pipeline.checkpoint import now
from bridge.pipeline.merge import Merge
from bridge.pipeline.passing import closing, passed, placed
from bridge.pipeline.session import Session
from bridge.pipeline.streaming import Streaming
from bridge.source import chunks, connection, rows
from bridge.source.catalog import Relation
from bridge.source.chunks import Chunk, Gone, Passing, Where
from bridge.source.rows import Plan
from bridge.stream import subjects
from bridge.stream.publisher import Publisher
from bridge.stream.reader import read
from bridge.stream.state import Again, Conflict, SnapshotStatus
from bridge.waiting import Backoff

# A chunk is to take about a second; how many rows that is shows from one to the next.
CHUNK_SECONDS = 1.0
FEWEST, MOST = 10, 50_000
FIRST_BYTES, FIRST_MOST, FIRST_UNKNOWN = 1 << 20, 5_000, 100
LARGEST_BYTES = 8 << 20
GROWTH = 4
AMONG = 500
UNSEEN_PAUSE = 0.5


class Ended(Exception):
    """Nobody wants the table to be read any more: paused, or cancelled."""


class Altered(Exception):
    """The table has other columns than when its reading began."""


class Reading:
    """The reading of one table; `run` it, and `look` when what is asked for may have changed."""

    def __init__(
        self, session: Session, publisher: Publisher, between: Between, streaming: Streaming, root: tuple[str, str]
    ) -> None:
        self._session = session
        self._publisher = publisher
        self._between = between
        self._streaming = streaming
        self._root = root
        self._key = subjects.snapshot_key(session.config.source.name, *root)
        self._subject = session.plans.subject(root).encode()
        self._merge = Merge()
        self._again = Again(state="requested")
        self._status = SnapshotStatus(state="incomplete")
        self._revision = 0
        self._looked = anyio.Event()
        self._limit = 0
        self._backoff = Backoff(f"snapshot of {'.'.join(root)}")

    def look(self) -> None:
        """What is asked for may have changed."""
        self._looked.set()

    async def wanted(self) -> bool:
        """Whether the table is to be read, now that this one has ended."""
        found = await self._session.state.get(self._key, SnapshotStatus)
        return found is not None and found[0].again is not None and found[0].again.under_way

    async def run(self) -> None:
        """Read the table until it is all in the stream, or nobody wants it any more.

        Raises:
            Unavailable: NATS or PostgreSQL is away. Fenced: somebody else is at work.
        """
        name = ".".join(self._root)
        try:
            await self._current()
            log.get().info("snapshot begins", table=name, resumed=bool(self._again.first_seq))
            await self._connected()
        except Ended:
            log.get().info("snapshot left", table=name, rows=self._again.rows)
        except (Unavailable, Fenced):
            raise
        except BridgeError as error:
            log.get().warning("snapshot failed", table=name, why=error.what, next=error.remedy)
            with contextlib.suppress(Ended):
                await self._note(state="failed", why=f"{error.what} → {error.remedy}")
        finally:
            self._between.merges.pop(self._subject, None)

    async def _connected(self) -> None:
        """Over as many connections as it takes: one that is ended by hand is no end of the reading."""
        while True:
            try:
                async with connection.connect(self._session.config.source.dsn) as sql:
                    await self._whole(sql)
                    return
            except Unavailable as error:
                if self._session.broker.closed.is_set() or isinstance(error, Conflict):
                    raise
                await self._note(state="waiting", why=error.what)
                await self._backoff.wait(error)

    async def _whole(self, sql: psycopg.AsyncConnection[Any]) -> None:
        while True:
            try:
                await self._caught_up(sql)
                self._merge = self._between.merges[self._subject] = Merge()
                await self._recollect()
                await self._parts(sql)
                await self._moved(sql)
                await self._end()
                return
            except Altered:
                log.get().info("table altered", table=".".join(self._root), meaning="it is read from its beginning")
                await self._note(part=0, parts=[], after=[], moved=[], last=False, shape="", rows=0, first_seq=0, seq=0)

    async def _caught_up(self, sql: psycopg.AsyncConnection[Any]) -> None:
        """Return once the stream has passed everything that any earlier session can have published."""
        await passed(self._streaming, sql, await chunks.end(sql))

    async def _recollect(self) -> None:
        """The rows that moved since what is noted, by what the stream has of it."""
        again = self._again
        self._merge.last = again.last
        self._merge.moved.update((key.encode(), None) for key in again.moved)
        if not again.seq or self._session.config.stream.compact:
            return
        last = self._publisher.next_seq - 1
        await self._publisher.reached(last)
        batches = read(
            self._session.broker, self._session.config.stream.name,
            subjects=[self._subject.decode()], start=again.seq + 1, last=last,
        )  # fmt: skip
        async with aclosing(batches):
            async for batch in batches:
                for message in batch:
                    if message.op == "update" and b'"unchanged":' in message.data:
                        found = event.decode(message.data)
                        if found.unchanged and event.old_key(found) != bytes(found.key):
                            self._merge.moved[bytes(found.key)] = None

    # The steps

    async def _parts(self, sql: psycopg.AsyncConnection[Any]) -> None:
        """Every partition from the first to the last row, those that come meanwhile included."""
        catalog = self._session.catalog
        for part in await chunks.leaves(catalog, *self._root):
            chunks.refuse_keyless(part.name, part.key)
        if not self._again.first_seq and not self._again.where:
            await self._mark("begin")
            reach("reading.began")
        while not self._again.last:
            left = [r for r in await chunks.leaves(catalog, *self._root) if r.oid not in self._again.parts]
            if not left:
                return
            part = next((r for r in left if r.oid == self._again.part), left[0])
            if part.oid != self._again.part:
                await self._note(part=part.oid, after=[])
            try:
                while await self._chunk(sql, part, await self._where(sql, part)):
                    pass
            except Gone:
                if part.root == (part.schema, part.table):
                    if await catalog.relation(*self._root) is not None:
                        raise Altered from None  # another one has its name
                    raise
            await self._note(parts=[*self._again.parts, part.oid], part=0, after=[])

    async def _moved(self, sql: psycopg.AsyncConnection[Any]) -> None:
        """The rows that moved where no chunk came by any more."""
        self._merge.last = True
        await self._note(last=True)
        while self._merge.moved:
            keys = list(self._merge.moved)[:AMONG]
            self._merge.due = set(keys)
            for key in keys:
                # Before they are read: one may get another row meanwhile.
                del self._merge.moved[key]
            for part in await chunks.leaves(self._session.catalog, *self._root):
                await self._among(sql, part, keys)
            self._merge.due = set()
            await self._note()

    async def _among(self, sql: psycopg.AsyncConnection[Any], part: Relation, keys: list[bytes]) -> None:
        """Publish the rows with these keys. Of a key whose JSON is not PostgreSQL's text, all rows are looked at."""
        if chunks.plain(part):
            among = [texts for texts in (chunks.texts(key, part.key) for key in keys) if texts is not None]
            if among:
                await self._chunk(sql, part, Where(among=among), only=set(keys))
            return
        after: list[str] = []
        while True:
            chunk = await self._read(sql, part, Where(after, limit=await self._size(sql, part)), set(keys))
            await self._publish(sql, chunk)
            if chunk.whole:
                return
            after = chunk.after

    async def _chunk(
        self, sql: psycopg.AsyncConnection[Any], part: Relation, where: Where, only: set[bytes] | None = None
    ) -> bool:
        """Read a chunk and publish it; whether there is more behind it."""
        began = time.monotonic()
        chunk = await self._read(sql, part, where, only)
        await self._publish(sql, chunk)
        if only is None:
            rows = self._again.rows + len(chunk.rows)
            rate = round(len(chunk.rows) / max(time.monotonic() - began, 1e-6), 1)
            await self._note(
                key=list(chunk.plan.key), after=chunk.after or self._again.after, rows=rows, rate=rate,
                eta=round(max(self._again.estimate - rows, 0) / rate, 1) if rate else None,
            )  # fmt: skip
        reach("reading.noted")
        return not chunk.whole

    async def _read(
        self, sql: psycopg.AsyncConnection[Any], part: Relation, where: Where, only: set[bytes] | None
    ) -> Chunk:
        """A chunk whose snapshot shows all that the stream has had, with the changes that it does not show merged."""
        waits = False
        while True:
            self._merge.open((part.schema, part.table))
            pending = self._between.delivered.pending()
            try:
                chunk = await chunks.read(sql, self._session.catalog, part.oid, self._planned, where)
            except Passing as error:
                self._merge.close()
                await self._note(state="waiting", why=error.what)
                await self._backoff.wait(error)
                continue
            except BaseException:
                self._merge.close()
                raise
            unseen = [xid for xid in pending if not chunk.snapshot.has(xid)]
            if not unseen:
                break
            self._merge.close()
            if not waits:
                waits = True
                listed = ", ".join(map(str, unseen[:5])) + (", …" if len(unseen) > 5 else "")
                await self._note(
                    state="waiting",
                    why=f"transactions {listed} are committed but not visible yet: is a synchronous standby away?",
                )
            with anyio.move_on_after(UNSEEN_PAUSE):
                await self._looked.wait()
            await self._current()
        self._backoff.over()
        if self._again.state == "waiting":
            await self._note(state="running", why="")
        reach("reading.read")
        kept = chunk.rows if only is None else {key: row for key, row in chunk.rows.items() if key in only}
        self._merge.fill(chunk.snapshot, dict(kept), closing(chunk.high))
        self._adapt(chunk)
        return chunk

    async def _publish(self, sql: psycopg.AsyncConnection[Any], chunk: Chunk) -> None:
        piece = Piece(self._subject, chunk.high, b"read", merge=self._merge)
        try:
            await placed(self._streaming, self._publisher, self._between, piece, sql)
        finally:
            self._merge.close()
        reach("reading.published")

    async def _mark(self, phase: str) -> int:
        relation = await self._session.catalog.relation(*self._root)
        if relation is None:
            raise Gone(f"the table {'.'.join(self._root)} does not exist (any more)", "name one that does")
        plan = await self._session.plans.of(relation, whole=True)
        shape = _shape(plan)
        if phase == "end" and shape != self._again.shape:
            raise Altered
        high = self._streaming.passed
        piece = Piece(self._subject, 0, b"snapshot", rows.marker(plan, phase, closing(high)))
        await placed(self._streaming, self._publisher, self._between, piece)
        if phase == "begin":
            await self._note(
                state="running", why="", first_seq=piece.first, shape=shape, started_at=now(),
                estimate=sum(r.estimate for r in await chunks.leaves(self._session.catalog, *self._root)),
            )  # fmt: skip
        return piece.last

    async def _end(self) -> None:
        again = self._again
        if again.where:
            await self._finish(self._status)
        else:
            last = await self._mark("end")
            reach("reading.ended")
            await self._finish(SnapshotStatus(
                state="done", mode="incremental", rows=again.rows, estimate=again.rows, first_seq=again.first_seq,
                last_seq=last, complete_from=again.first_seq, started_at=again.started_at, finished_at=now(),
            ))  # fmt: skip
        log.get().info("snapshot done", table=".".join(self._root), rows=again.rows)

    # The state

    async def _current(self) -> None:
        found = await self._session.state.get(self._key, SnapshotStatus)
        if found is None or found[0].again is None or not found[0].again.under_way:
            raise Ended
        self._status, self._revision = found
        self._again = found[0].again

    async def _note(self, **changes: Any) -> None:
        """Store how far it is, with the rows that moved.

        Raises:
            Ended: it was paused or cancelled meanwhile.
        """
        wanted = self._again.state if changes.get("state") is None else changes["state"]
        self._again = msgspec.structs.replace(self._again, **{
            "state": "running" if wanted == "requested" else wanted,
            "moved": [key.decode() for key in self._merge.moved], "seq": self._publisher.acked.seq, "at": now(),
            **changes,
        })  # fmt: skip
        await self._store(msgspec.structs.replace(self._status, again=self._again))

    async def _finish(self, status: SnapshotStatus) -> None:
        await self._store(msgspec.structs.replace(status, again=None))

    async def _store(self, status: SnapshotStatus) -> None:
        try:
            self._revision = await self._session.state.put(self._key, status, self._revision)
        except Conflict:
            # Paused, cancelled, or asked for once more: whoever goes on does so from what is stored.
            raise Ended from None
        self._status = status

    # The chunks

    async def _planned(self, relation: Relation) -> Plan:
        if relation.root != self._root:
            raise Gone(f"{relation.name} is no part of {'.'.join(self._root)} any more", "name the table that it is in")
        plan = await self._session.plans.of(relation, whole=True)
        altered = self._again.shape and _shape(plan) != self._again.shape
        if altered or (self._again.after and self._again.key != list(plan.key)):
            raise Altered
        return plan

    async def _where(self, sql: psycopg.AsyncConnection[Any], part: Relation) -> Where:
        again = self._again
        return Where(again.after, (), again.where, await self._size(sql, part))

    async def _size(self, sql: psycopg.AsyncConnection[Any], part: Relation) -> int:
        if not self._limit:
            wide = await chunks.width(sql, part.oid)
            self._limit = int(min(max(FIRST_BYTES / wide, FEWEST), FIRST_MOST)) if wide else FIRST_UNKNOWN
        return self._limit

    def _adapt(self, chunk: Chunk) -> None:
        """Aim for a second a chunk, and for no more than a few megabytes."""
        count = len(chunk.rows)
        if not count:
            return
        by_time = count * CHUNK_SECONDS / max(chunk.seconds, 0.001)
        by_bytes = LARGEST_BYTES / max(chunk.size / count, 1)
        self._limit = int(max(FEWEST, min(by_time, by_bytes, count * GROWTH, MOST)))


def _shape(plan: Plan) -> str:
    columns = sorted(f"{column.name}:{column.oid}:{column.type}" for column in plan.relation.columns)
    return hashlib.md5("\0".join(columns).encode(), usedforsecurity=False).hexdigest()
