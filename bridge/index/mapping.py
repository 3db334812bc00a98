"""PostgreSQL types → index mapping and settings. Pure.

Every choice keeps two promises: a value that PostgreSQL holds is never refused by the engine (hence `ignore_malformed`
for infinities and dates outside the engine's range, `ignore_above` for long keywords, and `convert` where a field takes
another JSON than events have), and what is stored is exact wherever it is not converted (the document's source keeps
every digit; a `numeric` is a keyword for exact matches with a `double` beside it for ranges). docs/indexes.md
is the table of it all.

`Choices` is what a user and the engine decide; each generation keeps its own. A field of `fields` stands as it is
given, but for the same two guards, which a user can turn off. json = "object" is the one choice that may refuse values:
there the engine guesses the types of what is inside.

`_bridge` is the one field that is ours: `version` (of the last write), `table` and `partition` are indexed, because
truncates and sweeps page through documents by them in an order that no later write disturbs; the rest of it is stored
only.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec

from bridge.errors import ConfigError
from bridge.index import dialect
from bridge.index.dialect import Product

HIDDEN = "_bridge"
KEYWORD_LIMIT = 8_191
SUBFIELD_LIMIT = 256
GC_DELETES = "1h"
FIELDS = 1_000
FIELDS_LIMIT = "index.mapping.total_fields.limit"
RESTORED = ("index.number_of_replicas", "index.refresh_interval", "index.auto_expand_replicas")
DATES = "strict_date_optional_time"

_KEYWORD: dict[str, Any] = {"type": "keyword", "ignore_above": KEYWORD_LIMIT}
_TEXT: dict[str, Any] = {
    "type": "text",
    "fields": {"keyword": {"type": "keyword", "ignore_above": SUBFIELD_LIMIT}},
}
_DATE: dict[str, Any] = {"type": "date", "format": DATES, "ignore_malformed": True}
_DATE_RANGE: dict[str, Any] = {"type": "date_range", "format": f"{DATES}||epoch_millis"}
_DOUBLE: dict[str, Any] = {"type": "double", "ignore_malformed": True}
_STORED: dict[str, Any] = {"type": "object", "enabled": False}
_KINDS = ("range", "multirange")
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
    "double precision": _DOUBLE,
    "boolean": {"type": "boolean"},
    "date": _DATE,
    "timestamp without time zone": _DATE,
    "timestamp with time zone": _DATE,
    "bytea": {"type": "binary"},
    "inet": {"type": "ip", "ignore_malformed": True, "fields": {"keyword": _KEYWORD}},
    "cidr": {"type": "ip_range"},
    "tsvector": {"type": "text"},
    **{f"int4{kind}": {"type": "integer_range"} for kind in _KINDS},
    **{f"int8{kind}": {"type": "long_range"} for kind in _KINDS},
    **{f"num{kind}": {"type": "double_range"} for kind in _KINDS},
    **{f"{of}{kind}": _DATE_RANGE for of in ("date", "ts", "tstz") for kind in _KINDS},
}
_WHOLE = frozenset({"smallint", "integer", "bigint", "oid"})
_MAY_BE_MALFORMED = (
    "byte", "short", "integer", "long", "float", "half_float", "double", "scaled_float", "date", "date_nanos", "ip",
    "geo_point", "point", "xy_point",
)  # fmt: skip
_GUARDS: dict[str, dict[str, Any]] = {
    "keyword": {"ignore_above": KEYWORD_LIMIT},
    **{kind: {"ignore_malformed": True} for kind in _MAY_BE_MALFORMED},
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


class Choices(msgspec.Struct, frozen=True):
    """What decides a field beside its column's type: the index's `numeric`, `json` and `fields`, and the engine."""

    numeric: str = "exact"
    json: str = "stored"
    fields: dict[str, dict[str, Any]] = {}
    product: Product = Product()


PLAIN = Choices()


class Column(Protocol):
    """A column's name and its type as `format_type` prints it."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...


def base_type(type_name: str) -> str:
    """`type_name` without length, precision and array brackets: `character varying(20)[]` is `character varying`."""
    return _MODIFIER.sub("", type_name).replace("[]", "").strip()


def field(type_name: str, chosen: Choices = PLAIN) -> dict[str, Any]:
    """The mapping of one column; engines map arrays like their elements. Unknown types are keywords."""
    base = base_type(type_name)
    if base == "numeric":
        return _numeric(chosen)
    if base in ("json", "jsonb"):
        return _json(chosen)
    if base == "point":
        cartesian = dialect.field_type(chosen.product, "point")
        return {"type": cartesian, "ignore_malformed": True} if cartesian else dict(_KEYWORD)
    found = dict(_TYPES.get(base, _KEYWORD))
    if type_name.endswith("[]") and base in _WHOLE:
        # An array whose lower bound is not 1 comes as PostgreSQL's text.
        found["ignore_malformed"] = True
    return found


def _numeric(chosen: Choices) -> dict[str, Any]:
    kind, _, factor = chosen.numeric.partition(":")
    if kind == "exact":
        return {**_KEYWORD, "fields": {"number": dict(_DOUBLE)}}
    if kind == "scaled_float" and dialect.field_type(chosen.product, "scaled"):
        return {"type": "scaled_float", "scaling_factor": float(factor), "ignore_malformed": True}
    return dict(_DOUBLE)


def _json(chosen: Choices) -> dict[str, Any]:
    flat_type = dialect.field_type(chosen.product, "flat")
    if chosen.json == "object":
        return {"type": "object", "dynamic": True}
    if chosen.json == "flat" and flat_type == "flattened":
        return {"type": flat_type, "ignore_above": KEYWORD_LIMIT}
    if chosen.json == "flat" and flat_type:
        return {"type": flat_type}
    return dict(_STORED)


def lacking(chosen: Choices) -> list[str]:
    """What was chosen and this engine does not have, each with what is done instead."""
    found = []
    if chosen.json == "flat" and not dialect.field_type(chosen.product, "flat"):
        found.append(f'json = "flat" is "stored": {chosen.product} has no field type for it')
    if chosen.numeric.startswith("scaled_float") and not dialect.field_type(chosen.product, "scaled"):
        found.append(f'numeric = "{chosen.numeric}" is "double": {chosen.product} has no scaled_float')
    return found


def toastable(type_name: str) -> bool:
    """Whether PostgreSQL may store values of this type out of line and leave them out of an update's event."""
    return type_name.endswith("[]") or base_type(type_name) not in _FIXED


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


def fields(
    columns: Iterable[Column],
    *,
    keep: Iterable[str],
    exclude: Iterable[str],
    rename: Mapping[str, str],
    chosen: Choices = PLAIN,
) -> dict[str, dict[str, Any]]:
    """The `properties` of the columns that get into the document, under the names that they have there, and of the
    fields of `chosen` that are no columns (a transform's or a constant's)."""
    named = types(columns, keep=keep, exclude=exclude, rename=rename)
    found = {name: field(kind, chosen) for name, kind in named.items()}
    return found | {name: guarded(given) for name, given in chosen.fields.items()}


def types(
    columns: Iterable[Column], *, keep: Iterable[str], exclude: Iterable[str], rename: Mapping[str, str]
) -> dict[str, str]:
    """The column types behind a document's fields, by the fields' names."""
    kept, left_out = set(keep), set(exclude)
    return {
        rename.get(column.name, column.name): column.type
        for column in columns
        if column.name not in left_out and (not kept or column.name in kept)
    }


def guarded(given: Mapping[str, Any]) -> dict[str, Any]:
    """A user's field with what keeps it from refusing values, unless the user says otherwise."""
    return {**_GUARDS.get(given.get("type", ""), {}), **given}


def templates(properties: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dynamic templates for the objects whose inside is guessed: as few types as can be, none of which refuses others
    of its kind."""
    kinds: dict[str, dict[str, Any]] = {
        "long": {"type": "double", "ignore_malformed": True},
        "double": {"type": "double", "ignore_malformed": True},
        "boolean": dict(_KEYWORD),
        "string": _TEXT,
        "date": _TEXT,
    }
    return [
        {f"{name}_{kind}": {"path_match": f"{name}.*", "match_mapping_type": kind, "mapping": made}}
        for name, given in properties.items()
        if given.get("type") == "object" and given.get("dynamic") is True and "properties" not in given
        for kind, made in kinds.items()
    ]


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

    Raises:
        ConfigError: a mapping.json that keeps documents from being read back whole.
    """
    if own is not None:
        whole = {name: part for name, part in own.get("mappings", own).items() if name != "settings"}
        given = whole.get("properties", {})
        _check_source(whole.get("_source", {}))
    else:
        # Strict: a column that came later is refused by the engine and then added with its own type.
        whole, given = {"dynamic": True if guessed else "strict"}, properties
        inside = templates(properties)
        if inside:
            whole["dynamic_templates"] = inside
    whole["properties"] = {**given, HIDDEN: hidden()}
    whole["_meta"] = {**whole.get("_meta", {}), **meta}
    return whole


def _check_source(source: Mapping[str, Any]) -> None:
    if source.get("enabled", True) in (False, "false") or source.get("includes") or source.get("excludes"):
        raise ConfigError(
            "the mapping file turns _source off, or leaves fields out of it",
            "take _source out of it: updates that leave large columns out are completed from the document",
        )


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
    wanted = {name: given.get(name) for name in RESTORED if name != "index.auto_expand_replicas"}
    if "index.auto_expand_replicas" in given:
        wanted["index.auto_expand_replicas"] = given["index.auto_expand_replicas"]
        wanted.pop("index.number_of_replicas")
    return wanted


class _Template(msgspec.Struct):
    index_patterns: list[str] = []
    order: int = 0
    settings: dict[str, Any] = {}


class _Simulated(msgspec.Struct):
    template: _Template = msgspec.field(default_factory=_Template)


def inherited(answer: Mapping[str, Any], index: str) -> dict[str, Any]:
    """Those settings of index templates that a replay puts aside, from a simulation or from all templates of the older
    kind: they would end as the engine's defaults."""
    if "template" in answer:
        found = flat(dialect.read(_Simulated, dict(answer)).template.settings)
    else:
        templates = [dialect.read(_Template, one) for one in answer.values() if isinstance(one, dict)]
        matching = [t for t in templates if any(fnmatch.fnmatchcase(index, p) for p in t.index_patterns)]
        found = {}
        for template in sorted(matching, key=lambda t: t.order):
            found |= flat(template.settings)
    return {name: found[name] for name in RESTORED if name in found}
