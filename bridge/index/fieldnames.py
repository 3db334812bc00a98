"""Which names an engine can have for a field, and which fields cannot stand beside each other. Pure.

Measured on OpenSearch 2.19 and Elasticsearch 8 and 9: `reserved` refuse an index or every document of it, so do empty
names and those with nothing before or between their dots; with a dot at the end they make a field of another name. A
dotted name on its own is an object with that field in it, and what is stored is what was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.index.dialect import ELASTICSEARCH, OPENSEARCH, Product
from bridge.index.mapping import HIDDEN

_COMMON = frozenset(
    {
        "_id", "_index", "_source", "_routing", "_seq_no", "_version", "_primary_term", "_field_names", "_ignored",
        "_doc_count", "_nested_path", "_data_stream_timestamp",
    }
)  # fmt: skip
_RESERVED = {
    ELASTICSEARCH: _COMMON | {"_ignored_source", "_tier"},
    OPENSEARCH: _COMMON | {"_feature"},
}
# White space to Python, but not to Java.
_NOT_BLANK = frozenset("\x85\xa0\u2007\u202f")


def unfit(name: str, product: Product, *, dotted: bool = True) -> str:
    """Why an engine cannot have a field of this name; empty where it can.

    Args:
        dotted: whether a dot in a name makes an object, as it does unless a mapping file says `subobjects: false`.
    """
    first, *rest = parts = name.split(".")
    if first == HIDDEN:
        return "that field is the bridge's own"
    if first in _RESERVED.get(product.distribution, _RESERVED[ELASTICSEARCH] | _RESERVED[OPENSEARCH]):
        return f"{first} is a field of the search engine's own"
    if not name:
        return "it is empty"
    if dotted and "" in parts:
        return "in a field's name something stands before and behind each dot"
    if dotted and rest and any(map(_blank, parts)):
        return "in a field's name more than blanks stands before and behind each dot"
    # OpenSearch takes a name of nothing but blanks.
    if _blank(name) and product.distribution != OPENSEARCH:
        return "it is nothing but blanks"
    return ""


def _blank(name: str) -> bool:
    return name.isspace() and _NOT_BLANK.isdisjoint(name)


def around(name: str, properties: Mapping[str, Any]) -> str:
    """The field that a dotted name would be inside of and cannot be, because that one is no object; or empty.

    What is only stored is no such object either: Elasticsearch takes a field inside of it, and never indexes it.
    """
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((field for field in outer if field in properties and not _open(properties[field])), "")


def within(name: str, properties: Mapping[str, Any]) -> str:
    """A field that would be inside of the field `name`; or empty."""
    return next((field for field in properties if field.startswith(f"{name}.")), "")


def _open(field: Mapping[str, Any]) -> bool:
    return field.get("type", "object") == "object" and field.get("enabled", True) is not False
