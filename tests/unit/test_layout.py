"""A table's columns as they were, by their numbers: what the record, the catalogue and one change tell together."""

from __future__ import annotations

import msgspec
import pytest

from bridge.pipeline.aligned import When
from bridge.pipeline.layout import (
    MOST_LAYOUTS,
    MOST_NUMBERS,
    Passed,
    added,
    chosen,
    crossed,
    same,
    there,
)
from bridge.pipeline.numbered import Change
from bridge.source.catalog import Column, Dropped, Relation
from bridge.source.wal2json import Action, Cell, Named, Record
from bridge.stream.state import Column as Kept
from bridge.stream.state import Layout, TableRecord

TEXT, INT, NUMERIC = 25, 23, 1700
KNOWN = {name: Kept(name, "text", TEXT) for name in ("id", "a", "b", "secret")}
RECORDED = {"id": 1, "a": 2, "b": 3}


def relation(columns: dict[int, tuple[str, int]], dropped: dict[int, int] | None = None) -> Relation:
    """Of columns by number, each with its name and the transaction that wrote it."""
    return Relation(
        oid=1, schema="public", table="t", kind="r", root=("public", "t"), identity="d", key=(columns[1][0],),
        columns=tuple(
            Column(name, TEXT, "text", toast=True, virtual=False, number=number, xid=xid)
            for number, (name, xid) in columns.items()
        ),
        dropped=tuple(Dropped(number, toast=True, xid=xid) for number, xid in (dropped or {}).items()),
    )  # fmt: skip


def was(
    today: Relation, action: Action, *names: str, passed: dict[int, int] | None = None, shown: tuple[str, ...] = ()
) -> dict[str, int]:
    """The columns of then, of a change in a transaction that ends at 100."""
    record = Record(
        action=action, lsn="0/0", columns=[Cell(n, TEXT) for n in names] if action != "D" else [],
        identity=[Cell(n, TEXT) for n in names] if action == "D" else [], pk=[Named("id")],
    )  # fmt: skip
    when = Passed(100, passed or {}, 3, {}).when
    found = there(today, RECORDED, Change.of(record, ordered=True), when, KNOWN, shown)
    assert {column.name for column in found.relation.columns} == found.numbers.keys()
    return found.numbers


def test_where_a_transaction_is_passed() -> None:
    passed = Passed(100, {10: 99, 11: 100, 12: 101}, 8, {})
    assert [passed.when(xid) for xid in (10, 11, 12, 9, 7)] == [
        When.AFTER, When.WITHIN, When.BEFORE, When.BEFORE, When.AFTER,
    ]  # fmt: skip
    # Ids go round; what the slot cannot need any more was before, and so is what was met then.
    assert Passed(100, {}, 5, {}).when(0xFFFFFFF0) is When.AFTER
    assert Passed(100, {}, 0xFFFFFFF0, {}).when(5) is When.BEFORE
    assert Passed(100, {}, None, {5: 101}).when(5) is When.BEFORE
    assert Passed(101, {}, None, {5: 101}).when(5) is When.AFTER


def test_what_is_dropped_is_there_until_the_log_has_that_or_a_whole_row_lacks_it() -> None:
    today = relation({1: ("id", 3), 3: ("b", 3)}, {2: 50})
    assert was(today, "U", "id") == {"id": 1, "a": 2, "b": 3}
    assert was(today, "D", "id") == {"id": 1, "a": 2, "b": 3}
    assert was(today, "U", "id", passed={50: 90}) == {"id": 1, "b": 3}
    assert was(today, "U", "id", passed={50: 100}) == {"id": 1, "b": 3}
    assert was(today, "U", "id", "a", passed={50: 100}) == {"id": 1, "a": 2, "b": 3}
    assert was(today, "I", "id", "b") == {"id": 1, "b": 3}


def test_what_came_is_there_from_the_first_change_that_shows_it() -> None:
    today = relation({1: ("id", 3), 3: ("b", 3), 4: ("c", 51)}, {2: 50})
    assert was(today, "U", "id") == {"id": 1, "a": 2, "b": 3}
    assert was(today, "U", "id", passed={50: 90, 51: 91}) == {"id": 1, "b": 3}
    assert was(today, "U", "id", "c", passed={50: 90}) == {"id": 1, "b": 3, "c": 4}
    # One that a reading has told of.
    assert was(today, "U", "id", passed={50: 90}, shown=("c",)) == {"id": 1, "b": 3, "c": 4}


def test_a_renamed_column_has_its_old_name_until_the_log_has_the_new_one() -> None:
    today = relation({1: ("id", 3), 2: ("z", 50), 3: ("b", 3)})
    assert was(today, "U", "id") == {"id": 1, "a": 2, "b": 3}
    assert was(today, "U", "id", "z") == {"id": 1, "z": 2, "b": 3}
    assert was(today, "U", "id", passed={50: 90}) == {"id": 1, "z": 2, "b": 3}
    # Within the transaction that renames it, before that.
    assert was(today, "U", "id", "a", passed={50: 100}) == {"id": 1, "a": 2, "b": 3}


def test_one_that_takes_the_name_of_another_is_another() -> None:
    again = relation({1: ("id", 3), 3: ("b", 3), 4: ("a", 51)}, {2: 50})
    assert was(again, "U", "id") == {"id": 1, "a": 2, "b": 3}
    assert was(again, "U", "id", passed={50: 90}) == {"id": 1, "b": 3}
    assert was(again, "U", "id", "a", passed={50: 90}) == {"id": 1, "b": 3, "a": 4}
    swapped = relation({1: ("id", 3), 2: ("b", 51), 3: ("a", 50)})
    assert was(swapped, "U", "id", "a", "b") == {"id": 1, "a": 2, "b": 3}
    assert was(swapped, "U", "id", "b", passed={50: 90, 51: 91}) == {"id": 1, "b": 2, "a": 3}


def test_one_that_came_and_went_has_the_number_that_its_place_in_a_row_leaves() -> None:
    today = relation({1: ("id", 3), 2: ("a", 3), 3: ("b", 3), 5: ("d", 52)}, {4: 51})
    assert was(today, "I", "id", "a", "b", "c") == {"id": 1, "a": 2, "b": 3, "c": 4}
    assert was(today, "U", "id", "c", "d") == {"id": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    former = relation({1: ("id", 3), 3: ("b", 3)}, {2: 51})
    assert was(former, "I", "id", "y", "b") == {"id": 1, "y": 2, "b": 3}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_name_that_only_the_old_row_has_is_that_of_a_column(ordered: bool) -> None:
    def of(today: Relation, new: str, old: str, *, full: bool = True) -> dict[str, int]:
        action: Action = "U" if new else "D"
        cells = ([Cell(name, TEXT) for name in names.split()] for names in (new, old))
        record = Record(action, "0/0", columns=next(cells), identity=next(cells), pk=[Named("id")])
        change = Change.of(record, ordered=ordered, full=full)
        return there(today, RECORDED, change, Passed(100, {}, 3, {}).when, KNOWN).numbers

    came = relation({1: ("id", 3), 2: ("a", 3), 3: ("b", 3)}, {4: 50})
    assert of(came, "id a b", "id a b c") == {"id": 1, "a": 2, "b": 3, "c": 4}
    assert of(came, "", "id a b c") == {"id": 1, "a": 2, "b": 3, "c": 4}
    renamed = relation({1: ("id", 3), 2: ("a", 3)}, {3: 50})
    assert of(renamed, "id a", "id a c") == {"id": 1, "a": 2, "c": 3}
    assert of(renamed, "id a", "id a b") == {"id": 1, "a": 2, "b": 3}
    # What neither row has is not there; an old key tells nothing of that.
    assert of(renamed, "id a", "id a") == {"id": 1, "a": 2}
    assert of(renamed, "id a", "id", full=False) == {"id": 1, "a": 2, "b": 3}


@pytest.mark.parametrize(("type_", "numbers"), [
    ("numeric", {"id": 1, "b": 2, "c": 3, "a": 4}), ("numeric(25,2)", {"id": 1, "b": 2, "c": 3, "a": 4}),
    ("numeric(24,2)", {"id": 1, "c": 2, "a": 3}),
])  # fmt: skip
def test_a_number_of_few_digits_is_never_left_out(type_: str, numbers: dict[str, int]) -> None:
    now = Column("d", NUMERIC, type_, toast=True, virtual=False, number=2, xid=50)
    today = relation({1: ("id", 3), 4: ("a", 50)}, {3: 51})
    today = msgspec.structs.replace(today, columns=(today.columns[0], now, today.columns[1]))
    known = {name: Kept(name, type_, NUMERIC) for name in ("b", "a")} | {"id": KNOWN["id"]}
    cells = [Cell("id", TEXT), Cell("c", NUMERIC), Cell("a", TEXT)]
    change = Change.of(Record("U", "0/0", columns=cells, pk=[Named("id")]), ordered=True)
    when = Passed(100, {}, 3, {}).when
    found = there(today, {"id": 1, "b": 2, "a": 3}, change, when, known, varying={NUMERIC: True})
    assert found.numbers == numbers


def test_both_rows_tell_where_a_column_stands() -> None:
    today = relation({1: ("id", 3), 3: ("b", 3), 6: ("d", 3)}, {2: 50, 4: 51, 5: 52})
    record = Record(
        "U", "0/0", columns=[Cell(n, TEXT) for n in ("id", "b", "e")], pk=[Named("id")],
        identity=[Cell(n, TEXT) for n in ("id", "b", "c", "e", "d")],
    )  # fmt: skip
    change = Change.of(record, ordered=True, full=True)
    found = there(today, {"id": 1, "b": 3, "d": 6}, change, Passed(100, {}, 3, {}).when, KNOWN)
    assert found.numbers["c"] == 4
    assert found.numbers["e"] == 5


def test_the_catalogue_is_not_that_of_a_change_with_another_name() -> None:
    today = relation({1: ("id", 3), 2: ("a", 3), 3: ("b", 3)}, {4: 50})

    def alike(*names: str) -> bool:
        record = Record("I", "0/0", columns=[Cell(name, TEXT) for name in names])
        return same(today, RECORDED, Change.of(record, ordered=True), KNOWN, ())

    assert [alike("id", "a", "b"), alike("id", "a", "b", "c"), alike("i", "a", "b")] == [True, False, False]
    assert same(today, RECORDED, Change.of(None, ordered=True), KNOWN, ())


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("abcd", []), ("bacd", ["ab"]), ("badc", ["ab", "cd"]), ("bcad", ["abc"]), ("dbca", ["abcd"]), ("acbd", ["bc"]),
        ("xbya", ["ab"]), ("", []),
    ],
)  # fmt: skip
def test_names_that_have_changed_places_are_found_by_the_order_of_a_row(row: str, found: list[str]) -> None:
    numbers = {"a": 1, "b": 2, "c": 3, "d": 4, "y": 9}
    record = Record("I", "0/0", columns=[Cell(name, TEXT) for name in row])
    change = Change.of(record, ordered=False)
    assert crossed(change, numbers, {n: n for n in (1, 2, 3, 4)}) == tuple(frozenset(names) for names in found)
    # A partition has its columns in an order of its own.
    turned = Change.of(Record("I", "0/0", columns=[Cell(name, TEXT) for name in reversed(row)]), ordered=False)
    assert crossed(turned, numbers, {n: 9 - n for n in (1, 2, 3, 4)}) == tuple(map(frozenset, reversed(found)))


def test_a_type_is_the_last_known_one_until_the_log_has_the_other() -> None:
    today = relation({1: ("id", 3), 2: ("a", 50), 3: ("b", 3)})
    columns = tuple(msgspec.structs.replace(c, oid=INT) if c.name == "a" else c for c in today.columns)
    today = msgspec.structs.replace(today, columns=columns)

    def oid(passed: dict[int, int], *cells: Cell) -> int:
        change = Change.of(Record(action="U", lsn="0/0", columns=[Cell("id", TEXT), *cells]), ordered=True)
        found = there(today, RECORDED, change, Passed(100, passed, 3, {}).when, KNOWN)
        return next(column.oid for column in found.relation.columns if column.name == "a")

    assert [oid({}), oid({50: 90}), oid({}, Cell("a", INT)), oid({50: 100}, Cell("a", TEXT))] == [TEXT, INT, INT, TEXT]


def test_a_key_has_the_names_of_then() -> None:
    today = relation({1: ("i", 50), 2: ("a", 3), 3: ("b", 3)})
    change = Change.of(Record(action="U", lsn="0/0", columns=[Cell("id", TEXT)]), ordered=True)
    found = there(today, RECORDED, change, Passed(100, {}, 3, {}).when, KNOWN)
    assert (found.relation.key, found.key, found.behind) == (("id",), ("id",), True)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_key_that_had_another_name_for_a_time_is_no_column_that_came_and_went(ordered: bool) -> None:
    today = relation({1: ("id", 50), 3: ("b", 3)}, {2: 51, 4: 52})
    row = [Cell(name, TEXT) for name in ("idd", "b")]
    record = Record("D", "0/0", identity=row, pk=[Named("idd")])
    change = Change.of(record, ordered=ordered, full=True)
    found = there(today, RECORDED, change, Passed(100, {}, 3, {}).when, KNOWN)
    assert (found.numbers["idd"], found.key) == (1, ("idd",))
    # A column that the primary key does not have is not the key's.
    other = Change.of(msgspec.structs.replace(record, pk=[Named("id")]), ordered=ordered, full=True)
    assert there(today, RECORDED, other, Passed(100, {}, 3, {}).when, KNOWN).numbers["idd"] in (2, 4)


@pytest.mark.parametrize(("at", "number"), [("", 3), ("1", 1), ("2", 1), ("5", 2), ("6", 2), ("9", 3)])
def test_a_change_that_comes_once_more_meets_the_layout_of_then(at: str, number: int) -> None:
    layouts = [Layout("2", 7, {"a": 1}), Layout("5", 7, {"a": 2}), Layout("7", 8, {"a": 9}), Layout("8", 7, {"a": 3})]
    assert chosen(TableRecord([], [], layouts=layouts), 7, at) == {"a": number}


def test_layouts_stay_few_and_small_and_of_one_table() -> None:
    layouts = list[Layout]()
    for at in range(20):
        layouts = added(layouts, 7, {"a": at}, f"{at:02}")
    assert [layout.columns["a"] for layout in layouts] == list(range(20 - MOST_LAYOUTS, 20))
    # What is seen once more counts anew from there.
    assert [layout.since for layout in added(layouts, 7, {"a": 1}, "14")] == ["12", "13", "14"]
    assert [layout.oid for layout in added(layouts, 8, {"a": 1}, "30")] == [8]
    wide = {f"c{number}": number for number in range(1600)}
    layouts = added(added(layouts, 7, wide, "20"), 7, wide, "21")
    assert sum(len(layout.columns) for layout in layouts) <= MOST_NUMBERS
    assert layouts[-1].since == "21"
