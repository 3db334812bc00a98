"""A column's JSON as events have it → the JSON that its field takes. Pure.

    range types     integer_range, long_range, double_range, date_range: {"gte":1,"lt":5}; infinite bounds are left out,
                    an empty range (and one that holds no value of the field's kind) is null; multiranges are lists
    point           point, xy_point: {"x":1.5,"y":2}; geo_point: {"lon":1.5,"lat":2}; out of reach or not finite: null
    cidr, inet      ip_range: as printed, but IPv4 addresses that are written as IPv6 as IPv4
    json, jsonb     flattened, flat_object, object: what is no object gets into one, {"value": …}; what is deeper than
                    20 becomes its JSON text; names and (flat_object) strings too long, and nulls there, are left out;
                    text, keyword: objects and arrays as their JSON text; json that is only stored: of a name that is
                    there twice the last one counts, as in jsonb, since engines refuse it
    boolean[]       null for an array whose lower bound is not 1, which comes as PostgreSQL's text
    vector          dense_vector, knn_vector: a list of numbers

Bounds that the field rounds (a `double` for a numeric, milliseconds for microseconds) are rounded outwards where the
range would be empty otherwise: searches may find too much at an edge, never too little.

Every converter gives its own results back unchanged, so a document's value can stand in for its column's; it raises for
nothing that PostgreSQL can print, and what it does not understand becomes null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NamedTuple

import msgspec

from bridge.index import nested
from bridge.index.mapping import base_type

Convert = Callable[[bytes], bytes]

NULL = b"null"
LONGEST_NUMBER = 1_000
LARGEST_FLOAT = 3.4028234663852886e38
_INTEGERS = {"integer_range": 31, "long_range": 63}
_JSON = ("json", "jsonb")
_TEXTUAL = ("text", "keyword", "wildcard", "match_only_text", "search_as_you_type", "constant_keyword")
_BOUND = r'("(?:[^"\\]|""|\\.)*+"|[^",()\[\]]*+)'
_RANGE = re.compile(rf"([\[(]){_BOUND},{_BOUND}([\])])")
_MOMENT = re.compile(r"(\d{4,})-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?(\+00)?( BC)?")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_POINT = re.compile(r"\(([^,()]+),([^,()]+)\)")
_VECTOR = re.compile(r"\[[-+.\deE,]+\]")
_WHOLE_RANGE = re.compile(rb'"\[(-?\d{1,9}),(-?\d{1,9})\)"')
_NUMERIC = b"0123456789.eE+-"
_LONG_NUMBER = re.compile(rb'"(?:[^"\\]|\\.)*+"|(-?\d[-+.\deE]{%d,}+)' % (LONGEST_NUMBER - 1))

_text = msgspec.json.Decoder(str).decode
_row = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.encode


def converter(field: Mapping[str, Any], type_name: str) -> Convert | None:
    """How values of a column become values of its field; None where they are that already.

    Args:
        field: the field's mapping.
        type_name: the column's type as `format_type` prints it; empty where it is not known.
    """
    kind, base = str(field.get("type", "object")), base_type(type_name)
    if base in _JSON:
        return _json(field, kind, base, of_many=type_name.endswith("[]"))
    if kind in _SCALARS:
        convert = _each(_SCALARS[kind])
        return _quick(convert) if kind in _INTEGERS else convert
    if base == "boolean" and type_name.endswith("[]"):
        return lambda raw: NULL if raw[:1] == b'"' else raw
    return None


def converters(
    properties: Mapping[str, Any], types: Mapping[str, str], rename: Mapping[str, str] | None = None
) -> dict[str, Convert]:
    """The converters that a table's columns need, by the columns' names.

    Args:
        properties: the document's fields, by their names.
        types: the columns' types, by the columns' names; `rename` says how the document calls them.
    """
    named = rename or {}
    fields = {name: properties.get(named.get(name, name)) for name in types}
    found = {name: converter(field, types[name]) for name, field in fields.items() if field is not None}
    return {name: convert for name, convert in found.items() if convert is not None}


def document(data: bytes, by: Mapping[str, Convert]) -> bytes:
    """A document with its fields converted; those that were are as they are."""
    if not by:
        return data
    row = _row(data)
    for name in row.keys() & by.keys():
        row[name] = msgspec.Raw(by[name](bytes(row[name])))
    return _encode(row)


def fit(data: bytes) -> bytes:
    """A document that an engine can read: on one line, numbers of more than 1,000 characters as strings.

    Bulks are split into lines, and a json value keeps those that it was written in. Engines refuse a whole document for
    a number that long; a `numeric` has up to 147,000 characters, also inside of jsonb.
    """
    if b"\n" in data:
        # Within strings it is escaped.
        data = data.replace(b"\n", b" ")
    # A number that long covers one of these places: looking at them costs next to nothing.
    for place in range(LONGEST_NUMBER, len(data), LONGEST_NUMBER):
        if data[place] in _NUMERIC and _run(data, place) > LONGEST_NUMBER:
            return _LONG_NUMBER.sub(_quoted, data)
    return data


def _quoted(match: re.Match[bytes]) -> bytes:
    return b'"%b"' % match[1] if match[1] and len(match[1]) > LONGEST_NUMBER else match[0]


def _run(data: bytes, place: int) -> int:
    """How many characters of numbers are around a place, as far as it matters."""
    before, after = data[place - LONGEST_NUMBER : place], data[place : place + LONGEST_NUMBER]
    return len(before) - len(before.rstrip(_NUMERIC)) + len(after) - len(after.lstrip(_NUMERIC))


def _each(one: Callable[[str], bytes]) -> Convert:
    """The converter of a string, or of each string in an array of them, without those that become null."""

    def convert(raw: bytes) -> bytes:
        if raw[:1] == b'"':
            return one(_text(raw))
        if raw[:1] == b"[":
            found = [convert(bytes(item)) for item in _items(raw)]
            return b"[%b]" % b",".join(item for item in found if item != NULL)
        return raw

    return convert


def _quick(convert: Convert) -> Convert:
    """The converter with a short way for ranges of whole numbers as PostgreSQL prints nearly all of them."""

    def quick(raw: bytes) -> bytes:
        match = _WHOLE_RANGE.fullmatch(raw)
        if match is None or int(match[1]) >= int(match[2]):
            return convert(raw)
        return b'{"gte":%b,"lt":%b}' % match.groups()

    return quick


# Ranges


class _Bound(NamedTuple):
    """One end of a range: how the document says it, and the first (last) place on the field's own scale within."""

    json: bytes
    inclusive: bool
    place: float | int
    edge: float | int


def _ranges(bound: Callable[[str, bool, bool], _Bound | float]) -> Callable[[str], bytes]:
    """The converter of a range's or multirange's text.

    Args:
        bound: (text, inclusive, whether it is the lower) → the bound, or an infinity that it is at or beyond.
    """

    def convert(text: str) -> bytes:
        if text.startswith("{"):
            found = [one(match) for match in _RANGE.finditer(text)]
            return b"[%b]" % b",".join(item for item in found if item != NULL)
        match = _RANGE.fullmatch(text)
        return one(match) if match is not None else NULL

    def one(match: re.Match[str]) -> bytes:
        opening, lower, upper, closing = match.groups()
        try:
            low = bound(_bare(lower), opening == "[", True) if lower else -math.inf
            high = bound(_bare(upper), closing == "]", False) if upper else math.inf
        except ValueError:
            return NULL
        return _range(low, high)

    return convert


def _bare(bound: str) -> str:
    if not bound.startswith('"'):
        return bound
    return re.sub(r'""|\\(.)', lambda match: match[1] or '"', bound[1:-1])


def _range(low: _Bound | float, high: _Bound | float) -> bytes:
    if low == math.inf or high == -math.inf:
        return NULL
    parts = []
    wide = isinstance(low, _Bound) and isinstance(high, _Bound) and low.edge > high.edge
    if wide and low.place > high.place:  # type: ignore[union-attr]
        return NULL
    if isinstance(low, _Bound):
        parts.append(b'"%b":%b' % (b"gte" if low.inclusive or wide else b"gt", low.json))
    if isinstance(high, _Bound):
        parts.append(b'"%b":%b' % (b"lte" if high.inclusive or wide else b"lt", high.json))
    return b"{%b}" % b",".join(parts)


def _whole(bits: int) -> Callable[[str, bool, bool], _Bound | float]:
    """Bounds of whole numbers with so many bits."""
    least, most = -(1 << bits), (1 << bits) - 1

    def bound(text: str, inclusive: bool, lower: bool) -> _Bound | float:
        if _NUMBER.fullmatch(text) is None:
            return _infinite(text)
        exact = Decimal(text)
        value = exact.to_integral_value(ROUND_CEILING if lower else ROUND_FLOOR)
        if value < least:
            return -math.inf
        if value > most:
            return math.inf
        named = int(value)
        inclusive = inclusive or value != exact
        edge = named if inclusive else named + (1 if lower else -1)
        return _Bound(b"%d" % named, inclusive, edge, edge)

    return bound


def _double(text: str, inclusive: bool, lower: bool) -> _Bound | float:
    if _NUMBER.fullmatch(text) is None:
        return _infinite(text)
    place = float(text)
    if math.isinf(place):
        return place
    digits = text if len(text) <= LONGEST_NUMBER else repr(place)
    edge = place if inclusive else math.nextafter(place, math.inf if lower else -math.inf)
    return _Bound(digits.encode(), inclusive, place, edge)


def _float(text: str, _inclusive: bool, lower: bool) -> _Bound | float:
    found = _double(text, True, lower)
    if isinstance(found, _Bound) and abs(found.place) > LARGEST_FLOAT:
        return math.copysign(math.inf, found.place)
    return found


def _infinite(text: str) -> float:
    """What is no number: infinities, and NaN, which is greater than all of them."""
    if text in ("infinity", "Infinity", "NaN"):
        return math.inf
    if text in ("-infinity", "-Infinity"):
        return -math.inf
    raise ValueError


def _moment(text: str, inclusive: bool, lower: bool) -> _Bound | float:
    match = _MOMENT.fullmatch(text)
    if match is None:
        return _infinite(text)
    digits, month, day, hour, minute, second, fraction, zone, before = match.groups()
    year = 1 - int(digits) if before else int(digits)
    fraction = (fraction or "").ljust(3, "0")
    place = _days(year, int(month), int(day)) * 86_400_000
    if hour is not None:
        place += ((int(hour) * 60 + int(minute)) * 60 + int(second)) * 1_000 + int(fraction[:3])
    # Below a millisecond the field does not see: the edge's own millisecond belongs to the range.
    inclusive = inclusive or fraction[3:].strip("0") != ""
    edge = place if inclusive else place + (1 if lower else -1)
    if not 1 <= year <= 9999:
        return _Bound(b"%d" % place, inclusive, place, edge)
    if hour is None and inclusive is lower:
        return _Bound(f'"{digits}-{month}-{day}"'.encode(), inclusive, place, edge)
    # In full, as engines complete what is shorter to its end.
    time = f"{hour or '00'}:{minute or '00'}:{second or '00'}.{fraction}"
    return _Bound(f'"{digits}-{month}-{day}T{time}{"Z" if zone else ""}"'.encode(), inclusive, place, edge)


def _days(year: int, month: int, day: int) -> int:
    """Days since 1970 in the Gregorian calendar, of any year; 0 is the year before 1."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


# Points, addresses, vectors


def _point(first: bytes, second: bytes, farthest: tuple[float, float]) -> Callable[[str], bytes]:
    def convert(text: str) -> bytes:
        match = _POINT.fullmatch(text)
        if match is None or not all(_NUMBER.fullmatch(part) for part in match.groups()):
            return NULL
        if any(abs(float(part)) > far for part, far in zip(match.groups(), farthest, strict=True)):
            return NULL
        return b'{"%b":%b,"%b":%b}' % (first, match[1].encode(), second, match[2].encode())

    return convert


def _network(text: str) -> bytes:
    address, _, bits = text.partition("/")
    if address.startswith("::ffff:") and "." in address:
        # The same addresses, but engines refuse this notation.
        address, bits = address.removeprefix("::ffff:"), str(int(bits or "128") - 96)
        if bits.startswith("-"):
            return NULL
    return _encode(f"{address}/{bits or (128 if ':' in address else 32)}")


def _vector(text: str) -> bytes:
    return text.encode() if _VECTOR.fullmatch(text) else NULL


_CARTESIAN = _point(b"x", b"y", (LARGEST_FLOAT, LARGEST_FLOAT))
_SCALARS: dict[str, Callable[[str], bytes]] = {
    **{kind: _ranges(_whole(bits)) for kind, bits in _INTEGERS.items()},
    "double_range": _ranges(_double),
    "float_range": _ranges(_float),
    "date_range": _ranges(_moment),
    "point": _CARTESIAN,
    "xy_point": _CARTESIAN,
    "geo_point": _point(b"lon", b"lat", (180, 90)),
    "ip_range": _network,
    "dense_vector": _vector,
    "knn_vector": _vector,
}


# JSON


def _json(field: Mapping[str, Any], kind: str, base: str, *, of_many: bool) -> Convert | None:
    rules = nested.RULES.get(kind)
    if kind == "object" and field.get("enabled", True) is False:
        # Only the type json keeps a name twice.
        return (lambda raw: nested.ruled(raw, nested.STORED)) if base == "json" else None
    if kind in _TEXTUAL:
        return lambda raw: _encode(raw.decode()) if raw[:1] in b"[{" else raw
    if rules is None:
        return None

    def convert(raw: bytes) -> bytes:
        return nested.wrapped(raw, rules)

    if not of_many:
        return convert
    return lambda raw: b"[%b]" % b",".join(convert(bytes(i)) for i in _items(raw)) if raw[:1] == b"[" else convert(raw)
