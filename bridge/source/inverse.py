"""An event's values as text that PostgreSQL reads: the inverse of `values`, from JSON and a column's type. Pure.

The type is what the state bucket records of a column (`stream.state.Column`: `base`, where the column is of a domain,
else `type`), as format_type prints it. What comes back is PostgreSQL's value for value, with two exceptions, which an
event does not tell from SQL's NULL: the null of a json or jsonb column, and what wal2json before 2.6 sends as null.

    date, timestamps   ISO 8601 → datestyle ISO, year 0000 and before with BC
    bytea              base64 → hexadecimal
    json, jsonb        as they are
    arrays             JSON arrays → {…}; a string is PostgreSQL's own text already. Of a type that ends in [][] the
                       elements are arrays
    everything else    a string's text; numbers and booleans as they are
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

import msgspec

_MODIFIER = re.compile(r"\((?:[^()]|\([^()]*\))*\)")
_YEAR = re.compile(r"([+-]?)(\d{4,})(-\d\d-\d\d.*)")
_string = msgspec.json.Decoder(str).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def text(value: bytes, of: str) -> str | None:
    """What PostgreSQL reads as the value of a column of the type `of`; None for NULL.

    Raises:
        ValueError: it is no value of that type.
    """
    if value == b"null":
        return None
    try:
        if not of.endswith("[]"):
            return _reader(of)(value)
        if value[:1] == b'"':
            return _string(value)
        kind = of.removesuffix("[]")
        delimiter = ";" if kind.rstrip("[]") == "box" else ","
        if kind.endswith("[]"):  # the elements are arrays themselves, as those of a domain can be
            return _written([text(item, kind) for item in map(bytes, _items(value))], delimiter)
        return _array(value, _reader(kind), delimiter)
    except msgspec.DecodeError:
        raise ValueError(f"not the JSON of a value of the type {of}") from None


def _reader(of: str) -> Callable[[bytes], str]:
    return _READERS.get(_MODIFIER.sub("", of), _plain)


def _plain(value: bytes) -> str:
    return _string(value) if value[:1] == b'"' else value.decode()


def _json(value: bytes) -> str:
    return value.decode()


def _bytea(value: bytes) -> str:
    return "\\x" + base64.b64decode(_string(value), validate=True).hex()


def _moment(value: bytes) -> str:
    found = _string(value)
    match = _YEAR.fullmatch(found)
    if match is None:
        return found  # an infinity
    sign, year, rest = match.groups()
    if sign == "-" or not int(year):
        return f"{int(year) + 1:04d}{rest} BC"
    return year + rest


def _array(value: bytes, reader: Callable[[bytes], str], delimiter: str) -> str:
    """A JSON array of any depth as PostgreSQL's text."""
    items = [bytes(item) for item in _items(value)]
    if any(item[:1] == b"[" for item in items):
        return "{" + delimiter.join(_array(item, reader, delimiter) for item in items) + "}"
    return _written([None if item == b"null" else reader(item) for item in items], delimiter)


def _written(elements: list[str | None], delimiter: str) -> str:
    """One dimension of an array: every element but NULL in quotes, in which nothing but those is special."""
    quoted = [
        '"' + one.replace("\\", "\\\\").replace('"', '\\"') + '"' if one is not None else "NULL" for one in elements
    ]
    return "{" + delimiter.join(quoted) + "}"


_READERS: dict[str, Callable[[bytes], str]] = {
    "bytea": _bytea,
    "json": _json,
    "jsonb": _json,
    "date": _moment,
    "timestamp without time zone": _moment,
    "timestamp with time zone": _moment,
}
