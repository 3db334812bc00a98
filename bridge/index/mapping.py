"""PostgreSQL types → index mapping and settings. Pure.

Every choice keeps two promises: a value that PostgreSQL holds is never refused by the engine (hence `ignore_malformed`
for infinities and dates outside the engine's range, `ignore_above` for long keywords), and what is stored is exact (the
document's source keeps every digit; a `numeric` is a keyword for exact matches with a `double` beside it for ranges).
json and jsonb are kept but not searchable (`enabled: false`): `flattened` and `flat_object` refuse arrays, scalars and
long strings, which jsonb columns hold; a mapping.json of one's own makes them searchable.

`_bridge` is the one field that is ours: `version` (of the last write), `table` and `partition` are indexed, because
truncates and sweeps page through documents by them in an order that no later write disturbs; the rest of it is stored
only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

HIDDEN = "_bridge"
KEYWORD_LIMIT = 8_191
SUBFIELD_LIMIT = 256
GC_DELETES = "1h"
FIELDS = 1_000
FIELDS_LIMIT = "index.mapping.total_fields.limit"

_KEYWORD: dict[str, Any] = {"type": "keyword", "ignore_above": KEYWORD_LIMIT}
_TEXT: dict[str, Any] = {
    "type": "text",
    "fields": {"keyword": {"type": "keyword", "ignore_above": SUBFIELD_LIMIT}},
}
_DATE: dict[str, Any] = {"type": "date", "format": "strict_date_optional_time", "ignore_malformed": True}
_STORED: dict[str, Any] = {"type": "object", "enabled": False}
_TYPES: dict[str, dict[str, Any]] = {
    "text": _TEXT,
    "character varying": _TEXT,
    "character": _TEXT,
    '"char"': _KEYWORD,
    "name": _KEYWORD,
    "citext": _TEXT,
    "xml": {"type": "text"},
    "smallint": {"type": "integer"},
    "integer": {"type": "integer"},
    "bigint": {"type": "long"},
    "oid": {"type": "long"},
    "real": {"type": "float", "ignore_malformed": True},
    "double precision": {"type": "double", "ignore_malformed": True},
    "numeric": {**_KEYWORD, "fields": {"number": {"type": "double", "ignore_malformed": True}}},
    "boolean": {"type": "boolean"},
    "date": _DATE,
    "timestamp without time zone": _DATE,
    "timestamp with time zone": _DATE,
    "json": _STORED,
    "jsonb": _STORED,
    "bytea": {"type": "binary"},
    "inet": {"type": "ip", "ignore_malformed": True},
    "tsvector": {"type": "text"},
}
_FIXED = frozenset(
    {
        "smallint", "integer", "bigint", "oid", "real", "double precision", "boolean", "date", "uuid", "interval",
        "timestamp without time zone", "timestamp with time zone", "time without time zone", "time with time zone",
        "money", "macaddr", "macaddr8", '"char"', "name", "inet", "cidr", "pg_lsn", "point", "line", "lseg", "box",
        "circle", "xid", "cid", "tid",
    }
)  # fmt: skip
_MODIFIER = re.compile(r"\([^)]*\)")


class Column(Protocol):
    """A column's name and its type as `format_type` prints it."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...


def _base(type_name: str) -> str:
    """`type_name` without length, precision and array brackets: `character varying(20)[]` is `character varying`."""
    return _MODIFIER.sub("", type_name).replace("[]", "").strip()


def field(type_name: str) -> dict[str, Any]:
    """The mapping of one column; engines map arrays like their elements. Unknown types are keywords."""
    return dict(_TYPES.get(_base(type_name), _KEYWORD))


def toastable(type_name: str) -> bool:
    """Whether PostgreSQL may store values of this type out of line and leave them out of an update's event."""
    return type_name.endswith("[]") or _base(type_name) not in _FIXED


def guess(value: Any) -> dict[str, Any]:
    """The mapping of a field whose column type is not known, from one of its values."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "long", "ignore_malformed": True}
    if isinstance(value, float):
        return {"type": "double", "ignore_malformed": True}
    if isinstance(value, (dict, list)):
        return dict(_STORED)
    return dict(_TEXT)


def fields(columns: Iterable[Column], *, keep: Iterable[str], exclude: Iterable[str], rename: dict[str, str]) -> Any:
    """The `properties` of the columns that get into the document, under the names that they have there."""
    kept, left_out = set(keep), set(exclude)
    return {
        rename.get(column.name, column.name): field(column.type)
        for column in columns
        if column.name not in left_out and (not kept or column.name in kept)
    }


def hidden() -> dict[str, Any]:
    """The mapping of the field that is ours."""
    return {
        "type": "object",
        "dynamic": False,
        "properties": {
            "version": {"type": "long"},
            "partition": {"type": "keyword"},
            "table": {"type": "keyword"},
        },
    }


def mappings(
    properties: dict[str, Any],
    meta: dict[str, Any],
    *,
    own: dict[str, Any] | None = None,
    guessed: bool = False,
) -> dict[str, Any]:
    """The `mappings` of an index.

    Args:
        own: a user's mapping.json (with or without its outer "mappings"), which replaces everything but our field.
        guessed: let the engine guess fields that are not listed (documents made by a transform).
    """
    if own is not None:
        whole = dict(own.get("mappings", own))
        given = whole.get("properties", {})
    else:
        # Strict: a column that came later is refused by the engine and then added with its own type.
        whole, given = {"dynamic": True if guessed else "strict"}, properties
    whole["properties"] = {**given, HIDDEN: hidden()}
    whole["_meta"] = {**whole.get("_meta", {}), **meta}
    return whole


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Index settings with dotted names that all start with `index.`, whichever way they were written."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict):
            found |= flat(value, f"{full}.")
        else:
            found[full if full.startswith("index.") else f"index.{full}"] = value
    return found


def count(mapping: dict[str, Any]) -> int:
    """How many fields a mapping has, as engines count them: with those inside and beside others."""
    inside = [*mapping.get("properties", {}).values(), *mapping.get("fields", {}).values()]
    return len(inside) + sum(count(field) for field in inside)


def settings(own: dict[str, Any], *, replaying: bool, fields: int = 0) -> dict[str, Any]:
    """The settings of a new index of so many fields; while it replays the log without replicas and refreshes."""
    wanted = {"index.gc_deletes": GC_DELETES, FIELDS_LIMIT: max(FIELDS, fields * 2), **flat(own)}
    if replaying:
        wanted |= {"index.number_of_replicas": 0, "index.refresh_interval": "-1"}
        wanted.pop("index.auto_expand_replicas", None)
    return wanted


def restored(own: dict[str, Any]) -> dict[str, Any]:
    """The settings that end a replay: the user's, or the engine's defaults (null)."""
    given = flat(own)
    names = ("index.number_of_replicas", "index.refresh_interval")
    wanted = {name: given.get(name) for name in names}
    if "index.auto_expand_replicas" in given:
        wanted["index.auto_expand_replicas"] = given["index.auto_expand_replicas"]
        wanted.pop("index.number_of_replicas")
    return wanted
