"""How far behind a compacted log a reader may be: a deleted row's tombstone goes after `tombstone_ttl`."""

from __future__ import annotations

import time
from collections import deque

from bridge.errors import IndexMismatch


class Freshness:
    """Whether a reader of a compacted log has seen every tombstone in time.

    Everything that the stream stored before `since` (seconds since 1970) has been read. A tombstone that was not goes
    one time-to-live later at the earliest; half of it is left for clocks that differ and for work on the way.
    `remember`: after how many seconds a new `since` is worth being written down.
    """

    def __init__(self, index: str, tombstone_ttl: float, since: float) -> None:
        self._index = index
        self._ttl = tombstone_ttl
        self._taken: deque[tuple[int, float]] = deque()
        self.since = since
        self.remember = min(60.0, tombstone_ttl / 16)

    def taken(self, seq: int, at: int) -> None:
        """A message is being worked on; `at` is the stream's time in nanoseconds."""
        self._taken.append((seq, at / 1e9))

    def done(self, seq: int) -> None:
        """Everything up to `seq` is done."""
        while self._taken and self._taken[0][0] <= seq:
            self.since = max(self.since, self._taken.popleft()[1])

    def caught_up(self, at: float) -> None:
        """At that time nothing was left to read, and all of it is done."""
        self._taken.clear()
        self.since = max(self.since, at)

    @property
    def lost(self) -> bool:
        """Whether a tombstone may have gone unseen."""
        return time.time() - self.since > self._ttl / 2

    def check(self) -> None:
        """Raises IndexMismatch where a tombstone may have gone unseen."""
        if self.lost:
            raise IndexMismatch(
                f"the index {self._index} is {time.time() - self.since:,.0f} seconds behind a compacted log whose "
                f"tombstones go after {self._ttl:,.0f}: it may have missed rows that were deleted",
                f"build it anew: bridge reindex {self._index}; a longer [stream] tombstone_ttl allows for longer stops",
            )
