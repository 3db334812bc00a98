"""Events of one table → one index, in order, in large bulks when there is much and at once when there is little.

The index reader and the rebuild share this. It promises: a document is in one unanswered bulk at a time; versions
decide what wins, so anything may come again; a column that PostgreSQL did not send keeps its value, never null; what
cannot be written becomes a dead letter; `reached` is called with a place only when everything up to it has been
answered. It knows nothing of NATS: what it needs from the stream comes through `Ground`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.abc
import msgspec

from bridge import log
from bridge.event import Event
from bridge.index.bulk import Bulk, Mark, Refusal, Sender, Tally
from bridge.index.document import (
    NO_KEY,
    Builder,
    Operation,
    Put,
    Rejected,
    Remove,
    Row,
    identity,
    keyed,
    keyless,
    outline,
    read,
    row,
    version,
)  # fmt: skip
from bridge.index.engine import Engine
from bridge.index.ground import Ground, Incoming, Label, Letter
from bridge.index.mapping import HIDDEN
from bridge.index.unchanged import Reconstruction

IN_FLIGHT = 2
PAGE = 1_000
SLICE = 250
ROWS = ("insert", "update", "read", "delete")
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class Base(msgspec.Struct):
    """A row to take unchanged columns from, and the version that wrote it (0: rebuilt from the log)."""

    columns: Row
    version: int = 0


class Job(msgspec.Struct):
    """One event on its way; `problem` says why it can be no document, where that is so."""

    mark: Mark
    event: Event
    id: str
    old: str | None
    version: int
    needs: bool
    problem: str = ""

    @property
    def base_id(self) -> str:
        """The document that holds the values of its unchanged columns."""
        return self.id if self.old is None else self.old


class Applier:
    """Applies messages in order. `group` runs the bulks; `rejected` are the dead letters so far, id → version."""

    def __init__(
        self,
        engine: Engine,
        alias: str,
        physical: str,
        label: Label,
        builder: Builder,
        ground: Ground,
        group: anyio.abc.TaskGroup,
        *,
        tally: Tally,
        rejected: dict[str, int],
    ) -> None:
        self._engine = engine
        self._alias = alias
        self._label = label
        self._builder = builder
        self._ground = ground
        self._group = group
        self._sender = Sender(engine, alias, self._learn, tally=tally, physical=physical)
        self._slots = anyio.Semaphore(IN_FLIGHT)
        self._flying: deque[Bulk] = deque()
        self._current = Bulk()
        self._rejected = rejected
        self._again: set[tuple[str, int]] = set()
        self._key: Sequence[str] | None = None
        self._needing: list[tuple[str, int]] = []
        self._recalled: dict[tuple[str, int], Row | None] = {}

    @property
    def idle(self) -> bool:
        """Whether everything taken has been answered."""
        return not self._flying and self._current.last is None

    async def take(self, messages: Sequence[Incoming]) -> None:
        """Apply a batch; returns when it is in bulks, most of them not answered yet."""
        for start in range(0, len(messages), SLICE):
            await self._take(messages[start : start + SLICE])

    async def _take(self, messages: Sequence[Incoming]) -> None:
        self._key = None
        jobs = [await self._read(message) for message in messages]
        self._needing = [(job.base_id, job.mark.seq) for job in jobs if job.needs]
        self._recalled.clear()
        bases = await self._bases(jobs)
        for job in jobs:
            await self._apply(job, bases)
            self._current.last = job.mark
            if self._current.full:
                await self.flush()

    async def _read(self, message: Incoming) -> Job:
        """A message as a job; whatever cannot be read in it is that one job's problem."""
        mark = Mark(message.seq, message.epoch, message.position)
        at = version(message.epoch, message.seq)
        event, problem = None, ""
        try:
            event = await self._event(message.data)
            if event.op not in ROWS:
                return Job(mark, event, "", None, at, False)
            doc_id, old = identity(event)
            needs = event.op != "delete" and bool(event.unchanged) and bool(self._builder.kept(event.unchanged))
            return Job(mark, event, doc_id, old, at, needs)
        except Rejected as error:
            problem = str(error)
        except _UNREADABLE as error:
            problem = f"it cannot be read ({type(error).__name__})"
        op, key, doc_id = outline(message.data)
        unread = Event(op=op, source="", schema="", table="", key=key)  # type: ignore[arg-type]
        return Job(mark, unread, doc_id, None, at, False, problem)

    async def _event(self, data: bytes) -> Event:
        """The event in a message; one of a row has its key, even where its table had none then.

        Raises:
            Rejected: it is none, or which row it changes cannot be told.
            ServerRefused: the table has no key now either.
        """
        event = read(data)
        if event.op in ROWS and keyless(event):
            if self._key is None:
                self._key = await self._ground.key()
            event = keyed(event, self._key)
        return event

    async def _apply(self, job: Job, bases: dict[str, Base]) -> None:
        event = job.event
        if job.problem:
            bases.pop(job.id, None)
            await self._reject(job, job.problem)
        elif event.op == "truncate":
            await self.settle()
            await self._purge(job.version, job.version, event.partition)
        elif event.op == "snapshot":
            await self._marker(job)
        elif event.op == "schema":
            await self._ground.learn([])
        elif event.op == "delete":
            bases.pop(job.id, None)
            self._add(Remove(job.id, job.version), job.mark)
        elif event.op != "message":
            await self._write(job, bases)

    async def _write(self, job: Job, bases: dict[str, Base]) -> None:
        base = None
        if job.needs:
            base = self._held(job.base_id) or bases.get(job.base_id)
            if base is None:
                found = await self._bases([job])
                base = found.get(job.base_id)
                bases |= found
            newer = max(base.version if base is not None else 0, self._newer(job.id, bases))
            if newer >= job.version:
                if job.old is not None:
                    self._remove_later(job.old, job)
                return
        for doc_id in (job.id, job.old):
            if doc_id is not None:
                bases.pop(doc_id, None)
        try:
            op = await self._builder.build(job.event, job.id, job.version, base.columns if base else None)
        except Rejected as error:
            await self._reject(job, str(error))
        except _UNREADABLE as error:
            await self._reject(job, f"its row cannot be read ({type(error).__name__})")
        else:
            if (job.base_id, job.version) in self._again:
                self._again.discard((job.base_id, job.version))
                op.again = job.old is None
            self._add(op, job.mark)
        if job.old is not None:
            self._remove_later(job.old, job)

    def _newer(self, doc_id: str, bases: dict[str, Base]) -> int:
        return bases[doc_id].version if doc_id in bases else 0

    async def _reject(self, job: Job, reason: str) -> None:
        self._sender.tally.refused += 1
        if job.id:
            self._rejected[job.id] = job.version
        await self._bury(job.mark, job.event.op, job.id, job.event.key, reason)

    def _add(self, op: Operation, mark: Mark) -> None:
        self._order(op.id)
        self._current.add(op, mark)

    def _remove_later(self, doc_id: str, job: Job) -> None:
        """Delete the row's old document, but only when the new one is there: until then it is what searches find."""
        self._order(doc_id)
        self._current.later[doc_id] = Remove(doc_id, job.version)

    def _order(self, doc_id: str) -> None:
        """A document is in one unanswered bulk at a time."""
        for bulk in self._flying:
            if doc_id in bulk and bulk not in self._current.after:
                self._current.after.append(bulk)

    # Bulks

    async def flush(self) -> None:
        """Send what has gathered, once a place for a bulk is free."""
        bulk = self._current
        if bulk.last is None:
            return
        if bulk.ops or bulk.later:
            await self._slots.acquire()
            self._current = Bulk()
            self._flying.append(bulk)
            self._group.start_soon(self._fly, bulk)
        else:
            self._current = Bulk()
            self._flying.append(bulk)
            bulk.done.set()
            await self._advance()

    async def settle(self) -> None:
        """Send what has gathered and wait until everything has been answered."""
        await self.flush()
        while self._flying:
            await self._flying[-1].done.wait()
            await self._advance()

    async def _fly(self, bulk: Bulk) -> None:
        try:
            for other in bulk.after:
                await other.done.wait()
            bulk.after.clear()
            refusals, _ = await self._sender.send(list(bulk.ops.values()))
            for refusal in refusals:
                await self._refused(refusal, bulk.marks[refusal.op.id])
            if bulk.later:
                await self._sender.send(list(bulk.later.values()))
        finally:
            self._slots.release()
        bulk.done.set()
        await self._advance()

    async def _refused(self, refusal: Refusal, mark: Mark) -> None:
        op = refusal.op
        self._rejected[op.id] = op.version
        key = row(row(op.doc)[HIDDEN])["key"] if isinstance(op, Put) else NO_KEY
        await self._bury(mark, "index" if isinstance(op, Put) else "delete", op.id, key, refusal.reason)

    async def _bury(self, mark: Mark, op: str, doc_id: str, key: msgspec.Raw, reason: str) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        label = self._label
        await self._ground.bury(
            Letter(
                index=label.index, generation=label.generation, table=label.table, op=op, id=doc_id, key=key,
                seq=mark.seq, epoch=mark.epoch, position=mark.position, reason=reason, at=at,
            )
        )  # fmt: skip

    async def _advance(self) -> None:
        mark = None
        while self._flying and self._flying[0].done.is_set():
            mark = self._flying.popleft().last
        if mark is not None:
            await self._ground.reached(mark)

    async def _learn(self, documents: list[Put]) -> bool:
        found = []
        for op in documents:
            with contextlib.suppress(*_UNREADABLE):
                found.append(msgspec.json.decode(op.doc))
        return await self._ground.learn(found)

    # Unchanged columns

    def _held(self, doc_id: str) -> Base | None:
        """The document as an unanswered bulk holds it; the newest where several do."""
        for bulk in (self._current, *reversed(self._flying)):
            op = bulk.ops.get(doc_id)
            if isinstance(op, Put):
                if op.version < self._rejected.get(doc_id, 0):
                    return None
                return Base(self._builder.base(op.doc), 0)
            if op is not None:
                return None
        return None

    async def _bases(self, jobs: list[Job]) -> dict[str, Base]:
        """Where each job's unchanged columns stand: in unanswered bulks, in the index, or in the log."""
        bases: dict[str, Base] = {}
        wanted: dict[str, Job] = {}
        touched: set[str] = set()
        for job in jobs:
            if job.needs and job.base_id not in touched:
                held = self._held(job.base_id)
                if held is not None:
                    bases[job.base_id] = held
                else:
                    wanted[job.base_id] = job
            touched |= {job.id, job.base_id}
        if not wanted:
            return bases
        if any(base_id in bulk for bulk in (self._current, *self._flying) for base_id in wanted):
            # A document that is on its way, but behind which something was rejected.
            await self.settle()
        asked = list({doc_id for base_id, job in wanted.items() for doc_id in (base_id, job.id)})
        found = await self._engine.mget(self._alias, asked)
        lost: dict[str, Job] = {}
        for base_id, job in wanted.items():
            for doc_id in {base_id, job.id} & found.keys():
                source = found[doc_id].source
                bases[doc_id] = Base(self._builder.base(source), found[doc_id].version)
            if not self._usable(job, bases):
                lost[base_id] = job
        if lost:
            await self._rebuild(lost, bases)
        return bases

    def _usable(self, job: Job, bases: dict[str, Base]) -> bool:
        """Whether the base found is the row just before the event, or the event is stale anyway."""
        if self._newer(job.id, bases) >= job.version:
            return True
        base = bases.get(job.base_id)
        if base is None or self._rejected.get(job.base_id, 0) > base.version:
            return False
        return all(name in base.columns for name in self._builder.kept(job.event.unchanged))

    async def _rebuild(self, lost: dict[str, Job], bases: dict[str, Base]) -> None:
        """Rebuild rows from the log, but not those that were deleted later: an event that came again finds no base.

        A delete with the event's own version tells: it is refused where something newer was there. Where it is not,
        the version is taken by that delete, and the document that follows is written over the same version.
        """
        absent = [job for base_id, job in lost.items() if base_id not in bases and job.old is None]
        if absent:
            _, stale = await self._sender.send([Remove(job.id, job.version, again=True) for job in absent])
            for doc_id in stale:
                bases[doc_id] = Base({}, 1 << 62)
                lost.pop(doc_id, None)
            self._again |= {(job.id, job.version) for job in absent if job.id not in stale}
        asked = [(base_id, job.mark.seq) for base_id, job in lost.items()]
        if any(wanted not in self._recalled for wanted in asked):
            await self._recall([*asked, *self._needing])
        for wanted in asked:
            bases.pop(wanted[0], None)
            found = self._recalled[wanted]
            if found is not None:
                bases[wanted[0]] = Base(found)

    async def _recall(self, wanted: list[tuple[str, int]]) -> None:
        """Rows from the log, for all events at once that may ask: each pass reads everything."""
        rebuilding = Reconstruction(wanted)
        while True:
            log.get().info("rows rebuilt from the log", count=len(wanted), upto=rebuilding.upto)
            async for messages in self._ground.history(rebuilding.upto):
                for message in messages:
                    try:
                        rebuilding.see(message.seq, await self._event(message.data))
                    except (Rejected, *_UNREADABLE):
                        rebuilding.lose(message.seq, outline(message.data)[2])
            if not rebuilding.again():
                break
        self._recalled |= {pair: rebuilding.found.get(pair) for pair in wanted}

    # Whole tables

    async def _marker(self, job: Job) -> None:
        if job.event.phase == "begin":
            await self._ground.begun(job.version)
            return
        begin = self._ground.beginning()
        if job.event.begin_seq:
            # Of a compacted log: a later begin may have taken the place of this end's own. One writer wrote both.
            begin = version(job.mark.epoch, job.event.begin_seq)
        if not begin or begin >= job.version:
            log.get().warning("no sweep", index=self._alias, seq=job.mark.seq, why="its begin marker was not seen")
            return
        await self.settle()
        await self._purge(begin, begin, None)

    async def _purge(self, before: int, at: int, partition: str | None) -> None:
        """Delete every document last written before a version, with version `at`; newer ones stay whatever comes."""
        await self._engine.refresh(self._alias)
        clauses: list[dict[str, Any]] = [{"range": {"_bridge.version": {"lt": before}}}]
        if partition is not None:
            clauses.append({"term": {"_bridge.partition": partition}})
        body: dict[str, Any] = {
            "size": PAGE,
            "_source": False,
            "track_total_hits": False,
            "sort": [{"_bridge.version": "asc"}],
            "query": {"bool": {"filter": clauses}},
        }
        removed = 0
        while hits := await self._engine.search(self._alias, body):
            await self._sender.send([Remove(hit.id, at) for hit in hits])
            removed += len(hits)
            body["search_after"] = hits[-1].sort
        log.get().info("documents removed", index=self._alias, count=removed, before=before)
