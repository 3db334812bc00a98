"""Changes of a table's columns or key as events of their own, each before the first event that has the others.

The catalogue may be ahead of the log, and events come from several hands: the stream, snapshots, readings beside the
stream. Each asks here before it publishes by a plan that it has not published by before. What the log has is kept in
the state bucket (`TableRecord.logged`), written before the event that says so with that event's position: behind the
log's end it is no news of the log, and forgotten at the start, before the log comes to that position with other events.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import msgspec

from bridge import event, log
from bridge.failpoints import reach
from bridge.pipeline.plans import Plans
from bridge.pipeline.recorded import TEXT
from bridge.pipeline.shapes import Shapes
from bridge.source.rows import Plan
from bridge.stream.state import Column, Shape, TableShape

MOST_SHAPES, MOST_COLUMNS = 20, 3000

Root = tuple[str, str]


class _Known(NamedTuple):
    """The plan that events were published by last, and the shape that the log had then."""

    plan: Plan
    shape: TableShape


class Announcing:
    """Which shape the log has of each table."""

    def __init__(self, plans: Plans, kept: Shapes, source: str) -> None:
        self._plans = plans
        self._kept = kept
        self._source = source
        self._shapes: dict[Root, list[TableShape]] = {}
        self._known: dict[tuple[str, str], _Known] = {}
        self._compared: dict[tuple[str, str, bool], tuple[Plan, Shape | None]] = {}

    async def begin(self, after: str) -> None:
        """Forget what is recorded of the log behind the position of its last event: it was never published.

        Raises:
            Unavailable: the state bucket does not answer.
        """
        for root, record in (await self._plans.recorded.all()).items():
            told = [shape for shape in record.logged if shape.since <= after] or record.logged[:1]
            if told != record.logged:
                await self._plans.recorded.logged(root, told)

    async def due(
        self,
        plan: Plan,
        position: str,
        lsn: bytes,
        closing: bytes,
        *,
        row: bool = True,
        shown: Collection[str] | None = None,
    ) -> bytes:
        """The event to publish at a position before one that is written by a plan; empty where the log has its shape.

        Args:
            lsn, closing: of the event that shows the change.
            row: whether it has the whole row; one of a delete shows nothing but the key.
            shown: the columns that the change has which the event is of, where it may have left out others.

        Raises:
            Unavailable: the state bucket or the catalogue does not answer.
        """
        relation = plan.relation
        name, root = (relation.schema, relation.table), relation.root
        known = self._known.get(name)
        if known is not None and known.plan is plan and known.shape is self._shapes[root][-1]:
            return b""
        await self._turned(plan, position, row=row, shown=shown)
        shapes = self._shapes.get(root) or await self._logged(plan)
        before = shapes[-1]
        now = await self._shape(plan, before)
        if not row:
            now = TableShape(before.columns, now.key)
        payload = b""
        if not _same(now, before):
            now = msgspec.structs.replace(now, since=position)
            shapes = _latest([*shapes, now])
            await self._plans.recorded.logged(root, shapes)
            reach("schema.recorded")
            payload = event.altered(
                self._source, *root, (now.columns, now.key), (before.columns, before.key), lsn, closing
            )
            log.get().info("columns changed", table=".".join(root), columns=len(now.columns), at=position)
        self._shapes[root] = shapes
        if row:
            self._known[name] = _Known(plan, shapes[-1])
        return payload

    async def _turned(self, plan: Plan, position: str, *, row: bool, shown: Collection[str] | None) -> None:
        """Have it noted, before the event is written, where its table was otherwise when its rows were last judged."""
        relation, name = plan.relation, (plan.relation.schema, plan.relation.table, row)
        before, kept = self._compared.get(name, (None, None))
        if before is not plan or kept is not self._kept.kept.get(relation.root):
            await self._kept.turned(plan, position, row=row, shown=shown)
            self._compared[name] = plan, self._kept.kept.get(relation.root)

    def forget(self, root: Root) -> None:
        """Have every plan of a table asked for again: the log's shape is another one than its changes had."""
        self._plans.forget(root)

    async def _logged(self, plan: Plan) -> list[TableShape]:
        """The shapes that the log has had of a plan's table, by what is recorded."""
        root = plan.relation.root
        record = await self._plans.recorded.of(root)
        if record is None or self._plans.recorded.is_new(root):
            # The log has nothing of it: what comes first is no change.
            first = await self._shape(plan, None)
            if record is not None and not _same(first, TableShape(record.columns, record.key)):
                await self._plans.recorded.logged(root, [first])
            return [first]
        return record.logged or [TableShape(record.columns, record.key)]

    async def _shape(self, plan: Plan, before: TableShape | None) -> TableShape:
        """The shape of what is written by a plan: the whole table's, with its key. A partition has its columns in an
        order of its own."""
        today = {column.name: column for column in plan.relation.columns}
        once = {column.name: column for column in before.columns} if before is not None else {}
        columns = []
        for name, field in plan.fields.items():
            if not field.shown:
                continue
            found, last = today.get(name), once.get(name)
            if name in plan.masks:
                columns.append(Column(name, "text", TEXT))
            elif found is not None and found.oid == field.oid and found.type:
                columns.append(Column(name, found.type, found.oid, found.base))
            elif last is not None and last.oid == field.oid:
                columns.append(last)
            else:
                columns.append(Column(name, await self._plans.type_name(field.oid), field.oid))
        if before is not None and plan.relation.is_partition:
            order = {column.name: place for place, column in enumerate(before.columns)}
            columns.sort(key=lambda column: order.get(column.name, len(order)))
            return TableShape(columns, before.key if set(before.key) == set(plan.root_key) else list(plan.root_key))
        return TableShape(columns, list(plan.key))


def _latest(shapes: list[TableShape]) -> list[TableShape]:
    """As many of the last shapes as a record has room for, two at least."""
    count, columns = 0, 0
    for shape in reversed(shapes[-MOST_SHAPES:]):
        columns += len(shape.columns)
        if count >= 2 and columns > MOST_COLUMNS:
            break
        count += 1
    return shapes[-count:]


def _same(one: TableShape, other: TableShape) -> bool:
    """Whether two shapes are the same for a reader: in whatever order the columns are."""
    columns = [{column.name: (column.type, column.oid) for column in shape.columns} for shape in (one, other)]
    return columns[0] == columns[1] and sorted(one.key) == sorted(other.key)
