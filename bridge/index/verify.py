"""`bridge verify --index NAME`: whether an index holds what the log says, while its reader and writers go on.

    S: the reader has done everything up to here → rows as of S drawn from the log → each row's document asked for by
    id, and the index paged through for documents without a row → the log read on to its end T: whatever changed since
    S is left out → the rest is looked at once more

So what is found is wrong whatever the reader does next. A repair writes those keys' latest state (see `mending`), and
then looks at them again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec

from bridge import log
from bridge.config import Config
from bridge.errors import ServerRefused, Unavailable
from bridge.index.belonging import belongs
from bridge.index.document import Operation, Remove
from bridge.index.engine import EngineError, Hit
from bridge.index.expected import EXTRA, KINDS, REFUSED, expected, judge
from bridge.index.generation import FOLLOWED, members
from bridge.index.mapping import HIDDEN
from bridge.index.mending import Mending
from bridge.index.naming import UNREADABLE, Rejected, address, parts, row
from bridge.index.picture import Note, Standing
from bridge.index.place import Place, site
from bridge.index.rereading import Rereading, caught_up, in_use, looking, rereading
from bridge.stream.server import Servers
from bridge.waiting import Backoff, forever

ROWS = 500
ROWS_BYTES = 4 << 20
PAGE = 1_000
WINDOW = 10_000
HELD = "the index has a version beyond the log's end, from a write by hand: try again after the next event"


class Finding(msgspec.Struct, frozen=True):
    """A document that is not as it should be: `kind` is one of KINDS, `key` the row's where the log has it."""

    kind: str
    id: str
    routing: str = ""
    key: msgspec.Raw | None = None


class Report(msgspec.Struct, kw_only=True):
    """What a comparison found in one generation.

    Args:
        seq: the comparison holds for this sequence of the log. end: up to here the log was read.
        behind: how many events behind `seq` there were. reader: whether the generation had been caught up.
        rows: how many the log has. documents: how many the index has.
        counts: how many documents there are of each kind, now. found: before a repair.
        changed: how many keys looked wrong and were changed meanwhile, so that nothing can be said of them.
        repaired: how many rows a repair has written. mended: how many of `found` are as the log says since.
        refused: why the engine refused what a repair wrote, and how often. lost: how many events do not tell their row.
    """

    index: str
    generation: int
    physical: str
    state: str
    seq: int
    end: int = 0
    behind: int = 0
    reader: bool = True
    rows: int = 0
    documents: int = 0
    counts: dict[str, int] = {}
    found: dict[str, int] = {}
    changed: int = 0
    repaired: int = 0
    mended: int = 0
    refused: dict[str, int] = {}
    lost: int = 0
    findings: list[Finding] = []

    @property
    def same(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return not any(self.counts.values())


async def verify(config: Config, name: str, servers: Servers, *, repair: bool = False, limit: int = 20) -> list[Report]:
    """Compare the generations of an index that are in use with the log.

    Args:
        repair: write what differs anew.
        limit: how many findings of each kind are listed.

    Raises:
        ConfigError: there is no such index. Gap: the stream does not reach back to a complete picture.
        IndexMismatch: a generation is gone or not of this stream. Overtaken: retention is faster than the comparison.
        ServerRefused: there is no generation in use; credentials, privileges, no room for a temporary file.
    """
    where = site(config, name)

    async def attempt(backoff: Backoff) -> list[Report]:
        async with looking(where, servers, "verify") as place:
            backoff.over()
            numbers = [generation.number for generation in (await place.record()).having(*FOLLOWED)]
            if not numbers:
                raise ServerRefused(f"the index {name} has not been built yet", f"build it: bridge index {name}")
            return [await _verified(place, number, repair=repair, limit=limit) for number in numbers]

    return await forever(f"verify {name}", attempt)


async def _verified(place: Place, number: int, *, repair: bool, limit: int) -> Report:
    """One generation; Unavailable where a rebuild has taken its place meanwhile."""
    reader = await caught_up(place, number)
    generation = (await place.record()).get(number)
    if generation is None:
        raise Unavailable("a rebuild has replaced a generation", "looking at the new one")
    stream = place.site.config.stream.name
    try:
        await belongs(place.engine, place.site.name, generation.physical, stream, generation.stream_created)
        async with rereading(place, generation) as reading:
            compared = _Comparison(place, reading, await place.refused(number))
            return await compared.run(Report(
                index=place.site.name, generation=number, physical=generation.physical, state=generation.state,
                seq=generation.seq, reader=reader,
            ), repair=repair, limit=limit)  # fmt: skip
    except EngineError:
        await in_use(place, generation)
        raise


class _Comparison:
    """The steps, in order."""

    def __init__(self, place: Place, reading: Rereading, letters: dict[str, int]) -> None:
        self._engine = place.engine
        self._generation = reading.feed.generation
        self._reading = reading
        self._picture = reading.picture
        self._letters = letters
        self._namings = {name: member.naming for name, member in members(self._generation.shapes).items()}
        self._mending = Mending(place, reading)

    async def run(self, report: Report, *, repair: bool, limit: int) -> Report:
        """Fill in the report."""
        await self._reading.draw(report.seq)
        report.rows, report.lost = self._picture.count(), self._picture.lost
        await self._engine.refresh(self._generation.physical)
        report.documents = await self._engine.count(self._generation.physical)
        before = self._picture.events
        await self._rows()
        await self._rest()
        report.changed = await self._settle()
        report.found = report.counts = self._picture.noted()
        if repair and any(kind != REFUSED for kind in report.counts):
            await self._repair(report)
            report.counts = self._picture.noted()
        await self._reading.still_stands()
        report.end, report.behind = self._reading.end, self._picture.events - before
        report.findings = list(self._listed(limit))
        return report

    async def _rows(self) -> None:
        """Note every row whose document is not as it should be."""
        for chunk in self._picture.chunks(ROWS, ROWS_BYTES):
            self._picture.note(await self._judged(chunk))

    async def _judged(self, rows: Iterable[Standing]) -> list[Note]:
        made, notes = list[tuple[Standing, Operation]](), list[Note]()
        for standing in rows:
            try:
                ops = await expected(self._reading.builders, standing, standing.version)
            except Rejected:
                notes.append(Note(standing.id, standing.id, REFUSED))
                continue
            made += [(standing, op) for op in ops]
            self._picture.expect(op.id for op in ops[1:])
        found = await self._engine.mget(self._generation.physical, [op.id for _, op in made]) if made else {}
        for standing, op in made:
            kind = judge(op, found.get(op.id))
            refused = max(self._letters.get(op.id, 0), self._letters.get(standing.id, 0))
            if kind and refused >= standing.version:
                kind = REFUSED
            if kind:
                notes.append(Note(op.id, standing.id, kind))
        return notes

    async def _rest(self) -> None:
        """Note every document that has no row."""
        async for hits in self._pages():
            self._picture.note([self._left(hit) for hit in hits if self._picture.lacks(hit.address)])

    def _left(self, hit: Hit) -> Note:
        """What a document without row is; one of several that a row had stays where its newest event was refused."""
        owner = self._owner(hit)
        return Note(hit.address, owner, REFUSED if self._picture.noted_as(owner) == REFUSED else EXTRA)

    def _owner(self, hit: Hit) -> str:
        """The row that a document says it is of: one of several, say, that a row had once."""
        with contextlib.suppress(*UNREADABLE, Rejected, KeyError):
            hidden = row(row(hit.source)[HIDDEN])
            name = msgspec.json.decode(hidden["table"], type=str)
            return address(self._namings[name].id(row(hidden["key"])), hit.routing)
        return hit.address

    async def _pages(self) -> AsyncIterator[list[Hit]]:
        """All documents: by their version, which no later write puts before the page; then those that have none."""
        exists = {"exists": {"field": "_bridge.version"}}
        body: dict[str, Any] = {
            "size": PAGE,
            "_source": ["_bridge.table", "_bridge.key"],
            "track_total_hits": False,
            "sort": [{"_bridge.version": "asc"}],
            "query": exists,
        }
        physical = self._generation.physical
        while hits := await self._engine.search(physical, body):
            yield hits
            last = hits[-1].sort[0]
            full = len(hits) == body["size"]
            if hits[0].sort[0] < last:
                # Others of the last one's version may be on the next page.
                body |= {"search_after": [last - 1], "size": PAGE}
            elif full and body["size"] < WINDOW:
                body["size"] = WINDOW
            else:
                if full:
                    log.get().warning("not all were looked at", index=physical, why=f"{WINDOW} of version {last}")
                body |= {"search_after": [last], "size": PAGE}
        rest = {"size": WINDOW, "_source": False, "query": {"bool": {"must_not": [exists]}}}
        hits = await self._engine.search(physical, rest)
        if len(hits) == WINDOW:
            log.get().warning("not all were looked at", index=physical, why=f"{WINDOW} without a version")
        yield hits

    async def _settle(self) -> int:
        """Leave out what was changed meanwhile, look once more at the rest; how many were left out."""
        before = sum(self._picture.noted().values())
        await self._reading.advance()
        changed = before - sum(self._picture.noted().values())
        for page in self._picture.notes(ROWS):
            await self._look_again([note for note in page if note.note != REFUSED])
        before = sum(self._picture.noted().values())
        await self._reading.advance()
        return changed + before - sum(self._picture.noted().values())

    async def _look_again(self, notes: list[Note]) -> None:
        if not notes:
            return
        rows = [self._picture.get(owner) for owner in dict.fromkeys(note.owner for note in notes)]
        again = {note.id: note for note in await self._judged(row for row in rows if row is not None)}
        gone = [note for note in notes if self._picture.lacks(note.id)]
        found = await self._engine.mget(self._generation.physical, [note.id for note in gone]) if gone else {}
        again |= {note.id: note for note in gone if judge(Remove(note.id, 0), found.get(note.id))}
        self._picture.forget(note.id for note in notes if note.id not in again)
        self._picture.note(again.values())

    async def _repair(self, report: Report) -> None:
        """Write what was found anew."""
        refused, newer = Counter[str](), set[str]()
        for page in self._picture.notes(ROWS):
            asked = {n.id if self._picture.lacks(n.id) else n.owner: n for n in page if n.note != REFUSED}
            outcome = await self._mending.write(asked)
            report.repaired += len(outcome.written) + len(outcome.deleted)
            refused.update(outcome.refused.values())
            newer |= outcome.newer
        before = sum(self._picture.noted().values())
        changed = await self._settle()
        report.mended = before - sum(self._picture.noted().values()) - changed
        report.changed += changed
        held = sum(bool(self._picture.noted_as(address)) for address in newer)
        if held:
            refused[HELD] = held
        report.refused = dict(refused)

    def _listed(self, limit: int) -> Iterable[Finding]:
        listed = Counter[str]()
        for page in self._picture.notes(PAGE):
            for note in page:
                if listed[note.note] < limit:
                    standing = self._picture.get(note.owner)
                    key = msgspec.Raw(standing.key) if standing is not None else None
                    yield Finding(note.note, *parts(note.id), key)
                listed[note.note] += 1
            if all(listed[kind] >= limit for kind in KINDS):
                return
