"""Which table a name in the log meant, and of which one it was a partition, where the catalogue is ahead of it. Pure.

wal2json names tables as they were when the change was made, by name alone. By the time that the change is read, the
table can be dropped, or detached, or another one can have its name. What is kept of each table (`Shape`) is what it was
when the stream last was where the catalogue was; where that says otherwise than the catalogue, the transaction that
made the difference decides, and for what is gone altogether there is nothing else to go by.

Source: PostgreSQL's commands/tablecmds.c. A rename writes a table's row of pg_type, as a new owner does; what makes a
table writes the rows of its hidden columns, and nothing else ever does; ATTACH writes a row of pg_inherits; DETACH
takes that away, and writes the row of the constraint that is the partition's primary key, which little else does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from bridge.pipeline.aligned import When
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
from bridge.source.wal2json import Record
from bridge.stream.state import Leaf, TableRecord

Root = tuple[str, str]
Passed = Callable[[int], When]


class Owner(NamedTuple):
    """What is kept of a name: the root whose rows its table held, which is itself where it was no partition."""

    root: Root
    leaf: Leaf


class Now(NamedTuple):
    """A table, or partition, of the catalogue, and its root."""

    relation: Relation
    top: Relation


class Then(NamedTuple):
    """root: the table that a name was of; now: what the catalogue has of what was under the name, None where that is
    gone; beside: what else the name may have been of; instead: what has the name since, where the change's columns
    alone tell that it is not of that."""

    root: Root
    now: Now | None
    beside: frozenset[Root]
    instead: Relation | None = None


def differs(owner: Owner, found: Relation | None) -> bool:
    """Whether the catalogue has another table of a name than the kept one, or has it elsewhere."""
    return found is None or (found.oid, found.root) != (owner.leaf.oid, owner.root)


def altered(now: Now | None) -> set[int]:
    """The transactions that can have given a relation its name and its root."""
    if now is None:
        return set()
    return {one for of in now for one in (of.named, of.made, of.freed, *of.links)}


def is_former(
    found: Relation, record: Record | None, known: Collection[str], when: Passed, *, had_another_name: bool
) -> bool:
    """Whether a change is of an earlier table than the one that has its name in the catalogue.

    Of one that gets its name within the change's transaction only the columns tell whether that was before the change,
    by their order first, which no table's columns change. What they are called it can only have changed within that
    transaction, the earlier one at any time; but a table that is new has no other change before an insert.

    Args:
        known: the columns that the earlier table had. had_another_name: whether the one of the catalogue is kept under
            another name. when: where the change is to a transaction.
    """
    where = when(found.named if had_another_name else found.made)
    if where is not When.WITHIN or record is None:
        return where is When.BEFORE
    shown, names = (
        {cell.name for cell in (*record.columns, *record.identity)},
        {column.name for column in found.columns},
    )
    places = {column.name: column.number for column in found.columns}
    row = [places[cell.name] for cell in record.columns if cell.name in places]
    missing = len(shown - names)
    return row != sorted(row) or len(shown - set(known)) < missing + (missing > 0 or record.action != "I")


def root_then(owner: Owner, now: Now, kept_oid: int, when: Passed, *, is_root: bool) -> Root:
    """The table that a relation was of when a change was made: the kept one, or the one of the catalogue.

    Args:
        kept_oid: of the kept root. is_root: whether the root of the catalogue is known as one that was not detached
            since. when: where the change is to a transaction.
    """
    if now.top.oid == kept_oid:
        later = when(now.top.named) is When.BEFORE
    elif any(when(xid) is When.BEFORE for xid in now.relation.links):
        later = True
    else:
        later = not is_root and when(now.top.freed) is When.BEFORE
    return owner.root if later else now.relation.root


def withheld(
    sections: Collection[tuple[Leaving, TableRecord | None]], record: Record, key: Collection[str]
) -> set[str]:
    """The columns that may not leave of a table that may have been a partition of one of which not everything may, or
    that one itself under another name. Both have its key.

    Args:
        sections: what is chosen of tables, each with what is recorded of it. key: of the change's table.
    """
    cells, found = {cell.name for cell in (*record.columns, *record.identity)}, set[str]()
    for chosen, kept in sections:
        guarded = chosen.hidden(cells) | chosen.masks.keys()
        if not guarded.intersection(key) and (kept is None or not key or not kept.key or set(key) == set(kept.key)):
            found |= guarded & cells
    return found
