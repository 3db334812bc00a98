"""When most documents are rejected, it is not they that are wrong: stop burying them and say so. Pure.

A circuit counts what became of the last documents. It is asked before rejected ones are buried, with all outcomes of
one bulk; as long as it says no, that bulk is not over: nothing of it is buried or acked. It closes by itself once
enough of what comes is taken again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

WINDOW = 1_000
LEAST = 100


class Circuit:
    """One generation's.

    Args:
        limit: the share of rejected documents, 0 to 1, above which it opens; 1: never.
        ends: nobody waits beside it for an operator: a rebuild ends where it opens.
    """

    def __init__(self, limit: float, *, ends: bool = False) -> None:
        self._limit = limit
        self._past: deque[tuple[int, int]] = deque()
        self._total = 0
        self.ends = ends
        self.open = False
        self.rejected = 0
        self.of = 0
        self.reason = ""

    def admits(self, taken: int, reasons: Sequence[str]) -> bool:
        """Whether the rejected documents of a bulk may be buried; only what is admitted counts from then on.

        Args:
            taken: how many of the bulk's documents were taken.
            reasons: why each of the others was rejected, scrubbed.
        """
        rejected, of = len(reasons), taken + len(reasons)
        for part, whole in reversed(self._past):
            if of >= WINDOW:
                break
            # Of a bulk that the window cuts through, its share counts.
            fits = min(whole, WINDOW - of)
            rejected += round(part * fits / whole)
            of += fits
        if reasons and rejected >= LEAST and rejected > self._limit * of:
            self.open, self.rejected, self.of = True, rejected, of
            self.reason = Counter(reasons).most_common(1)[0][0]
            return False
        self.open = self.open and self.ends
        self._remember(taken, len(reasons))
        return True

    def _remember(self, taken: int, rejected: int) -> None:
        if taken + rejected:
            self._past.append((rejected, taken + rejected))
            self._total += taken + rejected
        while self._past and self._total - self._past[0][1] >= WINDOW:
            self._total -= self._past.popleft()[1]

    def __str__(self) -> str:
        return f"{self.rejected} of the last {self.of} documents were rejected, most often: {self.reason}"
