"""Whether a row of PostgreSQL and the log say the same, and when that cannot be told yet. Pure.

A row is read with a snapshot S; the log has been read past the WAL's end of that moment, so everything that S shows is
in it. What the log has beyond S is known by its transactions: a row that one of them has written, or may have, is to be
looked at once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

from bridge.event import Event
from bridge.index.naming import UNREADABLE, row
from bridge.index.picture import Standing
from bridge.source.altering import Snapshot

Kind = Literal["missing", "extra", "different"]
Phase = Literal["replaying", "comparing", "looking again"]
NULL = b"null"
KINDS: tuple[Kind, ...] = ("missing", "extra", "different")


class Finding(msgspec.Struct, frozen=True):
    """A row on which the two do not agree: its key, the columns that differ, and what each says (None: no such row)."""

    kind: Kind
    key: msgspec.Raw
    columns: list[str] = []
    table: msgspec.Raw | None = None
    log: msgspec.Raw | None = None


class Compared(NamedTuple):
    """How far the comparison of a table is: `done` of `of` events of the log, or rows of PostgreSQL (about)."""

    table: str
    phase: Phase
    done: int
    of: int


class Report(msgspec.Struct, kw_only=True):
    """What a comparison found in one table.

    rows: of PostgreSQL; logged: of the log, both as they were when they were read; counts: of each kind of finding;
    changing: rows that were changed at each look; unread: those nested too deep to be compared; lost: events that do
    not say which row they change; why: why the table was not compared, and `estimate` then how many rows it
    has about (0: PostgreSQL has not counted them yet); findings: the first of each kind.
    """

    table: str
    rows: int = 0
    logged: int = 0
    counts: dict[str, int] = {}
    changing: int = 0
    unread: int = 0
    lost: int = 0
    seq: int = 0
    why: str = ""
    estimate: int = 0
    findings: list[Finding] = []

    @property
    def same(self) -> bool:
        """Whether nothing was found."""
        return not any(self.counts.values())


class Recent:
    """The transactions that the log has and an early snapshot does not show, by the rows that they write.

    Args:
        seen: a snapshot from before anything was compared.
    """

    def __init__(self, seen: Snapshot) -> None:
        self._seen = seen
        self._rows: dict[str, list[int]] = {}
        self._all: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, event: Event, addresses: Iterable[str]) -> None:
        """Take an event of the log, with the addresses of its row now and before."""
        if event.txid is None or self._seen.has(event.txid):
            return
        if event.op == "truncate":
            self._all.append(event.txid)
        for address in addresses:
            self._rows.setdefault(address, []).append(event.txid)

    def forget(self, seen: Snapshot) -> None:
        """Forget what a newer snapshot shows: every later one does, too."""
        self._seen = seen
        kept = ((address, [xid for xid in xids if not seen.has(xid)]) for address, xids in self._rows.items())
        self._rows = {address: xids for address, xids in kept if xids}
        self._all = [xid for xid in self._all if not seen.has(xid)]

    def newer(self, address: str, shown: Snapshot) -> bool:
        """Whether the log has a change of a row that a snapshot does not show."""
        return any(not shown.has(xid) for xid in (*self._rows.get(address, ()), *self._all))


def differing(found: Mapping[str, msgspec.Raw] | None, logged: Standing | None) -> tuple[Kind, list[str]] | None:
    """How a row (None: there is none) and what the log says of it differ, with the columns that do; None where they do
    not.

    A column that the log's row lacks is as good as null: it was added later. One that the table lacks was dropped.
    """
    if found is None:
        return ("extra", []) if logged is not None else None
    if logged is None:
        return "missing", []
    if logged.problem:
        return "different", []
    try:
        columns = row(logged.data)
    except UNREADABLE:
        return "different", []
    wrong = [
        name
        for name, value in found.items()
        if name in logged.missing or not _same(bytes(columns.get(name, NULL)), bytes(value))
    ]
    return ("different", wrong) if wrong else None


def _same(one: bytes, other: bytes) -> bool:
    """Whether two JSON values say the same; numbers to the last digit, strings however they are escaped."""
    if one == other:
        return True
    texts = one[:1] == other[:1] == b'"'
    return texts and msgspec.json.decode(one) == msgspec.json.decode(other)
