"""What an initial snapshot that was interrupted leaves in the stream, and how the next session takes it up.

The exported snapshot is gone with its connection; the slot is not. Tables that are whole stay: what follows the slot's
consistent point is still to come. The others are read while the stream flows, from their beginning: what the stream has
of them is as it was at the consistent point, and the end of the complete read takes away what is gone by then.
"""

from __future__ import annotations

import itertools

from bridge import log
from bridge.pipeline.checkpoint import now
from bridge.pipeline.complete import INTERRUPTED
from bridge.pipeline.session import Session
from bridge.stream import subjects
from bridge.stream.state import Again, Checkpoint, SnapshotStatus
from bridge.stream.tail import Tail

Root = tuple[str, str]


async def left(session: Session, checkpoint: Checkpoint | None, tail: Tail) -> list[Root] | None:
    """The tables that are still to be read, where the others can stay; None where all must be read anew: none is whole
    in the stream, or one of the others has no key by which it can be read later."""
    if checkpoint is None or checkpoint.phase != "snapshot" or not checkpoint.consistent_point:
        return None
    whole, rest = list[Root](), list[Root]()
    relations = await session.catalog.published(session.plans.recorded.of)
    for root, group in itertools.groupby(relations, key=lambda r: r.root):
        kept = await session.state.get(subjects.snapshot_key(session.config.source.name, *root), SnapshotStatus)
        # One that nothing is known of was made, or chosen, since then.
        if kept is None:
            continue
        status = kept[0]
        if status.state == "done" and status.lsn == checkpoint.consistent_point and status.last_seq <= tail.seq:
            whole.append(root)
        elif all(relation.key for relation in group):
            rest.append(root)
        else:
            return None
    return rest if whole else None


async def hand_over(session: Session, rest: list[Root]) -> None:
    """Ask for the tables that are still to be read."""
    wanted = session.config.snapshot.mode != "never"
    for root in rest:
        key = subjects.snapshot_key(session.config.source.name, *root)
        kept = await session.state.get(key, SnapshotStatus)
        if kept is not None and kept[0].state == "incomplete":
            continue
        again = Again(state="requested") if wanted else None
        status = SnapshotStatus(state="incomplete", error=INTERRUPTED, finished_at=now(), again=again)
        await session.state.put(key, status, kept[1] if kept is not None else 0)
    log.get().warning(
        "snapshot interrupted",
        tables_left=len(rest),
        next="they are read while the stream flows" if wanted else "bridge snapshot --all",
    )
