"""What a name in the log meant when the catalogue has another table of that name by now, or has it elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from bridge.pipeline.aligned import When
from bridge.pipeline.belonging import Owner, Then, altered, differs, then, withheld
from bridge.source.catalog import Relation
from bridge.source.leaving import Leaving
from bridge.source.wal2json import Action, Cell, Named, Record
from bridge.stream.state import Column, Leaf, TableRecord

T, ONE, OTHER = ("public", "t"), ("public", "one"), ("public", "other")
PART = Owner(T, Leaf(7, "public.one", 7, "", ["id"]))
ALONE = Owner(ONE, Leaf(7, "public.one", 7, "", ["id"]))


def relation(root: tuple[str, str], *, oid: int = 7, named: int = 10, links: tuple[int, ...] = ()) -> Relation:
    return Relation(oid, *ONE, "r", root, "d", ("id",), (), named=named, links=links, written=30)


def before(*xids: int) -> Callable[[int], When]:
    """When those transactions are still to come, and all others have passed."""
    return lambda xid: When.BEFORE if xid in xids else When.AFTER


@pytest.mark.parametrize(
    ("owner", "found", "coming", "is_root", "wanted"),
    [
        (PART, None, [], True, Then(T, False, 7)),
        (PART, relation(T, links=(20,)), [20, 30], True, None),
        (PART, relation(T, oid=8, links=(20,)), [10], True, Then(T, False, 7)),
        (PART, relation(T, oid=8, links=(20,)), [20], True, None),
        (PART, relation(ONE, oid=8), [10], True, Then(T, False, 7)),
        (PART, relation(ONE), [30], False, Then(T, True, 7)),
        (PART, relation(ONE), [], False, None),
        (ALONE, relation(T, links=(20,)), [20], True, Then(ONE, True, 7)),
        (ALONE, relation(T, links=(20,)), [30], True, None),
        (ALONE, relation(OTHER, links=(19, 20)), [19], True, Then(ONE, True, 7)),
    ],
)
def test_the_transaction_that_made_the_difference_decides(
    owner: Owner, found: Relation | None, coming: list[int], is_root: bool, wanted: Then | None
) -> None:
    found_there = then(owner, found, before(*coming), is_root=is_root)
    assert found_there == wanted
    if wanted is not None:
        assert differs(owner, found)
        assert found is None or set(coming) & altered(found)


def test_what_is_as_it_was_needs_no_look() -> None:
    assert not differs(PART, relation(T))
    assert not differs(ALONE, relation(ONE))
    assert altered(None) == set()


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
    assert withheld(sections, change) == wanted
