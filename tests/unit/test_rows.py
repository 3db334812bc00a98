"""Changes and snapshot rows as events."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bridge import event
from bridge.errors import BadRecord, ConfigError
from bridge.source import rows, wal2json
from bridge.source.catalog import Column, Relation
from bridge.source.rows import Plan, Stale
from bridge.source.values import codec

COLUMNS = (
    Column("id", 23, "integer", toast=False, virtual=False),
    Column("body", 25, "text", toast=True, virtual=False),
    Column("price", 1700, "numeric", toast=False, virtual=False),
    Column("secret", 25, "text", toast=True, virtual=False),
)
CODECS = {oid: codec(oid, {}) for oid in (20, 23, 25, 1700)}
CLOSING = event.transaction("0/200", 7, "2026-01-01T00:00:00.000000Z")


def plan(identity: str = "d", key: tuple[str, ...] = ("id",), exclude: tuple[str, ...] = (), **changes: Any) -> Plan:
    relation = Relation(1, "public", "t", "r", ("public", "t"), identity, key, COLUMNS)
    return rows.plan(msgspec.structs.replace(relation, **changes), "main", "cdc.main.public.t", CODECS, exclude)


def cells(**values: str) -> list[dict[str, Any]]:
    oids = {"id": 23, "body": 25, "price": 1700, "secret": 25, "extra": 20}
    return [{"name": n, "typeoid": oids[n], "value": msgspec.Raw(v.encode())} for n, v in values.items()]


def record(
    action: str, columns: list[Any] | None = None, identity: list[Any] | None = None, pk: tuple[str, ...] = ("id",)
) -> wal2json.Record:
    return wal2json.decode(
        msgspec.json.encode(
            {"action": action, "lsn": "0/100", "schema": "public", "table": "t", "columns": columns or [],
             "identity": identity or [], "pk": [{"name": name, "typeoid": 23} for name in pk]}
        )
    )  # fmt: skip


def change(
    made: Plan,
    action: str,
    columns: list[Any] | None = None,
    identity: list[Any] | None = None,
    pk: tuple[str, ...] | None = None,
) -> event.Event:
    raw = record(action, columns, identity, made.key if pk is None else pk)
    return event.decode(rows.change(made, raw, CLOSING))


FULL_ROW = cells(id="1", body='"b"', price="1.10", secret='"s"')


def test_an_insert_has_key_and_row_with_its_exact_digits() -> None:
    found = change(plan(), "I", FULL_ROW)
    assert (found.op, bytes(found.key), found.lsn, found.commit_lsn, found.txid) == (
        "insert", b'{"id":1}', "0/100", "0/200", 7,
    )  # fmt: skip
    assert bytes(found.after) == b'{"id":1,"body":"b","price":1.10,"secret":"s"}'
    assert not bytes(found.before)


def test_an_update_that_leaves_a_toasted_column_alone_names_it_and_does_not_write_null() -> None:
    found = change(plan(), "U", cells(id="1", price="2", secret='"s"'), cells(id="1"))
    assert found.unchanged == ("body",)
    assert bytes(found.after) == b'{"id":1,"price":2,"secret":"s"}'
    assert not bytes(found.before)


def test_full_identity_fills_what_an_update_left_alone_from_the_old_row() -> None:
    found = change(plan("f"), "U", cells(id="1", price="2", secret='"s"'), FULL_ROW)
    assert found.unchanged == ()
    assert msgspec.json.decode(found.after) == {"id": 1, "body": "b", "price": 2, "secret": "s"}
    assert msgspec.json.decode(found.before)["price"] == 1.1


def test_a_change_of_the_key_carries_the_old_one() -> None:
    found = change(plan(), "U", cells(id="2", body='"b"', price="1", secret='"s"'), cells(id="1"))
    assert (bytes(found.key), bytes(found.before)) == (b'{"id":2}', b'{"id":1}')


def test_a_delete_has_the_key_and_with_full_identity_the_row() -> None:
    assert bytes(change(plan(), "D", identity=cells(id="1")).key) == b'{"id":1}'
    found = change(plan("f"), "D", identity=FULL_ROW)
    assert bytes(found.before) == b'{"id":1,"body":"b","price":1.10,"secret":"s"}'


def test_a_table_without_key_has_none() -> None:
    found = change(plan(key=()), "I", FULL_ROW)
    assert bytes(found.key) == b"null"


@pytest.mark.parametrize("action", ["I", "U"])
def test_an_excluded_column_is_nowhere(action: str) -> None:
    found = change(plan("f", exclude=("secret",)), action, FULL_ROW, FULL_ROW if action == "U" else None)
    assert b"secret" not in bytes(found.after) + bytes(found.before)
    toasted = change(plan(exclude=("secret",)), "U", cells(id="1", price="1"), cells(id="1"))
    assert toasted.unchanged == ("body",)


def test_a_key_cannot_be_excluded() -> None:
    with pytest.raises(ConfigError, match="id, part of its key"):
        plan(exclude=("id",))


def test_an_excluded_column_that_the_catalogue_does_not_know_any_more_is_hidden_all_the_same() -> None:
    old = record("I", [*FULL_ROW, *cells(extra="5")])
    found = event.decode(rows.change(plan(exclude=("extra",)).adapted(old, CODECS, None), old, CLOSING))
    assert msgspec.json.decode(found.after).keys() == {"id", "body", "price", "secret"}


@pytest.mark.parametrize(
    ("action", "columns", "identity"),
    [
        ("I", cells(id="1", body='"b"', price="1"), None),
        ("I", [*FULL_ROW, *cells(extra="1")], None),
        ("U", cells(id="1", body='"b"', secret='"s"'), cells(id="1")),
        ("U", FULL_ROW, cells(price="1", id="1")),
        ("D", None, cells(price="1")),
    ],
)
def test_a_change_that_does_not_fit_the_catalogue_is_noticed(action: str, columns: Any, identity: Any) -> None:
    with pytest.raises(Stale):
        change(plan(), action, columns, identity)


def test_a_change_from_before_the_table_was_altered_is_taken_as_it_is() -> None:
    old = record("U", cells(id="1", extra="5"), cells(id="1"))
    found = event.decode(rows.change(plan().adapted(old, CODECS, None), old, CLOSING))
    assert bytes(found.after) == b'{"id":1,"extra":5}'


@pytest.mark.parametrize(
    ("pk", "key"), [(("price",), b'{"price":1.10}'), ((), b"null"), (("id", "price"), b'{"id":1,"price":1.10}')]
)
def test_the_key_is_the_one_that_the_table_had_when_the_change_was_made(pk: tuple[str, ...], key: bytes) -> None:
    with pytest.raises(Stale):
        change(plan(), "I", FULL_ROW, pk=pk)
    old = record("I", FULL_ROW, pk=pk)
    fitted = plan().adapted(old, CODECS, None)
    assert bytes(event.decode(rows.change(fitted, old, CLOSING)).key) == key


def test_a_change_from_when_another_index_was_the_identity_has_that_ones_key() -> None:
    old = record("U", FULL_ROW, cells(price="1.10"), pk=("id",))
    found = event.decode(rows.change(plan().adapted(old, CODECS, None), old, CLOSING))
    assert bytes(found.key) == b'{"price":1.10}'


def test_a_partitions_events_go_under_the_roots_name() -> None:
    found = change(plan(schema="arch", table="T 2026"), "I", FULL_ROW)
    assert (found.schema, found.table, found.partition) == ("public", "t", 'arch."T 2026"')


def test_a_row_of_copy_gives_the_same_row_and_key_as_an_insert() -> None:
    reader = rows.Reader(plan(), CLOSING)
    found = event.decode(reader.payload(b"1\ta\\tb\\\\c\\nd\t1.10\t\\N\n"))
    streamed = change(plan(), "I", cells(id="1", body='"a\\tb\\\\c\\nd"', price="1.10", secret="null"))
    assert (found.op, bytes(found.key), bytes(found.after)) == ("read", bytes(streamed.key), bytes(streamed.after))
    assert reader.columns == '"id", "body", "price", "secret"'


@pytest.mark.parametrize(
    ("notice", "expected"),
    [
        ('no tuple identifier for UPDATE in table "public"."we"ird"', ("UPDATE", "public", 'we"ird')),
        ("something else", None),
    ],
)
def test_the_plugins_warning_about_a_lost_change_is_understood(notice: str, expected: Any) -> None:
    assert wal2json.missing_identity(notice) == expected


def test_a_records_error_names_the_place_and_no_value() -> None:
    with pytest.raises(BadRecord) as error:
        wal2json.decode(b'{"action":"I","lsn":"0/1","columns":[{"name":"a","typeoid":"planted","value":1}]}')
    assert "planted" not in str(error.value)
    assert "$.columns[0].typeoid" in str(error.value)


def test_a_commits_time_is_iso_8601_with_six_digits() -> None:
    assert wal2json.timestamp("2026-11-23 00:28:16.5+00") == "2026-11-23T00:28:16.500000Z"
    assert wal2json.timestamp("2026-11-23 00:28:16+00") == "2026-11-23T00:28:16.000000Z"


BEGIN = (
    b'{"action":"B","xid":727,"timestamp":"2026-11-28 12:30:38.780275+00","origin":0,'
    b'"lsn":"A/19256A8","nextlsn":"A/19256D8"}'
)


@pytest.mark.parametrize("fraction", [b".780275", b".78", b".000001"])
def test_the_usual_begin_of_a_transaction_is_read_as_decoding_reads_it(fraction: bytes) -> None:
    data = BEGIN.replace(b".780275", fraction)
    begun, record = wal2json.begin(data), wal2json.decode(data)
    assert begun is not None
    at = wal2json.timestamp(record.timestamp)
    assert begun == (727, 0xA019256A8, 0xA019256D8, at, event.transaction(record.nextlsn, record.xid, at))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b'"origin":0', b'"origin":1'),
        (b".780275", b""),
        (b"2026-11-28", b"12026-11-28"),
        (b"2026-11-28", b"2026-02-30"),
        (b"12:30:38", b"24:30:38"),
        (b"+00", b"+01"),
        (b'"xid":727', b'"xid":0727'),
        (b'"xid":727,', b""),
        (b"A/19256D8", b"a/19256d8"),
        (b"A/19256D8", b"A/119256D80"),
        (b'D8"}', b'D8"} '),
        (b'"action":"B"', b'"action":"C"'),
    ],
)
def test_any_other_begin_is_left_to_decoding(part: bytes, other: bytes) -> None:
    assert part in BEGIN
    assert wal2json.begin(BEGIN.replace(part, other)) is None
