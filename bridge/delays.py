"""How long changes take, counted in this process: from the commit to the stream's ack, and to the search index.

Who takes a change further counts here, once a batch; who serves figures reads. The commit's time is by PostgreSQL's
clock, the end by this machine's: what they differ by is in each figure. Pure.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from datetime import datetime

BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0,
)  # fmt: skip


class Delays:
    """A histogram of seconds. counts: how many were not longer than each of `BOUNDS` and longer than the one before,
    the longest last; sum: all of them together."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one; one from before its commit, by clocks that differ, as 0."""
        seconds = max(seconds, 0.0)
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def since(self, committed_at: str, now: float) -> None:
        """Count one from its commit (ISO 8601) to now (seconds since 1970); none where the commit's time is no time."""
        with contextlib.suppress(ValueError):
            self.add(now - datetime.fromisoformat(committed_at).timestamp())


acked = Delays()
"""Commit to ack: of each batch that the stream has taken, the transaction that was committed first."""

indexed: dict[str, Delays] = {}
"""Commit to index, by the index's name: of each batch that its reader has taken, the event that was committed first."""
