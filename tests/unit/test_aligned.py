"""Which numbers a row's names are of, by hand-made catalogues that are ahead of it."""

from __future__ import annotations

import pytest

from bridge.pipeline.aligned import MOST_CELLS, Slot, When, aligned

INT, TEXT, DOMAIN, BOOL, JSONB = 23, 25, 16386, 16, 3802
BEFORE, WITHIN, AFTER = When.BEFORE, When.WITHIN, When.AFTER


def slot(
    number: int,
    recorded: str | None,
    today: str | None,
    when: When = BEFORE,
    types: tuple[int | None, int | None] = (TEXT, TEXT),
    *,
    large: bool = True,
) -> Slot:
    oids = (types[0] if recorded else None, types[1] if today else None)
    return Slot(number, recorded, oids[0], today, oids[1], when, large, key=today == "id")


ID = slot(1, "id", "id", AFTER, (INT, INT), large=False)


def found(*slots: Slot, whole: bool = False, key: tuple[str, ...] = (), **shown: int) -> dict[int, str] | None:
    return aligned([ID, *slots], {"id": INT, **shown}, whole=whole, key=key)


def test_what_was_recorded_is_there_though_the_catalogue_has_another_name_by_now() -> None:
    assert found(slot(2, "a", "b"), slot(3, "b", "a"), a=TEXT, b=TEXT) == {1: "id", 2: "a", 3: "b"}


def test_names_in_another_order_than_recorded_were_exchanged() -> None:
    assert found(slot(2, "a", "a", WITHIN), slot(3, "b", "b", WITHIN), b=TEXT, a=TEXT) == {1: "id", 2: "b", 3: "a"}


def test_two_that_exchanged_their_names_and_have_others_by_now_are_no_third_one() -> None:
    once = slot(2, "a", "d"), slot(3, "b", None), slot(4, None, "a", types=(None, DOMAIN))
    assert found(*once, b=TEXT, a=TEXT) == {1: "id", 2: "b", 3: "a"}


def test_a_column_whose_name_another_one_has_was_renamed_or_dropped_before() -> None:
    later = slot(4, None, "a")
    assert found(slot(2, "a", "a"), slot(3, "b", "b"), later, b=TEXT, a=TEXT) == {1: "id", 2: "b", 3: "a"}
    # Where it has another name by now, that is told.
    assert found(slot(2, "a", "c"), slot(3, "b", "b"), later, b=TEXT, a=TEXT) == {1: "id", 2: "c", 3: "b", 4: "a"}


def test_a_large_value_that_was_left_alone_keeps_its_name() -> None:
    assert found(slot(2, "a", "b"), slot(3, "b", "a"), b=TEXT) == {1: "id", 2: "a", 3: "b"}
    # What is settled has today's name.
    assert found(slot(2, "a", "c", AFTER), slot(3, "b", "b", AFTER), b=TEXT) == {1: "id", 2: "c", 3: "b"}


def test_a_new_name_where_a_large_column_was_is_that_ones_rather_than_of_one_that_came_and_went() -> None:
    gone = slot(2, "a", None), slot(3, None, None, types=(None, None))
    assert found(*gone, e=TEXT) == {1: "id", 2: "e"}
    # Of another type it is another one.
    assert found(*gone, e=JSONB) == {1: "id", 2: "a", 3: "e"}


def test_a_column_that_came_and_is_dropped_within_the_changes_transaction_is_no_later_one() -> None:
    came = slot(2, None, None, WITHIN, types=(None, None)), slot(3, None, None, types=(None, None))
    assert found(*came, c=TEXT, whole=True) == {1: "id", 2: "c"}


def test_a_name_that_nobody_knows_is_of_the_column_that_must_be_shown() -> None:
    small = slot(2, "a", "a", types=(INT, INT), large=False)
    assert found(small, slot(3, "b", "b"), x=INT, b=TEXT) == {1: "id", 2: "x", 3: "b"}


def test_a_column_that_is_dropped_by_the_transaction_at_hand_counts_as_dropped_where_it_is_not_shown() -> None:
    assert found(slot(2, "a", None, WITHIN), slot(3, "b", "b", AFTER), b=TEXT) == {1: "id", 3: "b"}
    assert found(slot(2, "a", None, WITHIN), slot(3, "b", "b", AFTER), a=TEXT, b=TEXT) == {1: "id", 2: "a", 3: "b"}
    assert found(slot(2, "a", None, BEFORE), slot(3, "b", "b", AFTER), b=TEXT) == {1: "id", 2: "a", 3: "b"}


def test_a_whole_row_leaves_nothing_out() -> None:
    dropped = slot(2, "a", None, BEFORE)
    assert found(dropped, slot(3, "b", "b"), whole=True, b=TEXT) == {1: "id", 3: "b"}
    assert found(slot(2, "a", "a", AFTER), whole=True) is None


def test_a_type_that_a_dropped_column_never_had_is_of_another_one() -> None:
    renamed = slot(3, "b", "c", types=(TEXT, DOMAIN))
    assert found(slot(2, "a", None, WITHIN, (INT, None), large=False), renamed, a=DOMAIN) == {1: "id", 3: "a"}


def test_of_two_that_fit_alike_the_older_column_has_the_name() -> None:
    assert found(slot(2, None, "d"), slot(3, None, "e"), c=TEXT) == {1: "id", 2: "c"}
    # What came and went since may have had any name.
    assert found(slot(2, None, "d"), slot(3, None, None), c=TEXT) == {1: "id", 3: "c"}


def test_the_names_of_the_key_are_those_of_its_columns() -> None:
    key = slot(2, "k", "id", BEFORE, (INT, INT), large=False)
    other = slot(3, None, None, BEFORE, (None, None), large=False)
    assert aligned([key, other], {"idd": INT}, whole=True, key=("idd",)) == {2: "idd"}


@pytest.mark.parametrize("slots", [[ID], [ID, *(slot(number, None, None) for number in range(2, MOST_CELLS // 2 + 2))]])
def test_what_does_not_fit_or_would_take_long_is_left_to_others(slots: list[Slot]) -> None:
    assert aligned(slots, {"id": INT, "a": TEXT}, whole=False) is None


def test_a_virtual_column_is_in_no_row() -> None:
    virtual = slot(2, "v", "v", AFTER)._replace(virtual=True)
    assert found(virtual, slot(3, "b", "b", AFTER), whole=True, b=TEXT) == {1: "id", 2: "v", 3: "b"}


def test_what_came_first_is_there_where_what_came_later_is() -> None:
    gone, again = slot(2, None, None, large=False), slot(3, None, "e", large=False)
    assert found(gone, again, whole=True, e=TEXT) == {1: "id", 2: "e"}
    assert found(gone, again, whole=True, x=TEXT, e=TEXT) == {1: "id", 2: "x", 3: "e"}
    assert found(gone, again, e=TEXT) == {1: "id", 2: "e"}
    # What the log had dropped before the last column came is gone; in the transaction that drops it, it may be.
    assert found(gone, slot(3, "b", "b"), again._replace(number=4), whole=True, b=TEXT, e=TEXT) == {
        1: "id", 3: "b", 4: "e",
    }  # fmt: skip
    assert found(gone._replace(when=WITHIN), again, whole=True, e=TEXT) == {1: "id", 3: "e"}


def test_what_was_exchanged_before_one_of_them_was_dropped_is_told_by_the_types() -> None:
    dropped, kept = slot(2, "e", None, WITHIN, (INT, None), large=False), slot(3, "c", "b", types=(BOOL, BOOL))
    later, last = slot(6, None, "e", types=(None, JSONB)), slot(7, None, "d", types=(None, TEXT))
    slots = dropped, kept._replace(large=False), later, last
    assert found(*slots, whole=True, c=INT, e=BOOL, a=TEXT) == {1: "id", 2: "c", 3: "e", 6: "a"}
