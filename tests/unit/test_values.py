"""PostgreSQL's text of a value as JSON: what stream and snapshot share."""

from __future__ import annotations

import msgspec
import pytest

from bridge.source import values
from bridge.source.values import Type, codec, from_wal2json

TYPES = {
    t.oid: t
    for t in [
        Type(23, "int4"), Type(25, "text"), Type(17, "bytea"), Type(603, "box", delimiter=";"),
        Type(1007, "_int4", element=23), Type(1009, "_text", element=25), Type(1001, "_bytea", element=17),
        Type(1020, "_box", element=603, delimiter=";"), Type(1231, "_numeric", element=1700),
        Type(9001, "positive", base=23), Type(9002, "email", base=25), Type(9003, "nested", base=9001),
        Type(9004, "tags", base=1009), Type(9005, "_tags", element=9004), Type(9006, "more", base=9004),
        Type(9007, "_more", element=9006), Type(9008, "_positive", element=9001),
    ]
}  # fmt: skip


def convert(oid: int, text: str) -> bytes:
    return codec(oid, TYPES).convert(text)


@pytest.mark.parametrize(
    ("oid", "text", "expected"),
    [
        (values.INT8, "9223372036854775807", b"9223372036854775807"),
        (values.NUMERIC, "1.10", b"1.10"),
        (values.NUMERIC, "9" * 400, b"9" * 400),
        (values.NUMERIC, "NaN", b'"NaN"'),
        (values.FLOAT8, "-Infinity", b'"-Infinity"'),
        (values.FLOAT8, "1e+20", b"1e+20"),
        (values.FLOAT8, "-0", b"-0"),
        (values.BOOL, "t", b"true"),
        (values.BOOL, "false", b"false"),
        (values.JSON, '{ "a" :1.0}', b'{ "a" :1.0}'),
        (values.BYTEA, "\\x00ff", b'"AP8="'),
        (values.BYTEA, "00ff", b'"AP8="'),
        (values.BYTEA, "\\x", b'""'),
        (values.DATE, "2026-02-28", b'"2026-02-28"'),
        (values.DATE, "0044-03-15 BC", b'"-0043-03-15"'),
        (values.DATE, "0001-01-01 BC", b'"0000-01-01"'),
        (values.DATE, "10000-01-01", b'"+10000-01-01"'),
        (values.DATE, "infinity", b'"infinity"'),
        (values.TIMESTAMP, "2026-01-02 03:04:05.678", b'"2026-01-02T03:04:05.678"'),
        (values.TIMESTAMPTZ, "2026-01-02 03:04:05.678901+00", b'"2026-01-02T03:04:05.678901Z"'),
        (values.TIMESTAMPTZ, "0044-03-15 12:00:00+00 BC", b'"-0043-03-15T12:00:00Z"'),
        (values.TIMESTAMPTZ, "-infinity", b'"-infinity"'),
        (25, 'quote " back \\ line \n é', b'"quote \\" back \\\\ line \\n \xc3\xa9"'),
        (999_999, "of a type that nobody knows", b'"of a type that nobody knows"'),
        (9001, "42", b"42"),
        (9003, "42", b"42"),
        (9002, "a@b", b'"a@b"'),
    ],
)
def test_a_value_keeps_every_digit_and_character(oid: int, text: str, expected: bytes) -> None:
    assert convert(oid, text) == expected
    msgspec.json.decode(expected)


@pytest.mark.parametrize(
    ("oid", "text", "expected"),
    [
        (1007, "{}", b"[]"),
        (1007, "{1,NULL,3}", b"[1,null,3]"),
        (1007, "{{1,2},{3,4}}", b"[[1,2],[3,4]]"),
        (1009, '{plain,"with, comma","quote \\" back \\\\","NULL",NULL,""}',
         b'["plain","with, comma","quote \\" back \\\\","NULL",null,""]'),
        (1007, "[0:2]={1,2,3}", b'"[0:2]={1,2,3}"'),
        (1001, '{"\\\\x00ff",NULL}', b'["AP8=",null]'),
        (1020, "{(1,1),(0,0);(2,2),(1,1)}", b'["(1,1),(0,0)","(2,2),(1,1)"]'),
        (1231, "{1.10,NaN}", b'[1.10,"NaN"]'),
        (9005, '{"{a,NULL}","{}",NULL}', b'[["a",null],[],null]'),
        (9005, '{"{{a},{b}}"}', b'[[["a"],["b"]]]'),
        (9005, '{{"{a}"},{"{b}"}}', b'"{{\\"{a}\\"},{\\"{b}\\"}}"'),
        (9007, '{{"{a}"}}', b'"{{\\"{a}\\"}}"'),
        (9005, '{"[0:0]={a}"}', b'["[0:0]={a}"]'),
        (9008, "{{1},{2}}", b"[[1],[2]]"),
    ],
)  # fmt: skip
def test_an_array_of_any_shape_is_a_json_array_or_postgresqls_text(oid: int, text: str, expected: bytes) -> None:
    assert convert(oid, text) == expected
    msgspec.json.decode(expected)


@pytest.mark.parametrize("text", ["plain", "é\U0001f600", "\x01\x1f\x7f\b\f\n\r\t", 'q"\\/', ""])
def test_text_that_wal2json_escaped_is_the_same_bytes_as_text_that_copy_gave(text: str) -> None:
    # wal2json escapes as PostgreSQL's escape_json does; a text column's value is passed on as it is.
    escapes = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
    raw = '"' + "".join(escapes.get(c, f"\\u{ord(c):04x}" if c < " " else c) for c in text) + '"'
    assert codec(25, TYPES).raw
    assert convert(25, text) == raw.encode()


@pytest.mark.parametrize(
    ("raw", "oid", "expected"),
    [
        (b"null", 23, b"null"),
        (b"42", 23, b"42"),
        (b'"42"', 9001, b"42"),
        (b'"t"', values.BOOL, b"true"),
        (b'"NaN"', values.NUMERIC, b'"NaN"'),
        (b'"{\\"a\\": 1.0}"', values.JSONB, b'{"a": 1.0}'),
    ],
)
def test_what_wal2json_says_becomes_the_columns_type(raw: bytes, oid: int, expected: bytes) -> None:
    assert from_wal2json(msgspec.Raw(raw), codec(oid, TYPES).convert) == expected


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"a":[' * 3000 + '"]}\\""' + "]}" * 3000 + " "])
def test_json_that_is_nested_deeper_than_a_decoder_goes_is_taken(text: str) -> None:
    assert convert(values.JSONB, text) == text.encode()


@pytest.mark.parametrize("deep", [0, 5000])
@pytest.mark.parametrize("text", ["", "{", '{"a":1},"op":"delete"', "[1]]", '["', "[1}", "[] []", "[],1", '[1]"x"'])
def test_json_that_is_none_is_refused(text: str, deep: int) -> None:
    with pytest.raises(ValueError, match=r"JSON|truncated"):
        convert(values.JSON, "[" * deep + text + "]" * deep if not deep else "[" * deep + "]" * deep + text + "]")
