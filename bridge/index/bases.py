"""What was there before an event: the row that unchanged columns are taken from, and how many documents it had.

A base is found in the bulks that are not answered yet, else in the index, else (for unchanged columns) the row is
rebuilt from the log. Never is a column that PostgreSQL did not send written as null.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import NamedTuple, Protocol

import msgspec

from bridge import log
from bridge.event import Event
from bridge.failpoints import reach
from bridge.index.bulk import Mark, Sender
from bridge.index.document import Builder, Put, Remove, count_of
from bridge.index.dropped import Dropped
from bridge.index.engine import Engine
from bridge.index.flight import Flight
from bridge.index.ground import Ground
from bridge.index.naming import UNREADABLE, Rejected, Row, address, outline, row
from bridge.index.unchanged import Reconstruction

_NEVER_OLDER = 1 << 62


class Base(msgspec.Struct):
    """A row to take unchanged columns from, the version that wrote it (0: unanswered, or rebuilt from the log), and how
    many documents it may have."""

    columns: Row
    version: int = 0
    count: int = 1


class Job(msgspec.Struct):
    """One event on its way.

    `needs` says that its document takes values from its base, `several` that its row may have several documents,
    `leaves` that it takes the document away with values that a later event may need, `looked` that the index was asked
    for its base, `keyless` that its table's key must be asked for; `problem` says why it can be no document, where that
    is so.
    """

    mark: Mark
    event: Event
    id: str
    old: str | None
    version: int
    builder: Builder | None
    needs: bool = False
    several: bool = False
    leaves: bool = False
    looked: bool = False
    keyless: bool = False
    problem: str = ""

    @property
    def base_id(self) -> str:
        """The document that holds the values of its unchanged columns."""
        return self.id if self.old is None else self.old

    @property
    def asks(self) -> bool:
        """Whether its base has to be found."""
        return self.needs or self.several or self.leaves


class Read(Protocol):
    """Reads a message's event, with its key and its table's builder; raises Rejected."""

    def __call__(self, data: bytes) -> Awaitable[tuple[Event, Builder]]: ...


class _Where(NamedTuple):
    engine: Engine
    physical: str
    flight: Flight
    sender: Sender
    ground: Ground


class Bases:
    """Finds the bases of jobs.

    Args:
        rejected: the documents among the dead letters, address → version that was refused.
        dropped: the columns of rows that have no document.
        again: where an (address, version) is noted whose version a delete has taken before its document is written.
    """

    def __init__(
        self,
        engine: Engine,
        physical: str,
        flight: Flight,
        sender: Sender,
        ground: Ground,
        read: Read,
        *,
        builders: Mapping[tuple[str, str], Builder],
        rejected: dict[str, int],
        dropped: Dropped,
        again: set[tuple[str, int]],
    ) -> None:
        self._where = _Where(engine, physical, flight, sender, ground)
        self._read = read
        self._builders = builders
        self._rejected = rejected
        self._dropped = dropped
        self._again = again
        self._needing: list[tuple[str, int]] = []
        self._recalled: dict[tuple[str, int], Row | None] = {}

    async def of(self, jobs: list[Job]) -> dict[str, Base]:
        """The bases of a run of jobs; those of jobs that follow another one of the same row are found later."""
        self._needing = [(job.base_id, job.mark.seq) for job in jobs if job.needs]
        self._recalled.clear()
        return await self.find(jobs) if any(job.asks for job in jobs) else {}

    def held(self, job: Job, address: str) -> Base | None:
        """The document as an unanswered bulk holds it; the newest where several do."""
        op = self._where.flight.held(address)
        if not isinstance(op, Put) or op.version < self._rejected.get(address, 0) or job.builder is None:
            return None
        return Base(job.builder.base(op.doc), 0, count_of(op.doc))

    def _without(self, job: Job) -> Base | None:
        """What is remembered of a row that has no document, where that is all that the job needs."""
        found = self._dropped.get(job.base_id)
        if found is None or job.builder is None or not (job.needs or job.leaves):
            return None
        at, columns = found
        return Base(columns, at) if all(n in columns for n in job.builder.kept(job.event.unchanged)) else None

    def unsure(self, job: Job, base: Base | None) -> bool:
        """Whether the base's count may be too low, because a later document at its address was refused."""
        refused = self._rejected.get(job.base_id, 0)
        return refused > 0 and refused >= (base.version if base is not None else 0)

    async def find(self, jobs: list[Job]) -> dict[str, Base]:
        """Where each job's base stands: in unanswered bulks, in the index, or in the log."""
        bases: dict[str, Base] = {}
        wanted: dict[str, Job] = {}
        touched: set[str] = set()
        for job in jobs:
            if job.asks and job.base_id not in touched:
                held = self.held(job, job.base_id) or self._without(job)
                if held is not None:
                    bases[job.base_id] = held
                else:
                    wanted[job.base_id] = job
            touched |= {job.id, job.base_id}
        if not wanted:
            return bases
        if any(base_id in self._where.flight for base_id in wanted):
            # A document that is on its way, but behind which something was rejected.
            await self._where.flight.settle()
        asked = list({doc_id for base_id, job in wanted.items() for doc_id in (base_id, job.id)})
        found = await self._where.engine.mget(self._where.physical, asked)
        lost: dict[str, Job] = {}
        for base_id, job in wanted.items():
            job.looked = True
            assert job.builder is not None
            for doc_id in {base_id, job.id} & found.keys():
                source = found[doc_id].source
                bases[doc_id] = Base(job.builder.base(source), found[doc_id].version, count_of(source))
            if not self._usable(job, bases):
                lost[base_id] = job
        if lost:
            await self._rebuild(lost, bases)
        return bases

    def _usable(self, job: Job, bases: dict[str, Base]) -> bool:
        """Whether the base found is the row just before the event, or the event is stale anyway."""
        if not job.needs or newer(job.id, bases) >= job.version:
            return True
        base = bases.get(job.base_id)
        if base is None or self._rejected.get(job.base_id, 0) > base.version:
            return False
        if base.version >= job.version:
            # Of a row that has taken this key since: the event comes once more, and its own document is not there.
            return False
        assert job.builder is not None
        return all(name in base.columns for name in job.builder.kept(job.event.unchanged))

    async def _rebuild(self, lost: dict[str, Job], bases: dict[str, Base]) -> None:
        """Rebuild rows from the log, but not those that were deleted later: an event that came again finds no base.

        A delete with the event's own version tells: it is refused where something newer was there. Where it is not,
        the version is taken by that delete, and the document that follows is written over the same version.
        """
        absent = [job for base_id, job in lost.items() if base_id not in bases and job.old is None]
        if absent:
            _, stale = await self._where.sender.send([Remove(job.id, job.version, again=True) for job in absent])
            reach("index.reserved")
            for doc_id in stale:
                bases[doc_id] = Base({}, _NEVER_OLDER)
                lost.pop(doc_id, None)
            self._again |= {(job.id, job.version) for job in absent if job.id not in stale}
        asked = [(base_id, job.mark.seq) for base_id, job in lost.items()]
        if any(wanted not in self._recalled for wanted in asked):
            await self._recall([*asked, *self._needing])
        for wanted in asked:
            before = bases.pop(wanted[0], None)
            found = self._recalled[wanted]
            if found is not None:
                bases[wanted[0]] = Base(found, count=before.count if before is not None else 1)

    async def _recall(self, wanted: list[tuple[str, int]]) -> None:
        """Rows from the log, for all events at once that may ask: each pass reads everything."""
        rebuilding = Reconstruction(wanted)
        while True:
            log.get().info("rows rebuilt from the log", count=len(wanted), upto=rebuilding.upto)
            async for messages in self._where.ground.history(rebuilding.upto):
                for message in messages:
                    try:
                        event, builder = await self._read(message.data)
                        rebuilding.see(message.seq, event, builder.naming)
                    except (Rejected, *UNREADABLE):
                        rebuilding.lose(message.seq, address_of(message.data, self._builders))
            if not rebuilding.again():
                break
        self._recalled |= {pair: rebuilding.found.get(pair) for pair in wanted}


def newer(doc_id: str, bases: Mapping[str, Base]) -> int:
    """The version that stands at an address; 0 where none is known."""
    return bases[doc_id].version if doc_id in bases else 0


def address_of(data: bytes, builders: Mapping[tuple[str, str], Builder]) -> str:
    """The address of the row that an unreadable event changes, as far as its opening tells; else empty."""
    found = outline(data)
    builder = builders.get((found.schema, found.table))
    if builder is None or bytes(found.key) == b"null":
        return ""
    try:
        return address(builder.naming.id(row(found.key)), "")
    except (Rejected, *UNREADABLE):
        return ""
