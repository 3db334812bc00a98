"""Which columns, by their numbers, a change's names are of, where the catalogue is ahead of the log. Pure.

By the order of the row where that is known of all columns (`aligned`); else by the names alone, which is less sure
where columns exchanged them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from bridge.pipeline.aligned import Slot, When, aligned
from bridge.source import catalog
from bridge.source.catalog import Relation
from bridge.source.wal2json import Cell, Record
from bridge.stream.state import Column

# PostgreSQL stores no value apart that takes no more bytes than a pointer to it would, 24 (heaptoast.c): at most these
# digits, in groups of four.
_NUMERIC, _MOST_DIGITS = 1700, 24
_DIGITS = re.compile(r"numeric\((\d+),\d+\)")


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


class Ahead(NamedTuple):
    """A change, and what is known of its table.

    relation: as the catalogue has it, of partitions the root; numbers: of the columns that the log had so far; when:
    where the change is to a transaction; known: columns by name, as they were last; masked: columns without a type of
    their own; varying: whether the values of a type, by its oid, vary in length, without the types that are gone.
    """

    relation: Relation
    numbers: Mapping[str, int]
    change: Change
    when: Callable[[int], When]
    known: Mapping[str, Column]
    masked: Collection[str]
    varying: Mapping[int, bool]

    @property
    def today(self) -> dict[int, catalog.Column]:
        """The columns of today, by their numbers."""
        return {column.number: column for column in self.relation.columns}

    @property
    def gone(self) -> dict[int, catalog.Dropped]:
        """The columns that are dropped by now, by their numbers."""
        return {column.number: column for column in self.relation.dropped}


def by_order(ahead: Ahead, places: Mapping[int, int] | None) -> dict[int, str] | None:
    """The columns' names by the order of a row; None where that is not known of all of them, or does not fit.

    Args:
        places: of the columns by their numbers, where the row has them; their numbers, where there are none.
    """
    change, today = ahead.change, ahead.today
    recorded = {number: name for name, number in ahead.numbers.items()}
    slots = []
    every: list[catalog.Column | catalog.Dropped] = [*ahead.relation.columns, *ahead.relation.dropped]
    for column in every:
        number, where, now = column.number, ahead.when(column.xid), today.get(column.number)
        if now is None and where is When.AFTER:
            continue
        if places is not None and number not in places:
            return None
        name = recorded.get(number)
        last = ahead.known.get(name) if name is not None and name not in ahead.masked else None
        large = _large(column)
        if last is not None and where is not When.AFTER:
            large = _was_large(last, ahead, otherwise=large)
        slot = Slot(number, name, last.oid if last is not None else None, None, None, where, large)
        if now is not None:
            key = now.name in ahead.relation.key
            slot = slot._replace(today=now.name, today_oid=now.oid, grown=_large(now), virtual=now.virtual, key=key)
        slots.append(slot)
    slots.sort(key=lambda slot: places[slot.number] if places is not None else slot.number)
    row = {name: change.cells[name] for name in _row(change)}
    return aligned(slots, row, whole=change.whole, key=change.primary, first=not ahead.numbers)


def by_name(ahead: Ahead) -> dict[int, str]:
    """The names of the columns that were recorded, by their names alone."""
    today, gone = ahead.today, ahead.gone
    names = dict[int, str]()
    for name, number in ahead.numbers.items():
        now = today.get(number)
        if now is not None and now.name == name:
            names[number] = name
        elif now is not None:
            names[number] = now.name if _renamed(now, name, ahead) else name
        elif number in gone and _stays(gone[number], name, ahead):
            names[number] = name
    often = Counter(names.values())
    for number in [number for number, name in names.items() if often[name] > 1]:
        # Two columns cannot have one name: the catalogue's word counts.
        del names[number]
        if number in today:
            names[number] = today[number].name
    return names


def guess(names: dict[int, str], ahead: Ahead) -> None:
    """Finds the numbers of columns that a change shows and neither the record nor the catalogue has by these names.

    Each came and went since, or had that name for a time. A row's columns stand in the order of their numbers; what is
    dropped and was never seen had some name, what is there has one that the log need not know yet.
    """
    change, today = ahead.change, ahead.today
    xids = {number: column.xid for number, column in (today | ahead.gone).items()}
    free = [number for number in sorted(xids) if ahead.when(xids[number]) is not When.AFTER]
    recorded = {number: name for name, number in ahead.numbers.items()}
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

        def unlikely(number: int, name: str = name, oid: int = oid) -> tuple[bool, bool, bool, bool]:
            last = ahead.known.get(recorded.get(number, ""))
            of = today[number].oid if number in today else last.oid if last is not None else oid
            # The key's columns are never left out, and seldom others by now.
            is_key = number in today and today[number].name in ahead.relation.key
            other = bool(change.primary) and (name in change.primary) != is_key
            return other, of != oid, number in today, number in recorded

        fit = [n for n in free if low < n < high and names.get(n, "") not in change.cells]
        if fit:
            names[min(fit, key=unlikely)] = name


def _row(change: Change) -> list[str]:
    """The names that a change shows, in the order of its rows."""
    shown = list(change.rows[0])
    for place, name in enumerate(change.rows[1]):
        if name not in shown:
            shown.insert(shown.index(change.rows[1][place - 1]) + 1 if place else 0, name)
    return shown


def _renamed(now: catalog.Column, name: str, ahead: Ahead) -> bool:
    """Whether a column has today's name by then."""
    where, cells = ahead.when(now.xid), ahead.change.cells
    if where is When.WITHIN:
        return name not in cells
    return where is When.AFTER or (now.name in cells and (name not in cells or now.name not in ahead.numbers))


def _stays(column: catalog.Dropped, name: str, ahead: Ahead) -> bool:
    """Whether a column that is dropped by now was still there."""
    change, where, last = ahead.change, ahead.when(column.xid), ahead.known.get(name)
    shown = name in change.cells or change.keyed
    if where is When.WITHIN:
        others = (other for other in ahead.relation.columns if other.name == name)
        return shown and all(ahead.when(other.xid) is When.BEFORE for other in others)
    large = _was_large(last, ahead, otherwise=column.toast) if last is not None else column.toast
    return where is When.BEFORE and (shown or (large and not change.whole))


def _large(column: catalog.Column | catalog.Dropped) -> bool:
    """Whether an update can leave a column's values out. What is dropped could have been of any length."""
    return column.toast and not (isinstance(column, catalog.Column) and _is_small(column.oid, column.type))


def _was_large(last: Column, ahead: Ahead, *, otherwise: bool) -> bool:
    """Whether an update could leave a column's values out when it was of the type that is recorded last."""
    return ahead.varying.get(last.oid, otherwise) and not _is_small(last.oid, last.type)


def _is_small(oid: int, type_: str) -> bool:
    found = _DIGITS.fullmatch(type_) if oid == _NUMERIC else None
    return found is not None and int(found[1]) <= _MOST_DIGITS
