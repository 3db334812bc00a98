"""Which rows of a chunk are still news when their turn comes, and what the stream's changes become meanwhile."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from bridge import event
from bridge.event import columns_of, filled, old_key
from bridge.pipeline.merge import Delivered, Merge
from bridge.source.altering import Snapshot

TABLE = ("public", "t")
CLOSING = b',"lsn":"0/9"' + event.transaction("0/9", None, None)
S = Snapshot.parse("10:20:12,15")
SEEN, RUNNING, LATER = 11, 15, 20


def payload(op: event.Op, key: int, after: Any = None, before: Any = None, unchanged: list[str] | None = None) -> bytes:
    """An event as the bridge writes it."""
    parts = [event.head(op, "main", *TABLE), b',"key":' + raw({"id": key})]
    parts += [b',"before":' + raw(before)] if before is not None else []
    parts += [b',"after":' + raw(after)] if after is not None else []
    parts += [b',"unchanged":' + raw(unchanged)] if unchanged else []
    return b"".join(parts) + b',"lsn":"0/5"' + event.transaction("0/6", 7, None)


def raw(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def row(key: int) -> bytes:
    """A row that was read, without what it closes with."""
    return event.head("read", "main", *TABLE) + b',"key":%b,"after":%b' % (
        raw({"id": key}), raw({"id": key, "v": key, "body": f"large {key}"})
    )  # fmt: skip


def rows(*keys: int) -> dict[bytes, bytes]:
    return {raw({"id": key}): row(key) for key in keys}


def opened(*keys: int) -> Merge:
    """A merge whose chunk holds these keys."""
    merge = Merge()
    merge.open(TABLE)
    merge.fill(S, rows(*keys), CLOSING)
    return merge


def left(merge: Merge) -> list[int]:
    return [msgspec.json.decode(event.decode(one).key)["id"] for one in merge.take(100)]


@pytest.mark.parametrize(("xid", "stays"), [(SEEN, True), (RUNNING, False), (LATER, False), (12, False), (13, True)])
def test_a_row_gives_way_to_what_its_snapshot_does_not_show(xid: int, stays: bool) -> None:
    merge = opened(1, 2, 3)
    change = payload("update", 2, {"id": 2, "v": 9, "body": "new"})
    assert merge.see("U", xid, TABLE, change) == change
    assert left(merge) == ([1, 2, 3] if stays else [1, 3])


@pytest.mark.parametrize(("xid", "stays"), [(SEEN, True), (LATER, False)])
def test_what_comes_while_the_chunk_is_read_counts_when_it_is_there(xid: int, stays: bool) -> None:
    merge = Merge()
    merge.open(TABLE)
    merge.see("D", xid, TABLE, payload("delete", 2))
    merge.see("U", xid, TABLE, payload("update", 3, {"id": 3, "v": 9}, unchanged=["body"]))
    merge.fill(S, rows(1, 2, 3), CLOSING)
    taken = merge.take(9)
    assert [json.loads(bytes(event.decode(one).key))["id"] for one in taken] == ([1, 2, 3] if stays else [1, 3])
    # It was published before anybody knew what it left out: its row follows it as it was then.
    assert json.loads(bytes(event.decode(taken[-1]).after))["v"] == (3 if stays else 9)
    assert not merge.moved


def test_a_row_is_brought_up_to_what_was_published_before_it_was_there() -> None:
    merge = Merge()
    merge.open(TABLE)
    merge.see("U", LATER, TABLE, payload("update", 1, {"id": 1, "v": 8}, unchanged=["body"]))
    merge.see("U", LATER, TABLE, payload("update", 9, {"id": 9, "v": 9}, before={"id": 1}, unchanged=["body"]))
    merge.see("U", LATER, TABLE, payload("update", 2, {"id": 2, "v": 8}, unchanged=["body"]))
    merge.see("D", LATER, TABLE, payload("delete", 2))
    merge.see("U", LATER, TABLE, payload("update", 3, {"id": 3, "v": 8}, unchanged=["body"]))
    merge.see("U", LATER, TABLE, payload("update", 3, {"id": 3, "v": 9, "body": "new"}))
    merge.fill(S, rows(1, 2, 3), CLOSING)
    [moved] = [event.decode(one) for one in merge.take(9)]
    assert (moved.op, moved.lsn) == ("read", "0/9")
    assert json.loads(bytes(moved.key)) == {"id": 9}
    assert json.loads(bytes(moved.after)) == {"id": 9, "v": 9, "body": "large 1"}


@pytest.mark.parametrize("early", [False, True])
def test_rows_nested_deeper_than_a_decoder_goes_are_merged_too(early: bool) -> None:
    deep = b"[" * 5000 + b"]" * 5000
    nested = payload("update", 1, {"id": 1, "v": 9, "deep": "?"}, unchanged=["body"]).replace(b'"?"', deep)
    merge = Merge()
    merge.open(TABLE)
    read = {raw({"id": 1}): row(1).replace(b'"large 1"', deep)}
    if early:
        assert merge.see("U", LATER, TABLE, nested) == nested
        merge.fill(S, read, CLOSING)
        [found] = merge.take(9)
    else:
        merge.fill(S, read, CLOSING)
        found = merge.see("U", LATER, TABLE, nested)
        assert event.outline(found).unchanged == ()
        assert merge.left == 0
    assert event.outline(found).key == raw({"id": 1})
    assert {name: bytes(value) for name, value in event.columns_of(found).items()} == {
        "id": b"1", "v": b"9", "body": deep, "deep": deep
    }  # fmt: skip


def test_a_newer_change_takes_its_unchanged_columns_from_the_row() -> None:
    merge = opened(1, 2)
    found = event.decode(merge.see("U", LATER, TABLE, payload("update", 2, {"id": 2, "v": 9}, unchanged=["body"])))
    assert json.loads(bytes(found.after)) == {"id": 2, "v": 9, "body": "large 2"}
    assert found.unchanged == ()
    # The row is published as that, and no more.
    again = event.decode(merge.see("U", LATER, TABLE, payload("update", 2, {"id": 2, "v": 10}, unchanged=["body"])))
    assert again.unchanged == ("body",)
    assert left(merge) == [1]
    assert not merge.moved


def test_a_row_that_moves_without_all_of_its_columns_is_read_last() -> None:
    merge = opened(1)
    moved = payload("update", 70, {"id": 70, "v": 9}, before={"id": 7}, unchanged=["body"])
    assert merge.see("U", SEEN, TABLE, moved) == moved
    merge.see("U", LATER, TABLE, payload("update", 80, {"id": 80, "v": 9, "body": "x"}, before={"id": 8}))
    merge.see("U", LATER, TABLE, payload("update", 10, {"id": 10, "v": 9}, before={"id": 1}, unchanged=["body"]))
    assert list(merge.moved) == [raw({"id": 70})]


def test_in_the_end_only_rows_that_were_still_to_be_read_are_read_again() -> None:
    merge = Merge()
    merge.last = True
    merge.moved[raw({"id": 5})] = None
    merge.due = {raw({"id": 6})}
    for old in (4, 5, 6):
        merge.see("U", LATER, TABLE, payload("update", old + 50, {"id": 1}, before={"id": old}, unchanged=["body"]))
    assert list(merge.moved) == [raw({"id": 5}), raw({"id": 55}), raw({"id": 56})]


@pytest.mark.parametrize("early", [False, True])
def test_both_keys_of_a_change_make_rows_old(early: bool) -> None:
    merge = Merge() if early else opened(1, 2, 3)
    if early:
        merge.open(TABLE)
    merge.see("U", LATER, TABLE, payload("update", 3, {"id": 3, "v": 1, "body": ""}, before={"id": 1, "v": 1}))
    if early:
        merge.fill(S, rows(1, 2, 3), CLOSING)
    assert left(merge) == [2]


@pytest.mark.parametrize(
    ("xid", "table", "stay"),
    [(LATER, TABLE, []), (SEEN, TABLE, [1, 2]), (LATER, ("public", "another_partition"), [1, 2])],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_truncate_empties_the_chunk_of_its_own_table(
    xid: int, table: tuple[str, str], stay: list[int], early: bool
) -> None:
    merge = Merge()
    merge.open(TABLE)
    if early:
        merge.see("T", xid, table, payload("truncate", 0))
    merge.fill(S, rows(1, 2), CLOSING)
    if not early:
        merge.see("T", xid, table, payload("truncate", 0))
    assert left(merge) == stay


def test_rows_are_taken_in_order_and_piece_by_piece() -> None:
    merge = opened(5, 1, 3)
    first = merge.take(2)
    assert [event.decode(one).lsn for one in first] == ["0/9", "0/9"]
    assert merge.left == 1
    merge.see("D", LATER, TABLE, payload("delete", 3))
    assert (merge.left, merge.take(2)) == (0, [])


def test_what_is_delivered_and_not_to_be_seen_holds_the_confirmation_back() -> None:
    delivered = Delivered()
    assert delivered.safe(500) == 500
    for xid, start in ((11, 100), (12, 200), (13, 300), (25, 400)):
        delivered.add(xid, start)
    assert delivered.safe(500) == 100
    delivered.seen(S)
    assert delivered.pending() == [12, 25]
    assert (delivered.safe(500), delivered.safe(150)) == (200, 150)


@pytest.mark.parametrize(
    ("after", "unchanged", "known", "wanted", "rest"),
    [
        ({"id": 1}, ["a"], {"a": "x"}, {"id": 1, "a": "x"}, []),
        ({}, ["a", "b"], {"b": [1, '},"'], "c": 2}, {"b": [1, '},"']}, ["a"]),
        (
            {"id": 1, "t": '},"unchanged":["a"]'},
            ["a"],
            {"a": None},
            {"id": 1, "t": '},"unchanged":["a"]', "a": None},
            [],
        ),
        ({"id": 1}, ["a"], {}, {"id": 1}, ["a"]),
    ],
)
def test_an_event_is_filled(after: Any, unchanged: list[str], known: Any, wanted: Any, rest: list[str]) -> None:
    before = payload("update", 1, after, unchanged=unchanged)
    found = event.decode(filled(before, {name: msgspec.Raw(raw(value)) for name, value in known.items()}))
    assert json.loads(bytes(found.after)) == wanted
    assert list(found.unchanged) == rest
    assert (found.lsn, found.txid, bytes(found.key)) == ("0/5", 7, raw({"id": 1}))


def test_the_old_key_is_in_the_keys_own_order() -> None:
    found = event.decode(payload("update", 1, {}, before={"x": 9, "id": 3}))
    assert old_key(found) == raw({"id": 3})
    assert old_key(event.decode(payload("delete", 4))) == raw({"id": 4})
    assert columns_of(payload("read", 1, {"a": [1]})) == {"a": msgspec.Raw(b"[1]")}
