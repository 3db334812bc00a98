"""What fields take: never an error, never an empty range that is none, the same again for what was converted."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.index import convert, nested
from bridge.index.convert import converter, fit


def made(field: str, value: Any, type_name: str = "", **parameters: Any) -> Any:
    """What a field's converter makes of a value."""
    found = converter({"type": field, **parameters}, type_name)
    assert found is not None
    return json.loads(found(json.dumps(value).encode()))


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("integer_range", "[1,5)", {"gte": 1, "lt": 5}),
        ("integer_range", "empty", None),
        ("integer_range", "(,5)", {"lt": 5}),
        ("integer_range", "(,)", {}),
        ("integer_range", "[1.5,2.5]", {"gte": 2, "lte": 2}),
        ("integer_range", "(1,2)", None),
        ("integer_range", "[1,3000000000)", {"gte": 1}),
        ("integer_range", "[3000000000,)", None),
        ("long_range", "[-9223372036854775808,9223372036854775807)",
         {"gte": -9223372036854775808, "lt": 9223372036854775807}),
        ("integer_range", "{}", []),
        ("integer_range", "{[1,3),[5,7)}", [{"gte": 1, "lt": 3}, {"gte": 5, "lt": 7}]),
        ("integer_range", ["[1,2)", "empty", None], [{"gte": 1, "lt": 2}]),
        ("integer_range", "[0:0]={\"[1,2)\"}", None),
        ("double_range", "(1.5,2.5]", {"gt": 1.5, "lte": 2.5}),
        ("double_range", "[1,Infinity]", {"gte": 1}),
        ("double_range", "[NaN,]", None),
        ("double_range", "(1,1.0000000000000000001)", {"gte": 1, "lte": 1}),
        ("double_range", "(0.1,0.10000000000000002)", {"gte": 0.1, "lte": 0.10000000000000002}),
        ("double_range", f"[1{'0' * 400},)", None),
        ("double_range", f"[-1{'0' * 400},1)", {"lt": 1}),
        ("float_range", "[1e39,)", None),
        ("float_range", "(1,2)", {"gte": 1, "lte": 2}),
        ("date_range", "[2020-01-01,2020-02-01)", {"gte": "2020-01-01", "lt": "2020-02-01"}),
        ("date_range", '["2020-01-01 00:00:00.5+00",infinity]', {"gte": "2020-01-01T00:00:00.500Z"}),
        ("date_range", '[-infinity,"2020-01-01 00:00:00.123456")', {"lte": "2020-01-01T00:00:00.123456"}),
        ("date_range", '("2020-01-01 00:00:00","2020-01-01 00:00:00.001")',
         {"gte": "2020-01-01T00:00:00.000", "lte": "2020-01-01T00:00:00.001"}),
        ("date_range", '["0044-03-15 BC",12345-01-01)', {"gte": -63517824000000, "lt": 327403382400000}),
        ("date_range", "[infinity,infinity]", None),
        ("date_range", "no range", None),
        ("point", "(1.5,-2)", {"x": 1.5, "y": -2}),
        ("xy_point", "(NaN,1)", None),
        ("xy_point", "(1e300,1)", None),
        ("geo_point", "(13.4,52.5)", {"lon": 13.4, "lat": 52.5}),
        ("geo_point", "(0,91)", None),
        ("geo_point", ["(1,2)", "(NaN,2)"], [{"lon": 1, "lat": 2}]),
        ("ip_range", "10.0.0.0/8", "10.0.0.0/8"),
        ("ip_range", "::ffff:1.2.3.0/120", "1.2.3.0/24"),
        ("ip_range", "10.0.0.1", "10.0.0.1/32"),
        ("ip_range", "fe80::1", "fe80::1/128"),
        ("dense_vector", "[1,2.5,-3e-05]", [1, 2.5, -3e-05]),
    ],
)  # fmt: skip
def test_a_value_becomes_what_its_field_takes(field: str, text: Any, expected: Any) -> None:
    assert made(field, text) == expected


def test_what_needs_no_conversion_has_no_converter() -> None:
    kinds = [
        ("text", "text"),
        ("keyword", "numeric"),
        ("date", "date"),
        ("keyword", "int4range"),
        ("boolean", "boolean"),
    ]
    assert [converter({"type": field}, kind) for field, kind in kinds] == [None] * len(kinds)
    assert converter({"type": "object", "enabled": False}, "jsonb") is None


def test_json_becomes_objects_within_limits() -> None:
    assert made("flattened", 1, "jsonb") == {"value": 1}
    assert made("flattened", ["a", {"b": 1}], "jsonb") == {"value": ["a", {"b": 1}]}
    assert made("flattened", [{"a": 1}, {"a": 2}], "jsonb") == [{"a": 1}, {"a": 2}]
    assert made("flattened", None, "jsonb") is None
    assert made("flattened", {"k" * 9_000: 1, "a\0": 2, "b": None}, "jsonb") == {"b": None}
    assert made("flat_object", {"a": None, "b": ["x" * 30_000, None, 1]}, "jsonb") == {"b": [1]}
    assert made("object", {"": 1, "a..b": 2, "a.b": 3, " ": 4}, "jsonb") == {"a.b": 3}
    assert made("flattened", [1, {"a": 2}], "jsonb[]") == [{"value": 1}, {"a": 2}]
    assert made("text", {"a": [1]}, "jsonb") == '{"a": [1]}'
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    found = made("flattened", deep, "jsonb")
    for _ in range(20):
        found = found["a"]
    assert json.loads(found) == {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}}


def test_of_a_name_that_is_twice_in_json_the_last_one_counts() -> None:
    found = converter({"type": "object", "enabled": False}, "json")
    assert found is not None
    assert found(b'{"a" : 1.10,\n "b":[{"x":1, "x":2}], "a":2}') == b'{"a":2,"b":[{"x":2}]}'
    deepest = b"[" * 490 + b"]" * 490
    assert found(deepest) == deepest


def test_an_array_with_a_lower_bound_of_its_own_is_no_boolean() -> None:
    found = converter({"type": "boolean"}, "boolean[]")
    assert found is not None
    assert found(b'"[0:1]={t,f}"') == b"null"
    assert found(b"[true,null]") == b"[true,null]"


def test_documents_are_converted_by_field() -> None:
    types = {"ages": "int4range", "n": "integer", "doc": "jsonb"}
    properties = {"ages": {"type": "integer_range"}, "n": {"type": "integer"}, "doc": {"type": "flattened"}, "x": {}}
    by = convert.converters(properties, types)
    assert sorted(by) == ["ages", "doc"]
    assert sorted(convert.converters(properties, {"years": "int4range"}, {"years": "ages"})) == ["years"]
    digits = b'{"ages":"[1,2)","n":1.10,"other":12345678901234567890.10}'
    once = convert.document(digits, by)
    assert once == b'{"ages":{"gte":1,"lt":2},"n":1.10,"other":12345678901234567890.10}'
    assert convert.document(once, by) == once
    assert convert.document(digits, {}) is digits


@pytest.mark.parametrize("before", [0, 1, 998, 999, 1_000, 1_001, 2_500])
def test_numbers_that_are_too_long_become_strings(before: int) -> None:
    body = "x" * before
    for length in (999, 1_000):
        fits = f'{{"body":"{body}","n":{"9" * length}}}'.encode()
        assert fit(fits) is fits
    long = "-" + "9" * 1_000
    data = f'{{"body":"{body}","text":"{"1" * 3_000}","n":[{long},1,{{"a":0.{"1" * 5_000}}}]}}'.encode()
    found = msgspec.json.decode(fit(data))
    assert found["n"] == [long, 1, {"a": "0." + "1" * 5_000}]
    assert found["text"] == "1" * 3_000
    assert fit(fit(data)) == fit(data)


def test_a_document_is_one_line() -> None:
    assert fit(b'{"doc":{"a" :\n1, "b":"\\n"}\n}') == b'{"doc":{"a" : 1, "b":"\\n"} }'


numbers = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False).map(lambda d: format(d, "f")[:2_000]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["", "NaN", "Infinity", "-Infinity"]),
)


@given(numbers, numbers, st.sampled_from("[("), st.sampled_from(")]"),
       st.sampled_from(["integer_range", "long_range", "double_range", "float_range"]))  # fmt: skip
def test_ranges_of_numbers_are_never_empty_as_engines_see_them(
    low: str, high: str, opening: str, closing: str, field: str
) -> None:
    found = made(field, f"{opening}{low},{high}{closing}")
    again = made(field, found)
    assert again == found
    if found is None or len(found) < 2:
        return
    least, most = found.get("gte", found.get("gt")), found.get("lte", found.get("lt"))
    assert least <= most
    if "_range" in field and field.startswith(("integer", "long")):
        assert least + ("gt" in found) <= most - ("lt" in found)
        bits = 31 if field == "integer_range" else 63
        assert -(1 << bits) <= least <= most < 1 << bits
    elif least == most:
        assert {"gte", "lte"} == found.keys()


@given(st.datetimes(), st.datetimes(), st.sampled_from("[("), st.sampled_from(")]"))
def test_ranges_of_moments_hold_what_they_held(low: Any, high: Any, opening: str, closing: str) -> None:
    low, high = min(low, high), max(low, high)
    text = f'{opening}"{low.isoformat(" ")}","{high.isoformat(" ")}"{closing}'
    found = made("date_range", text)
    floor = {key: value[:23] for key, value in found.items()}
    assert floor.get("gte", floor.get("gt")) == low.isoformat(timespec="milliseconds")
    assert floor.get("lte", floor.get("lt")) == high.isoformat(timespec="milliseconds")
    if low.microsecond % 1_000 or opening == "[":
        assert "gte" in found


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.decimals(allow_nan=False, allow_infinity=False).map(float),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(documents, st.sampled_from(sorted(nested.RULES)))
def test_json_is_an_object_and_stays_what_it_is(value: Any, field: str) -> None:
    once = made(field, value, "jsonb")
    assert made(field, once, "jsonb") == once
    found = once if isinstance(once, list) else [once]
    assert all(isinstance(item, dict) for item in found if item is not None)


@given(st.text(), st.sampled_from(sorted(convert._SCALARS)))
def test_no_text_raises(text: str, field: str) -> None:
    assert made(field, made(field, text)) == made(field, text)


def test_days_are_those_of_the_calendar() -> None:
    assert convert._days(1970, 1, 1) == 0
    assert convert._days(2000, 2, 29) == 11_016
    assert convert._days(1, 1, 1) == -719_162
    assert convert._days(0, 12, 31) == -719_163
    assert Decimal(convert._days(5874897, 12, 31)) * 86_400_000 < 2**63
