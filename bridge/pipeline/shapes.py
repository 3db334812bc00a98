"""The shapes of the published tables: as the state bucket has kept them, and as the catalogue has them today.

A shape is written before anything is claimed of its table, and what a difference asks for before the new shape is: who
is killed in between asks twice, and never not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import anyio
import msgspec
import psycopg

from bridge import structured
from bridge.pipeline import judging
from bridge.pipeline.belonging import Owner
from bridge.source import connection, export, shapes
from bridge.source.altering import Snapshot
from bridge.source.catalog import Filter
from bridge.source.rows import Plan
from bridge.source.shapes import Today
from bridge.source.slot import Created
from bridge.stream import subjects
from bridge.stream.state import Leaf, Shape, State, Turned

Root = tuple[str, str]
AT_ONCE = 32


class Look(NamedTuple):
    """today: what the catalogue said; known, met: the shapes that were kept and the partitions that were met before."""

    snapshot: Snapshot
    today: dict[Root, Today]
    known: dict[Root, Shape]
    met: dict[Root, set[tuple[int, str]]]
    published: Filter

    def vanished(self) -> list[Root]:
        """The published tables that are not there any more."""
        return [r for r, k in self.known.items() if not k.gone and r not in self.today and self.published.matches(*r)]

    def altered(self) -> list[Root]:
        """The tables that are other ones than those that are known, or not known."""
        return [root for root, one in self.today.items() if self._is_other(root, one)]

    def _is_other(self, root: Root, one: Today) -> bool:
        kept = self.known.get(root)
        there = {(part.oid, part.name) for part in one.parts}
        return kept is None or judging.shape(one, kept) != kept or not self.met.get(root, set()) <= there


class Shapes:
    """kept: what the state bucket has, by root table, once it is loaded; met: by root table, the oids and names of
    partitions that the stream has brought changes of, until the catalogue is looked at; on_turned: called where the log
    has something otherwise than what is kept; unseen: whether the stream has brought changes of a name that nobody has
    seen in the catalogue."""

    def __init__(self, sql: psycopg.AsyncConnection[Any], source: str, published: Filter, state: State) -> None:
        self._sql = sql
        self._source = source
        self._published = published
        self._state = state
        self.kept: dict[Root, Shape] = {}
        self.on_turned: Callable[[], None] | None = None
        self._keeping = anyio.Lock()
        self.met: dict[Root, set[tuple[int, str]]] = {}
        # Who claims a name, the oldest claim first; and by which root, and under which name, a table's oid is claimed.
        self._owners: dict[Root, dict[Root, Owner]] = {}
        self._by_oid: dict[int, dict[tuple[Root, Root], None]] = {}
        self.unseen = False

    async def load(self) -> None:
        """Read what is kept."""
        found = await self._state.values(f"shape.{subjects.token(self._source)}.", Shape)
        for key, kept in found.items():
            self._has(subjects.table_of(key), kept)

    async def keep(self, root: Root, shape: Shape) -> None:
        """Keep a table's shape."""
        if self.kept.get(root) != shape:
            await self._state.put(subjects.shape_key(self._source, *root), shape)
            self._has(root, shape)

    def _has(self, root: Root, shape: Shape) -> None:
        last = self.kept.get(root)
        now = dict(_claims(root, shape)) if not shape.gone else {}
        for name, leaf in _claims(root, last) if last is not None else ():
            if name not in now:
                self._owners.get(name, {}).pop(root, None)
                self._by_oid.get(leaf.oid, {}).pop((root, name), None)
        for name, leaf in now.items():
            self._owners.setdefault(name, {})[root] = Owner(root, leaf)
            self._by_oid.setdefault(leaf.oid, {})[root, name] = None
        self.kept[root] = shape

    def owner(self, name: Root) -> Owner | None:
        """What is kept of the table, or partition, of a name; None where nothing is, or it is known to be gone."""
        return next(iter(self._owners.get(name, {}).values()), None)

    def had_another_name(self, oid: int, name: Root) -> bool:
        """Whether a table is kept under another name."""
        return any(other != name for _, other in self._by_oid.get(oid, {}))

    def is_root(self, name: Root) -> bool:
        """Whether rows are known to have been those of the table of a name, and of no other one that it was detached
        from since."""
        leaves = self.kept[name].leaves if name in self.kept else []
        oldest = (next(iter(self._by_oid.get(leaf.oid, {})), None) for leaf in leaves)
        return any(claim is not None and claim[0] == name for claim in oldest)

    async def turned(self, plan: Plan, at: str, *, row: bool, shown: Collection[str] | None) -> None:
        """Note what the log is to have otherwise than a table's shape, before the event that a plan writes at a
        position; `row` and `shown` as `judging.turned` has them."""
        root = plan.relation.root
        async with self._keeping:
            kept = self.kept.get(root)
            found = judging.turned(kept, plan, at, row=row, shown=shown) if kept is not None else None
            if kept is None or found is None:
                return
            await self.keep(root, msgspec.structs.replace(kept, turned=found))
        if self.on_turned is not None:
            self.on_turned()

    async def judged(self, root: Root, shape: Shape, turned: Turned | None) -> None:
        """Keep a table's shape, with what has turned since it was judged by what had until then."""
        async with self._keeping:
            kept = self.kept[root]
            await self.keep(
                root, shape if kept.turned == turned else msgspec.structs.replace(shape, turned=kept.turned)
            )

    async def today(self) -> tuple[Snapshot, dict[Root, Today]]:
        """What the catalogue says of every published table, and which transactions are in that."""
        snapshot, found = await shapes.read(self._sql)
        return snapshot, {one.root: one for one in found if self._published.matches(*one.root)}

    async def look(self) -> Look:
        """The catalogue beside what was known before it was read: what the stream meets from now on is newer."""
        known, met, self.met = dict(self.kept), self.met, {}
        snapshot, today = await self.today()
        return Look(snapshot, today, known, met, self._published)

    async def of(self, root: Root) -> Today | None:
        """What the catalogue says of a table; None where there is none of that name."""
        _, found = await shapes.read(self._sql, root)
        return found[0] if found else None

    async def exported(self, created: Created) -> None:
        """Keep the shapes of a new slot's exported snapshot, from which the log begins: before anything is read.

        Raises:
            Unavailable: the snapshot is gone.
        """
        try:
            await export.adopt(self._sql, created.snapshot)
            _, found = await self.today()
        except psycopg.Error as error:
            raise connection.refusal(error, "looking at the tables of the slot's snapshot") from None
        finally:
            if not self._sql.closed:
                await self._sql.execute("ROLLBACK")
        # Every moment counts in which a table may be truncated before it is read.
        limit = anyio.Semaphore(AT_ONCE)

        async def keep(today: Today) -> None:
            async with limit:
                await self.keep(today.root, judging.shape(today))

        async with structured.group() as tasks:
            for one in found.values():
                tasks.start_soon(keep, one)


def _claims(root: Root, shape: Shape) -> Iterator[tuple[Root, Leaf]]:
    """The names that a table's rows are under. One of a partition that has a dot in it could be of two."""
    for leaf in shape.leaves:
        if leaf.oid == shape.oid:
            yield root, leaf
        elif leaf.name.count(".") == 1:
            schema, _, table = leaf.name.partition(".")
            yield (schema, table), leaf


def gone(kept: Shape) -> Shape:
    """The shape of a table that is not there any more."""
    return msgspec.structs.replace(kept, gone=True)
