"""Transactions that may have altered a table, by their commit records' length and the snapshot of the catalogue."""

from __future__ import annotations

import pytest

from bridge.source.altering import PAGE, PAGE_HEADER, Snapshot, may_alter


@pytest.mark.parametrize(
    ("length", "expected"),
    [(48, False), (56, False), (64, False), (72, True), (104, True), (1336, True)],
)
def test_a_long_commit_record_may_alter_wherever_it_stands(length: int, expected: bool) -> None:
    assert may_alter(3 * PAGE + 24, 3 * PAGE + 24 + length) == expected
    across = 4 * PAGE - 24
    assert may_alter(across, across + length + PAGE_HEADER) == expected
    assert may_alter(4 * PAGE - length, 4 * PAGE) == expected


@pytest.mark.parametrize(
    ("text", "xid", "seen"),
    [
        ("10:20:", 9, True),
        ("10:20:", 19, True),
        ("10:20:", 20, False),
        ("10:20:", 21, False),
        ("10:20:10,15", 15, False),
        ("10:20:10,15", 14, True),
        ("4294967306:4294967316:4294967307", 11, False),
        ("4294967306:4294967316:4294967307", 12, True),
        ("4294967306:4294967316:", 4294967290, True),
        ("4294967200:4294967290:", 5, False),
    ],
)
def test_a_transaction_is_seen_if_it_had_ended_before_the_snapshot(text: str, xid: int, seen: bool) -> None:
    assert Snapshot.parse(text).has(xid) == seen


@pytest.mark.parametrize("text", ["", "1:2", "a:b:", "1:2:3,x"])
def test_what_is_no_snapshot_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        Snapshot.parse(text)
