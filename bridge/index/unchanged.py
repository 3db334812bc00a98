"""Rows as they were, rebuilt from the log: for updates whose TOASTed columns are neither in the event nor in the index.

Pure: feed it a table's events from the beginning, in order; it remembers only the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bridge.event import Event
from bridge.index.naming import Naming, Row, parts, row


class _Followed(NamedTuple):
    columns: Row
    table: tuple[str, str]
    partition: str | None

    def falls(self, truncate: Event) -> bool:
        """Whether a truncate has removed the row."""
        whole = truncate.partition is None or truncate.partition == self.partition
        return whole and (truncate.schema, truncate.table) == self.table


class Reconstruction:
    """The rows behind some ids, each as it stood just before one sequence; at most two passes.

    Args:
        wanted: ids, each with the sequence before which its row is asked for.
    """

    def __init__(self, wanted: Iterable[tuple[str, int]]) -> None:
        self._asked: dict[int, set[str]] = {}
        for doc_id, seq in wanted:
            self._asked.setdefault(seq, set()).add(doc_id)
        self.upto = max(self._asked, default=0)
        self._followed = {doc_id for doc_ids in self._asked.values() for doc_id in doc_ids}
        self._rows: dict[str, _Followed] = {}
        self._earlier: dict[str, set[str]] = {}
        self._more: set[str] = set()
        self.found: dict[tuple[str, int], Row] = {}

    def again(self) -> bool:
        """Whether another pass is needed, because a row had other keys before; call after a whole pass.

        The first pass has seen every change of a key, so the second one follows whole chains of them.
        """
        if not self._more:
            return False
        while self._more:
            self._followed |= self._more
            self._more = {old for new in self._more for old in self._earlier.get(new, ())} - self._followed
        self._rows, self.found = {}, {}
        return True

    def lose(self, seq: int, doc_id: str) -> None:
        """Take a message that cannot be read: what it made of the row `doc_id` is not known."""
        self._answer(seq)
        self._rows = {address: row for address, row in self._rows.items() if parts(address)[0] != doc_id}

    def _answer(self, seq: int) -> None:
        for doc_id in self._asked.get(seq, ()):
            if doc_id in self._rows:
                self.found[doc_id, seq] = dict(self._rows[doc_id].columns)

    def see(self, seq: int, event: Event, naming: Naming) -> None:
        """Take the event at `seq`, of a table whose rows are called by `naming`.

        Raises:
            Rejected, DecodeError: it cannot be read; say so with `lose`.
        """
        self._answer(seq)
        if event.op == "truncate":
            self._rows = {doc_id: row for doc_id, row in self._rows.items() if not row.falls(event)}
        elif event.op in ("insert", "update", "read", "delete") and event.key:
            self._row(event, *naming.identity(event))

    def _row(self, event: Event, doc_id: str, old: str | None) -> None:
        if event.op == "delete":
            self._rows.pop(doc_id, None)
            return
        base = self._rows.pop(old, None) if old is not None else self._rows.get(doc_id)
        if old is not None and event.unchanged:
            self._earlier.setdefault(doc_id, set()).add(old)
        if doc_id not in self._followed:
            return
        columns = row(event.after)
        if event.unchanged and base is None and old is not None and old not in self._followed:
            self._more.add(old)
        for name in event.unchanged:
            if base is not None and name in base.columns:
                columns[name] = base.columns[name]
        self._rows[doc_id] = _Followed(columns, (event.schema, event.table), event.partition)
