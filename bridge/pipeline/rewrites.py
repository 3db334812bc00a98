"""The watch on what changes rows without a change in PostgreSQL's log, and what follows from it.

    the stream brings a transaction that may have altered tables → the catalogue shows it → shapes read, the WAL's end H
    → the stream has passed H, truncates before it included → judged → the table is asked for to be read again
    → its new shape is kept

What was altered and altered back shows in the log alone: that is noted with the shape that the table has again.
What was altered while no bridge ran shows at the start in the same way. A table that came since, and of which the
stream has brought nothing yet, is taken note of here.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import anyio
import psycopg

from bridge import event, log
from bridge.errors import ServerRefused, Unavailable
from bridge.failpoints import reach
from bridge.pipeline import judging, shapes
from bridge.pipeline.altering import Altering
from bridge.pipeline.between import Between, Piece
from bridge.pipeline.checkpoint import now
from bridge.pipeline.complete import Completeness, readable, remedy
from bridge.pipeline.passing import closing, passed, placed
from bridge.pipeline.session import Session
from bridge.pipeline.shapes import Look, Root
from bridge.pipeline.streaming import Streaming
from bridge.source import chunks, connection
from bridge.source.catalog import has_rows
from bridge.source.shapes import Today, read
from bridge.stream import subjects
from bridge.stream.publisher import Publisher
from bridge.stream.state import Conflict, SnapshotStatus
from bridge.waiting import Backoff, until

# A look at some thousand tables costs a tenth of a second: looks are to take no more than a twentieth of the time,
# however many temporary tables are made.
REST = 20
LEAST_REST = 0.1
VISIBLE_EVERY = 0.1
LOCKED = "5s"
FROM_BEFORE = "its rows in the log are from before"


class Rewrites:
    """Looks at the start, and whenever `altering` has something new, until cancelled."""

    def __init__(
        self,
        session: Session,
        publisher: Publisher,
        between: Between,
        streaming: Streaming,
        complete: Completeness,
        altering: Altering,
    ) -> None:
        self._session = session
        self._shapes = session.shapes
        self._publisher = publisher
        self._between = between
        self._streaming = streaming
        self._complete = complete
        self._altering = altering
        self._config = session.config
        self._hurry = anyio.Event()
        self._shapes.on_turned = self._look_again

    def _look_again(self) -> None:
        self._altering.news.set()

    async def run(self) -> None:
        """Return only by raising: Unavailable where something is away."""
        while True:
            self._altering.news = anyio.Event()
            await self._brought()
            began = time.monotonic()
            look = await self._shapes.look()
            took, seq = time.monotonic() - began, self._publisher.next_seq
            if look.vanished() or look.altered():
                await self._patiently(look, seq)
            self._altering.seen(look.snapshot)
            with anyio.move_on_after(max(LEAST_REST, took * REST)):
                await self._hurry.wait()
            if not self._altering.xids:
                await self._altering.news.wait()

    async def settled(self) -> None:
        """Return once everything that the stream has brought so far is judged: what truncates have told is forgotten
        with this process."""
        self._hurry.set()

        async def done() -> bool:
            return not self._altering.xids

        await until(done, seconds=math.inf, every=0.01)

    async def _brought(self) -> None:
        """Return once the catalogue shows what the stream has brought: a commit is delivered before it is to be seen,
        long before where a synchronous standby is away."""
        brought = set(self._altering.xids)

        async def shown() -> bool:
            snapshot = await self._session.catalog.snapshot()
            return all(snapshot.has(xid) for xid in brought)

        if brought:
            await until(shown, seconds=math.inf, every=VISIBLE_EVERY)

    async def _patiently(self, look: Look, seq: int) -> None:
        """Judge what differs over as many connections as it takes: that one cannot be had now is no end of the stream.

        Args:
            seq: what was published from this sequence on was so after the look.
        """
        backoff = Backoff("the watch on altered tables")
        while True:
            try:
                async with connection.connect(self._config.source.dsn) as sql:
                    await sql.execute(f"SET lock_timeout = '{LOCKED}'")
                    await passed(self._streaming, sql, await chunks.end(sql))
                    await self._each(sql, look, seq)
                    backoff.over()
                    return
            except (Unavailable, ServerRefused) as error:
                if self._session.broker.closed.is_set():
                    raise
                await backoff.wait(error if isinstance(error, Unavailable) else Unavailable(error.what, error.remedy))

    async def _each(self, sql: psycopg.AsyncConnection[Any], look: Look, seq: int) -> None:
        for root in look.vanished():
            if self._shapes.kept[root].gone:
                continue  # said over a connection before
            log.get().warning(
                "table gone",
                table=".".join(root),
                meaning="it was dropped, renamed or moved, is a partition or not logged now; its rows stay in the log",
                next="delete its index, or take it out of the index's tables and `bridge reindex`",
            )
            await self._shapes.keep(root, shapes.gone(look.known[root]))
            self._session.plans.forget(root)
        for root in look.altered():
            if root in look.known and judging.settled(self._shapes.kept[root]) == judging.settled(look.known[root]):
                await self._judge(sql, look, root, seq)
            elif root not in self._shapes.kept:
                # What has come with the stream since has a shape of later already.
                await self._new(sql, look.today[root], seq)

    async def _new(self, sql: psycopg.AsyncConnection[Any], today: Today, seq: int) -> None:
        """A table of which no shape is kept: the stream has brought no change of it."""
        key = subjects.snapshot_key(self._config.source.name, *today.root)
        if await self._session.state.get(key, SnapshotStatus) is not None:
            await self._rewritten(today, [judging.AWAY], seq, another=True)
            await self._shapes.keep(today.root, judging.shape(today))
        else:
            rows = await has_rows(sql, *today.root, partitioned=today.partitioned)
            await self._complete.appeared(today, rows=rows)

    async def _judge(self, sql: psycopg.AsyncConnection[Any], look: Look, root: Root, seq: int) -> None:
        today, kept = look.today[root], self._shapes.kept[root]
        excluded = self._session.plans.leaving(root).hidden(column.name for column in today.columns)
        met = look.met.get(root, set())
        truncated = partial(self._altering.truncated, snapshot=look.snapshot)
        verdict = judging.judge(kept, today, truncated, excluded, met, unseen=self._shapes.unseen)
        filled = [part.name for part in verdict.attached if await has_rows(sql, part.schema, part.table)]
        seen = verdict.seen + [f"partition {name} came with rows" for name in filled]
        if verdict.left and (seen or await self._must_be_read(root)):
            seen += [f"partition {name} left" for name in verdict.left]
        elif verdict.left:
            await self._left(root, verdict.left)
            seq = self._publisher.next_seq
            # One that has come since has lost rows to the truncate of its namesake.
            _, found = await read(sql, root)
            names = [part.name for one in found for part in one.parts if part.name in verdict.left]
            seen = [f"another partition is called {name} now" for name in names]
        another = kept.gone or today.oid != kept.oid
        if seen:
            # A reading that began before has what turned behind its beginning.
            since = self._publisher.next_seq if judging.back(kept, today, excluded) else seq
            await self._rewritten(today, seen, since, another=another)
            reach("rewrite.asked")
        await self._shapes.judged(root, judging.shape(today, None if seen else kept), kept.turned)
        if another or verdict.left or verdict.attached:
            # Its plans can still be those of its namesake, or have partitions that are its own no more.
            self._session.plans.forget(root)

    async def _must_be_read(self, root: Root) -> bool:
        """Whether a partition that left is no matter of a truncate: nothing is to be done about it, or a reading of the
        table may still bring its rows."""
        key = subjects.snapshot_key(self._config.source.name, *root)
        found = await self._session.state.get(key, SnapshotStatus)
        being_read = found is not None and found[0].again is not None and found[0].again.under_way
        return being_read or self._config.snapshot.on_rewrite == "warn"

    async def _left(self, root: Root, left: list[str]) -> None:
        """Say in the log that partitions are empty, for they are the table's no more."""
        source, high = self._config.source.name, self._streaming.passed
        head, subject = event.head("truncate", source, *root), self._session.plans.subject(root).encode()
        if "T" in self._session.plans.leaving(root).dropped:
            return
        for partition in left:
            payload = b'%b,"key":null%b%b' % (head, event.tail(partition), closing(high))
            piece = Piece(subject, 0, b"truncate", payload)
            await placed(self._streaming, self._publisher, self._between, piece)
            log.get().info(
                "partition left", table=".".join(root), partition=partition, next="the log has a truncate of it"
            )

    async def _rewritten(self, today: Today, seen: list[str], seq: int, *, another: bool) -> None:
        """Mark a table whose rows were changed, and ask for it to be read again where that is wanted and can be."""
        key = subjects.snapshot_key(self._config.source.name, *today.root)
        name, what = ".".join(today.root), judging.told(seen)
        reads = self._complete.heals and readable(today)
        error = f"{what}: {FROM_BEFORE}"
        if not readable(today):
            error = f"{error}, and it has no key to be read again by"
        while True:
            found = await self._session.state.get(key, SnapshotStatus)
            before, revision = found if found is not None else (SnapshotStatus(state="incomplete"), 0)
            if judging.begun_since(before, seq):
                log.get().info("table rewritten", table=name, what=what, next="nothing, it was read since")
                return
            after = judging.marked(before, error, now(), reads=reads, another=another)
            try:
                await self._session.state.put(key, after, revision)
            except Conflict:
                continue
            break
        if after.again is None:
            log.get().warning(
                "table rewritten", table=name, what=what, meaning=FROM_BEFORE, next=remedy(name, key=readable(today))
            )
        elif after.again.under_way:
            log.get().info("table rewritten", table=name, what=what, next="it is read again while the stream flows")
        else:
            log.get().warning(
                "table rewritten", table=name, what=what, meaning=f"its reading is {after.again.state}",
                next=f"bridge snapshot {name} --resume",
            )  # fmt: skip
