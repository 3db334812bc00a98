"""From where on the stream holds every row of a table, for tables that no snapshot of ours has read.

A table first met at a start may have rows that are in no log: unless it is empty, nothing is claimed, and it is asked
for to be read while the stream flows. One that is made while the bridge streams, and is still as it was made, has all
its rows in the log. The claim stands in the state bucket as the table's snapshot, its shape beside it: what alters the
table from then on is seen by that (`rewrites`).
"""

from __future__ import annotations

import msgspec

from bridge import event, log
from bridge.config import join_name
from bridge.pipeline import judging
from bridge.pipeline.checkpoint import now
from bridge.pipeline.session import Session
from bridge.source.catalog import Relation, has_rows
from bridge.source.shapes import Today
from bridge.stream import compact, subjects
from bridge.stream.publisher import Publisher
from bridge.stream.server import Broker
from bridge.stream.state import Again, SnapshotStatus

ALTERED = "it was altered before it was first looked at"
BEFORE = "rows from before it was published are not in the log"
CUT = "the stream's end was cut off, and with it rows that had been read"
INTERRUPTED = "the initial snapshot was interrupted before all of its rows were read"
LEFT_OUT = "it was left out of [source] tables for a time"
REMEDY = "`bridge drop --stream --state` and start anew, or write every row again"


def readable(today: Today) -> bool:
    """Whether a table can be read while the stream flows: what holds its rows has a key."""
    return all(part.key for part in today.parts)


def remedy(name: str, *, key: bool) -> str:
    """What an operator does about a table that is not whole in the log."""
    return f"bridge snapshot {name}" if key else REMEDY


class Completeness:
    """Looks at every published table at a start (`survey`), and at the ones that appear later (`met`).

    Args:
        earlier: the oids of the tables that an earlier session of this process has seen; `survey` adds its own. What
            is not among them was made since then, so that the log has all its rows.
    """

    def __init__(self, session: Session, publisher: Publisher, earlier: set[int]) -> None:
        self._config = session.config
        self._sql = session.sql
        self._catalog = session.catalog
        self._plans = session.plans
        self._state = session.state
        self._shapes = session.shapes
        self._publisher = publisher
        self._there = earlier
        self._settled: set[tuple[str, str]] = set()

    async def survey(
        self, broker: Broker, *, fresh: bool = False, snapshot: bool = False, adopted: bool = False, gap: bool = False
    ) -> None:
        """Record every published table, and for each that has no snapshot from where on it is complete.

        Args:
            fresh: the slot is new, there is nothing unread.
            snapshot: every table that was there has just been read.
            adopted: the state bucket was lost, the stream was not.
            gap: an earlier log goes on, and what happened meanwhile is in none.
        """
        source = self._config.source.name
        found = await self._catalog.all()
        _, today = await self._shapes.today()
        old = {r.root for r in found if fresh or not self._there or r.oid in self._there}
        snapshots = set(await self._state.keys(f"snapshot.{subjects.token(source)}."))
        if fresh and not snapshot:
            snapshots.clear()  # of an attempt that did not end
        tables = set(await self._state.keys(f"table.{subjects.token(source)}."))
        await self._left_out(snapshots)
        await self._forget(snapshots, {relation.root for relation in found})
        for relation in found:
            root = relation.root
            if relation.is_partition or not self._catalog.filter.matches(*root):
                continue
            # A change of a partition does not tell what became of the whole; an excluded column must not be missed.
            anew = relation.kind == "p" or self._plans.leaving(root).named
            if anew or subjects.table_key(source, *root) not in tables:
                await self._plans.of(relation, whole=fresh)
            self._settled.add(root)
            shape, former = today.get(root), self._shapes.kept.get(root)
            if subjects.snapshot_key(source, *root) in snapshots:
                if shape is not None and root not in self._shapes.kept:
                    await self._shapes.keep(root, judging.shape(shape))
                await self._asked_for(relation)
                continue
            if shape is not None and not (fresh and root in self._shapes.kept):
                await self._shapes.keep(root, judging.shape(shape))
            begin = await self._marker(broker, root) if adopted else 0
            made = (snapshot or root not in old) and shape is not None and shape.made
            if self._shapes.had_another_name(relation.oid, root):
                made = False  # what was read of it stands under that name
            if former is not None and former.gone:
                # The log has rows of the table that had the name before.
                await self._incomplete(root, key=bool(relation.key), why=judging.AWAY)
            elif begin or made or not (gap or await self._has_rows(relation)):
                await self._done(root, begin or self._publisher.next_seq)
            else:
                await self._incomplete(root, key=bool(relation.key))
        self._there |= {relation.oid for relation in found}

    async def met(self, relation: Relation) -> None:
        """Take note of a table that the stream meets: one that was not there at the start, and is as it was made, has
        all its rows in it."""
        known = relation.oid in self._there
        self._there.add(relation.oid)
        root = relation.root
        if not self._catalog.filter.matches(*root):
            return
        if relation.is_partition:
            self._shapes.met.setdefault(root, set()).add((relation.oid, relation.name))
        if root in self._settled:
            return
        self._settled.add(root)
        if relation.is_partition:
            top = await self._catalog.relation(*root)
            known = known or top is None or top.oid in self._there
            relation = top or relation
        if await self._state.get(subjects.snapshot_key(self._config.source.name, *root), SnapshotStatus):
            return
        today = await self._shapes.of(root)
        if today is not None:
            await self._shapes.keep(root, judging.shape(today))
        if not known and (today is None or today.made):
            await self._done(root, self._publisher.next_seq)
        else:
            key = today is not None and readable(today)
            await self._incomplete(root, key=key, why=BEFORE if known else ALTERED)

    async def appeared(self, today: Today, *, rows: bool) -> None:
        """Take note of a table that is in the catalogue, and of which the stream has brought nothing.

        Args:
            rows: whether it had some after `today` was read.
        """
        root = today.root
        if root in self._settled:
            return  # met just now
        self._settled.add(root)
        known = today.oid in self._there
        self._there.add(today.oid)
        seq = self._publisher.next_seq
        await self._shapes.keep(root, judging.shape(today))
        if rows and (known or not today.made):
            await self._incomplete(root, key=readable(today))
        else:
            await self._done(root, seq)

    async def _marker(self, broker: Broker, root: tuple[str, str]) -> int:
        """The sequence of the begin marker with which the table's events open; 0 where the stream has none any more.

        A compacted log that holds a table whole does so from its first message on.
        """
        name = self._config.stream.name
        if self._config.stream.compact:
            return int(await compact.is_complete(broker, name, self._plans.subject(root)))
        stream = await broker.stream(name)
        if stream is None or stream.first_seq != 1:
            return 0
        first = await broker.message(name, next_by_subj=self._plans.subject(root), seq=1)
        return first.seq if first is not None and first.headers.get(event.HEADER_OP) == "snapshot" else 0

    async def _left_out(self, snapshots: set[str]) -> None:
        """A table that is not published now is not complete when it comes back."""
        for key in snapshots:
            root = subjects.table_of(key)
            kept = await self._state.get(key, SnapshotStatus) if not self._catalog.filter.matches(*root) else None
            if kept is not None and (kept[0].state == "done" or kept[0].complete_from):
                gone = msgspec.structs.replace(kept[0], state="incomplete", complete_from=0, error=LEFT_OUT)
                await self._state.put(key, gone, kept[1])

    async def _forget(self, snapshots: set[str], there: set[tuple[str, str]]) -> None:
        """A table that was dropped, or is a partition by now, is not asked for with all others any more; nor has it a
        picture to keep."""
        for key in sorted(snapshots):
            schema, table = subjects.table_of(key)
            if (schema, table) in there:
                continue
            found = await self._catalog.relation(schema, table)
            if found is None or found.is_partition:
                log.get().info("table gone", table=join_name(schema, table), meaning="its snapshot is forgotten")
                await self._state.delete(key)
                snapshots.discard(key)

    async def _done(self, root: tuple[str, str], seq: int) -> None:
        await self._put(root, SnapshotStatus(state="done", first_seq=seq, complete_from=seq, finished_at=now()))

    async def _incomplete(self, root: tuple[str, str], *, key: bool, why: str = BEFORE) -> None:
        """Claim nothing of a table; ask for it to be read where that can be done."""
        again, name = self._wanted(key=key), ".".join(root)
        if again is None:
            log.get().warning("table incomplete", table=name, meaning=why, next=remedy(name, key=key))
        else:
            log.get().info("table incomplete", table=name, meaning=why, next="it is read while the stream flows")
        await self._put(root, SnapshotStatus(state="incomplete", error=why, finished_at=now(), again=again))

    def _wanted(self, *, key: bool) -> Again | None:
        return Again(state="requested") if self._config.snapshot.mode != "never" and key else None

    async def _has_rows(self, relation: Relation) -> bool:
        return await has_rows(self._sql, relation.schema, relation.table, partitioned=relation.kind == "p")

    @property
    def heals(self) -> bool:
        """Whether a table whose rows were changed by DDL is read again by itself."""
        return self._config.snapshot.on_rewrite == "snapshot" and self._config.snapshot.mode != "never"

    async def _asked_for(self, relation: Relation) -> None:
        """A table that was left out for a time is read when it is back, and one whose rows the stream has lost again:
        its end was cut off by a power failure."""
        key = subjects.snapshot_key(self._config.source.name, *relation.root)
        found, tail = await self._state.get(key, SnapshotStatus), self._publisher.next_seq - 1
        if found is None:
            return
        status = before = found[0]
        if status.mode == "incremental" and status.last_seq > tail:
            status = msgspec.structs.replace(status, state="incomplete", complete_from=0, error=CUT)
        if status.again is not None and status.again.seq > tail:
            status = msgspec.structs.replace(status, again=Again(state=status.again.state, where=status.again.where))
        if status.state in ("waiting", "running"):
            # No initial snapshot is under way: it was interrupted, and this came in late.
            status = msgspec.structs.replace(status, state="incomplete", complete_from=0, error=INTERRUPTED)
        if status.state == "incomplete" and status.again is None and (self.heals or not status.complete_from):
            status = msgspec.structs.replace(status, again=self._wanted(key=bool(relation.key)))
        if status != before:
            await self._state.put(key, status, found[1])

    async def _put(self, root: tuple[str, str], status: SnapshotStatus) -> None:
        await self._state.put(subjects.snapshot_key(self._config.source.name, *root), status)
