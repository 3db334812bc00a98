"""One table read while its changes stream: chunk after chunk, each published once the stream has passed its end.

    caught up → begin marker → for every partition: [chunk read → stream passes its H → rows published → noted] …
    → rows that moved → end marker → noted as done

A chunk whose snapshot lacks a transaction that the stream has had is read again. A table that is altered meanwhile is
read again from its beginning. Whatever ends this process, the next one goes on behind the last chunk that is noted, and
finds the rows that moved since in the log.
"""

from __future__ import annotations

import contextlib
import time
from shlex import quote as typed
from typing import Any

import psycopg

from bridge import log
from bridge.config import join_name
from bridge.errors import BridgeError, Fenced, ServerRefused, Unavailable
from bridge.failpoints import reach
from bridge.pipeline.asked import Asked, Ended
from bridge.pipeline.between import Between, Piece
from bridge.pipeline.checkpoint import now
from bridge.pipeline.merge import Merge
from bridge.pipeline.moves import moves
from bridge.pipeline.pace import Pace
from bridge.pipeline.passing import closing, passed, placed
from bridge.pipeline.session import Session
from bridge.pipeline.shape import elsewhere, shape
from bridge.pipeline.streaming import Streaming
from bridge.source import chunks, connection, rows
from bridge.source.catalog import Relation
from bridge.source.chunks import Chunk, Gone, Passing, Reordered, Where
from bridge.source.rows import Plan
from bridge.stream import subjects
from bridge.stream.publisher import Publisher
from bridge.stream.state import Again, Conflict, SnapshotStatus
from bridge.waiting import Backoff

AMONG = 500
UNSEEN_PAUSE = 0.5
# The state bucket's values are messages: a longer list of keys is left to the log, which has them all.
MOVED_BYTES = 128 << 10
# How far a reading is that has to begin.
ANEW: dict[str, Any] = {
    "part": 0, "parts": [], "after": [], "moved": [], "last": False, "shape": "", "rows": 0, "first_seq": 0, "seq": 0,
}  # fmt: skip


class Altered(Exception):
    """The table has other columns than when its reading began, or has lost a partition that was read."""


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
        self._name = join_name(*root)
        self._subject = session.plans.subject(root).encode()
        self._merge = Merge()
        self._collects = False
        self._pace = Pace()
        self._plan: Plan | None = None
        self._backoff = Backoff(f"snapshot of {self._name}")
        key = subjects.snapshot_key(session.config.source.name, *root)
        self._asked = Asked(session.state, key, self._backoff)

    @property
    def _again(self) -> Again:
        return self._asked.again

    def look(self) -> None:
        """What is asked for may have changed."""
        self._asked.look()

    async def wanted(self) -> bool:
        """Whether the table is to be read."""
        return await self._asked.wanted()

    async def run(self) -> None:
        """Read the table until it is all in the stream, or nobody wants it any more.

        Raises:
            Unavailable: NATS or PostgreSQL is away. Fenced: somebody else is at work.
        """
        name = self._name
        try:
            await self._asked.current()
            if not self._session.catalog.filter.matches(*self._root):
                raise ServerRefused(
                    f"{name} is not published",
                    f"name it in [source] tables, or: bridge snapshot {typed(name)} --cancel",
                )
            if self._again.first_seq and not self._publisher.ends(self._subject, self._again.first_seq):
                await self._note(**ANEW)
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
        if not self._collects:
            await self._caught_up(sql)
            await self._collect()
        while True:
            try:
                await self._parts(sql)
                await self._moved(sql)
                await self._end()
                return
            except (Altered, Reordered):
                log.get().info("table altered", table=self._name, meaning="it is read from its beginning")
                if not self._again.rows:
                    # Whatever alters it all the time, the log is not to be filled with beginnings.
                    why = f"{self._name} was altered before anything of it was read"
                    await self._backoff.wait(Unavailable(why, "reading it from its beginning"))
                self._merge.restart()
                await self._note(**ANEW)

    async def _caught_up(self, sql: psycopg.AsyncConnection[Any]) -> None:
        """Return once the stream has passed everything that any earlier session can have published."""
        await passed(self._streaming, sql, await chunks.end(sql))

    async def _collect(self) -> None:
        """Take part in what the stream brings; what moved since the last note is found in the log."""
        again = self._again
        merge = self._merge = self._between.merges[self._subject] = Merge()
        merge.moved.update((key.encode(), None) for key in again.moved)
        last = self._publisher.next_seq - 1
        stream = self._session.config.stream
        if again.seq and not stream.compact:
            await self._publisher.reached(last)
            subject = self._subject.decode()
            found = await moves(self._session.broker, stream.name, subject, again.seq + 1, last)
            merge.moved |= dict.fromkeys(found)
        merge.last = again.last
        self._collects = True

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
                while await self._chunk(sql, part):
                    pass
            except Gone:
                if part.root == (part.schema, part.table):
                    if await catalog.relation(*self._root) is not None:
                        raise Altered from None  # another one has its name
                    raise
                if not self._again.after:
                    continue  # nothing of it is in the log
            await self._note(parts=[*self._again.parts, part.oid], part=0, after=[])

    async def _moved(self, sql: psycopg.AsyncConnection[Any]) -> None:
        """The rows that moved where no chunk came by any more."""
        merge = self._merge
        merge.last = True
        merge.moved |= dict.fromkeys(merge.due)  # of an attempt that was cut off
        await self._note(last=True)
        while merge.moved:
            parts = await chunks.leaves(self._session.catalog, *self._root)
            # Where all rows must be looked at, they are for all keys at once.
            keys = list(merge.moved)[: AMONG if all(map(chunks.plain, parts)) else None]
            merge.due = set(keys)
            for key in keys:
                # Before they are read: one may get another row meanwhile.
                del merge.moved[key]
            for part in parts:
                try:
                    await self._among(sql, part, keys)
                except Gone:
                    if not part.is_partition:
                        raise
            reach("reading.moved")
            merge.due = set()
            await self._note()

    async def _among(self, sql: psycopg.AsyncConnection[Any], part: Relation, keys: list[bytes]) -> None:
        """Publish the rows with these keys. Of a key whose JSON is not PostgreSQL's text, all rows are looked at."""
        plain = chunks.plain(part)
        found = [chunks.texts(key, part.key) for key in keys] if plain else []
        among = [texts for texts in found if texts is not None]
        if plain and not among:
            return
        where = Where(among=among, limit=0 if plain else await self._size(sql, part))
        while True:
            chunk = await self._read(sql, part, where, set(keys))
            await self._publish(sql, chunk)
            if chunk.whole:
                return
            where = where._replace(key=chunk.key, after=chunk.after)

    async def _chunk(self, sql: psycopg.AsyncConnection[Any], part: Relation) -> bool:
        """Read the next chunk and publish it; whether there is more behind it."""
        began, again = time.monotonic(), self._again
        where = Where(again.key, again.after, (), again.where, await self._size(sql, part))
        chunk = await self._read(sql, part, where, None)
        await self._publish(sql, chunk)
        count = self._again.rows + len(chunk.rows)
        rate = round(len(chunk.rows) / max(time.monotonic() - began, 1e-6), 1)
        await self._note(
            key=chunk.key, after=chunk.after or self._again.after, rows=count, rate=rate,
            eta=round(max(self._again.estimate - count, 0) / rate, 1) if rate else None,
        )  # fmt: skip
        reach("reading.noted")
        return not chunk.whole

    async def _read(
        self, sql: psycopg.AsyncConnection[Any], part: Relation, where: Where, only: set[bytes] | None
    ) -> Chunk:
        """A chunk whose snapshot shows all that the stream has had, with the changes that it does not show merged."""
        while True:
            self._merge.open((part.schema, part.table))
            pending = self._between.delivered.pending()
            try:
                chunk = await chunks.read(sql, self._session.catalog, part.oid, self._planned, where)
            except Passing as error:
                self._merge.close()
                if error.long and where.limit:
                    # It may be a time limit that this chunk is too large for.
                    self._pace.interrupted()
                    where = where._replace(limit=self._pace.rows)
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
            await self._visible(unseen)
        reach("reading.read")
        kept = chunk.rows if only is None else {key: row for key, row in chunk.rows.items() if key in only}
        self._merge.fill(chunk.snapshot, dict(kept), closing(chunk.high))
        self._backoff.over()
        if self._again.state == "waiting":
            await self._note(state="running", why="")
        self._pace.took(len(chunk.rows), chunk.size, chunk.seconds)
        return chunk

    async def _visible(self, unseen: list[int]) -> None:
        """Return once transactions are to be seen: the session looks for that all the time (`Between.delivered`)."""
        listed = ", ".join(map(str, unseen[:5])) + (", …" if len(unseen) > 5 else "")
        why = f"transactions {listed} are committed but not visible yet: is a synchronous standby away?"
        while not set(self._between.delivered.pending()).isdisjoint(unseen):
            # Paused and resumed in one moment, it is "requested".
            if self._again.state != "waiting":
                await self._note(state="waiting", why=why)
            await self._asked.look_within(UNSEEN_PAUSE)

    async def _publish(self, sql: psycopg.AsyncConnection[Any], chunk: Chunk) -> None:
        piece = Piece(self._subject, chunk.high, b"read", merge=self._merge, plan=self._plan)
        try:
            await placed(self._streaming, self._publisher, self._between, piece, sql)
        finally:
            self._merge.close()
        reach("reading.published")

    async def _mark(self, phase: str) -> int:
        relation = await self._session.catalog.relation(*self._root)
        if relation is None:
            raise Gone(f"the table {self._name} does not exist (any more)", "name one that does")
        plan = await self._session.plans.of(relation, whole=True)
        now_has = shape(plan)
        if phase == "end" and now_has != self._again.shape:
            raise Altered
        high = self._streaming.passed
        piece = Piece(self._subject, 0, b"snapshot", rows.marker(plan, phase, closing(high)), plan=plan)
        await placed(self._streaming, self._publisher, self._between, piece)
        if phase == "begin":
            await self._note(
                state="running", why="", first_seq=piece.first, shape=now_has, started_at=now(),
                estimate=sum(r.estimate for r in await chunks.leaves(self._session.catalog, *self._root)),
            )  # fmt: skip
        return piece.last

    async def _end(self) -> None:
        again = self._again
        if again.where:
            await self._asked.finish(self._asked.status)
        else:
            there = {part.oid for part in await chunks.leaves(self._session.catalog, *self._root)}
            if not there.issuperset(again.parts):
                raise Altered  # a partition that is gone: its rows are in the log, and nobody deletes them
            last = await self._mark("end")
            reach("reading.ended")
            await self._asked.finish(SnapshotStatus(
                state="done", mode="incremental", rows=again.rows, estimate=again.rows, first_seq=again.first_seq,
                last_seq=last, complete_from=again.first_seq, started_at=again.started_at, finished_at=now(),
            ))  # fmt: skip
        log.get().info("snapshot done", table=self._name, rows=again.rows)

    # The state

    async def _note(self, **changes: Any) -> None:
        """Store how far it is, with the rows that moved; a list that is too long is left to the log from where the last
        note was.

        Raises:
            Ended: it was paused, cancelled or asked for anew meanwhile.
        """
        merge = self._merge
        moved = list(dict.fromkeys([*merge.due, *merge.moved]))
        if self._collects and sum(map(len, moved)) <= MOVED_BYTES:
            changes = {"moved": [key.decode() for key in moved], "seq": self._publisher.acked.seq, **changes}
        await self._asked.note(**changes)

    # The chunks

    async def _planned(self, relation: Relation) -> Plan:
        if relation.root != self._root:
            raise elsewhere(self._root, relation)
        plan = await self._session.plans.of(relation, whole=True)
        if self._again.shape and shape(plan) != self._again.shape:
            raise Altered
        self._plan = plan
        return plan

    async def _size(self, sql: psycopg.AsyncConnection[Any], part: Relation) -> int:
        if not self._pace.rows:
            self._pace.begin(await chunks.width(sql, part.oid))
        return self._pace.rows
