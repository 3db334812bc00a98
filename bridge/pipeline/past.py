"""Tables as they were where the stream is, when the catalogue is ahead of it: asks what `layout` needs to know."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

import msgspec

from bridge.pipeline import belonging, layout
from bridge.pipeline.aligned import When
from bridge.pipeline.belonging import Now, Then
from bridge.pipeline.layout import Passed, There
from bridge.pipeline.numbered import Change
from bridge.pipeline.shapes import Shapes
from bridge.source import lsn
from bridge.source.catalog import Catalog, Relation
from bridge.source.rows import Plan, was_full
from bridge.source.wal2json import Record
from bridge.stream.state import Column, Layout, TableRecord

MOST_ENDS, MOST_KEPT = 10_000, 50

Name = tuple[str, str]
Told = Callable[[Name], Awaitable[TableRecord | None]]


class Past:
    """What the stream has passed, of transactions that may have altered tables.

    behind: the tables, or partitions, whose plan is of what they were, or has the key of then, each with the LSN up to
    which that can last;
    oids: of the tables whose columns count, by their names.
    """

    def __init__(self, catalog: Catalog, shapes: Shapes, sections: Collection[Name]) -> None:
        self.behind: dict[Name, int] = {}
        self.oids: dict[Name, int] = {}
        self._catalog = catalog
        self._shapes = shapes
        self._sections = frozenset(sections)
        self._ends: dict[int, int] = {}
        self._met: dict[int, int] = {}
        self._moving = 0

    def passes(self, xid: int, end: int) -> None:
        """The stream brings a transaction that may have altered tables; its commit record ends at `end`."""
        self._ends[xid] = end
        # What it does counts for its own changes in another way than for those behind it.
        self._moving = 2
        if len(self._ends) > MOST_ENDS:
            del self._ends[next(iter(self._ends))]

    def latest(self) -> dict[int, str]:
        """The last of those transactions, to be kept for a later session, which may not be sent them again."""
        found = list(self._ends.items())[-MOST_KEPT:]
        return {xid: lsn.show(end) for xid, end in found}

    def known(self, latest: Mapping[int, str]) -> None:
        """What an earlier session has kept."""
        self._ends = {xid: lsn.parse(end) for xid, end in latest.items()} | self._ends

    def meet(self, relations: Iterable[Relation], horizon: int) -> None:
        """The catalogue says this of tables; all of it was committed before the LSN. So is known what the stream does
        not name: a savepoint's transaction has an id of its own."""
        if len(self._met) > MOST_ENDS:
            self._met.clear()
        oids = set(self.oids.values())
        for relation in relations:
            if relation.oid in oids:
                self._note(layout.xids(relation), horizon)

    def over(self, end: int) -> list[Name]:
        """The tables that may be others than they were in the transaction that ends there, which comes next."""
        moving, self._moving = self._moving > 0, max(0, self._moving - 1)
        found = [name for name, horizon in self.behind.items() if moving or end >= horizon]
        for name in found:
            del self.behind[name]
        return found

    async def keyed(self, name: Name, found: Plan, today: Plan) -> None:
        """A change fits a plan of its own rather than today's. Where its table had another replica identity, no insert
        shows the end of that, and the catalogue may be beyond it already."""
        then, now = ((one.key, one.full, one.by_primary_key) for one in (found, today))
        if then != now and name not in self.behind:
            _, self.behind[name] = await self._catalog.bounds()

    async def belonged(self, name: Name, now: Now | None, record: Record | None, at: str, told: Told) -> Then | None:
        """What a name was of when a change was made at a position; None where that is what the catalogue says, or
        nothing is kept of it.

        Args:
            now: what the catalogue has under that name. told: gives what is recorded of a table.
        """
        self.behind.pop(name, None)
        owner = self._shapes.owner(name)
        if owner is None or not at:
            self._shapes.unseen |= now is None
            return None
        if not belonging.differs(owner, now.relation if now is not None else None):
            return await self._meanwhile(name, now, at) if owner.root == name else None
        is_other, former = now is None or now.relation.oid != owner.leaf.oid, now
        if is_other:
            both = await self._catalog.family_of(owner.leaf.oid)
            former = Now(*both) if both is not None else None
        when, horizon = await self._when(at, belonging.altered(now) | belonging.altered(former))
        beside, instead = {name, owner.root, *(one.relation.root for one in (now, former) if one is not None)}, None
        if now is not None and is_other:
            other, known = self._shapes.had_another_name(now.relation.oid, name), await self._known(owner.root, told)
            if not belonging.is_former(now.relation, record, known, when, had_another_name=other):
                sure = when(now.relation.named) is When.AFTER
                return None if sure else Then(now.relation.root, now, frozenset(beside))
            instead = now.relation if When.WITHIN in map(when, (now.relation.named, now.relation.made)) else None
        if now is not None:
            coming = [self._met[xid] for xid in belonging.altered(now) if when(xid) is not When.AFTER]
            self.behind[name] = min(coming, default=horizon)
        if former is None:
            return Then(owner.root, None, frozenset(beside), instead)
        is_root = self._shapes.is_root(former.relation.root)
        root = belonging.root_then(owner, former, self._shapes.kept[owner.root].oid, when, is_root=is_root)
        if root == (former.relation.schema, former.relation.table):
            root = name
        same = now is not None and (now.relation.oid, now.relation.root) == (former.relation.oid, root)
        return None if same else Then(root, former, frozenset(beside), instead)

    async def _meanwhile(self, name: Name, now: Now | None, at: str) -> Then | None:
        """A table that is what it was; where columns may be withheld it counts that it may have been a partition
        meanwhile."""
        if not self._sections or now is None:
            return None
        when, _ = await self._when(at, {now.relation.freed})
        return Then(name, now, self._sections) if when(now.relation.freed) is When.BEFORE else None

    async def _known(self, root: Name, told: Told) -> set[str]:
        """The columns that a table had when the log last told of it."""
        last = await told(root)
        if last is not None and last.logged:
            return {*(column.name for column in last.logged[-1].columns), *last.hidden}
        return {place.name for place in self._shapes.kept[root].columns}

    async def _when(self, at: str, xids: Collection[int]) -> tuple[belonging.Passed, int]:
        """Where a position is to transactions, those included that the catalogue has just shown, and an LSN before
        which these committed."""
        oldest, horizon = await self._catalog.bounds()
        self._note(xids, horizon)
        return self._passed(at, oldest).when, horizon

    def _note(self, xids: Collection[int], horizon: int) -> None:
        for xid in xids:
            self._met.setdefault(xid, horizon)

    def _passed(self, at: str, oldest: int | None) -> Passed:
        return Passed(int(at[9:25], 16) if at else 0, self._ends, oldest, self._met)

    async def root(self, relation: Relation, found: Relation | None, at: str) -> Relation | None:
        """The table whose columns have the names of a relation's: its root, or itself; None where there is none, or
        another one has its name since the change at a position.

        Args:
            found: the root, where it was read together with the relation. Two moments may have other names.
        """
        root = found or (await self._catalog.relation(*relation.root) if relation.is_partition else relation)
        if root is None or not root.oid:
            return None
        kept = self._shapes.kept.get(relation.root)
        if at and relation.is_partition and kept is not None and kept.oid != root.oid:
            when, _ = await self._when(at, {root.named})
            if when(root.named) is When.BEFORE:
                self.behind[relation.schema, relation.table] = self._met[root.named]
                return None
        self.oids[relation.root] = root.oid
        return root

    async def was(
        self,
        relation: Relation,
        root: Relation,
        kept: TableRecord | None,
        record: Record | None,
        at: str,
        masked: Collection[str],
    ) -> There | None:
        """A table, or partition, as it was when a change was made at a position; None where the numbers of its columns
        are not recorded, and the change does not show a row."""
        name = (relation.schema, relation.table)
        numbers = layout.chosen(kept, root.oid, at)
        # A record without any numbers is of an earlier version, and has its columns otherwise.
        old = kept is not None and not kept.layouts
        if numbers is None and (record is None or record.action not in ("I", "U") or (old and record.action == "U")):
            return None
        known, keys, shown = dict[str, Column](), list[list[str]](), set[str]()
        if kept is not None and numbers is not None:
            # Else what is recorded is of another table, that had the name.
            known, keys = layout.columns_at(kept, at), [kept.key, *(shape.key for shape in kept.history)]
            shown = {c.name for c in kept.columns if at >= kept.since.get(c.name, "")}
        numbers = numbers or {}
        full = record is not None and relation.identity == "f" and was_full(record, keys)
        change = Change.of(record, ordered=root is relation, full=full)
        oldest, horizon = await self._catalog.bounds()
        self.meet([root], horizon)
        passed = self._passed(at, oldest)
        ahead = any(passed.when(xid) is not When.AFTER for xid in layout.xids(root))
        places = _places(relation, root)
        crossed = layout.crossed(change, numbers, places)
        if layout.same(root, numbers, change, known, masked) and not ahead and not crossed:
            return There(relation, dict(numbers), False, {}, root.key)
        last = (column.oid for column in known.values())
        found = layout.there(
            root,
            numbers,
            change,
            passed.when,
            known,
            shown,
            masked,
            await self._catalog.varying([*last, *change.cells.values()]),
            places,
        )
        found = found._replace(
            crossed=layout.crossed(change, found.numbers, places),
            sure=layout.sure(root, passed.when),
            keyed=passed.when(relation.chosen) is When.AFTER,
        )
        if (found.behind or ahead or found.crossed) and record is not None:
            later = (self._met[xid] for xid in layout.xids(root) if passed.when(xid) is not When.AFTER)
            self.behind[name] = min([*later, self.behind.get(name, horizon)], default=horizon)
        mine = found.relation if root is relation else layout.of_partition(relation, found, places)
        typed = [
            c if c.type else msgspec.structs.replace(c, type=await self._catalog.type_name(c.oid)) for c in mine.columns
        ]
        return found._replace(relation=msgspec.structs.replace(mine, columns=tuple(typed)))


def _places(relation: Relation, root: Relation) -> dict[int, int]:
    """Where a row of a relation has the columns of its root, by their numbers there."""
    if not relation.oid:
        return {}
    mine = {column.name: column.number for column in relation.columns}
    places = {column.number: mine[column.name] for column in root.columns if column.name in mine}
    if root is relation:
        return places | {column.number: column.number for column in root.dropped}
    # What is dropped has no name any more, but who dropped it from the root did so from its partitions.
    there, here = (_dropped(one) for one in (root, relation))
    for xid, numbers in there.items():
        if len(numbers) == len(here.get(xid, [])):
            places |= zip(numbers, here[xid], strict=True)
    return places


def _dropped(relation: Relation) -> dict[int, list[int]]:
    """The numbers of its columns that each transaction has dropped."""
    found = dict[int, list[int]]()
    for column in relation.dropped:
        found.setdefault(column.xid, []).append(column.number)
    return found


def layouts(
    root: Relation | None, kept: TableRecord | None, was: There | None, young: set[str], at: str, *, whole: bool
) -> list[Layout]:
    """The layouts to record of a table that was looked at for a change at a position, or for none.

    Args:
        young: columns that the log does not have yet, where there was nothing to tell that by. whole: the table is read
            as it is now.
    """
    past = kept.layouts if kept is not None else []
    if root is None or (was is None and layout.chosen(kept, root.oid, "") is not None):
        return past
    if was is None and not whole and (not at or past):
        return past  # the first insert tells more
    numbers = was.numbers if was is not None else {c.name: c.number for c in root.columns if c.name not in young}
    if (was is not None and not at) or layout.chosen(kept, root.oid, at) == numbers:
        return past
    return layout.added(past, root.oid, numbers, at)
