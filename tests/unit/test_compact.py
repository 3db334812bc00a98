"""Compacted logs: keys as subjects, events as messages, pairs in batches, and which tables can be held."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import event
from bridge.errors import ConfigError, IndexMismatch, NotCompactable
from bridge.pipeline import compactable
from bridge.source.catalog import Column, Relation
from bridge.stream import subjects
from bridge.stream.compact import Purge, leftover
from bridge.stream.freshness import Freshness
from bridge.stream.keyed import spread
from bridge.stream.state import Column as Kept
from bridge.stream.state import TableRecord
from bridge.stream.subjects import key_token

SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=,#")
SUBJECT = b"cdc.main.public.t"
AT = str(event.Position(1, 2, 3, 4, 0)).encode()

scalars = st.one_of(
    st.integers().map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(str).filter(lambda text: "E" not in text),
    st.sampled_from(["true", "false", '{"a": 1}', "[1, 2]", "null"]),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=80).map(json.dumps),
    st.text(alphabet="'1tn,#=", max_size=5).map(json.dumps),
    st.sampled_from(["1", "-1", "1.0", "1e5", "true", "null", "{}", "[", "'", "'1", ""]).map(json.dumps),
)
keys = st.lists(scalars, min_size=1, max_size=3)


def named(key: list[str]) -> str:
    return key_token([value.encode() for value in key])


@given(keys, keys)
def test_two_keys_never_share_a_subject(one: list[str], other: list[str]) -> None:
    same = [json.loads(v) if v[0] == '"' else [v] for v in one] == [
        json.loads(v) if v[0] == '"' else [v] for v in other
    ]
    assert (named(one) == named(other)) == same


@given(keys)
def test_a_key_is_one_harmless_token_of_bounded_length(key: list[str]) -> None:
    found = named(key)
    assert set(found) <= SAFE
    assert 0 < len(found) <= subjects.LONGEST_KEY
    assert not found.startswith("@")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (["1"], "1"),
        (['"1"'], "=271"),
        (['"alice"'], "alice"),
        (['""'], "="),
        (["1", '"1"'], "1,=271"),
        (['"1"', "1"], "=271,1"),
        (['"1,1"'], "1=2C1"),
        (['"2026-01-31"', "5"], "2026-01-31,5"),
        (['"a.b c"'], "a=2Eb=20c"),
        (['"@truncate"'], "=40truncate"),
    ],
)
def test_keys_read_well(key: list[str], expected: str) -> None:
    assert named(key) == expected


def test_a_long_key_is_its_digest() -> None:
    one, other = named([json.dumps("x" * 201)]), named([json.dumps("x" * 202)])
    assert len(one) == 65
    assert one[0] == other[0] == "#"
    assert one != other
    assert named([json.dumps("x" * 200)]) == "x" * 200


def payload(op: event.Op, partition: str | None = None, **fields: Any) -> bytes:
    data = event.head(op, "main", "public", "t")
    for name, value in fields.items():
        data += b',"%s":%s' % (name.encode(), value if isinstance(value, bytes) else json.dumps(value).encode())
    return data + event.tail(partition) + b',"lsn":"0/3"' + event.transaction("0/2", 7, None)


def test_an_event_of_a_row_goes_to_its_key_as_it_is() -> None:
    for op in ("insert", "update", "read"):
        data = payload(op, key={"id": 1}, after={"id": 1, "n": 2})
        [one] = spread(SUBJECT, AT, data, 0)
        assert (one.subject, one.op, one.position, one.payload, one.tombstone) == (
            SUBJECT + b".1",
            op.encode(),
            AT,
            data,
            False,
        )
    [gone] = spread(SUBJECT, AT, payload("delete", key={"id": 1}), 0)
    assert (gone.subject, gone.op, gone.tombstone) == (SUBJECT + b".1", b"delete", True)


def test_rows_of_partitions_stand_below_their_partition() -> None:
    [one] = spread(SUBJECT, AT, payload("insert", 'public."t 1"', key={"id": 1}, after={"id": 1}), 0)
    assert one.subject == SUBJECT + b".public=2E=22t=201=22.1"
    [whole] = spread(SUBJECT, AT, payload("truncate", key=None), 0)
    [part] = spread(SUBJECT, AT, payload("truncate", "public.t1", key=None), 0)
    assert (whole.subject, part.subject) == (SUBJECT + b".@truncate", SUBJECT + b".public=2Et1.@truncate")


def test_an_old_row_with_the_same_key_is_no_change_of_the_key() -> None:
    data = payload("update", key={"id": 1}, before={"id": 1, "n": 1}, after={"id": 1, "n": 2})
    [one] = spread(SUBJECT, AT, data, 0)
    assert one.payload == data


@pytest.mark.parametrize("old", [{"id": 1}, {"id": 1, "n": 7, "word": "x"}])
def test_a_changed_key_is_a_tombstone_and_an_insert_with_digits_kept(old: dict[str, Any]) -> None:
    data = payload("update", "public.t1", key={"id": 2}, before=old, after=b'{"id": 2,"n":1.10}')
    gone, row = spread(SUBJECT, AT, data, 0)
    assert (gone.subject, row.subject) == (SUBJECT + b".public=2Et1.1", SUBJECT + b".public=2Et1.2")
    assert (gone.op, gone.tombstone, row.op, row.tombstone) == (b"delete", True, b"insert", False)
    assert (gone.position, row.position) == (AT, str(event.Position(1, 2, 3, 4, 1)).encode())
    first, second = event.decode(gone.payload), event.decode(row.payload)
    assert (first.op, second.op) == ("delete", "insert")
    assert bytes(first.key) == b'{"id":1}'
    assert bytes(first.before) == (json.dumps(old).encode() if len(old) > 1 else b"")
    assert bytes(first.after) == b""
    assert bytes(second.before) == b""
    assert (bytes(second.key), bytes(second.after)) == (b'{"id": 2}', b'{"id": 2,"n":1.10}')
    for one in (first, second):
        assert (one.partition, one.lsn, one.commit_lsn, one.txid) == ("public.t1", "0/3", "0/2", 7)


def test_a_key_column_that_was_left_out_is_taken_from_the_key() -> None:
    data = payload("update", key={"id": "long"}, after={"n": 2}, unchanged=["id"])
    [one] = spread(SUBJECT, AT, data, 0)
    found = event.decode(one.payload)
    assert (found.op, found.unchanged) == ("update", ())
    assert json.loads(bytes(found.after)) == {"n": 2, "id": "long"}


def test_a_row_that_is_not_whole_or_has_no_key_is_refused_without_its_values() -> None:
    with pytest.raises(NotCompactable, match="leaves out body") as error:
        spread(SUBJECT, AT, payload("update", key={"id": 1}, after={"id": 1, "n": "secret"}, unchanged=["body"]), 0)
    assert "secret" not in str(error.value)
    with pytest.raises(NotCompactable, match="does not say which row"):
        spread(SUBJECT, AT, payload("insert", key=None, after={"n": 1}), 0)


REF = b'{"bucket":"b","name":"n","size":5,"digest":"d"}'


def test_a_row_that_is_stored_elsewhere_keeps_its_reference() -> None:
    [one] = spread(SUBJECT, AT, payload("update", key={"id": 1}, ref=REF), 0)
    assert one.subject == SUBJECT + b".1"
    gone, row = spread(SUBJECT, AT, payload("update", key={"id": 2}, before={"id": 1}, ref=REF), 0)
    assert b'"ref"' not in gone.payload
    assert b'"ref":' + REF in row.payload
    [same] = spread(SUBJECT, AT, data := payload("update", key={"id": "x"}, ref=REF, unchanged=["id"]), 0)
    assert same.payload == data
    with pytest.raises(NotCompactable, match="leaves out body"):
        spread(SUBJECT, AT, payload("update", key={"id": 1}, ref=REF, unchanged=["body"]), 0)


def test_a_row_nested_too_deep_is_refused_by_name() -> None:
    deep = b'{"id":1,"j":' + b"[" * 5000 + b"]" * 5000 + b"}"
    with pytest.raises(NotCompactable, match="nested too deep"):
        spread(SUBJECT, AT, payload("insert", key={"id": 1}, after=deep), 0)


def test_markers_have_subjects_of_their_own_and_the_end_tells_its_beginning() -> None:
    [begin] = spread(SUBJECT, AT, payload("snapshot", key=None, phase=b'"begin"'), 9)
    [end] = spread(SUBJECT, AT, payload("snapshot", key=None, phase=b'"end"'), 9)
    assert (begin.subject, end.subject) == (SUBJECT + b".@begin", SUBJECT + b".@end")
    assert event.decode(begin.payload).begin_seq is None
    assert (event.decode(end.payload).phase, event.decode(end.payload).begin_seq) == ("end", 9)


def test_what_is_left_behind_is_below_a_truncate_or_the_begin_that_an_end_names() -> None:
    assert leftover("cdc.main.public.t.@truncate", 8, 0) == Purge(8, "cdc.main.public.t.>", 8)
    assert leftover("cdc.main.public.t.p.@truncate", 8, 3) == Purge(8, "cdc.main.public.t.p.>", 8)
    assert leftover("cdc.main.public.t.@end", 8, 3) == Purge(8, "cdc.main.public.t.>", 3)
    assert leftover("cdc.main.public.t.@begin", 8, 3) is None
    assert leftover("cdc.main.public.t.5", 8, 3) is None


def table(key: tuple[str, ...] = ("id",), identity: str = "d", **columns: tuple[int, bool]) -> Relation:
    found = tuple(Column(name, oid, "", toast, virtual=False) for name, (oid, toast) in columns.items())
    return Relation(5, "public", "t", "r", ("public", "t"), identity, key, found)


INT, BIG, TEXT = (23, False), (20, False), (25, True)


def test_a_table_must_have_a_key_and_whole_updates() -> None:
    assert compactable.finding(table(id=INT, n=INT), ()) is None
    assert compactable.finding(table(identity="f", id=INT, body=TEXT), ()) is None
    assert compactable.finding(table(id=INT, body=TEXT), {"body"}) is None
    assert compactable.finding(table(id=TEXT, n=INT), ()) is None
    assert "no key" in str(compactable.finding(table(key=(), identity="f", id=INT), ()))
    assert "leave out body" in str(compactable.finding(table(id=INT, body=TEXT), ()))
    with pytest.raises(ConfigError, match="1 table cannot"):
        compactable.refuse([table(id=INT), table(id=INT, body=TEXT)], {})


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        (table(id=INT), table(id=INT, n=INT), True),
        (table(id=INT), table(id=BIG), True),
        (table(id=INT), table(key=("nr",), nr=INT), True),
        (table(id=INT), table(id=TEXT), False),
        (table(id=INT, n=INT), table(key=("n",), id=INT, n=INT), False),
        (table(id=INT, n=INT), table(key=("id", "n"), id=INT, n=INT), False),
        (table(key=("id", "n"), id=INT, n=INT), table(id=INT), False),
    ],
)
def test_a_key_that_moves_its_rows_is_refused(was: Relation, now: Relation, same: bool) -> None:
    kept = TableRecord([Kept(c.name, c.type, c.oid) for c in was.columns], list(was.key))
    if same:
        compactable.check(now, (), kept)
    else:
        with pytest.raises(NotCompactable, match="under their old keys"):
            compactable.check(now, (), kept)


def test_a_dropped_table_is_judged_by_its_changes() -> None:
    compactable.check(msgspec.structs.replace(table(key=()), oid=0), (), None)


def test_a_reader_is_late_by_what_it_has_done_not_by_what_it_was_given() -> None:
    fresh = Freshness("posts", tombstone_ttl=1000, since=0)
    assert fresh.lost
    with pytest.raises(IndexMismatch, match="posts"):
        fresh.check()
    now = 1 << 62  # far in the future, in nanoseconds
    fresh.taken(5, now)
    fresh.done(4)
    assert fresh.lost
    fresh.done(5)
    assert not fresh.lost
    fresh.check()
