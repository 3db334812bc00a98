"""Lines of COPY as events: whatever is in a row, it has the bytes that the same value has in a change."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.source import copied
from bridge.source.copied import Column, Lines
from bridge.source.values import Type, codec

INT8, TEXT, BOOL, NUMERIC, FLOAT8, TIMESTAMPTZ, DATE, JSONB, BYTEA, TEXTS = (
    20, 25, 16, 1700, 701, 1184, 1082, 3802, 17, 1009,
)  # fmt: skip
DOMAIN = 90_000
TYPES = {TEXTS: Type(TEXTS, "_text", element=TEXT), DOMAIN: Type(DOMAIN, "price", base=NUMERIC)}
HEAD, CLOSING = b'{"op":"read"', b',"part":"100%"}'
# COPY's own escapes; it prints every other character as it is. Source: PostgreSQL documentation, COPY, "Text Format".
ESCAPES = str.maketrans(
    {"\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}
)  # fmt: skip


def lines(oids: list[int], key: list[int]) -> Lines:
    columns = [Column(b',"c%d%%":' % n, oid, codec(oid, TYPES).convert) for n, oid in enumerate(oids)]
    return Lines(columns, key, HEAD, CLOSING)


def line(*values: str | None) -> bytes:
    """What COPY prints of a row."""
    return "\t".join(["\\N" if value is None else value.translate(ESCAPES) for value in values]).encode() + b"\n"


def event(oids: list[int], key: list[int], values: list[str | None]) -> bytes:
    """The event, member by member."""
    members = [
        b'"c%d%%":%b' % (n, b"null" if value is None else codec(oid, TYPES).convert(value))
        for n, (oid, value) in enumerate(zip(oids, values, strict=True))
    ]
    keys = b"{%b}" % b",".join([members[place] for place in key]) if key else b"null"
    return b'%b,"key":%b,"after":{%b}%b' % (HEAD, keys, b",".join(members), CLOSING)


TRICKY = st.text(st.sampled_from('\\"NvntbfruU0%{}, \t\n\r\v\b\f\x01\x1f\x7f\x85é\u2028😀'), max_size=12)
TEXTS_OF_ALL_KINDS = st.none() | TRICKY | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(TEXTS_OF_ALL_KINDS, min_size=1, max_size=6), st.integers(0, 3))
@example(["\\N", None, "\\\\N", '"', '\\"', "\\v", "\v"], 1)
@example(["\x01"], 0)
@example([None], 1)
def test_a_text_is_written_as_it_is_in_a_change(texts: list[str | None], keys: int) -> None:
    oids, key = [TEXT] * len(texts), list(range(min(keys, len(texts))))
    reader = lines(oids, key)
    found = reader.payload(line(*texts))
    assert found == event(oids, key, texts)
    if key:
        assert reader.key(found) == msgspec.json.encode({f"c{n}%": texts[n] for n in key})
    assert list(msgspec.json.decode(found)["after"].values()) == texts


@pytest.mark.parametrize("beside", ["plain", 'a "quoted" one', "a \\ backslash", "a\vtab", "\x01"])
@pytest.mark.parametrize(
    ("oid", "values"),
    [
        (INT8, ["0", "-9223372036854775808"]),
        (BOOL, ["t", "f"]),
        (NUMERIC, ["1.10", "NaN", "Infinity", "-Infinity", "-0.000000000000000000000001"]),
        (DOMAIN, ["1.10", "NaN"]),
        (FLOAT8, ["1e+20", "-1.5e-07", "Infinity"]),
        (
            TIMESTAMPTZ,
            ["2026-01-01 00:00:00.5+00", "0044-03-15 12:00:00+00 BC", "12026-01-01 00:00:00+00", "infinity",
             "-infinity"],
        ),
        (DATE, ["2026-01-01", "0044-03-15 BC", "12026-01-01", "-infinity"]),
        (JSONB, ['{"a": "\\"b\\"\\n"}', "null", '"\\\\N"']),
        (BYTEA, ["\\x", "\\xdeadbeef"]),
        (TEXTS, ["{}", '{a,NULL,"b \\"c\\"","\\\\N","NULL"}', "[2:3]={a,b}"]),
    ],
)  # fmt: skip
def test_every_type_is_written_as_it_is_in_a_change(oid: int, values: list[str], beside: str) -> None:
    oids = [TEXT, oid]
    reader = lines(oids, [0])
    for value in [*values, None]:
        assert reader.payload(line(beside, value)) == event(oids, [0], [beside, value])


def test_a_table_may_be_null_in_more_ways_than_are_kept() -> None:
    oids = [INT8] + [TEXT, BOOL] * 5
    reader = lines(oids, [0])
    ways = list(itertools.product([False, True], repeat=10))
    assert len(ways) > copied.FORMS
    for way in ways:
        row = ["1", *(None if null else "t" for null in way)]
        assert reader.payload(line(*row)) == event(oids, [0], row)


def test_a_table_without_columns_has_rows() -> None:
    assert lines([], []).payload(b"\n") == event([], [], [])


@pytest.mark.parametrize(
    "data", [b"1\ta\xff\n", b"1\ta\xff\x01\n", b"1\t\xed\xa0\x80\n", b"1\n", b"1\ta\tb\n"]
)  # fmt: skip
def test_what_is_no_text_or_no_row_of_the_table_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"utf-8|zip"):
        lines([INT8, TEXT], [0]).payload(data)


def test_the_values_of_a_key_are_told_as_postgresql_reads_them() -> None:
    row: list[str | None] = ["a\tb\\", "x", "2026-01-01 00:00:00+00"]
    assert lines([TEXT, TEXT, TIMESTAMPTZ], [2, 0]).texts(line(*row)) == [row[2], row[0]]
