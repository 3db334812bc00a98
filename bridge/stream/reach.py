"""From which sequence on a stream holds every row of a table: where a rebuild can begin, or why it cannot. Pure.

A table whose rows DDL has changed since its complete picture can be built from that all the same: what is built is as
old in these rows as every index of it, and becomes right with them, when the table has been read again.
"""

from __future__ import annotations

from shlex import quote as typed

from bridge.errors import Gap, Unavailable
from bridge.stream.state import Again, SnapshotStatus

ANEW = "begin anew: stop the bridge, `bridge drop --stream --state`, `bridge run`"


def _mended(table: str) -> str:
    return f"read it while the stream flows: bridge snapshot {typed(table)}; a table without a key: {ANEW}"


def _rests(again: Again) -> str:
    return f"has failed ({again.why})" if again.state == "failed" else "is paused"


def complete_from(status: SnapshotStatus | None, first_seq: int, stream: str, table: str) -> int:
    """The first sequence that a rebuild must read.

    Args:
        status: the table's snapshot as the state bucket has it; None where it has none.
        first_seq: the stream's first sequence now.

    Raises:
        Gap: rows are not in the stream, or no longer; the message says why.
        Unavailable: the table's snapshot is on its way.
    """
    start = max(first_seq, 1)
    if status is not None and status.state in ("waiting", "running"):
        raise Unavailable(f"the snapshot of {table} is not complete yet", "waiting for the bridge to finish it")
    whole = status is None or status.state == "done" or (status.state == "incomplete" and status.complete_from > 0)
    if status is not None and not whole and status.state == "incomplete" and status.again is not None:
        if status.again.under_way:
            raise Unavailable(f"{table} is being read, its rows are not all in the log yet", "waiting for the bridge")
        raise Gap(
            f"the reading of {table} {_rests(status.again)}, so that not all of its rows are in the log",
            f"let it go on: bridge snapshot {typed(table)} --resume",
        )
    if status is not None and not whole:
        why = "its snapshot has failed: " if status.state == "failed" else ""
        raise Gap(
            f"{why}rows of {table} from before sequence {status.first_seq or start} are not in the log", _mended(table)
        )
    complete = status.complete_from if status is not None else 1
    if first_seq > max(complete, 1):
        raise Gap(
            f"the stream {stream} begins at sequence {first_seq}, the last complete picture of {table} at {complete}: "
            "rows that have not changed since are no longer in it",
            f"give the stream more room (max_age, max_bytes) where that is too early, and {_mended(table)}",
        )
    return max(start, complete)
