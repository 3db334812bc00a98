"""What to do at a start, from what slot, checkpoint and stream say. Pure.

The stream's tail is the position: whatever is at or before it is in the log. There is no gap if PostgreSQL still has
all that follows the tail (tail.end ≥ confirmed_flush), or if the checkpoint explains the difference (idle advances: the
checkpoint is always written before PostgreSQL is told). Everything else is a contradiction, named with both positions.
"""

from __future__ import annotations

from typing import NamedTuple

from bridge.errors import ForeignWriter, Gap, OtherDatabase, OtherStream, SlotMissing, StreamHole
from bridge.event import Position
from bridge.source import lsn
from bridge.source.slot import PLUGIN, Identity, Slot, lost
from bridge.stream.publisher import Tail
from bridge.stream.server import StreamState
from bridge.stream.state import Checkpoint

START_ANEW = "to start anew: `bridge drop --stream --state`, then `bridge run`"


class Fresh(NamedTuple):
    """Make a new slot and read every table; `drop_slot` if one is left over from an attempt that did not finish."""

    drop_slot: bool


class Resume(NamedTuple):
    """Stream on after this position (its text; empty: from the slot's beginning)."""

    after: str


class Found(NamedTuple):
    """Everything that a start looks at. `history` holds (timeline, LSN where it was left) of the server's ancestors."""

    slot_name: str
    database: str
    identity: Identity
    history: list[tuple[int, int]]
    slot: Slot | None
    checkpoint: Checkpoint | None
    stream: StreamState
    tail: Tail


def decide(found: Found) -> Fresh | Resume:
    """How to start.

    Raises:
        Contradiction: one of its kinds; nothing may be published or confirmed until a person has decided.
    """
    if found.tail.seq and found.stream.messages and not found.tail.position:
        raise ForeignWriter(
            f"the last message of the stream {found.stream.name} (sequence {found.tail.seq}) is no bridge's",
            "find and stop its publisher; remove the message with `nats stream rmm`",
        )
    checkpoint = found.checkpoint
    if checkpoint is None:
        return _without_checkpoint(found)
    _same_database(found, checkpoint)
    if checkpoint.stream_created != found.stream.created:
        raise OtherStream(
            f"the stream {found.stream.name} was made again at {found.stream.created}; the checkpoint belongs to the "
            f"one of {checkpoint.stream_created}",
            START_ANEW,
        )
    unfinished = checkpoint.phase == "snapshot" or found.stream.last_seq < checkpoint.snapshot_seq
    if unfinished:
        return Fresh(drop_slot=found.slot is not None)
    slot = _usable(found)
    _no_hole(found)
    return Resume(_position(found, slot, checkpoint))


def _without_checkpoint(found: Found) -> Fresh | Resume:
    if found.slot is None and not found.stream.last_seq:
        return Fresh(drop_slot=False)
    if not found.stream.last_seq:
        raise Gap(
            f"the slot {found.slot_name} exists, but neither stream nor state know of it: what it has confirmed "
            f"({lsn.show(found.slot.confirmed_flush if found.slot else 0)}) is in no log",
            f"drop it with `bridge drop` and start again, or choose another [source] slot; {START_ANEW}",
        )
    slot = _usable(found)
    if not found.tail.position or Position.parse(found.tail.position).sub:
        raise OtherStream(
            f"the state bucket has no checkpoint, and the stream {found.stream.name} ends within a snapshot "
            f"(sequence {found.tail.seq})",
            START_ANEW,
        )
    _no_hole(found)
    return Resume(_position(found, slot, None))


def _same_database(found: Found, checkpoint: Checkpoint) -> None:
    if (checkpoint.system_id, checkpoint.database) != (found.identity.system_id, found.database):
        raise OtherDatabase(
            f"the stream {found.stream.name} was written from database {checkpoint.database} of system "
            f"{checkpoint.system_id}; this is {found.database} of system {found.identity.system_id}",
            f"correct [source] dsn, or give this database a source name of its own; {START_ANEW}",
        )
    if checkpoint.timeline == found.identity.timeline:
        return
    end = Position.parse(found.tail.position).end if found.tail.position else lsn.parse(checkpoint.lsn)
    left = dict(found.history).get(checkpoint.timeline)
    if left is None or left < end:
        raise OtherDatabase(
            f"the server is on timeline {found.identity.timeline}, which left timeline {checkpoint.timeline} at "
            f"{lsn.show(left) if left is not None else 'no known place'}; the stream goes on to {lsn.show(end)}",
            f"this server lacks changes that the stream has (a restored backup?); {START_ANEW}",
        )


def _usable(found: Found) -> Slot:
    slot = found.slot
    if slot is None:
        raise SlotMissing(
            f"PostgreSQL has no slot {found.slot_name}, but the stream {found.stream.name} goes on from it "
            f"(tail {found.tail.position or 'unknown'})",
            f"changes since then are lost; {START_ANEW}",
        )
    if slot.wal_status == "lost":
        raise lost(slot.name)
    if (slot.plugin, slot.database) != (PLUGIN, found.database):
        raise OtherDatabase(
            f"the slot {slot.name} belongs to plugin {slot.plugin} in database {slot.database}, not to {PLUGIN} in "
            f"{found.database}",
            "choose another [source] slot, or drop that one",
        )
    return slot


def _last(found: Found) -> int:
    """The sequence of the stream's last message; what stood after it was removed, which leaves no hole."""
    return found.tail.seq if found.tail.at is None else found.tail.at


def _no_hole(found: Found) -> None:
    stream, last = found.stream, _last(found)
    expected = last - stream.first_seq + 1
    if stream.messages and stream.messages != expected:
        raise StreamHole(
            f"the stream {stream.name} holds {stream.messages:,} messages between sequence {stream.first_seq} and "
            f"{last}, {expected - stream.messages:,} are missing",
            f"a block of its file store is damaged, or messages were deleted by hand; {START_ANEW}",
        )


def _position(found: Found, slot: Slot, checkpoint: Checkpoint | None) -> str:
    """The position to go on after; Gap where PostgreSQL no longer has all that follows it."""
    position = found.tail.position
    explains = checkpoint is not None and checkpoint.stream_seq <= found.stream.last_seq
    removed = not found.stream.messages or _last(found) < found.stream.last_seq
    if checkpoint is not None and explains and removed:
        position = max(position, checkpoint.position)
    end = Position.parse(position).end if position else 0
    if end >= slot.confirmed_flush:
        return position
    if checkpoint is not None and explains and lsn.parse(checkpoint.lsn) >= slot.confirmed_flush:
        return position
    raise Gap(
        f"the slot {slot.name} was confirmed up to {lsn.show(slot.confirmed_flush)}, the stream {found.stream.name} "
        f"ends at {lsn.show(end)}: what was between them is gone from PostgreSQL",
        f"find out who advanced the slot, or what took the stream's end away; {START_ANEW}",
    )


def timeline_of(end: int, identity: Identity, history: list[tuple[int, int]]) -> int:
    """The timeline to which a commit that ends at `end` belongs (PostgreSQL's history file, oldest first)."""
    for timeline, left in history:
        if end <= left:
            return timeline
    return identity.timeline
