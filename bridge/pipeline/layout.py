"""A table's columns as they were at a place in the log that the catalogue may be ahead of. Pure.

PostgreSQL gives a column a number that no other one of its table ever has: under another name it is the same column,
and what is dropped keeps its number. The number of each column that the log has is recorded (`Layout`). Where the
catalogue has it otherwise, that says also which transaction wrote so. Before the log comes to its commit, the column is
as it was recorded, unless a change shows otherwise: an insert has every column, an update all but TOASTed ones.

Source: PostgreSQL's pg_attribute (attnum, attisdropped, xmin). ALTER TABLE locks the table until its commit: in the log
that parts the changes from before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from bridge.pipeline.aligned import When
from bridge.pipeline.numbered import Ahead, Change, by_name, by_order, guess
from bridge.source import catalog
from bridge.source.catalog import Relation
from bridge.source.wal2json import Record
from bridge.stream.state import Column, Layout, TableRecord, TableShape

# A record must fit into a message: a column takes some 80 bytes of it, its number alone 30.
MOST_SHAPES, MOST_COLUMNS = 50, 3000
MOST_LAYOUTS, MOST_NUMBERS = 8, 2000
_HALF = 1 << 31
# Xids below are PostgreSQL's own, for what has been there for ever.
_FIRST_XID = 3


class Passed(NamedTuple):
    """Which transactions are in the log before the end of the one at hand, an LSN.

    ends: where those end that the stream has brought, now or once; oldest: the slot's catalog_xmin, before which all
    had ended where the stream began; met: of those that the catalogue shows, an LSN before which they committed, where
    that is known.
    """

    end: int
    ends: Mapping[int, int]
    oldest: int | None
    met: Mapping[int, int]

    def when(self, xid: int) -> When:
        """Where the transaction `xid`, that the catalogue shows, is."""
        end = self.ends.get(xid)
        if end is not None:
            return When.WITHIN if end == self.end else When.AFTER if end < self.end else When.BEFORE
        old = xid < _FIRST_XID or (self.oldest is not None and 0 < (self.oldest - xid) & 0xFFFFFFFF < _HALF)
        past = xid in self.met and self.end >= self.met[xid]
        return When.AFTER if old or past else When.BEFORE


class There(NamedTuple):
    """A relation as it was: its columns by their names of then, and the numbers of these; whether the catalogue has
    other ones, that the log comes to without a change that shows it; the names of today's columns, as they were; and
    the key that the root had.

    crossed: the names that a row has in another order than their columns stand, by sets that have changed places; sure:
    the numbers of the columns that have been as the catalogue has them from then on; keyed: whether the key has been of
    the same columns from then on, whatever their names.
    """

    relation: Relation
    numbers: dict[str, int]
    behind: bool
    names: dict[str, str]
    key: tuple[str, ...]
    crossed: tuple[frozenset[str], ...] = ()
    sure: frozenset[int] | None = None
    keyed: bool = False


def chosen(kept: TableRecord | None, oid: int, at: str) -> Mapping[str, int] | None:
    """The numbers of the columns that the log has at a position, the last one's where that is empty; None where nothing
    is recorded of the table of this oid."""
    found = [layout for layout in kept.layouts if layout.oid == oid] if kept is not None else []
    past = [layout for layout in found if layout.since <= at] if at else found
    return (past[-1] if past else found[0]).columns if found else None


def added(layouts: list[Layout], oid: int, numbers: Mapping[str, int], at: str) -> list[Layout]:
    """Layouts, with the numbers that the log has from a position on; as many as a record has room for."""
    past = [layout for layout in layouts if layout.oid == oid and layout.since < at]
    found, room = [Layout(at, oid, dict(numbers))], MOST_NUMBERS - len(numbers)
    for layout in reversed(past[1 - MOST_LAYOUTS :]):
        room -= len(layout.columns)
        if room < 0:
            break
        found.append(layout)
    return found[::-1]


def columns_at(kept: TableRecord, at: str) -> dict[str, Column]:
    """Every column that is known of a table, by name, as it was last up to a position."""
    logged = [shape.columns for shape in kept.logged if not at or shape.since <= at]
    shapes = [*(shape.columns for shape in kept.history), kept.columns, *logged]
    return {column.name: column for columns in shapes for column in columns}


def xids(relation: Relation) -> set[int]:
    """The transactions that have altered its columns last."""
    return {column.xid for column in relation.columns} | {column.xid for column in relation.dropped}


def same(
    relation: Relation,
    numbers: Mapping[str, int],
    change: Change,
    known: Mapping[str, Column],
    masked: Collection[str],
) -> bool:
    """Whether the catalogue has the very columns that the log had so far, with their types; a change has no other."""
    today = {column.name: column.number for column in relation.columns}
    if not change.cells.keys() <= today.keys():
        return False
    types = [(column, known[column.name]) for column in relation.columns if column.name in known]
    alike = all((one.oid, one.type) == (last.oid, last.type) or one.name in masked for one, last in types)
    return today == numbers and alike


def there(
    relation: Relation,
    numbers: Mapping[str, int],
    change: Change,
    when: Callable[[int], When],
    known: Mapping[str, Column],
    shown: Collection[str] = (),
    masked: Collection[str] = (),
    varying: Mapping[int, bool] = MappingProxyType({}),
    places: Mapping[int, int] | None = None,
) -> There:
    """A relation of the catalogue as it was when a change was made.

    Args:
        relation: of partitions the root.
        numbers: of the columns that the log had so far. known: columns by name, as they were last.
        shown: of columns that have come since, those that the log is known to have. masked: columns without a type of
            their own. varying: whether the values of a type, by its oid, vary in length; without those that are gone.
        places: of the columns by their numbers, where the row has them; their numbers, where there are none.
    """
    ahead = Ahead(relation, numbers, change, when, known, masked, varying)
    names = by_order(ahead, places) if not change.keyed else None
    if names is None:
        names = by_name(ahead)
    for column in relation.columns:
        met = column.name in change.cells or (
            column.name in shown and (column.name not in numbers or when(column.xid) is When.AFTER)
        )
        if met and column.number not in {*names, *numbers.values()} and column.name not in names.values():
            names[column.number] = column.name
    guess(names, ahead)
    return _made(names, ahead)


def _made(names: Mapping[int, str], ahead: Ahead) -> There:
    relation, when, varying = ahead.relation, ahead.when, ahead.varying
    today, gone = ahead.today, ahead.gone
    columns, behind = [], False
    for number in sorted(names):
        name, now = names[number], today.get(number)
        last, oid = ahead.known.get(name), ahead.change.cells.get(name)
        if now is not None:
            column = msgspec.structs.replace(now, name=name)
            if last is not None and name not in ahead.masked:
                large = varying.get(last.oid, True)
                if _typed(last, now, oid, when(now.xid)):
                    toast = now.toast if last.oid == now.oid else large
                    column = msgspec.structs.replace(column, oid=last.oid, type=last.type, base=last.base, toast=toast)
            behind = behind or column != now
        else:
            behind, type_oid = True, oid or (last.oid if last is not None else 0)
            if not type_oid:
                continue
            same = last is not None and last.oid == type_oid and name not in ahead.masked
            # In the transaction that drops it, what a change does not show counts as dropped already.
            toast = when(gone[number].xid) is When.BEFORE and varying.get(type_oid, gone[number].toast)
            column = catalog.Column(
                name, type_oid, last.type if same and last is not None else "", toast=toast, virtual=False,
                base=last.base if same and last is not None else "", number=number, xid=gone[number].xid,
            )  # fmt: skip
        columns.append(column)
    once = {now.name: names[number] for number, now in today.items() if number in names}
    key = tuple(once.get(name, name) for name in relation.key)
    relation = msgspec.structs.replace(relation, columns=tuple(columns), key=key)
    return There(relation, {name: number for number, name in names.items()}, behind, once, key)


def sure(relation: Relation, when: Callable[[int], When]) -> frozenset[int]:
    """The numbers of the columns, dropped ones too, that nobody alters behind a place in the log."""
    altered = {column.number: column.xid for column in relation.columns} | {c.number: c.xid for c in relation.dropped}
    return frozenset(number for number, xid in altered.items() if when(xid) is When.AFTER)


def crossed(change: Change, numbers: Mapping[str, int], places: Mapping[int, int]) -> tuple[frozenset[str], ...]:
    """The names in a change's rows that are not those of the columns that they are taken for.

    Args:
        places: of columns by their numbers, where a row has them.
    """
    found = list[frozenset[str]]()
    for row in change.rows:
        at = [(places[numbers[name]], name) for name in row if numbers.get(name) in places]
        last = list(accumulate((place for place, _ in reversed(at)), min))[::-1]
        begin, highest = 0, 0
        for end, (place, _) in enumerate(at, 1):
            highest = max(highest, place)
            # What follows stands behind all of it.
            if end == len(at) or highest < last[end]:
                found += [frozenset(name for _, name in at[begin:end])] if end - begin > 1 else []
                begin = end
    return tuple(found)


def _typed(last: Column, now: catalog.Column, shown: int | None, where: When) -> bool:
    """Whether a column was of its last known type rather than of today's."""
    if (last.oid, last.type) == (now.oid, now.type):
        return False
    if shown is not None and shown != now.oid:
        return shown == last.oid
    if where is When.WITHIN:
        return shown is None
    return where is When.BEFORE and shown in (None, last.oid)


def of_partition(partition: Relation, found: There, places: Mapping[int, int]) -> Relation:
    """A partition as it was, where its root was so: its columns have the same names, and numbers of their own.

    Args:
        places: its numbers, by those of its root; none of one that is gone.
    """
    mine = {column.name: column for column in partition.columns if partition.oid}
    today = {name: now for now, name in found.names.items()}
    columns = []
    for column in found.relation.columns:
        now = mine.get(today.get(column.name, ""))
        if now is not None:
            toast = now.toast if now.oid == column.oid else column.toast
            column = msgspec.structs.replace(column, number=now.number, toast=toast, xid=now.xid)
        elif column.number in places:
            column = msgspec.structs.replace(column, number=places[column.number])
        else:
            # What is there no more, and nobody knows where it was, stands last.
            column = msgspec.structs.replace(column, number=(1 << 16) + column.number)
        columns.append(column)
    columns.sort(key=lambda column: column.number)
    key = tuple(found.names.get(name, name) for name in partition.key)
    return msgspec.structs.replace(partition, columns=tuple(columns), key=key)


def young(relation: Relation, kept: TableRecord | None, exclude: set[str], record: Record | None, at: str) -> set[str]:
    """The columns that the log does not have yet at a position, though the catalogue has them by now; for a table of
    whose columns no numbers are recorded.

    An update that is older than its table's ALTER lacks a new column just as one that leaves its TOASTed value alone
    does. Such a value was written after the column came, by a change that showed it. Where another column has gone, the
    new one may be that one under another name, with values from before: then it counts as there.
    """
    today, shown = (
        {c.name for c in relation.columns},
        {cell.name for cell in (*record.columns, *record.identity)} if record is not None else set(),
    )
    if kept is None:
        return today - shown if record is not None and record.action == "I" else set()
    known = {column.name for column in kept.columns}
    found = {name for name, first in kept.since.items() if at < first} & today
    if relation.oid and not known - today:
        found |= today - known - exclude - set(kept.hidden)
    return found - shown


def shortened(past: list[TableShape], there: set[str]) -> list[TableShape]:
    """The earlier shapes of a table, oldest first, fewer where they are many or wide: the oldest one then has only the
    columns that no later one and no one of `there` has, so that every name that ever was is still known."""
    while len(past) > MOST_SHAPES or (len(past) > 1 and sum(len(shape.columns) for shape in past) > MOST_COLUMNS):
        (one, other), rest = past[:2], past[2:]
        later = there.union(*({column.name for column in shape.columns} for shape in rest))
        found = {column.name: column for shape in (one, other) for column in shape.columns if column.name not in later}
        past = [TableShape(list(found.values()), other.key), *rest]
        if not found:
            past = rest
    return past
