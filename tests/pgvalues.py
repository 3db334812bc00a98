"""Generated values of PostgreSQL's types, each as the text that PostgreSQL reads (hypothesis strategies).

`TYPES` has a strategy for each type; `arrays` makes one for arrays of a type, in all shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Texts = st.SearchStrategy[str]

CREATED = """
CREATE EXTENSION hstore;
CREATE EXTENSION citext;
CREATE EXTENSION ltree;
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"', 'a,b', '{}', 'NULL', '');
CREATE DOMAIN age AS int CHECK (value >= 0);
CREATE DOMAIN price AS numeric(12, 2);
CREATE DOMAIN blob AS bytea;
CREATE DOMAIN blobs AS blob[];
CREATE DOMAIN frames AS box[];
CREATE DOMAIN notes AS jsonb[];
CREATE DOMAIN birthday AS date;
CREATE DOMAIN document AS jsonb;
CREATE TYPE pair AS (a int, b text, c bytea);
CREATE TYPE floats AS RANGE (subtype = float8);
CREATE DOMAIN couple AS pair;
CREATE TYPE "Odd"".type" AS (x timestamptz, "y z" int[])
"""

letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(letters, max_size=12) | st.sampled_from(
    ["", "NULL", "null", "\\N", "{}", '"', "a,b", " x ", "\\", "😀"]
)
plain = st.text("abcdefghijklmnopqrstuvwxyzABC_0123456789", min_size=1, max_size=8)
digits = st.text("0123456789", min_size=1, max_size=60)


def integers(bits: int) -> Texts:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).map(str)


def floats(width: Any) -> Texts:
    usual = st.floats(width=width, allow_nan=False, allow_infinity=False)
    return usual.map(repr)


numerics = st.builds("{}{}{}".format, st.sampled_from(["", "-"]), digits, digits.map(".{}".format) | st.just(""))
numerics |= st.builds("1e{}".format, st.integers(-300, 400))


def joined(separator: str, *parts: Texts) -> Texts:
    return st.tuples(*parts).map(separator.join)


def two(low: int, high: int) -> Texts:
    return st.integers(low, high).map("{:02d}".format)


def days(last: int) -> Texts:
    """Days of the years 4713 BC to `last`."""
    year = st.integers(-4711, last) | st.integers(-50, 50) | st.integers(1900, 2100) | st.just(last)

    def day(year: int, rest: str) -> str:
        return f"{year:04d}-{rest}" if year > 0 else f"{1 - year:04d}-{rest} BC"

    return st.builds(day, year, joined("-", two(1, 12), two(1, 28)))


clocks = joined(":", two(0, 23), two(0, 59), two(0, 59))
fractions = st.just("") | st.integers(1, 999_999).map(".{:06d}".format)


def moments(zone: str) -> Texts:
    def moment(day: str, clock: str, fraction: str) -> str:
        bare, _, bc = day.partition(" ")
        return f"{bare} {clock}{fraction}{zone}{' BC' if bc else ''}"

    return st.builds(moment, days(294_275), clocks, fractions) | st.sampled_from(["infinity", "-infinity"])


intervals = st.builds(
    "{} months {} days {}{} seconds".format,
    st.integers(-(2**30), 2**30), st.integers(-(2**30), 2**30), st.integers(-(2**40), 2**40), fractions,
)  # fmt: skip
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def json_text(document: Any, spread: bool, escaped: bool) -> str:
    return json.dumps(document, indent=2 if spread else None, ensure_ascii=escaped)


jsons = st.builds(json_text, documents, st.booleans(), st.booleans())
# The null of JSON cannot be told from SQL's in a column, only in an array.
whole_jsons = jsons.filter(lambda text: text != "null")
lexemes = st.lists(plain, max_size=3).map(lambda found: " ".join(f"'{one}':{n + 1}B" for n, one in enumerate(found)))
points = st.builds("({},{})".format, floats(64), floats(64))


def quoted(text: str) -> str:
    """A part of a composite's or a range's text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '""') + '"'


def composites(*parts: Texts) -> Texts:
    return st.tuples(*(st.none() | part for part in parts)).map(
        lambda found: f"({','.join('' if one is None else quoted(one) for one in found)})"
    )


def ranges(values: st.SearchStrategy[Any], written: Callable[[Any], str] = str) -> Texts:
    def made(low: Any, high: Any, left: str, right: str, kind: int) -> str:
        if kind == 0:
            return "empty"
        low, high = sorted((low, high))
        return f"{left}{'' if kind == 1 else quoted(written(low))},{'' if kind == 2 else quoted(written(high))}{right}"

    return st.builds(made, values, values, st.sampled_from("[("), st.sampled_from("])"), st.integers(0, 4))


def arrays(of: Texts, delimiter: str = ",") -> Texts:
    """Arrays of up to three dimensions, with NULL and empty ones, some with lower bounds of their own."""

    def element(text: str | None) -> str:
        return "NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def written(flat: Sequence[str | None], shape: Sequence[int]) -> str:
        if not shape:
            return element(flat[0])
        each = len(flat) // shape[0]
        inner = (written(flat[n * each : (n + 1) * each], shape[1:]) for n in range(shape[0]))
        return "{" + delimiter.join(inner) + "}"

    @st.composite
    def made(draw: st.DrawFn) -> str:
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        if not shape:
            return "{}"
        size = 1
        for one in shape:
            size *= one
        flat = draw(st.lists(st.none() | of, min_size=size, max_size=size))
        bounds = ""
        if draw(st.integers(0, 4)) == 0:
            starts = [draw(st.integers(-2, 2)) for _ in shape]
            bounds = "".join(f"[{start}:{start + one - 1}]" for start, one in zip(starts, shape, strict=True)) + "="
        return bounds + written(flat, shape)

    return made()


whole = st.integers(-(2**31), 2**31 - 1)
oids = st.integers(0, 2**32 - 1).map(str)
addresses = st.ip_addresses().map(str)
bits = st.text("01", max_size=9)
binaries = st.binary(max_size=12).map(lambda found: "\\x" + found.hex())
days_since = st.dates()
pairs = composites(integers(32), texts, binaries)

smaller = whole.filter(lambda n: n < 2**31 - 1)  # PostgreSQL writes the next one into the range
jsonb = whole_jsons.filter(lambda text: "\\u0000" not in text)
words = st.integers(0, 2**32 - 1)
outlines = st.lists(points, min_size=1, max_size=3).map(",".join)
maps = st.dictionaries(plain, plain, max_size=3)

SCALARS: Mapping[str, Texts] = {
    "smallint": integers(16),
    "integer": integers(32),
    "bigint": integers(64),
    "oid": oids,
    "numeric": numerics,
    "numeric(30,5)": st.integers(-(10**20), 10**20).map(str),
    "real": floats(32),
    "double precision": floats(64),
    "money": st.integers(-(10**15), 10**15).map("{}.25".format),
    "boolean": st.sampled_from(["true", "false"]),
    "text": texts,
    "character varying(20)": texts,
    "character(15)": texts,
    '"char"': st.sampled_from(["", "a", "\\"]),
    "name": texts,
    "bytea": binaries,
    "date": days(5_874_896) | st.sampled_from(["infinity", "-infinity"]),
    "time without time zone": joined("", clocks, fractions) | st.just("24:00:00"),
    "time with time zone": joined("", clocks, fractions, st.sampled_from(["+00", "-05:30", "+15:59:59"])),
    "timestamp without time zone": moments(""),
    "timestamp with time zone": moments("+00"),
    "timestamp(3) with time zone": moments("+00"),
    "interval": intervals,
    "uuid": st.uuids().map(str),
    "inet": addresses,
    "cidr": st.ip_addresses(v=4).map("{}/32".format),
    "macaddr": st.integers(0, 2**48 - 1).map("{:012x}".format),
    "macaddr8": st.integers(0, 2**64 - 1).map("{:016x}".format),
    "bit(5)": st.text("01", min_size=5, max_size=5),
    "bit varying": bits,
    "json": whole_jsons,
    "jsonb": jsonb,
    "xml": plain.map('<a b="c">{} &amp; é</a>'.format),
    "tsvector": lexemes,
    "tsquery": plain.map("'{}':*A & !'b'".format),
    "point": points,
    "line": st.builds("{{1,{},{}}}".format, integers(16), integers(16)),
    "lseg": joined(",", points, points),
    "box": joined(",", points, points),
    "path": outlines.map("[{}]".format),
    "polygon": outlines.map("({})".format),
    "circle": st.builds("<{},{}>".format, points, st.integers(0, 1000)),
    "int4range": ranges(smaller),
    "int8range": ranges(whole),
    "numrange": ranges(whole),
    "floats": ranges(st.floats(allow_nan=False)),
    "daterange": ranges(days_since, lambda day: day.isoformat()),
    "tstzrange": ranges(st.datetimes(), lambda at: f"{at.isoformat()}+00"),
    "int4multirange": ranges(smaller).map("{{{}}}".format),
    "pg_lsn": joined("/", *[words.map("{:X}".format)] * 2),
    "xid8": st.integers(0, 2**64 - 1).map(str),
    "xid": oids,
    "cid": oids,
    "tid": st.builds("({},{})".format, words, st.integers(0, 2**16 - 1)),
    "int2vector": st.lists(integers(16), max_size=3).map(" ".join),
    "oidvector": st.lists(oids, max_size=3).map(" ".join),
    "regclass": st.sampled_from(["pg_class", "0"]),
    "jsonpath": plain.map('$."{}"[*] ? (@ > 1)'.format),
    "mood": st.sampled_from(["sad", 'it\'s "ok"', "a,b", "{}", "NULL", ""]),
    "age": st.integers(0, 2**31 - 1).map(str),
    "price": st.integers(-(10**9), 10**9).map(str),
    "blob": binaries,
    "birthday": days(9999),
    "document": jsonb,
    "pair": pairs,
    "couple": pairs,
    '"Odd"".type"': composites(moments("+00"), arrays(integers(32))),
    "hstore": maps.map(lambda found: ", ".join(f'"{name}"=>"{value}"' for name, value in found.items())),
    "citext": texts,
    "ltree": st.lists(plain, max_size=3).map(".".join),
    "blobs": arrays(binaries),
    "frames": arrays(joined(",", points, points), ";"),
    "notes": arrays(jsonb),
}


def _many(name: str, of: Texts) -> Texts:
    if name in ("json", "jsonb", "document"):
        of = jsons if name == "json" else jsons.filter(lambda text: "\\u0000" not in text)
    return arrays(of, ";" if name in ("box", "frames") else ",")


TYPES: Mapping[str, Texts] = {
    **SCALARS,
    **{f"{name}[]": _many(name, of) for name, of in SCALARS.items()},
}
