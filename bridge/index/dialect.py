"""What differs between search engines, as far as an index's mapping and settings go. Pure: one table.

                        Elasticsearch                  OpenSearch
    flat json           flattened, 7.3                 flat_object, 2.7
    cartesian point     point, 7.8, module spatial     xy_point, 2.4, plugin geospatial
    scaled_float        module mapper-extras           module mapper-extras
    lifecycle settings  index.lifecycle.*              index.plugins.index_state_management.*, older
                                                       index.opendistro.*

A version that is newer than the table has what the newest known one has. Modules matter because minimal builds lack
them; where an engine does not list any (managed ones may not), it is taken for a whole distribution. An engine that
cannot be told at all has none of these types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

Feature = Literal["flat", "point", "scaled"]
ELASTICSEARCH, OPENSEARCH = "elasticsearch", "opensearch"
NAMES = {ELASTICSEARCH: "Elasticsearch", OPENSEARCH: "OpenSearch"}


class Product(msgspec.Struct, frozen=True):
    """An engine: `distribution` is empty where it is not known; `version` is (major, minor); `parts` are its modules
    and plugins, None where it does not list them."""

    distribution: str = ""
    version: tuple[int, int] = (0, 0)
    parts: list[str] | None = None

    def __str__(self) -> str:
        if not self.distribution:
            return "an unknown search engine"
        return f"{NAMES[self.distribution]} {'.'.join(map(str, self.version))}"


class _Type(NamedTuple):
    """A field type: since which version, and a word in the name of the module that has it (empty: the core)."""

    name: str
    since: tuple[int, int]
    part: str = ""


_TYPES: dict[Feature, dict[str, _Type]] = {
    "flat": {ELASTICSEARCH: _Type("flattened", (7, 3)), OPENSEARCH: _Type("flat_object", (2, 7))},
    "point": {
        ELASTICSEARCH: _Type("point", (7, 8), "spatial"),
        OPENSEARCH: _Type("xy_point", (2, 4), "geospatial"),
    },
    "scaled": {
        ELASTICSEARCH: _Type("scaled_float", (5, 0), "mapperextras"),
        OPENSEARCH: _Type("scaled_float", (1, 0), "mapperextras"),
    },
}
_FOREIGN = {
    ELASTICSEARCH: ("index.plugins.", "index.opendistro."),
    OPENSEARCH: ("index.lifecycle.",),
}
_LIFECYCLE = {ELASTICSEARCH: "index.lifecycle.name", OPENSEARCH: "index.plugins.index_state_management.policy_id"}


class _Version(msgspec.Struct):
    number: str = ""
    distribution: str = ""


class _Root(msgspec.Struct):
    version: _Version = msgspec.field(default_factory=_Version)
    tagline: str = ""


class _Part(msgspec.Struct):
    name: str = ""


class _Node(msgspec.Struct):
    version: str = ""
    modules: list[_Part] | None = None
    plugins: list[_Part] | None = None


class _Nodes(msgspec.Struct):
    nodes: dict[str, _Node] = {}


def field_type(product: Product, feature: Feature) -> str | None:
    """The name of a field type that engines call differently; None where this one has none."""
    found = _TYPES[feature].get(product.distribution)
    if found is None or product.version < found.since:
        return None
    if found.part and product.parts is not None:
        plain = [re.sub(r"[^a-z]", "", part.lower()) for part in product.parts]
        if not any(found.part in part for part in plain):
            return None
    return found.name


def foreign(product: Product, settings: Iterable[str]) -> str:
    """What is wrong with settings (dotted names from `index.` on) that only the other engine knows; or empty."""
    wrong = sorted(name for name in settings if name.startswith(_FOREIGN.get(product.distribution, ())))
    if not wrong:
        return ""
    return f"{', '.join(wrong)}: not for {product}, whose lifecycles are named by {_LIFECYCLE[product.distribution]}"


def recognized(root: dict[str, Any], nodes: dict[str, Any]) -> Product:
    """The engine that gave these answers to `GET /` and `GET /_nodes/_local`; each is empty where it was refused.

    The node's own version counts: OpenSearch can be set to answer `GET /` with Elasticsearch's 7.10.2.
    """
    said, node = read(_Root, root), next(iter(read(_Nodes, nodes).nodes.values()), _Node())
    match = re.match(r"(\d{1,9})\.(\d{1,9})", node.version or said.version.number)
    if match is None:
        return Product()
    version = (int(match[1]), int(match[2]))
    lists = [found for found in (node.modules, node.plugins) if found is not None]
    parts = [part.name for found in lists for part in found] if lists else None
    return Product(_distribution(said, version, parts or []), version, parts)


def read(kind: type[T], answer: dict[str, Any]) -> T:
    """An answer as what it should be; empty where something else was said."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError:
        return kind()


def _distribution(root: _Root, version: tuple[int, int], parts: list[str]) -> str:
    said = f"{root.version.distribution} {root.tagline} {' '.join(parts)}".lower()
    if OPENSEARCH in said:
        return OPENSEARCH
    # Elasticsearch was at 7 when OpenSearch began to count anew at 1.
    return ELASTICSEARCH if version[0] >= 5 or "you know, for search" in said else OPENSEARCH
