"""A table's columns as they were at a place in the log that the catalogue may be ahead of. Pure.

PostgreSQL gives a column a number that no other one of its table ever has: under another name it is the same column,
and what is dropped keeps its number. The number of each column that the log has is recorded (`Layout`). Where the
catalogue has it otherwise, that says also which transaction wrote so. Before the log comes to its commit, the column is
as it was recorded, unless a change shows otherwise: an insert has every column, an update all but TOASTed ones.

Source: PostgreSQL's pg_attribute (attnum, attisdropped, xmin). ALTER TABLE locks the table until its commit: in the log
that parts the changes from before and after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from bridge.pipeline.aligned import Slot, When, aligned
from bridge.source import catalog
from bridge.source.catalog import Relation
from bridge.source.wal2json import Cell, Record
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


class Change(NamedTuple):
    """What a change shows.

    cells: its columns' types by name; rows: the names of the new row's, and of the old one's, each in the order of
    their numbers where `ordered`; whole: whether those are all columns; keyed: whether the new row has none;
    primary: the columns of the primary key.
    """

    cells: Mapping[str, int]
    rows: tuple[tuple[str, ...], tuple[str, ...]]
    ordered: bool
    whole: bool
    keyed: bool
    primary: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Record | None, *, ordered: bool, full: bool = False) -> Change:
        """Of a record; nothing is shown where there is none.

        An old row lacks what was NULL, a new one what is TOASTed and was left alone, which cannot be NULL: together
        they have every column.

        Args:
            full: whether its old row is all of one, not only the key.
        """
        if record is None:
            return cls({}, ((), ()), False, False, True)
        cells: list[Cell] = [*record.identity, *record.columns]
        new, old = (tuple(cell.name for cell in cells) for cells in (record.columns, record.identity))
        return cls(
            {cell.name: cell.typeoid for cell in cells},
            (new, old if full or new else ()),
            ordered,
            record.action == "I" or (full and record.action == "U"),
            not new,
            tuple(column.name for column in record.pk),
        )


class There(NamedTuple):
    """A relation as it was: its columns by their names of then, and the numbers of these; whether the catalogue has
    other ones, that the log comes to without a change that shows it; the names of today's columns, as they were; and
    the key that the root had.

    crossed: the names that a row has in another order than their columns stand, by sets that have changed places; sure:
    the numbers of the columns that have been as the catalogue has them from then on.
    """

    relation: Relation
    numbers: dict[str, int]
    behind: bool
    names: dict[str, str]
    key: tuple[str, ...]
    crossed: tuple[frozenset[str], ...] = ()
    sure: frozenset[int] | None = None


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
    names = None
    if not change.keyed:
        names = _laid(relation, numbers, change, when, known, masked, varying, places)
    if names is None:
        names = _named(relation, numbers, change, when, known, varying)
    for column in relation.columns:
        met = column.name in change.cells or (
            column.name in shown and (column.name not in numbers or when(column.xid) is When.AFTER)
        )
        if met and column.number not in {*names, *numbers.values()} and column.name not in names.values():
            names[column.number] = column.name
    _guess(names, numbers, relation, change, when, known)
    return _made(relation, names, change, when, known, masked, varying)


def _laid(
    relation: Relation,
    numbers: Mapping[str, int],
    change: Change,
    when: Callable[[int], When],
    known: Mapping[str, Column],
    masked: Collection[str],
    varying: Mapping[int, bool],
    places: Mapping[int, int] | None,
) -> dict[int, str] | None:
    """The columns' names by the order of a row; None where that is not known of all of them, or does not fit."""
    recorded = {number: name for name, number in numbers.items()}
    today_by, slots = {column.number: column for column in relation.columns}, []
    every: list[catalog.Column | catalog.Dropped] = [*relation.columns, *relation.dropped]
    for column in every:
        number, where, today = column.number, when(column.xid), today_by.get(column.number)
        if today is None and where is When.AFTER:
            continue
        if places is not None and number not in places:
            return None
        name = recorded.get(number)
        last = known.get(name) if name is not None and name not in masked else None
        large = column.toast
        if last is not None and where is not When.AFTER:
            large = varying.get(last.oid, large)
        slots.append(
            Slot(
                number, name, last.oid if last is not None else None, today.name if today is not None else None,
                today.oid if today is not None else None, where, large, today is not None and today.toast,
                today is not None and today.virtual, today is not None and today.name in relation.key,
            )
        )  # fmt: skip
    slots.sort(key=lambda slot: places[slot.number] if places is not None else slot.number)
    return aligned(slots, {name: change.cells[name] for name in _row(change)}, whole=change.whole, key=change.primary)


def _row(change: Change) -> list[str]:
    """The names that a change shows, in the order of its rows."""
    shown = list(change.rows[0])
    for place, name in enumerate(change.rows[1]):
        if name not in shown:
            shown.insert(shown.index(change.rows[1][place - 1]) + 1 if place else 0, name)
    return shown


def _named(
    relation: Relation,
    numbers: Mapping[str, int],
    change: Change,
    when: Callable[[int], When],
    known: Mapping[str, Column],
    varying: Mapping[int, bool],
) -> dict[int, str]:
    """The names of the columns that were recorded, by their names alone."""
    today = {column.number: column for column in relation.columns}
    gone = {column.number: column for column in relation.dropped}
    names = dict[int, str]()
    for name, number in numbers.items():
        now = today.get(number)
        if now is not None and now.name == name:
            names[number] = name
        elif now is not None:
            names[number] = now.name if _renamed(now, name, numbers, change, when) else name
        elif number in gone:
            last = known.get(name)
            large = varying.get(last.oid, gone[number].toast) if last is not None else gone[number].toast
            if _stays(gone[number], name, today.values(), change, when, large=large):
                names[number] = name
    often = Counter(names.values())
    for number in [number for number, name in names.items() if often[name] > 1]:
        # Two columns cannot have one name: the catalogue's word counts.
        del names[number]
        if number in today:
            names[number] = today[number].name
    return names


def _renamed(
    now: catalog.Column, name: str, numbers: Mapping[str, int], change: Change, when: Callable[[int], When]
) -> bool:
    """Whether a column has today's name by then."""
    where = when(now.xid)
    if where is When.WITHIN:
        return name not in change.cells
    return where is When.AFTER or (now.name in change.cells and (name not in change.cells or now.name not in numbers))


def _stays(
    column: catalog.Dropped,
    name: str,
    today: Collection[catalog.Column],
    change: Change,
    when: Callable[[int], When],
    *,
    large: bool,
) -> bool:
    """Whether a column that is dropped by now was still there; `large`: its values could be TOASTed."""
    where, shown = when(column.xid), name in change.cells
    if where is When.WITHIN:
        taken = (other for other in today if other.name == name and when(other.xid) is not When.BEFORE)
        return (shown or change.keyed) and next(taken, None) is None
    return where is When.BEFORE and (shown or change.keyed or (large and not change.whole))


def _guess(
    names: dict[int, str],
    numbers: Mapping[str, int],
    relation: Relation,
    change: Change,
    when: Callable[[int], When],
    known: Mapping[str, Column],
) -> None:
    """Finds the numbers of columns that a change shows and neither the record nor the catalogue has by these names.

    Each came and went since, or had that name for a time. A row's columns stand in the order of their numbers; what is
    dropped and was never seen had some name, what is there has one that the log need not know yet.
    """
    today = {column.number: column for column in relation.columns}
    xids = {number: column.xid for number, column in today.items()} | {c.number: c.xid for c in relation.dropped}
    free = [number for number in sorted(xids) if when(xids[number]) is not When.AFTER]
    recorded = {number: name for name, number in numbers.items()}
    for name in _row(change):
        at = {other: number for number, other in names.items()}
        if name in at:
            continue
        low, high = 0, 1 << 16
        for row in change.rows if change.ordered else ():
            place = row.index(name) if name in row else -1
            low = max([low, *(at[other] for other in row[: max(place, 0)] if other in at)])
            high = min([high, *(at[other] for other in row[place:] if place >= 0 and other in at)])
        oid = change.cells[name]

        def unlikely(number: int, oid: int = oid) -> tuple[bool, bool, bool]:
            last = known.get(recorded.get(number, ""))
            of = today[number].oid if number in today else last.oid if last is not None else oid
            return of != oid, number in today, number in recorded

        fit = [n for n in free if low < n < high and names.get(n, "") not in change.cells]
        if fit:
            names[min(fit, key=unlikely)] = name


def _made(
    relation: Relation,
    names: Mapping[int, str],
    change: Change,
    when: Callable[[int], When],
    known: Mapping[str, Column],
    masked: Collection[str],
    varying: Mapping[int, bool],
) -> There:
    today = {column.number: column for column in relation.columns}
    gone = {column.number: column for column in relation.dropped}
    columns, behind = [], False
    for number in sorted(names):
        name, now = names[number], today.get(number)
        last, oid = known.get(name), change.cells.get(name)
        if now is not None:
            column = msgspec.structs.replace(now, name=name)
            if last is not None and name not in masked:
                large = varying.get(last.oid, True)
                if _typed(last, now, oid, when(now.xid)):
                    toast = now.toast if last.oid == now.oid else large
                    column = msgspec.structs.replace(column, oid=last.oid, type=last.type, base=last.base, toast=toast)
            behind = behind or column != now
        else:
            behind, type_oid = True, oid or (last.oid if last is not None else 0)
            if not type_oid:
                continue
            same = last is not None and last.oid == type_oid and name not in masked
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
        places: its numbers, by those of its root.
    """
    mine = {column.name: column for column in partition.columns}
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
