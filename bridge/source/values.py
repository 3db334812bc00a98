"""PostgreSQL values as JSON: one function per type, from the text that PostgreSQL prints. Pure.

The stream and the snapshot both come through here, so the same value gives the same bytes whichever way it came.
It relies on the session settings that `connection.py` pins (timezone UTC, datestyle ISO, bytea hex, …).

    smallint … bigint, oid, real, double, numeric   number with PostgreSQL's digits; NaN and infinities as strings
    boolean                                         true, false
    json, jsonb                                     as stored
    arrays                                          JSON arrays; with lower bounds other than 1 PostgreSQL's own text,
                                                    and where elements (json, arrays of a domain) could be taken for
                                                    dimensions or NULL
    timestamp, timestamptz, date                    ISO 8601 (timestamptz in UTC with Z), "infinity", "-infinity"
    bytea                                           base64
    domains                                         as their base type
    everything else                                 PostgreSQL's text as a string
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import msgspec

Convert = Callable[[str], bytes]
Wire = Callable[[msgspec.Raw | bytes], bytes]
Kind = Literal["text", "number", "bool", "other"]

BOOL, BYTEA, INT8, INT2, INT4, OID = 16, 17, 20, 21, 23, 26
JSON, FLOAT4, FLOAT8, NUMERIC, JSONB = 114, 700, 701, 1700, 3802
DATE, TIMESTAMP, TIMESTAMPTZ = 1082, 1114, 1184
INTEGERS = frozenset({INT2, INT4, INT8, OID})
NUMBERS = INTEGERS | {FLOAT4, FLOAT8, NUMERIC}

quote = msgspec.json.encode
_decode_string = msgspec.json.Decoder(str).decode
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]|[^\s"{}\[\]]++', re.DOTALL)
_CLOSING = {b"[": b"]", b"{": b"}"}
_decode = msgspec.json.Decoder(msgspec.Raw).decode


class Type(NamedTuple):
    """What `pg_type` says of one type: `element` is the oid of an array's elements, `base` of a domain's base type;
    `varying` whether its values vary in length, and so can be TOASTed."""

    oid: int
    name: str
    element: int = 0
    base: int = 0
    delimiter: str = ","
    varying: bool = True


class Codec(NamedTuple):
    """How one type's values are written.

    convert: PostgreSQL's text → JSON; raw: wal2json's JSON value can be passed on unchanged; quick: the JSON of
    wal2json's JSON value where its form is the usual one, else empty, for types whose text needs little change.
    """

    convert: Convert
    raw: bool
    quick: Callable[[bytes], bytes] | None = None

    @property
    def wire(self) -> Wire:
        """wal2json's JSON value → JSON."""
        convert, quick = self.convert, self.quick
        if quick is None:
            return lambda value: from_wal2json(value, convert)

        def wire(value: msgspec.Raw | bytes) -> bytes:
            raw = value if type(value) is bytes else bytes(value)
            return quick(raw) or from_wal2json(raw, convert)

        return wire


def codec(oid: int, types: Mapping[int, Type]) -> Codec:
    """The codec of the type `oid`; a type that `types` does not know is text."""
    found = types.get(oid)
    if found is not None and found.base:
        of = codec(found.base, types)
        return of._replace(raw=of.convert is text)
    if found is not None and found.element:
        element = codec(found.element, types).convert
        delimiter = found.delimiter
        if element is json:
            return Codec(json_array, raw=False)
        if _is_array(found.element, types):
            return Codec(lambda value: array_of_arrays(value, element, delimiter), raw=False)
        return Codec(lambda value: array(value, element, delimiter), raw=False)
    return _CODECS.get(oid, _TEXT)


def _is_array(oid: int, types: Mapping[int, Type]) -> bool:
    """Whether the type `oid` is a domain of an array: no other element of an array is one itself."""
    found = types.get(oid)
    if found is None or not found.base:
        return False
    base = types.get(found.base)
    return base is not None and (bool(base.element) or _is_array(found.base, types))


def from_wal2json(value: msgspec.Raw | bytes, convert: Convert) -> bytes:
    """A value as wal2json gives it (JSON null, number, true/false, or a string with PostgreSQL's text) as JSON."""
    raw = bytes(value)
    if raw[:1] == b'"':
        return convert(_decode_string(raw))
    if raw == b"null":
        return raw
    return convert(raw.decode())


def text(value: str) -> bytes:
    """Any text as a JSON string."""
    return quote(value)


_NO_JSON = frozenset({b"NaN", b"Infinity", b"-Infinity"})


def number(value: str) -> bytes:
    """A number with its exact digits; what JSON cannot say (NaN, infinities) as a string."""
    return number_cell(value.encode())


def number_cell(cell: bytes) -> bytes:
    """`number` of what COPY prints."""
    return b'"%b"' % cell if cell in _NO_JSON else cell


def boolean(value: str) -> bytes:
    """PostgreSQL prints t and f, wal2json true and false."""
    return b"true" if value in ("t", "true") else b"false"


def boolean_cell(cell: bytes) -> bytes:
    """`boolean` of what COPY prints."""
    return b"true" if cell == b"t" else b"false"


def json(value: str) -> bytes:
    """JSON as stored; ValueError for what is none, as a cast that checks nothing can make it."""
    data = value.encode()
    _check(data)
    return data


def _check(data: bytes) -> None:
    """ValueError for what is no JSON. Of what is nested deeper than a decoder goes only the brackets are checked."""
    try:
        _decode(data)
    except RecursionError:
        _check_brackets(data)


def _check_brackets(data: bytes) -> None:
    """ValueError where they do not fit, or where one value ends and another one follows."""
    opened: list[bytes] = []
    closed = False
    for token in _TOKENS.finditer(data):
        found = token[0]
        if closed or found == b'"':
            raise ValueError("not JSON")
        if found in _CLOSING:
            opened.append(_CLOSING[found])
        elif found in (b"]", b"}"):
            if not opened or opened.pop() != found:
                raise ValueError("not JSON")
            closed = not opened
    if opened:
        raise ValueError("not JSON")


def bytea(value: str) -> bytes:
    """Hexadecimal digits, with PostgreSQL's backslash-x or without it as wal2json prints them, in base64."""
    return b'"%s"' % base64.b64encode(bytes.fromhex(value.removeprefix("\\x")))


_DATE = re.compile(r"(\d{4,})(-\d\d-\d\d)(?: (\d\d:\d\d:\d\d(?:\.\d+)?))?(\+00)?( BC)?")


def moment(value: str) -> bytes:
    """A date or time stamp of datestyle ISO in ISO 8601; year 1 BC is year 0000, years past 9999 carry a sign."""
    match = _DATE.fullmatch(value)
    if match is None:
        return quote(value)
    year, day, time, zone, bc = match.groups()
    if bc:
        before = int(year) - 1
        year = f"-{before:04d}" if before else "0000"
    elif len(year) > 4:
        year = f"+{year}"
    return quote(f"{year}{day}{'T' + time if time else ''}{'Z' if zone else ''}")


_DASH, _SPACE, _QUOTE, _DIGITS = b"-"[0], b" "[0], b'"'[0], frozenset(b"0123456789")


def quick_moment(value: bytes) -> bytes:
    """`moment` of a JSON string, for the years 0001 to 9999; empty for anything else."""
    if len(value) < 12 or value[5] != _DASH:
        return b""
    if value[11] == _SPACE:
        if value.endswith(b'+00"'):
            return b'%bT%bZ"' % (value[:11], value[12:-4])
        return b"%bT%b" % (value[:11], value[12:]) if value[-2] in _DIGITS else b""
    return value if value[11] == _QUOTE else b""


def moment_cell(cell: bytes) -> bytes:
    """`moment` of what COPY prints."""
    if len(cell) >= 10 and cell[4] == _DASH:
        if len(cell) == 10:
            return b'"%b"' % cell
        if cell[10] == _SPACE:
            if cell.endswith(b"+00"):
                return b'"%bT%bZ"' % (cell[:10], cell[11:-3])
            if cell[-1] in _DIGITS:
                return b'"%bT%b"' % (cell[:10], cell[11:])
    return moment(cell.decode())


def array(value: str, element: Convert, delimiter: str = ",") -> bytes:
    """An array's text as a JSON array of any depth. One whose lower bounds are not 1 stays PostgreSQL's text.

    Source: PostgreSQL documentation, "Array Input and Output Syntax". ValueError for what is none.
    """
    if not value.startswith("{"):
        return quote(value)
    try:
        found = _array(value, element, delimiter)
    except IndexError:
        raise ValueError("not an array") from None
    _check(found)
    return found


def json_array(value: str) -> bytes:
    """An array of json or jsonb: a JSON array where that tells which brackets and nulls are PostgreSQL's. Where there
    is another dimension, or an element is an array or JSON's null, it stays PostgreSQL's text."""
    plain = not value.startswith("{{")

    def element(item: str) -> bytes:
        nonlocal plain
        plain = plain and item.lstrip()[:1] not in ("[", "n")
        return json(item)

    found = array(value, element)
    return found if plain else quote(value)


def array_of_arrays(value: str, element: Convert, delimiter: str) -> bytes:
    """An array whose elements are arrays, which a domain can be: the outermost JSON array is the array's. Where it has
    another dimension, nothing would tell that from the elements' own, and it stays PostgreSQL's text."""
    return quote(value) if value.startswith("{{") else array(value, element, delimiter)


def _array(value: str, element: Convert, delimiter: str) -> bytes:
    out: list[bytes] = []
    position, end = 0, len(value)
    while position < end:
        char = value[position]
        if char == "{":
            out.append(b"[")
            position += 1
        elif char == "}":
            out.append(b"]")
            position += 1
        elif char == delimiter:
            out.append(b",")
            position += 1
        elif char == '"':
            item, position = _quoted(value, position + 1)
            out.append(element(item))
        else:
            item, position = _bare(value, position, delimiter)
            out.append(b"null" if item == "NULL" else element(item))
    return b"".join(out)


def _quoted(value: str, position: int) -> tuple[str, int]:
    parts: list[str] = []
    while True:
        start = position
        while value[position] not in '"\\':
            position += 1
        parts.append(value[start:position])
        if value[position] == '"':
            return "".join(parts), position + 1
        parts.append(value[position + 1])
        position += 2


def _bare(value: str, position: int, delimiter: str) -> tuple[str, int]:
    parts: list[str] = []
    while value[position] not in ("}", delimiter):
        if value[position] == "\\":
            position += 1
        parts.append(value[position])
        position += 1
    return "".join(parts), position


# Types of whose values COPY never prints a backslash: their JSON, from that.
CELLS: dict[Convert, Callable[[bytes], bytes]] = {
    number: number_cell,
    boolean: boolean_cell,
    moment: moment_cell,
}
_TEXT = Codec(text, raw=True)
_CODECS: dict[int, Codec] = {
    **{oid: Codec(number, raw=True) for oid in NUMBERS},
    BOOL: Codec(boolean, raw=True),
    JSON: Codec(json, raw=False),
    JSONB: Codec(json, raw=False),
    BYTEA: Codec(bytea, raw=False),
    DATE: Codec(moment, raw=False, quick=quick_moment),
    TIMESTAMP: Codec(moment, raw=False, quick=quick_moment),
    TIMESTAMPTZ: Codec(moment, raw=False, quick=quick_moment),
}
