"""The log's events beside the truth that the writer noted. Pure.

`Comparison.differences` has a line for each thing that is otherwise: which change, what the log has, what it must be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from bridge.event import Event
from bridge.stream.reader import Message
from tests.altering.steps import FIXED, HIDDEN, Catalogue, Change, Shape, Values, decoded, short

# What is smaller is not stored apart, and is in every update.
SMALL = 1000
MOST = 20
OPERATIONS = ("insert", "update", "delete", "truncate")


class Comparison:
    """One log beside one truth. `withheld`: how many values were left out for they may be the excluded column's, which
    a log may do with changes that the bridge did not see at once (docs/privacy.md); `uncertain`: how many events name a
    column of another moment as unchanged, or lack a large value that was left alone (docs/guarantees.md): in the
    transaction that alters the table; with savepoints where the catalogue is ahead of the log; where the column, or one
    with a name that no change had before, was altered again before the bridge saw it; and of a table that is gone.

    Args:
        first: the catalogue with which the log begins; ever: all that there were.
        savepoints: whether tables are altered behind savepoints. replaced: how often another table took the name.
    """

    def __init__(
        self, first: Catalogue, ever: list[Catalogue], shape: Shape, *, savepoints: bool, replaced: int = 0
    ) -> None:
        self.withheld = 0
        self.uncertain = 0
        self._savepoints = savepoints
        self._replaced = replaced
        self._ever = ever
        self._shape = shape
        self._columns = self._former = self._seen(first.columns)
        self._key = [first.key]

    def differences(self, found: list[tuple[Message, Event]], truth: list[Change], *, part: bool) -> Iterator[str]:
        """What is otherwise in the log's events than in what was committed; `part`: the log may end before that."""
        coming, number = iter(truth), 0
        for message, one in found:
            if self._shape.excluded and HIDDEN.encode() in message.data:
                yield f"sequence {message.seq}: {one.op} has the excluded column: {short(message.data.decode())}"
            if one.table == "t" and one.op == "schema":
                self._columns, self._key = {column.name: column.type for column in one.columns}, list(one.key_columns)
            if one.table != "t" or one.op not in OPERATIONS or one.txid is None:
                continue
            where = f"sequence {message.seq}, change {number}, {one.op}"
            change = next(coming, None)
            if change is None or change.op != one.op:
                yield f"{where}: what was done is {change.op if change else 'nothing more'}: {shown(one)}"
                return
            number += 1
            yield from (f"{where}: {what}" for what in self._differing(one, change))
            self._former = self._columns
        missing = list(coming)
        if missing and not part:
            yield f"{len(missing)} changes are not in the log, the first of them: {short(_plain(missing[0]))}"

    def _differing(self, one: Event, change: Change) -> Iterator[str]:
        """What is otherwise in one event than in the change that it must be."""
        key, after, before = (_values(raw) for raw in (one.key, one.after, one.before))
        there, old, new = change.there, self._seen(change.old or {}), self._seen(change.new or {})
        if row := new or old:
            yield from _unlike("key", key, {there.key: row[there.key]})
        if new:
            strange, lost = self._uncertain(one, change, old, new, after)
            self.uncertain += bool(strange or lost)
            wanted = {name: v for name, v in new.items() if name not in lost and name not in one.unchanged}
            published = self._published(after, wanted)
            self.withheld += len(wanted) - len(published)
            yield from _unlike("after", after, published)
            yield from _left_out([name for name in one.unchanged if name not in strange], new)
            columns, published = self._columns, self._published(self._columns, self._seen(there.columns))
            if lost or strange or self._is_uncertain(change):
                lost |= set(one.unchanged)  # of what type it was no change shows
            has, must = ({n: t for n, t in of.items() if n not in strange | lost} for of in (columns, published))
            yield from _unlike("columns", _bare(has), _bare(must))
            yield from _unlike("key columns", self._key, [there.key])
        if old and not before and set(old) == {there.key} and self._is_uncertain(change):
            return  # that the identity was FULL an old row of the key alone does not show
        if old and self._shape.full:
            yield from _unlike("before", _without_nulls(before), _without_nulls(self._published(before, old)))
        elif old and new:
            moved = old[there.key] != new[there.key]
            yield from _unlike("before", before, {there.key: old[there.key]} if moved else {})

    def _is_uncertain(self, change: Change) -> bool:
        gone = change.replaced < self._replaced
        return self._savepoints or gone or len({str(found) for found in change.around}) > 1

    def _uncertain(
        self, one: Event, change: Change, old: Values, new: Values, after: Values
    ) -> tuple[set[str], set[str]]:
        """The names in an update that are of another moment, and those of its large values that are missing."""
        if not old:
            return set(), set()
        lost = {n for n, value in new.items() if old.get(n) == value and n not in after and len(str(value)) >= SMALL}
        lost -= set(one.unchanged)
        strangers = new.keys() - self._former.keys()
        overtaken = self._is_overtaken(change, lost) or any(self._is_overtaken(change, {name}) for name in strangers)
        if not overtaken and not self._is_uncertain(change):
            return set(), set()
        gone = change.replaced < self._replaced
        moments = self._ever if self._savepoints or gone or overtaken else change.around
        could = {name for found in moments for name, type_ in found.columns.items() if type_ not in FIXED}
        strange = {name for name in one.unchanged if name not in new and name in could}
        return strange, lost

    def _is_overtaken(self, change: Change, names: set[str]) -> bool:
        """Whether all these columns were altered once more, after the change."""
        if change.there not in self._ever:
            return False
        behind = self._ever[len(self._ever) - self._ever[::-1].index(change.there) :]
        types = {name: change.there.columns[name] for name in names}
        return bool(names) and all(any(c.columns.get(n) != of for c in behind) for n, of in types.items())

    def _seen(self, values: Values) -> Values:
        return {name: value for name, value in values.items() if name not in self._shape.hidden}

    def _published(self, has: Values, wanted: Values) -> Values:
        """What must be there of what is wanted."""
        return {name: v for name, v in wanted.items() if name in has} if self._shape.excluded else wanted


def shown(one: Event) -> str:
    """An event for who looks into a failure."""
    if one.op == "schema":
        columns = ", ".join(f"{column.name} {column.type}" for column in one.columns)
        return f"schema ({columns}) key {list(one.key_columns)}"
    parts = {name: bytes(getattr(one, name)).decode() for name in ("key", "before", "after")}
    values = " ".join(f"{name}={value}" for name, value in parts.items() if value)
    left = f" unchanged={list(one.unchanged)}" if one.unchanged else ""
    return short(f"{one.op} {one.partition or one.table} {values}{left}{f' {one.phase}' if one.phase else ''}")


def _left_out(unchanged: list[str], new: Values) -> Iterator[str]:
    for name in unchanged:
        if name not in new:
            yield f"unchanged {name} is no column, those are {list(new)}"
        elif len(str(new[name])) < SMALL:
            yield f"unchanged {name} is not large: {new[name]}"


def _unlike(what: str, has: Any, wanted: Any) -> Iterator[str]:
    if has == wanted:
        return
    if isinstance(has, dict) and isinstance(wanted, dict):
        names = [
            name for name in {**wanted, **has} if (name in has, has.get(name)) != (name in wanted, wanted.get(name))
        ]
        has, wanted = ({name: one[name] for name in names if name in one} for one in (has, wanted))
    yield short(f"{what} has {_plain(has)}, not {_plain(wanted)}")


def _plain(value: Any) -> str:
    return re.sub(r"Decimal\('([^']*)'\)", r"\1", str(value))


def _values(raw: msgspec.Raw) -> Values:
    return decoded(bytes(raw)) or {} if bytes(raw) else {}


def _without_nulls(values: Values) -> Values:
    """PostgreSQL leaves NULLs out of an old row."""
    return {name: value for name, value in values.items() if value is not None}


def _bare(columns: dict[str, str]) -> dict[str, str]:
    """Types without their lengths: the log's own changes show none."""
    return {name: re.sub(r"\(.*?\)", "", type_) for name, type_ in columns.items()}
