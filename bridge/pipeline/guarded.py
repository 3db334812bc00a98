"""Columns that may not leave the database as they are, and have another name by now. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bridge.config import join_name
from bridge.errors import Contradiction
from bridge.pipeline.layout import There, crossed
from bridge.pipeline.numbered import Change
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
from bridge.source.wal2json import Record
from bridge.stream.state import TableRecord


def still_there(relation: Relation, chosen: Leaving, kept: TableRecord) -> None:
    """Return where no column that may not leave as it is has another name by now, though its own is taken again.

    Raises:
        Contradiction: one has, under which it would leave.
    """
    today = {column.number: column.name for column in relation.columns}
    hidden = chosen.hidden(today.values())
    for name, number in kept.places.get(str(relation.oid), {}).items():
        now = today.get(number, name)
        if name in chosen.guarded and now != name and now not in chosen.guarded and now not in hidden:
            raise Contradiction(
                f"the column {name} of {relation.name}, which is excluded or masked, is called {now} now",
                f'add {now} to exclude or mask of [source.table."{join_name(*relation.root)}"]; or, if it may be'
                f" published as it is, take {name} out of there",
            )


def renamed(relation: Relation, vanished: set[str], new: set[str]) -> Contradiction:
    """The error for columns that are new while excluded or masked ones have vanished."""
    table, gone, columns = ".".join(relation.root), ", ".join(sorted(vanished)), ", ".join(sorted(new))
    return Contradiction(
        f"{relation.name} has no column {gone} any more, which is excluded or masked, and has the new column {columns}:"
        " it may be the same one under another name",
        f'add {columns} to exclude or mask of [source.table."{table}"]; or, if it may be published as it is, take'
        f" {gone} out of there",
    )


def elsewhere(relation: Relation, owner: tuple[str, str]) -> Contradiction:
    """The error for a table, or partition, that belonged to another one, of which not everything may leave."""
    was, now = join_name(*owner), join_name(*relation.root)
    return Contradiction(
        f"{relation.name} belonged to {was}, of which not everything may leave, and is of {now} now, for which nothing"
        " is chosen",
        f'say what of it may leave in [source.table."{now}"]: exclude, mask or columns as in [source.table."{was}"];'
        f" or an empty section, if all of it may",
    )


def unnamed(relation: Relation, where: str, names: Collection[str]) -> Contradiction:
    """The error for a change whose row only columns name that may not leave as they are."""
    columns = ", ".join(sorted(names))
    return Contradiction(
        f"a change of {relation.name} at {where} tells its row by {columns}, its replica identity then, which may not"
        " leave as it is",
        'have everything read anew, without that change: `bridge drop --yes`, then a start with on_gap = "resnapshot";'
        f' or take {columns} out of exclude, mask or columns of [source.table."{join_name(*relation.root)}"]',
    )


def doubtful(relation: Relation, vanished: Collection[str], new: set[str], kept: TableRecord | None) -> set[str]:
    """Those new columns of a table that may be one of the vanished ones under another name; none where the numbers of
    all the vanished ones are recorded: a column keeps its number, and `still_there` knows it by that."""
    places = kept.places.get(str(relation.oid), {}) if kept is not None else {}
    return new if vanished and not places.keys() >= set(vanished) else set()


def keyed(relation: Relation, record: Record | None, *, same: bool = False) -> set[str]:
    """The key's columns, by their names when a change was made, as it shows itself: none of them is one that may not
    leave as it is, for no such column can be of today's key.

    Args:
        same: whether the key was of the same columns as today, whatever they were called.
    """
    if record is None:
        return set()
    primary = {column.name for column in record.pk}
    if same and relation.identity != "i" and len(primary) == len(relation.key):
        return primary
    return (primary | {cell.name for cell in record.identity}) & set(relation.key)


def strangers(
    root: Relation, was: There, chosen: Leaving, kept: TableRecord | None, record: Record | None, names: set[str]
) -> set[str]:
    """The columns, by their names when a change was made, that may be some that must not leave, under names that they
    had for a time: what came and went unseen, and what `moved`.

    Args:
        root: as the catalogue has it. names: those that are known.
    """
    if not chosen.guarded:
        return set()
    unknown = {column.name for column in was.relation.columns} - names - keyed(was.relation, record, same=was.keyed)
    return unknown | moved(root, was, chosen, kept, record)


def exchanged(record: Record, numbers: Mapping[str, int], chosen: Leaving) -> set[str]:
    """The columns in whose places, as a change shows them, ones were that may not leave, if it is of a table with these
    columns by their numbers."""
    places = {number: number for number in numbers.values()}
    groups = crossed(Change.of(record, ordered=True), numbers, places)
    return set[str]().union(*(group for group in groups if group & chosen.guarded))


def moved(root: Relation, was: There, chosen: Leaving, kept: TableRecord | None, record: Record | None) -> set[str]:
    """The names, of those that a table's columns had when a change was made, under which columns may leave that must
    not.

    Those are the names of their numbers. Where a change shows no value under such a column's name, and the column is
    altered later, its value may stand under any name that is not sure either; so it may where a row has names in
    another order than their columns are known to stand.

    Args:
        root: as the catalogue has it.
    """
    layouts = [layout.columns for layout in kept.layouts if layout.oid == root.oid] if kept is not None else []
    layouts.append({column.name: column.number for column in root.columns})
    numbers = {number for columns in layouts for name, number in columns.items() if name in chosen.guarded}
    # What has a name today that may leave is read under it: it only had the other one's for a time.
    numbers -= {column.number for column in root.columns if column.name not in chosen.guarded}
    found = {name for name, number in was.numbers.items() if number in numbers}
    cells = [*record.columns, *record.identity] if record is not None else []
    shown, names = {cell.name for cell in cells}, {number: name for name, number in was.numbers.items()}
    unseen = {number for number in numbers if names.get(number) not in shown}
    if record is not None and was.sure is not None and unseen - was.sure:
        found |= {name for name in shown if was.numbers.get(name) not in was.sure}
    for group in was.crossed:
        found |= group if unseen or group & (chosen.guarded | found) else set()
    return found - chosen.guarded - keyed(was.relation, record, same=was.keyed)
