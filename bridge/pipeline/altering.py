"""The transactions that the stream brings and that may have altered tables, until they were looked at.

The stream notes them here as it goes; the watch on altered tables takes them from here.
"""

from __future__ import annotations

import anyio

from bridge.source.altering import Snapshot
from bridge.source.shapes import Part

_HALF = 1 << 31
MOST = 100_000


class Altering:
    """xids: of the transactions that were not looked at yet, PostgreSQL's 32 bits, with where their commit records
    begin; news: set when there is one more."""

    def __init__(self) -> None:
        self.xids: dict[int, int] = {}
        self.news = anyio.Event()
        self._truncates: dict[tuple[str, str], set[int]] = {}

    def began(self, xid: int, start: int = 0) -> None:
        """The stream brings a transaction that may have altered tables; its commit record begins at `start`."""
        if len(self.xids) >= MOST:
            # Nobody has looked for very long. What is forgotten is a reason not to read a table again.
            self.xids.clear()
            self._truncates.clear()
        self.xids[xid] = start
        self.news.set()

    def truncate(self, schema: str, table: str, xid: int) -> None:
        """A transaction truncated a table or partition."""
        self._truncates.setdefault((schema, table), set()).add(xid)

    def seen(self, snapshot: Snapshot) -> None:
        """Everything that a snapshot shows has been looked at."""
        self.xids = {xid: start for xid, start in self.xids.items() if not snapshot.has(xid)}
        left = {name: {x for x in xids if not snapshot.has(x)} for name, xids in self._truncates.items()}
        self._truncates = {name: xids for name, xids in left.items() if xids}

    def safe(self, reached: int) -> int:
        """Up to where PostgreSQL may forget: who is killed before he has looked must be sent it again, for the
        catalogue does not tell a truncate from what rewrites rows."""
        return min(reached, *self.xids.values()) if self.xids else reached

    def truncated(self, part: Part, snapshot: Snapshot) -> bool:
        """Whether a table has its file from a TRUNCATE.

        A subtransaction has an id of its own, of which the stream says nothing. It was the last truncate's, unless it
        can have been that of another transaction, which had its own id before and committed later: who committed before
        the truncate has not written the table's row in pg_class after it.

        Args:
            snapshot: of the catalogue that has the part so.
        """
        named = self._truncates.get((part.schema, part.table), ())
        mine = [xid for xid in named if xid in self.xids and snapshot.has(xid)]
        if part.by in mine:
            return True
        if not mine or part.by in self.xids:
            return False
        last = max(mine, key=self.xids.__getitem__)
        since = [xid for xid, start in self.xids.items() if start >= self.xids[last] and snapshot.has(xid)]
        return [xid for xid in since if 0 < (part.by - xid) & 0xFFFFFFFF < _HALF] == [last]
