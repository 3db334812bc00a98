"""Rows of a table that are read while its changes stream: which of them are still news when their turn comes. Pure.

    open → (the chunk is read) → filled → (the stream passes the chunk's end) → its rows are taken → closed

A chunk's snapshot S shows some of the changes that the stream brings meanwhile. One that S sees is older than the row:
it is published, and the row follows it. One that S does not see is newer: its row is dropped, after the columns that
the change leaves out (TOASTed, not changed) were taken from it; where the change was published before the row was
there, the row is brought up to it instead. So every key's events stand in the order in which the key went through them.

What no chunk can tell is left for the last ones: a row that moved to another key without its TOASTed columns before it
was read. Each such move is an event in the log, so that whoever goes on with the reading finds them there.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from bridge import event
from bridge.source.altering import Snapshot


class Change(NamedTuple):
    """What came while a chunk was being read: `old` and `key` are None for a truncate; `lacking` is the event where it
    was published without columns that it does not change, else empty."""

    xid: int
    table: tuple[str, str]
    old: bytes | None = None
    key: bytes | None = None
    lacking: bytes = b""


class Merge:
    """One table (with its partitions) while it is read.

    moved: the keys, as JSON, of rows to read in the last chunks; last: whether nothing but those is left; due: those
    that are being read now.
    """

    def __init__(self) -> None:
        self.moved: dict[bytes, None] = {}
        self.last = False
        self.due: set[bytes] = set()
        self._table: tuple[str, str] | None = None
        self._snapshot: Snapshot | None = None
        self._early: list[Change] = []
        self._rows: dict[bytes, bytes] = {}
        self._closing = b""

    def open(self, table: tuple[str, str]) -> None:
        """A chunk of a table or partition is about to be read."""
        self._table, self._snapshot, self._early, self._rows = table, None, [], {}

    def restart(self) -> None:
        """The table is to be read from its beginning."""
        self.moved, self.last, self.due = {}, False, set()

    def close(self) -> None:
        """There is no chunk any more; what was not taken of it is forgotten."""
        self._table, self._snapshot, self._early, self._rows = None, None, [], {}

    def fill(self, snapshot: Snapshot, rows: dict[bytes, bytes], closing: bytes) -> None:
        """The chunk was read.

        Args:
            rows: its `read` events, without the `closing` that they share, by their keys as JSON.
        """
        self._snapshot, self._rows, self._closing = snapshot, rows, closing
        early, self._early = self._early, []
        for change in early:
            if snapshot.has(change.xid):
                continue
            if change.key is None or change.old is None:
                self._truncated(change.table)
                continue
            row = self._rows.pop(change.old, None)
            self._rows.pop(change.key, None)
            if row is not None and change.lacking:
                self._rows[change.key] = event.followed(row, change.lacking)

    @property
    def left(self) -> int:
        """How many rows of the chunk are still to be published."""
        return len(self._rows)

    def take(self, count: int) -> list[bytes]:
        """The next rows to publish, in the order in which they were read: the stream has passed the chunk's end."""
        keys = list(itertools.islice(self._rows, count))
        return [self._rows.pop(key) + self._closing for key in keys]

    def see(self, action: str, xid: int, table: tuple[str, str], payload: bytes) -> bytes:
        """A change that the stream brings; the event to publish for it.

        Args:
            action: wal2json's letter. table: the table or partition that it names.
        """
        if action == "T":
            self._truncate(xid, table)
            return payload
        key, old, unchanged = event.outline(payload)
        newer = self._snapshot is not None and not self._snapshot.has(xid)
        if newer:
            row = self._rows.pop(old, None)
            if old != key:
                self._rows.pop(key, None)
            if row is not None and unchanged:
                payload = event.filled(payload, event.columns_of(row + self._closing))
                unchanged = event.outline(payload).unchanged
        lacks = bool(unchanged)
        if lacks and old != key and (not self.last or old in self.moved or old in self.due):
            self.moved[key] = None
        if self._table is not None and self._snapshot is None:
            self._early.append(Change(xid, table, old, key, payload if lacks else b""))
        return payload

    def _truncate(self, xid: int, table: tuple[str, str]) -> None:
        if self._table is None:
            return
        if self._snapshot is None:
            self._early.append(Change(xid, table))
        elif not self._snapshot.has(xid):
            self._truncated(table)

    def _truncated(self, table: tuple[str, str]) -> None:
        # TRUNCATE of a partitioned table names every partition.
        if table == self._table:
            self._rows.clear()


class Delivered:
    """Transactions that the stream has begun to bring and that a snapshot may not show yet.

    A walsender passes a commit on before it is visible, long before where it waits for a synchronous standby. A row
    read with a snapshot that lacks one of them would stand behind its change for ever.
    """

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}

    def add(self, xid: int, start: int) -> None:
        """The stream brings a transaction, whose commit record begins at `start`."""
        self._starts[xid] = start

    def seen(self, snapshot: Snapshot) -> None:
        """Forget the transactions that a snapshot shows."""
        self._starts = {xid: start for xid, start in self._starts.items() if not snapshot.has(xid)}

    def pending(self) -> list[int]:
        """The transactions of which it is not known that they are to be seen."""
        return list(self._starts)

    def safe(self, reached: int) -> int:
        """Up to where PostgreSQL may forget: it must send again, at the next start, what is not to be seen yet, and
        it does so for transactions whose commit record begins there or later."""
        return min(reached, *self._starts.values()) if self._starts else reached
