"""Which table a name in the log meant, and of which one it was a partition, where the catalogue is ahead of it. Pure.

wal2json names tables as they were when the change was made, by name alone. By the time that the change is read, the
table can be dropped, or detached, or another one can have its name. What is kept of each table (`Shape`) is what it was
when the stream last was where the catalogue was; where that says otherwise than the catalogue, the transaction that
made the difference decides, and for what is gone altogether there is nothing else to go by.
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


class Owner(NamedTuple):
    """What is kept of a name: the root whose rows its table held, which is itself where it was no partition."""

    root: Root
    leaf: Leaf


class Then(NamedTuple):
    """root: the table that a name was of; there: whether the catalogue's table is that of then; oid: of the one of
    then."""

    root: Root
    there: bool
    oid: int


def differs(owner: Owner, found: Relation | None) -> bool:
    """Whether the catalogue has another table of a name than the kept one, or has it elsewhere."""
    return found is None or (found.oid, found.root) != (owner.leaf.oid, owner.root)


def altered(found: Relation | None) -> set[int]:
    """The transactions that have given a relation its name and its root."""
    return {found.named, found.written, *found.links} if found is not None else set()


def then(
    owner: Owner,
    found: Relation | None,
    when: Callable[[int], When],
    *,
    is_root: bool,
    shown: Collection[str] = (),
    known: Collection[str] = (),
    whole: bool = False,
) -> Then | None:
    """What a name was of when a change was made; None where that is what the catalogue says.

    Args:
        found: what the catalogue has under the name. when: where the change is to a transaction.
        is_root: whether the root that `found` has now is known as one: then it was not detached since.
        shown: the columns that the change shows, known: those that the table of then had: of one that gets its name
            within the change's transaction nothing else tells whether that was before the change. whole: whether the
            change is an insert: a table that is new has no other one first.
    """
    if found is None:
        return Then(owner.root, False, owner.leaf.oid)
    if found.oid != owner.leaf.oid:
        where, names = when(found.named), {column.name for column in found.columns}
        former = where is When.WITHIN and len(set(shown) - set(known)) < len(set(shown) - names) + (not whole)
        return Then(owner.root, False, owner.leaf.oid) if former or where is When.BEFORE else None
    if found.root == owner.root:
        return None
    moved = {*found.links} | (set() if is_root else {found.written})
    return Then(owner.root, True, owner.leaf.oid) if any(when(xid) is When.BEFORE for xid in moved) else None


def withheld(sections: Collection[tuple[Leaving, TableRecord | None]], record: Record) -> set[str]:
    """The columns that may not leave of a table that came and went before anybody saw it: it may have been a partition
    of one of which not everything may, or that one itself under another name. Both have its key.

    Args:
        sections: what is chosen of tables, each with what is recorded of it.
    """
    cells = {cell.name for cell in (*record.columns, *record.identity)}
    key, found = {column.name for column in record.pk}, set[str]()
    for chosen, kept in sections:
        guarded = chosen.hidden(cells) | chosen.masks.keys()
        if not key & guarded and (kept is None or not key or not kept.key or key == set(kept.key)):
            found |= guarded & cells
    return found
