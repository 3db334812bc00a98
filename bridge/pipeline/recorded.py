"""What the state bucket has of each table's columns (`TableRecord`), and how it follows what plans and the log show."""

from __future__ import annotations

import anyio
import msgspec

from bridge.pipeline.layout import chosen, shortened
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
from bridge.source.rows import Plan
from bridge.stream import subjects
from bridge.stream.state import Column, Layout, State, TableRecord, TableShape

TEXT = 25

Root = tuple[str, str]
Kept = tuple[TableRecord, int]


class Recorded:
    """The records of tables, by the names of their roots.

    recording: to be held by who reads and writes one: of two who record the same, one would meet the other's note.
    """

    def __init__(self, state: State, source: str) -> None:
        self._state = state
        self._source = source
        self.recording = anyio.Lock()
        self._first: set[Root] = set()
        self._last: dict[Root, TableRecord] = {}
        # Under which names columns are recorded, by the oids of tables; and the tables of which a choice is made, by
        # the oids of them and of their partitions.
        self._laid: dict[int, Root] | None = None
        self._owners: dict[int, Root] | None = None

    async def read(self, root: Root) -> Kept | None:
        """A table's record, with its revision, as the bucket has it now."""
        return await self._state.get(self._key(root), TableRecord)

    async def of(self, root: Root) -> TableRecord | None:
        """What is recorded of a table."""
        if root not in self._last:
            found = await self.read(root)
            if found is None:
                return None
            self._last[root] = found[0]
        return self._last[root]

    async def all(self) -> dict[Root, TableRecord]:
        """What is recorded of every table, by its name."""
        found = await self._state.values(f"table.{subjects.token(self._source)}.", TableRecord)
        return {subjects.table_of(key): kept for key, kept in found.items()}

    def is_new(self, root: Root) -> bool:
        """Whether nothing was recorded of a table before `note` was called for it."""
        return root in self._first

    async def logged(self, root: Root, shapes: list[TableShape]) -> None:
        """Record the shapes that the log has had of a table."""
        async with self.recording:
            kept = await self.read(root)
            if kept is not None:
                await self._put(root, msgspec.structs.replace(kept[0], logged=shapes), kept[1])

    async def told(self, root: Relation, kept: TableRecord | None) -> TableRecord | None:
        """What is recorded of a table: of one that has got its name just now, under that of before."""
        if chosen(kept, root.oid, "") is not None:
            return kept
        if self._laid is None:
            self._laid = {layout.oid: name for name, one in (await self.all()).items() for layout in one.layouts}
        before = self._laid.get(root.oid)
        return (await self.of(before) if before is not None else None) or kept

    async def owner(self, relation: Relation) -> Root:
        """The table that a relation was of when a choice was made of that; its own root where none was."""
        if self._owners is None:
            self._owners = {int(oid): root for root, kept in (await self.all()).items() for oid in kept.places}
        return self._owners.get(relation.oid, relation.root)

    async def place(self, relation: Relation, leaving: Leaving) -> TableRecord:
        """Record where the columns are that must not be missed under another name; the record of the table then."""
        places = {c.name: c.number for c in relation.columns if c.name in leaving.guarded}
        last = self._last[relation.root]
        if leaving.named and self._owners is not None:
            self._owners[relation.oid] = relation.root
        if last.places.get(str(relation.oid), {} if not leaving.named else None) != places:
            kept = await self.read(relation.root)
            if kept is not None:
                now = msgspec.structs.replace(kept[0], places={**kept[0].places, str(relation.oid): places})
                await self._put(relation.root, now, kept[1])
        return self._last[relation.root]

    async def note(
        self,
        found: Plan,
        kept: Kept | None,
        exclude: list[str],
        young: set[str],
        shown: dict[str, str],
        layouts: list[Layout],
        at: str,
        *,
        placed: bool,
    ) -> None:
        """Record the columns that the log has, and the first change that showed a new one.

        Args:
            kept: the record so far. young: the columns that no change has shown yet; shown: those of the change at
            hand, with its position `at`. placed: whether the plan is of the table as it was then.
        """
        relation, fields = found.relation, found.fields
        last = kept[0] if kept is not None else TableRecord([], [])
        known = {column.name for column in last.columns}
        columns = [
            Column(c.name, "text", TEXT) if c.name in found.masks else Column(c.name, c.type, c.oid, c.base)
            for c in relation.columns
            if (c.name in fields and fields[c.name].shown) or (c.name in young and c.name in known)
        ]
        if placed:
            # What a later change has shown is there, though this one comes once more.
            names = {column.name for column in columns}
            columns += [c for c in last.columns if c.name not in names and at < last.since.get(c.name, "")]
        if kept is None:
            last = TableRecord(columns, list(relation.key), hidden=exclude, layouts=layouts)
            await self._put(relation.root, last, None)
            self._first.add(relation.root)
            return
        primary = list(relation.key)
        fresh = [column for column in columns if column.name not in known]
        if relation.is_partition:
            # What else it has tells nothing of the whole: of that, `columns` are read when the bridge starts.
            now_there = {column.name: column for column in columns}
            stay = last.columns if not placed else [now_there[c.name] for c in last.columns if c.name in now_there]
            columns, primary = [*stay, *(c for c in fresh if c.name in shown)], last.key
        since = {**last.since, **{c.name: shown[c.name] for c in fresh if c.name in shown}}
        now = msgspec.structs.replace(last, hidden=sorted({*last.hidden, *exclude}), layouts=layouts)
        if (last.columns, last.key) != (columns, primary):
            shape = TableShape(last.columns, last.key)
            there = {column.name for column in columns}
            since = {name: at for name, at in since.items() if name in there}
            past = shortened([*last.history, shape], there)
            now = msgspec.structs.replace(
                now, columns=columns, key=primary, history=past, since=since, logged=last.logged or [shape]
            )
        if now != last:
            await self._put(relation.root, now, kept[1])
        else:
            self._last[relation.root] = now

    async def _put(self, root: Root, record: TableRecord, revision: int | None) -> None:
        self._last[root] = record
        if self._laid is not None:
            self._laid |= {layout.oid: root for layout in record.layouts}
        await self._state.put(self._key(root), record, revision)

    def _key(self, root: Root) -> str:
        return subjects.table_key(self._source, *root)
