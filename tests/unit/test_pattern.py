"""What a pattern takes gives the bytes that decoding gives; what is not usual is left to decoding."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import event
from bridge.source import pattern, rows, wal2json
from bridge.source.catalog import Column, Relation
from bridge.source.pattern import Patterns
from bridge.source.rows import Plan, Stale
from bridge.source.values import codec

INT, TEXT, STAMP, BYTEA, BOOL, FLOAT = 23, 25, 1184, 17, 16, 701
CODECS = {oid: codec(oid, {}) for oid in (INT, TEXT, STAMP, BYTEA, BOOL, FLOAT)}
CLOSING = event.transaction("0/200", 7, "2026-01-01T00:00:00.000000Z")
NAME = ("public", "t")
COLUMNS = (("id", INT), ("body", TEXT), ("at", STAMP), ('we"ird ]% \\', TEXT))


def plan(
    identity: str = "d",
    key: tuple[str, ...] = ("id",),
    exclude: tuple[str, ...] = (),
    columns: tuple[tuple[str, int], ...] = COLUMNS,
) -> Plan:
    found = tuple(Column(name, oid, "", toast=oid == TEXT, virtual=False) for name, oid in columns)
    return rows.plan(Relation(1, *NAME, "r", NAME, identity, key, found), "main", "cdc.main", CODECS, exclude)


def cells(values: dict[str, bytes], of: tuple[tuple[str, int], ...] = COLUMNS) -> list[dict[str, Any]]:
    oids = dict(of)
    return [{"name": n, "typeoid": oids[n], "value": msgspec.Raw(v)} for n, v in values.items()]


def record(
    action: str,
    columns: list[dict[str, Any]],
    identity: list[dict[str, Any]] | None = None,
    pk: tuple[str, ...] | None = ("id",),
    oids: tuple[tuple[str, int], ...] = COLUMNS,
) -> bytes:
    """A record as wal2json writes it."""
    whole: dict[str, Any] = {
        "action": action, "xid": 7, "timestamp": "2026-01-01 00:00:00+00", "lsn": "0/1AB", "schema": "public",
        "table": "t", "columns": columns,
    }  # fmt: skip
    if identity is not None:
        whole["identity"] = identity
    if pk is not None:
        whole["pk"] = [{"name": n, "typeoid": dict(oids)[n]} for n in pk]
    return msgspec.json.encode(whole)


def trained(made: Plan, known: dict[tuple[str, str], Plan | None] | None = None) -> Patterns:
    """Patterns that have seen enough of the table to have one."""
    found = Patterns({NAME: made} if known is None else known)
    for _ in range(pattern.BUSY):
        found.learn(NAME, made, record("I", []))
    return found


def taken(made: Plan, data: bytes) -> bytes | None:
    """The event that the pattern gives; it is the one that decoding gives."""
    found = trained(made).read(data, CLOSING)
    if found is None:
        return None
    of, at, payload = found
    assert (of, at) == (made, b"0/1AB")
    assert payload == rows.change(made, wal2json.decode(data), CLOSING)
    return payload


ROW = {"id": b"1", "body": b'"b"', "at": b'"2026-01-01 00:00:00+00"', 'we"ird ]% \\': b"null"}


def test_usual_inserts_and_updates_are_taken_with_their_values_converted() -> None:
    insert, update = record("I", cells(ROW)), record("U", cells(ROW), cells({"id": b"1"}))
    for data in insert, update:
        payload = taken(plan(), data)
        assert payload is not None
        assert bytes(event.decode(payload).key) == b'{"id":1}'
        assert msgspec.json.decode(event.decode(payload).after) == {
            "id": 1, "body": "b", "at": "2026-01-01T00:00:00Z", 'we"ird ]% \\': None,
        }  # fmt: skip


def test_hidden_columns_are_left_out_and_a_key_of_several_columns_is_in_its_order() -> None:
    made = plan(key=("body", "id"), exclude=("at",))
    identity = cells({"body": b'"b"', "id": b"1"})
    payload = taken(made, record("U", cells(ROW), identity, ("body", "id")))
    assert payload is not None
    assert b'"key":{"body":"b","id":1}' in payload
    assert b"2026-01-01T00:00:00Z" not in payload


@pytest.mark.parametrize(
    "value",
    [r'"a\nb\\"', r'"a\\"', r'"\\\""', r'"x\"},{"', r'"}],\"pk\":[{\"name\":\"id\",\"typeoid\":23}]}"', '"é€"', '""'],
)
def test_any_string_gives_the_same_bytes_or_is_left_to_decoding(value: str) -> None:
    for name in ("body", 'we"ird ]% \\'):
        payload = taken(plan(), record("I", cells({**ROW, name: value.encode()})))
        assert (payload is None) == ('"' in value[1:-1])


@pytest.mark.parametrize(
    "data",
    [
        record("D", [], cells({"id": b"1"})),
        record("T", [], None, None),
        record("U", cells(ROW), cells({"id": b"2"})),  # the key changed
        record("U", cells({k: v for k, v in ROW.items() if k != "body"}), cells({"id": b"1"})),  # TOASTed
        record("I", cells(dict(reversed(ROW.items())))),
        record("I", cells({**ROW, "new": b"1"}, (*COLUMNS, ("new", INT)))),
        record("I", cells(ROW, (("id", TEXT), *COLUMNS[1:]))),
        record("I", cells(ROW), None, ("id", "body")),  # another primary key
        record("I", cells(ROW), None, None),
        record("I", cells({**ROW, "id": b"[1]"})),
        record("I", cells(ROW))[:-1],
        record("I", cells(ROW)) + b" ",
        b"",
        b"{}",
    ],
)
def test_what_is_not_usual_is_left_to_decoding(data: bytes) -> None:
    assert trained(plan()).read(data, CLOSING) is None


def test_tables_without_a_key_or_with_full_identity_have_usual_inserts_only() -> None:
    without = plan(key=())
    assert taken(without, record("I", cells(ROW), None, ())) is not None
    assert taken(without, record("I", cells(ROW), None, None)) is not None
    assert taken(without, record("I", cells(ROW))) is None
    full = plan("f")
    assert taken(full, record("I", cells(ROW))) is not None
    assert taken(full, record("U", cells(ROW), cells(ROW))) is None
    whole = tuple((name, INT) for name in ("a", "b"))
    both = {"a": b"1", "b": b"2"}
    all_key = plan("f", ("a", "b"), columns=whole)
    update = record("U", cells(both, whole), cells(both, whole), ("a", "b"), whole)
    assert taken(all_key, update) is None


def test_a_key_by_another_index_does_not_look_at_the_primary_key() -> None:
    made = plan("i", ("body",))
    for pk in ("id",), ("body",), (), None:
        assert taken(made, record("U", cells(ROW), cells({"body": b'"b"'}), pk)) is not None


def test_a_table_is_decoded_until_it_is_busy_and_again_when_its_plan_is_another() -> None:
    made, data = plan(), record("I", cells(ROW))
    known: dict[tuple[str, str], Plan | None] = {NAME: made}
    found = Patterns(known)
    for _ in range(pattern.BUSY):
        assert found.read(data, CLOSING) is None
        found.learn(NAME, made, data)
    assert found.read(data, CLOSING) is not None
    other = plan(exclude=("body",))
    for today in other, None:
        known[NAME] = today
        assert found.read(data, CLOSING) is None
    known[NAME] = other
    for _ in range(pattern.BUSY):
        found.learn(NAME, other, data)
    taken_ = found.read(data, CLOSING)
    assert taken_ is not None
    assert taken_[0] is other


def test_a_very_wide_table_has_no_pattern() -> None:
    columns = tuple((f"c{n}", INT) for n in range(pattern.WIDEST + 1))
    values = {name: b"1" for name, _ in columns}
    made = plan(key=("c0",), columns=columns)
    assert taken(made, record("I", cells(values, columns), None, ("c0",), columns)) is None
    fits = plan(key=("c0",), columns=columns[:-1])
    values.popitem()
    assert taken(fits, record("I", cells(values, columns), None, ("c0",), columns)) is not None


@pytest.mark.parametrize("value", [b"0", b"-7", b"1234567890", b"null", b'"12"', b"-0", b"1.5", b"1e3", b"true"])
@pytest.mark.parametrize("oid", [INT, BOOL, FLOAT])
def test_what_is_tried_first_for_a_type_decides_nothing(oid: int, value: bytes) -> None:
    made = plan(columns=(("id", INT), ("x", oid)))
    data = record("I", cells({"id": b"1", "x": value}, (("id", INT), ("x", oid))))
    payload = taken(made, data)
    assert payload is None or b'"x":%b' % value in payload
    usual = value[:1] in (b"t", b"n", b'"') if oid == BOOL else value not in (b"-0", b"1.5", b"1e3", b"true")
    assert payload is not None or not usual


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5)
VALUES = {
    INT: st.integers(-(2**31), 2**31 - 1).map(lambda n: b"%d" % n),
    TEXT: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).map(msgspec.json.encode),
    STAMP: st.datetimes().map(lambda at: msgspec.json.encode(f"{at:%Y-%m-%d %H:%M:%S}+00")) | st.just(b'"infinity"'),
    BYTEA: st.binary().map(lambda data: msgspec.json.encode(data.hex())),
}


@st.composite
def changes(draw: st.DrawFn) -> tuple[Plan, bytes]:
    columns = tuple(
        (name, draw(st.sampled_from([INT, TEXT, STAMP, BYTEA])))
        for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    )
    names = [name for name, _ in columns]
    key = tuple(draw(st.lists(st.sampled_from(names), unique=True)))
    hidden = tuple(draw(st.lists(st.sampled_from(names), unique=True)))
    made = plan(
        draw(st.sampled_from("dfi")), key, tuple(name for name in hidden if name not in key), columns
    )  # fmt: skip
    values = {name: draw(VALUES[oid] | st.just(b"null")) for name, oid in columns}
    action = draw(st.sampled_from("IU"))
    row = cells({name: values[name] for name in names if action == "I" or draw(st.integers(0, 9))}, columns)
    identity = None
    if action == "U":
        old = {name: values[name] if draw(st.integers(0, 9)) else draw(VALUES[dict(columns)[name]]) for name in key}
        identity = cells(old, columns)
    pk = draw(st.sampled_from([key, key, key, key[:1], (), None]))
    return made, record(action, row, identity, pk, columns)


@given(changes())
def test_what_a_pattern_takes_is_what_decoding_gives(drawn: tuple[Plan, bytes]) -> None:
    made, data = drawn
    try:
        taken(made, data)
    except Stale:
        pytest.fail("decoding would have found the plan to be stale")
