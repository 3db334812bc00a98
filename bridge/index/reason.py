"""What an engine gives as the reason of a refusal, without the values that it quotes. Pure.

A reason is free text: it may hold any part of a document, the names of fields inside a jsonb value among them. So only
what is known beforehand gets out of here: the kind of an error, types of fields, the fields that the caller names, and
the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

BLOCKED = "cluster_block_exception"
CLOSED = "index_closed_exception"
GONE = ("index_not_found_exception", "alias_not_found_exception")
DEEPEST = 4
TYPES = frozenset(
    {
        "binary", "boolean", "byte", "date", "date_nanos", "date_range", "dense_vector", "double", "double_range",
        "flat_object", "flattened", "float", "float_range", "geo_point", "geo_shape", "half_float", "integer",
        "integer_range", "ip", "ip_range", "join", "keyword", "knn_vector", "long", "long_range", "nested", "object",
        "scaled_float", "short", "text", "unsigned_long", "version", "wildcard",
    }
)  # fmt: skip
_KIND = re.compile(r"[a-z0-9_]{1,80}")
_NAMED = re.compile(r"\[([^\[\]]{1,200})\]|field(?: name)? '([^']{1,200})'|field=\"([^\"]{1,200})\"")
_BLOCK = re.compile(r"blocked by: \[[A-Z_]+/(\d{1,3})/")
_SHOWN = 4


class Problem(msgspec.Struct, frozen=True):
    """The error part of an answer; `reason` may quote row values and must not be shown as it is."""

    type: str = ""
    reason: str | None = None
    caused_by: Problem | None = None


def chain(problem: Problem | None) -> Iterator[Problem]:
    """A problem and its causes, the outermost first."""
    for _ in range(DEEPEST):
        if problem is None:
            return
        yield problem
        problem = problem.caused_by


def scrub(problem: Problem | None, known: Collection[str] = ()) -> str:
    """The kinds of a problem and its causes, with those of the `known` fields and of the types that each names.

    Args:
        known: the names that may be shown; of `a.b.c` the longest known beginning is.
    """
    parts = []
    for part in chain(problem):
        names = list(dict.fromkeys(_names(part.reason or "", known)))[:_SHOWN]
        parts.append(_kind(part.type) + (f" [{', '.join(names)}]" if names else ""))
    return ": ".join(part for part in parts if part) or "no reason given"


def paths(mapping: dict[str, Any]) -> frozenset[str]:
    """The full names of a mapping's fields, those inside and beside others too."""
    found: set[str] = set()
    inside = {**mapping.get("properties", {}), **mapping.get("fields", {})}
    for name, field in inside.items():
        found |= {name, *(f"{name}.{below}" for below in paths(field))}
    return frozenset(found)


def _kind(text: str) -> str:
    return text if _KIND.fullmatch(text) or not text else "unnamed"


def _names(reason: str, known: Collection[str]) -> Iterator[str]:
    for match in _NAMED.finditer(reason):
        name = next(part for part in match.groups() if part)
        if name in TYPES:
            yield name
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        if name in known:
            yield name


def blocked(problem: Problem | None, index: str) -> tuple[str, str] | None:
    """What blocks an index, and what to do about it; None where nothing does.

    Args:
        index: the name to show in the remedy.
    """
    for part in chain(problem):
        if part.type == CLOSED:
            return _closed(index)
        if part.type == BLOCKED:
            numbers = [int(number) for number in _BLOCK.findall(part.reason or "")]
            return _block(numbers[0] if numbers else 0, index)
    return None


BLOCKS = {"read_only_allow_delete": 12, "read_only": 5, "read": 7, "write": 8, "metadata": 9}


def lifts(settings: Mapping[str, object], index: str) -> list[tuple[str, str]]:
    """What settings (flat, as `GET /INDEX/_settings?flat_settings` gives them) block an index, and what lifts that."""
    found = [number for name, number in BLOCKS.items() if str(settings.get(f"index.blocks.{name}")).lower() == "true"]
    return [(what, remedy.removeprefix("waiting; ")) for what, remedy in (_block(number, index) for number in found)]


def _closed(index: str) -> tuple[str, str]:
    return "the index is closed", f"waiting; open it: POST /{index}/_open"


def _block(number: int, index: str) -> tuple[str, str]:
    """The blocks that engines number alike."""
    if number in (1, 2):
        return "the cluster has no elected master or is still recovering its state", "waiting for the cluster"
    if number == 4:
        return _closed(index)
    if number == 12:
        return (
            "the index takes deletions of whole indexes only (index.blocks.read_only_allow_delete): the engine's disk"
            " has passed its flood-stage watermark, or somebody set it",
            f"waiting; make room on the engine's disk, then, if the engine does not lift the block by itself:"
            f' PUT /{index}/_settings {{"index.blocks.read_only_allow_delete": null}}',
        )
    setting = {5: "read_only", 7: "read", 8: "write", 9: "metadata"}.get(number)
    if setting is not None:
        return (
            f"the index is blocked by its setting index.blocks.{setting}",
            f'waiting; lift it: PUT /{index}/_settings {{"index.blocks.{setting}": null}}',
        )
    if number in (6, 13):
        name = "read_only" if number == 6 else "read_only_allow_delete"
        return (
            f"the whole cluster is blocked by its setting cluster.blocks.{name}",
            f'waiting; lift it: PUT /_cluster/settings {{"persistent": {{"cluster.blocks.{name}": null}}}}',
        )
    return f"the index is blocked (block {number})", f"waiting; see GET /{index}/_settings and the engine's log"
