"""What a generation should hold for a row, and whether it does: the one place that knows how its documents are made.

A document is compared as JSON, so that neither the order of its fields nor white space counts. Of the hidden field the
version does not count, nor how many documents the row may have had, and of its raw columns only those that both have:
which columns are kept there depends on the types that were known when the document was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from bridge.index.document import Builder, Operation, Put
from bridge.index.engine import Found
from bridge.index.mapping import HIDDEN
from bridge.index.naming import UNREADABLE, Rejected
from bridge.index.picture import Standing, Table

MISSING, EXTRA, STALE, DIFFERENT, REFUSED = "missing", "extra", "stale", "different", "refused"
KINDS = (MISSING, EXTRA, STALE, DIFFERENT, REFUSED)
_plain = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)


async def expected(builders: Mapping[Table, Builder], standing: Standing, at: int, had: int = 1) -> list[Operation]:
    """The operations that make an index hold a row as it stands, with version `at`; the first is of the row's address.

    Args:
        had: how many documents the row may have had, or more: those that it should not have are deleted.

    Raises:
        Rejected: the row can be no document.
    """
    if standing.problem:
        raise Rejected(standing.problem)
    builder = builders[standing.schema, standing.table]
    try:
        return await builder.build(standing.event(), standing.id, at, {}, had)
    except UNREADABLE as error:
        raise Rejected(f"its row cannot be read ({type(error).__name__})") from None


def judge(op: Operation, found: Found | None) -> str:
    """What is wrong with a document that `op` should have made: one of KINDS, or empty where nothing is."""
    if not isinstance(op, Put):
        return EXTRA if found is not None else ""
    if found is None:
        return MISSING
    source = bytes(found.source)
    if source == op.doc:
        return ""
    try:
        ours, theirs = _plain.decode(op.doc), _plain.decode(source)
    except UNREADABLE:
        return DIFFERENT
    if _documents_agree(ours, theirs):
        return ""
    hidden = theirs.get(HIDDEN)
    at = hidden.get("version") if isinstance(hidden, dict) else None
    return STALE if isinstance(at, int) and at < op.version else DIFFERENT


def _documents_agree(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    mine, other = ours.pop(HIDDEN), theirs.get(HIDDEN)
    if not isinstance(other, dict) or not _same(ours, {name: v for name, v in theirs.items() if name != HIDDEN}):
        return False
    raw, rest = mine.get("raw", {}), other.get("raw", {})
    if not isinstance(rest, dict) or not all(_same(raw[name], rest[name]) for name in raw.keys() & rest.keys()):
        return False
    return all(_same(mine.get(name), other.get(name)) for name in ("table", "key", "partition"))


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values; Python's own takes true for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
