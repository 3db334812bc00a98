"""Which transactions may have altered a table, told from the length of their commit records. Pure.

A commit record holds more than its usual members where the transaction invalidated other sessions' caches, and it
always does where it changed the catalogue. wal2json says of no change of the catalogue, but where each commit record
begins and ends. A transaction of many savepoints is taken for one that altered something: that costs a look, no more.

Source: PostgreSQL's access/xact.h (xl_xact_commit and what follows it), access/xlogrecord.h, xlog_internal.h.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

PAGE, PAGE_HEADER = 8192, 24
# Record header 24, its data's header 2, time of commit 8, flags 4, database 8; the smallest list of messages 4 + 16.
INVALIDATING = 66

_SNAPSHOT = re.compile(r"(\d+):(\d+):((?:\d+,)*\d*)")
_HALF = 1 << 31


def may_alter(start: int, end: int) -> bool:
    """Whether the transaction whose commit record begins and ends at these LSNs may have changed the catalogue."""
    length = end - start
    if start // PAGE != (end - 1) // PAGE:
        length -= PAGE_HEADER
    return length >= INVALIDATING


class Snapshot(NamedTuple):
    """Which transactions had ended when the catalogue was read: those before `xmax` that are not in `running`.

    Transaction ids are PostgreSQL's 32 bits: of two, the one less than half the circle ahead is the later one.
    """

    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the text of pg_snapshot ("xmin:xmax:xip,…"); ValueError if it is none."""
        found = _SNAPSHOT.fullmatch(text)
        if found is None:
            raise ValueError(f"not a snapshot: {text!r}")
        running = frozenset(int(word) & 0xFFFFFFFF for word in found[3].split(",") if word)
        return cls(int(found[2]) & 0xFFFFFFFF, running)

    def has(self, xid: int) -> bool:
        """Whether what the transaction did was to be seen, if it committed."""
        return xid not in self.running and (self.xmax - xid - 1) & 0xFFFFFFFF < _HALF
