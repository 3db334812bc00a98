"""Where the stream is, as the positions of events: the transaction, and the record in it. Pure.

A transaction is entered with its commit record's end, a logical message outside of one with its own. Records are
counted whether or not they are published, so that the same ones have the same positions at any time.
"""

from __future__ import annotations

# Behind whatever may stand at a record's own position: of a changed key, in a compacted log, two messages do.
BEHIND = 2


class Place:
    """end: of the transaction that is being read, 0 between two; prefix: what its positions begin with."""

    __slots__ = ("_hex", "_k", "_lsn", "end", "prefix")

    def __init__(self) -> None:
        self.end = 0
        self.prefix = b""
        self._lsn = b""
        self._hex = b"0" * 16
        self._k = 0

    def enter(self, timeline: int, end: int) -> None:
        """What follows belongs to the transaction whose commit record ends at `end`, on this timeline."""
        self.end = end
        self.prefix = b"%08x-%016x-" % (timeline, end)
        self._lsn, self._hex, self._k = b"", b"0" * 16, 0

    def leave(self) -> None:
        """Its commit record has come."""
        self.end = 0

    def count(self, at: bytes) -> None:
        """Count a record with this LSN, in PostgreSQL's text form."""
        if at == self._lsn:
            self._k += 1
        else:
            self._lsn, self._k = at, 0
            high, _, low = at.partition(b"/")
            self._hex = (high.rjust(8, b"0") + low.rjust(8, b"0")).lower()

    def position(self) -> bytes:
        """The position of the record that was counted last."""
        return b"%b%b-%08x-00000000" % (self.prefix, self._hex, self._k)

    def before(self) -> bytes:
        """A position just before that one, behind every record before it: no record begins a byte earlier."""
        if self._k:
            return b"%b%b-%08x-%08x" % (self.prefix, self._hex, self._k - 1, BEHIND)
        return b"%b%016x-%08x-%08x" % (self.prefix, int(self._hex, 16) - 1, 0, BEHIND)

    def __str__(self) -> str:
        return self.position().decode()
