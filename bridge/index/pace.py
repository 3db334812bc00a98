"""How fast something goes now. Pure."""

from __future__ import annotations

from collections import deque

WINDOW = 10.0


class Pace:
    """A rate over the last `window` seconds, not over the whole time: what was slow at first says nothing of the rest.

    Told a count and the time in seconds at which it stood, again and again.
    """

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._seen: deque[tuple[float, int]] = deque()

    def at(self, now: float, done: int) -> float:
        """The rate a second, with `done` at the time `now`; 0 while it is not known."""
        self._seen.append((now, done))
        # The newest of those that are older than the window stays: without it a slow pace would have no beginning.
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()
        began, before = self._seen[0]
        return max(done - before, 0) / (now - began) if now > began else 0.0
