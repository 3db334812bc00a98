"""Rows as they were, rebuilt from the log: for updates whose TOASTed columns are neither in the event nor in the index.

Pure: feed it a table's events from the beginning, in order; it remembers only the rows that are asked for.
"""

from __future__ import annotations

from bridge.event import Event
from bridge.index.document import Row, identity, row


class Reconstruction:
    """The rows behind some ids, each as it stood just before one sequence.

    Args:
        wanted: for each id the sequence before which its row is asked for.
    """

    def __init__(self, wanted: dict[str, int]) -> None:
        self._asked: dict[int, list[str]] = {}
        for doc_id, seq in wanted.items():
            self._asked.setdefault(seq, []).append(doc_id)
        self.upto = max(wanted.values(), default=0)
        self._followed = set(wanted)
        self._rows: dict[str, tuple[Row, str | None]] = {}
        self._more: set[str] = set()
        self.found: dict[str, Row] = {}

    def again(self) -> bool:
        """Whether another pass is needed, because a row had another key before; call after a whole pass."""
        if not self._more:
            return False
        self._followed |= self._more
        self._more = set()
        self._rows, self.found = {}, {}
        return True

    def see(self, seq: int, event: Event | None) -> None:
        """Take the event at `seq`; None where that message is none."""
        for doc_id in self._asked.get(seq, ()):
            if doc_id in self._rows:
                self.found[doc_id] = dict(self._rows[doc_id][0])
        if event is None:
            return
        if event.op == "truncate":
            kept = {i: r for i, r in self._rows.items() if event.partition is not None and r[1] != event.partition}
            self._rows = kept
        elif event.op in ("insert", "update", "read", "delete") and event.key:
            self._row(event)

    def _row(self, event: Event) -> None:
        doc_id, old = identity(event)
        if event.op == "delete":
            self._rows.pop(doc_id, None)
            return
        base = self._rows.pop(old, None) if old is not None else self._rows.get(doc_id)
        if doc_id not in self._followed:
            return
        columns = row(event.after)
        if event.unchanged and base is None and old is not None and old not in self._followed:
            self._more.add(old)
        for name in event.unchanged:
            if base is not None and name in base[0]:
                columns[name] = base[0][name]
        self._rows[doc_id] = (columns, event.partition)
