"""Rows without a document: the newest of what is known of them, and never more than there is room for."""

from __future__ import annotations

import msgspec

from bridge.index.dropped import Dropped

ROW = {"body": msgspec.Raw(b'"' + b"x" * 1_000 + b'"')}


def test_the_newest_state_counts_whatever_comes_again() -> None:
    dropped = Dropped()
    dropped.keep("1", 5, ROW)
    dropped.keep("1", 4, {})
    assert dropped.get("1") == (5, ROW)
    assert not dropped.forget("1", 4)
    assert dropped.forget("1", 6)
    assert dropped.get("1") is None
    assert dropped.forget("1", 1)


def test_room_is_bounded_and_given_back() -> None:
    dropped = Dropped(room=10_000)
    for number in range(100):
        dropped.keep(str(number), number, ROW)
    kept = [number for number in range(100) if dropped.get(str(number))]
    assert kept == list(range(100 - len(kept), 100))
    assert 5 <= len(kept) <= 9
    for number in kept:
        dropped.forget(str(number), 1_000)
    for number in range(len(kept)):
        dropped.keep(str(number), 1, ROW)
    assert all(dropped.get(str(number)) for number in range(len(kept)))
    dropped.clear()
    assert dropped.get("0") is None
