"""Columns that may not leave the database as they are, and have another name by now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from bridge.config import join_name
from bridge.errors import Contradiction
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
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


def doubtful(relation: Relation, vanished: Collection[str], new: set[str], kept: TableRecord | None) -> set[str]:
    """Those new columns of a table that may be one of the vanished ones under another name; none where the numbers of
    all the vanished ones are recorded: a column keeps its number, and `still_there` knows it by that."""
    places = kept.places.get(str(relation.oid), {}) if kept is not None else {}
    return new if vanished and not places.keys() >= set(vanished) else set()
