"""What a name in the log meant when the catalogue has another table of that name by now, or has it elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from bridge.pipeline.aligned import When
from bridge.pipeline.belonging import Now, Owner, Root, altered, differs, is_former, root_then, withheld
from bridge.source import catalog
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
from bridge.source.wal2json import Action, Cell, Named, Record
from bridge.stream.state import Column, Leaf, TableRecord

T, ONE, OTHER = ("public", "t"), ("public", "one"), ("public", "other")
PART = Owner(T, Leaf(7, "public.one", 7, "", ["id"]))
ALONE = Owner(ONE, Leaf(7, "public.one", 7, "", ["id"]))
MADE, NAMED, FREED = 10, 11, 12


def relation(root: Root, *links: int, oid: int = 7, name: Root = ONE, columns: tuple[str, ...] = ()) -> Relation:
    there = tuple(
        catalog.Column(one, 25, "text", toast=True, virtual=False, number=number)
        for number, one in enumerate(columns, 1)
    )
    return Relation(
        oid, *name, "r", root, "d", ("id",), there, named=NAMED + oid, made=MADE + oid, links=links, freed=FREED + oid
    )


def before(*xids: int, within: int = 0) -> Callable[[int], When]:
    """When those transactions are still to come, one is at hand, and all others have passed."""
    return lambda xid: When.BEFORE if xid in xids else When.WITHIN if xid == within else When.AFTER


def test_what_is_as_it_was_needs_no_look() -> None:
    assert not differs(PART, relation(T))
    assert not differs(ALONE, relation(ONE))
    assert differs(PART, None)
    assert differs(PART, relation(ONE))
    assert differs(PART, relation(T, oid=8))
    assert altered(None) == set()
    assert altered(Now(relation(T, 20), relation(T, oid=100, name=T))) == {17, 18, 19, 20, 110, 111, 112}


@pytest.mark.parametrize(
    ("coming", "within", "other", "change", "wanted"),
    [
        ([18], 0, False, ("I", "id", "new"), True),
        ([19], 0, False, ("I", "id", "new"), False),  # renamed, or given to somebody else
        ([19], 0, True, ("I", "id", "new"), True),
        ([18], 0, True, ("I", "id", "new"), False),
        ([], 18, False, ("I", "id", "new"), False),
        ([], 18, False, ("I", "id", "old"), True),
        ([], 18, False, ("I", "id"), False),
        ([], 18, False, ("U", "id"), True),
        ([], 19, True, ("U", "id", "new"), False),
        ([], 19, True, ("U", "id", "old", "new"), True),
        ([], 18, False, ("I", "new", "id"), True),  # no table's columns change their order
        ([], 18, False, ("U", "new", "id"), True),
    ],
)
def test_another_table_under_a_name(
    coming: list[int], within: int, other: bool, change: tuple[Action, str], wanted: bool
) -> None:
    action, *names = change
    found = relation(ONE, oid=8, columns=("id", "new"))
    when = before(*coming, within=within)
    made = record(*names, action=action)
    assert is_former(found, made, {"id", "old"}, when, had_another_name=other) is wanted


ROOT, LONE = relation(T, oid=100, name=T), relation(ONE)


@pytest.mark.parametrize(
    ("owner", "now", "coming", "is_root", "wanted"),
    [
        (PART, Now(LONE, LONE), [FREED + 7], False, T),
        (PART, Now(LONE, LONE), [NAMED + 7], False, ONE),  # its owner may be another one
        (PART, Now(LONE, LONE), [FREED + 7], True, ONE),
        (ALONE, Now(relation(T, 20), ROOT), [20], True, ONE),
        (ALONE, Now(relation(T, 20), ROOT), [FREED + 100], True, T),
        (ALONE, Now(relation(OTHER, 19, 20), ROOT), [19], True, ONE),
        (PART, Now(relation(OTHER, 20), relation(OTHER, oid=5, name=OTHER)), [NAMED + 5], True, T),
        (PART, Now(relation(OTHER, 20), relation(OTHER, oid=5, name=OTHER)), [FREED + 5], True, OTHER),
    ],
)
def test_the_transaction_that_made_the_difference_decides(
    owner: Owner, now: Now, coming: list[int], is_root: bool, wanted: Root
) -> None:
    assert root_then(owner, now, 5, before(*coming), is_root=is_root) == wanted
    assert set(coming) <= altered(now)


def record(*names: str, pk: tuple[str, ...] = ("id",), action: Action = "I") -> Record:
    cells = [Cell(name, 25, msgspec.Raw(b'"x"')) for name in names]
    return Record(action=action, lsn="0/0", columns=cells, pk=[Named(name) for name in pk])


def kept(*key: str) -> TableRecord:
    return TableRecord([Column(name, "text", 25) for name in key], list(key))


EXCLUDED, CHOSEN, MASKED = (
    Leaving(exclude=frozenset({"s"})),
    Leaving(frozenset({"id", "a"})),
    Leaving(masks={"m": bytes}),
)


@pytest.mark.parametrize(
    ("sections", "change", "wanted"),
    [
        ([(EXCLUDED, kept("id"))], record("id", "a", "s"), {"s"}),
        ([(EXCLUDED, None)], record("id", "a", "s"), {"s"}),
        ([(EXCLUDED, kept("other"))], record("id", "a", "s"), set()),
        ([(EXCLUDED, kept("other"))], record("a", "s", pk=()), {"s"}),
        ([(EXCLUDED, kept())], record("id", "s"), {"s"}),
        ([(EXCLUDED, kept("id"))], record("s", "a", pk=("s",)), set()),
        ([(CHOSEN, kept("id"))], record("id", "a", "b", "c"), {"b", "c"}),
        ([(MASKED, kept("id"))], record("id", "m"), {"m"}),
        ([(EXCLUDED, kept("id")), (MASKED, kept("id"))], record("id", "m", "s", "a"), {"m", "s"}),
        ([], record("id", "s"), set()),
    ],
)
def test_what_came_and_went_unseen_has_what_others_withhold_left_out(
    sections: list[tuple[Leaving, TableRecord | None]], change: Record, wanted: set[str]
) -> None:
    assert withheld(sections, change, [column.name for column in change.pk]) == wanted
