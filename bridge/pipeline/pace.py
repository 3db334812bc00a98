"""How many rows of a table are read at a time: about a second's, and no more than a few megabytes. Pure."""

from __future__ import annotations

SECONDS = 1.0
FEWEST, MOST = 10, 50_000
FIRST_BYTES, FIRST_MOST, FIRST_UNKNOWN = 1 << 20, 5_000, 100
LARGEST_BYTES = 8 << 20
GROWTH = 4


class Pace:
    """`rows` to read next; 0 until `begin`."""

    def __init__(self) -> None:
        self.rows = 0
        self._most = MOST

    def begin(self, width: float) -> None:
        """The first chunk of rows that have about so many bytes; 0: nobody knows."""
        self.rows = int(min(max(FIRST_BYTES / width, FEWEST), FIRST_MOST)) if width else FIRST_UNKNOWN

    def took(self, rows: int, size: int, seconds: float) -> None:
        """A chunk was read."""
        if not rows:
            return
        by_time = rows * SECONDS / max(seconds, 0.001)
        by_bytes = LARGEST_BYTES / max(size / rows, 1)
        self._most = min(MOST, self._most + self._most // 10 + 1)
        self.rows = int(max(FEWEST, min(by_time, by_bytes, rows * GROWTH, self._most)))

    def interrupted(self) -> None:
        """A chunk was not read to its end: it may have taken longer than the server allows."""
        self.rows = self._most = max(FEWEST, self.rows // GROWTH)
