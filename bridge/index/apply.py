"""Events of tables → an index, in order, in large bulks when there is much and at once when there is little.

The index reader and the rebuild share this. It promises: a document is in one unanswered bulk at a time; versions
decide what wins, so anything may come again; a column that PostgreSQL did not send keeps its value, never null; what
cannot be written becomes a dead letter; `reached` is called with a place only when everything up to it has been
answered. It knows nothing of NATS: what it needs from the stream comes through `Ground`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio.abc
import msgspec

from bridge import log
from bridge.event import Event
from bridge.failpoints import reach
from bridge.index.bases import Base, Bases, Job, address_of, newer
from bridge.index.bulk import Mark, Refusal, Sender, Tally
from bridge.index.circuit import Circuit
from bridge.index.document import Builder, Operation, Put, Remove, read, version
from bridge.index.dropped import Dropped
from bridge.index.engine import Engine
from bridge.index.flight import Flight
from bridge.index.ground import Ground, Incoming, Label, Letter
from bridge.index.home import IndexHome
from bridge.index.mapping import HIDDEN
from bridge.index.naming import NO_KEY, UNREADABLE, Rejected, Unknown, keyed, keyless, outline, parts, row

PAGE = 1_000
SLICE = 250
WRITTEN = ("insert", "update", "read")
ROWS = (*WRITTEN, "delete")


class Applier:
    """Applies messages in order.

    Args:
        builders: of each table, by (schema, table).
        group: runs the bulks.
        rejected: the dead letters so far, address → version that was refused.
        longest: how many documents a row of this generation may have at most.
    """

    def __init__(
        self,
        engine: Engine,
        physical: str,
        label: Label,
        builders: Mapping[tuple[str, str], Builder],
        ground: Ground,
        group: anyio.abc.TaskGroup,
        *,
        tally: Tally,
        rejected: dict[str, int],
        circuit: Circuit,
        longest: int = 1,
    ) -> None:
        self._engine = engine
        self._physical = physical
        self._label = label
        self._builders = builders
        self._ground = ground
        home = IndexHome(ground, builders)
        self._sender = Sender(engine, physical, home, circuit, name=label.named, tally=tally)
        self._flight = Flight(self._sender, group, refused=self._refused, reached=ground.reached)
        self._rejected = rejected
        self._gone: set[str] = set()
        self._longest = longest
        self._again: set[tuple[str, int]] = set()
        self._dropped = Dropped()
        self._keys: dict[tuple[str, str], Sequence[str]] = {}
        self._bases = Bases(
            engine, physical, self._flight, self._sender, ground, self._event,
            builders=builders, rejected=rejected, dropped=self._dropped, again=self._again,
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        """Whether everything taken has been answered."""
        return self._flight.idle

    @property
    def rejected(self) -> dict[str, int]:
        """The documents that were rejected and not deleted since, each with the last version that was."""
        return {address: at for address, at in self._rejected.items() if address not in self._gone}

    async def flush(self) -> None:
        """Send what has gathered, once a place for a bulk is free."""
        await self._flight.flush()

    async def settle(self) -> None:
        """Send what has gathered and wait until everything has been answered."""
        await self._flight.settle()

    async def take(self, messages: Sequence[Incoming]) -> None:
        """Apply a batch; returns when it is in bulks, most of them not answered yet."""
        for start in range(0, len(messages), SLICE):
            await self._take(messages[start : start + SLICE])

    async def _take(self, messages: Sequence[Incoming]) -> None:
        self._keys.clear()
        jobs = [self._read(message) for message in messages]
        for number, job in enumerate(jobs):
            if job.keyless:
                await self._learn_key(job.event)
                jobs[number] = self._read(messages[number])
        bases = await self._bases.of(jobs)
        for job in jobs:
            if not self._copied(job, bases):
                await self._apply(job, bases)
            self._flight.passed(job.mark)
            if self._flight.full:
                await self._flight.flush()

    def _copied(self, job: Job, bases: dict[str, Base]) -> bool:
        """Write the row of the commonest event: its document is the row, and nothing of before counts."""
        builder, event = job.builder, job.event
        if builder is None or job.old is not None or job.problem or self._longest > 1 or self._again:
            return False
        if event.unchanged or event.op not in WRITTEN or not builder.plain:
            return False
        if bases:
            bases.pop(job.id, None)
        self._dropped.forget(job.id, job.version)
        try:
            put = builder.copied(event, job.id, job.version)
        except UNREADABLE as error:
            self._reject(job, f"its row cannot be read ({type(error).__name__})")
        else:
            self._flight.add(put, job.mark)
        return True

    async def _learn_key(self, event: Event) -> None:
        """The key that a table has now, for events from when it had none; ServerRefused where it has none even now."""
        table = (event.schema, event.table)
        if table not in self._keys:
            self._keys[table] = await self._ground.key(*table)

    def _read(self, message: Incoming) -> Job:
        """A message as a job; whatever cannot be read in it is that one job's problem."""
        mark = Mark(message.seq, message.epoch, message.position)
        at = version(message.epoch, message.seq)
        try:
            event, builder = self._opened(message.data)
            if event.op not in ROWS:
                return Job(mark, event, "", None, at, builder)
            if keyless(event):
                return Job(mark, event, "", None, at, builder, keyless=True)
            doc_id, old = builder.naming.identity(event)
            several = self._longest > 1 and event.op != "insert"
            if not event.unchanged or event.op == "delete":
                return Job(mark, event, doc_id, old, at, builder, several=several)
            needs = builder.needs(event)
            leaves = not needs and builder.leaves(event)
            return Job(mark, event, doc_id, old, at, builder, needs, several, leaves)
        except Rejected as error:
            problem = str(error)
        except UNREADABLE as error:
            problem = f"it cannot be read ({type(error).__name__})"
        found = outline(message.data)
        unread = Event(op=found.op, source="", schema=found.schema, table=found.table, key=found.key)  # type: ignore[arg-type]
        return Job(mark, unread, address_of(message.data, self._builders), None, at, None, problem=problem)

    async def _event(self, data: bytes) -> tuple[Event, Builder]:
        """The event in a message, and its table's builder; a row's has its key, even where the table had none then.

        Raises:
            Rejected: it is none, or which row it changes cannot be told.
            ServerRefused: the table has no key now either.
        """
        event, builder = self._opened(data)
        if event.op in ROWS and keyless(event):
            await self._learn_key(event)
            event, builder = self._opened(data)
        return event, builder

    def _opened(self, data: bytes) -> tuple[Event, Builder]:
        """The event in a message, without a key where its table had none and today's is not known; and its builder."""
        event = read(data)
        table = (event.schema, event.table)
        builder = self._builders.get(table)
        if builder is None:
            raise Rejected("it is of a table that the index does not hold")
        if event.op in ROWS and table in self._keys and keyless(event):
            event = keyed(event, self._keys[table])
        return event, builder

    async def _apply(self, job: Job, bases: dict[str, Base]) -> None:
        event = job.event
        if job.problem:
            bases.pop(job.id, None)
            self._dropped.forget(job.id, job.version)
            self._reject(job, job.problem)
        elif event.op == "truncate":
            await self._flight.settle()
            await self._purge(job, job.version, job.version, event.partition)
        elif event.op == "snapshot":
            await self._marker(job)
        elif event.op == "schema":
            await self._ground.learn([])
        elif event.op == "delete":
            await self._delete(job, bases)
        elif event.op != "message":
            await self._write(job, bases)

    async def _delete(self, job: Job, bases: dict[str, Base]) -> None:
        assert job.builder is not None
        had = await self._had(job, bases)
        bases.pop(job.id, None)
        self._dropped.forget(job.id, job.version)
        self._left(job.id)
        self._add(job.builder.gone(job.id, job.version, had), job.mark)

    async def _write(self, job: Job, bases: dict[str, Base]) -> None:
        assert job.builder is not None
        had = await self._had(job, bases)
        base = None
        if job.needs:
            base = await self._base(job, bases)
            at = max(base.version if base is not None else 0, newer(job.id, bases))
            if at > job.version or (at == job.version and not job.several):
                if job.old is not None:
                    self._remove_later(job, had)
                return
        if job.needs and newer(job.id, bases) == job.version:
            base = bases[job.id]
        if job.leaves:
            base = self._last(job, bases)
        for doc_id in (job.id, job.old):
            if doc_id is not None:
                bases.pop(doc_id, None)
        try:
            ops = await job.builder.build(
                job.event, job.id, job.version, base.columns if base else None, 1 if job.old is not None else had
            )
            if len(ops) > self._longest:
                await self._ground.longest(len(ops))
                self._longest = len(ops)
        except Unknown as error:
            if self._ground.reads(f"{job.event.schema}.{job.event.table}", job.mark.seq):
                # Its row is read before the read's end, and has them.
                self._dropped.forget(job.id, job.version)
            else:
                self._reject(job, str(error))
                self._remember(job, base)
        except Rejected as error:
            self._reject(job, str(error))
            self._remember(job, base)
        except UNREADABLE as error:
            self._reject(job, f"its row cannot be read ({type(error).__name__})")
            self._dropped.forget(job.id, job.version)
        else:
            if isinstance(ops[0], Put):
                self._dropped.forget(job.id, job.version)
            else:
                self._remember(job, base)
            if (job.base_id, job.version) in self._again:
                self._again.discard((job.base_id, job.version))
                ops[0].again = job.old is None
            self._add(ops, job.mark)
        if job.old is not None:
            self._dropped.forget(job.old, job.version)
            self._remove_later(job, had)

    def _last(self, job: Job, bases: dict[str, Base]) -> Base | None:
        """The row just before an event that takes its document away, where that is at hand: the log is not asked."""
        base = self._bases.held(job, job.base_id) or bases.get(job.base_id)
        if base is None or base.version >= job.version or self._rejected.get(job.base_id, 0) > base.version > 0:
            return None
        return base

    def _remember(self, job: Job, base: Base | None) -> None:
        """Keep what a later update may leave out of a row that has no document now."""
        assert job.builder is not None
        before = base.columns if base is not None else (self._dropped.get(job.base_id) or (0, {}))[1]
        columns = row(job.event.after)
        for name in job.event.unchanged:
            if name in before:
                columns[name] = before[name]
        if all(name in columns for name in job.builder.kept(job.event.unchanged)):
            self._dropped.keep(job.id, job.version, job.builder.omissible(columns))
        else:
            self._dropped.forget(job.id, job.version)

    async def _base(self, job: Job, bases: dict[str, Base]) -> Base | None:
        base = self._bases.held(job, job.base_id) or bases.get(job.base_id)
        later = base is not None and base.version >= job.version > newer(job.id, bases)
        if base is None or later:
            found = await self._bases.find([job])
            base = found.get(job.base_id)
            bases |= found
        return base

    async def _had(self, job: Job, bases: dict[str, Base]) -> int:
        """How many documents the row may have had before the event, or more; an inserted row has had none."""
        if self._longest == 1 or job.event.op == "insert":
            return 1
        job.several = True
        base = self._bases.held(job, job.base_id) or bases.get(job.base_id)
        if base is None and not job.looked:
            base = await self._base(job, bases)
        return self._longest if self._bases.unsure(job, base) else base.count if base is not None else 1

    def _add(self, ops: list[Operation], mark: Mark) -> None:
        """A row's own document goes after its others: it is what tells that there are others to delete."""
        if isinstance(ops[0], Remove) and len(ops) > 1:
            self._flight.add_later(ops[0], mark, 0)
            ops = ops[1:]
        for op in ops:
            self._flight.add(op, mark)

    def _remove_later(self, job: Job, had: int) -> None:
        """Delete the row's old document, but only when the new one is there: until then it is what searches find."""
        assert job.builder is not None
        assert job.old is not None
        self._left(job.old)
        own, *others = job.builder.gone(job.old, job.version, had)
        for op in others:
            self._flight.add_later(op, job.mark, 0)
        self._flight.add_later(own, job.mark, 1 if others else 0)

    # Dead letters

    def _left(self, address: str) -> None:
        if address in self._rejected:
            self._gone.add(address)

    def _reject(self, job: Job, reason: str) -> None:
        if job.id:
            self._rejected[job.id] = job.version
            self._gone.discard(job.id)
        table = f"{job.event.schema}.{job.event.table}" if job.event.table else ""
        bury = partial(self._bury, job.mark, job.event.op, table, job.id, job.event.key, reason)
        self._flight.reject(reason, bury)

    async def _refused(self, refusal: Refusal, mark: Mark) -> None:
        op = refusal.op
        self._rejected[op.id] = op.version
        self._gone.discard(op.id)
        if isinstance(op, Put):
            hidden = row(row(op.doc)[HIDDEN])
            table, key = str(msgspec.json.decode(hidden["table"])), hidden["key"]
        else:
            table, key = "", NO_KEY
        await self._bury(mark, "index" if isinstance(op, Put) else "delete", table, op.id, key, refusal.reason)

    async def _bury(self, mark: Mark, op: str, table: str, address: str, key: msgspec.Raw, reason: str) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        doc_id, routing = parts(address)
        await self._ground.bury(
            Letter(
                index=self._label.index, generation=self._label.generation, table=table, op=op, id=doc_id,
                routing=routing, key=key, seq=mark.seq, epoch=mark.epoch, position=mark.position, reason=reason, at=at,
            )
        )  # fmt: skip
        reach("index.buried")

    # Whole tables

    async def _marker(self, job: Job) -> None:
        table = f"{job.event.schema}.{job.event.table}"
        if job.event.phase == "begin":
            await self._ground.begun(table, job.version)
            return
        begin = self._ground.beginning(table)
        if job.event.begin_seq:
            # Of a compacted log: a later begin may have taken the place of this end's own. One writer wrote both.
            begin = version(job.mark.epoch, job.event.begin_seq)
        if not begin or begin >= job.version:
            log.get().warning("no sweep", index=self._physical, seq=job.mark.seq, why="its begin marker was not seen")
            return
        await self._flight.settle()
        await self._purge(job, begin, begin, None)
        await self._ground.ended(table, job.version)

    async def _purge(self, job: Job, before: int, at: int, partition: str | None) -> None:
        """Delete every document of a table last written before a version, with version `at`; newer ones stay."""
        assert job.builder is not None
        self._dropped.clear()
        if partition is None and len(self._builders) == 1:
            self._gone.update(address for address, version in self._rejected.items() if version < before)
        await self._engine.refresh(self._physical)
        clauses: list[dict[str, Any]] = [{"range": {"_bridge.version": {"lt": before}}}]
        if partition is not None:
            clauses.append({"term": {"_bridge.partition": partition}})
        if len(self._builders) > 1:
            clauses.append({"term": {"_bridge.table": job.builder.table}})
        body: dict[str, Any] = {
            "size": PAGE,
            "_source": False,
            "track_total_hits": False,
            "sort": [{"_bridge.version": "asc"}],
            "query": {"bool": {"filter": clauses}},
        }
        removed, page = 0, set[str]()
        while hits := await self._engine.search(self._physical, body):
            left = [Remove(hit.address, at) for hit in hits if hit.address not in page]
            if not left:
                break
            refusals, _ = await self._sender.send(left)
            for refusal in refusals:
                await self._refused(refusal, job.mark)
            removed, page = removed + len(left), {hit.address for hit in hits}
            reach("index.sweeping")
            last = hits[-1].sort[0]
            if self._longest > 1:
                # The documents of one row share a version: those behind the page are found once these are gone.
                await self._engine.refresh(self._physical)
                last -= 1
            body["search_after"] = [last]
        if removed:
            log.get().info("documents removed", index=self._physical, count=removed)
