"""What to do at a start, from what slot, checkpoint and stream say. Pure.

The stream's tail is the position: whatever is at or before it is in the log. There is no gap if PostgreSQL still has
all that follows the tail, or if the checkpoint explains the difference (idle advances): one of its pairs says that all
up to what PostgreSQL has forgotten is in the part of the stream that is there. Rows of the initial snapshot are not in
PostgreSQL's log: where a part of them is missing, all are read again. Everything else is a contradiction, named with
both positions; docs/recovery.md lists them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from bridge.errors import (
    Contradiction,
    EventLost,
    ForeignWriter,
    Gap,
    OtherDatabase,
    Rewound,
    SlotMissing,
    StreamGone,
    StreamHole,
)
from bridge.event import Position
from bridge.source import lsn
from bridge.source.slot import PLUGIN, Identity, Slot, lost
from bridge.stream.server import StreamState
from bridge.stream.state import Checkpoint, Pair
from bridge.stream.tail import Tail

KEPT = 8  # pairs of earlier sessions that a new one takes over
START_ANEW = (
    'to start anew: `bridge drop --stream --state`, then `bridge run`; or once with [source] on_gap = "resnapshot"'
)


class Fresh(NamedTuple):
    """Make a new slot and read every table; `drop_slot` if one is left over, `why` if an earlier log goes on."""

    drop_slot: bool
    why: str = ""


class Resume(NamedTuple):
    """Stream on after this position (its text; empty: from the slot's beginning)."""

    after: str


class Found(NamedTuple):
    """Everything that a start looks at. `history` holds (timeline, LSN where it was left) of the server's ancestors; a
    stream that is not there has no `created`; `stays`: what an interrupted snapshot has of whole tables can be kept."""

    slot_name: str
    database: str
    identity: Identity
    history: list[tuple[int, int]]
    slot: Slot | None
    checkpoint: Checkpoint | None
    stream: StreamState
    tail: Tail
    stays: bool = False


def decide(found: Found) -> Fresh | Resume:
    """How to start.

    Raises:
        Contradiction: one of its kinds; nothing may be published or confirmed until a person has decided.
    """
    stream, tail, checkpoint = found.stream, found.tail, found.checkpoint
    _nobody_elses(found)
    if tail.seq and stream.messages and not tail.position:
        raise ForeignWriter(
            f"the last message of the stream {stream.name} (sequence {tail.seq}) is no bridge's",
            "find and stop its publisher; remove the message with `nats stream rmm`",
        )
    if checkpoint is None:
        return _without_checkpoint(found)
    refuse_another(checkpoint, found.identity.system_id, found.database, found.stream.name)
    _not_rewound(found, checkpoint)
    if not stream.created:
        raise StreamGone(
            f"the stream {stream.name} is gone; the checkpoint goes on from sequence {checkpoint.stream_seq}",
            f"restore it from a backup (`nats backup restore stream`); {START_ANEW}",
        )
    if checkpoint.stream_created != stream.created:
        raise StreamGone(
            f"the stream {stream.name} was made again at {stream.created}; the checkpoint belongs to the "
            f"one of {checkpoint.stream_created}",
            START_ANEW,
        )
    if checkpoint.lost:
        raise EventLost(checkpoint.lost, START_ANEW)
    if checkpoint.phase == "snapshot":
        return _interrupted(found, checkpoint)
    if stream.last_seq < checkpoint.snapshot_seq:
        return _again(found, lsn.parse(checkpoint.consistent_point))
    if _ends_within_snapshot(found) and tail.seq != checkpoint.snapshot_seq:
        return _again(found, Position.parse(tail.position).end)
    slot = _usable(found)
    _no_hole(found)
    return Resume(_position(found, slot, checkpoint))


def _interrupted(found: Found, checkpoint: Checkpoint) -> Fresh | Resume:
    """An initial snapshot that did not finish is taken up where whole tables of it can stay: the stream ends with its
    rows, and PostgreSQL still has all that follows them."""
    slot = found.slot
    if (
        found.stays
        and slot is not None
        and slot.wal_status != "lost"
        and _ends_within_snapshot(found)
        and Position.parse(found.tail.position).end == lsn.parse(checkpoint.consistent_point) >= slot.confirmed_flush
        and not _missing(found)
    ):
        return Resume(found.tail.position)
    return Fresh(slot is not None, "the initial snapshot had not been finished")


def _without_checkpoint(found: Found) -> Fresh | Resume:
    if not found.stream.last_seq:
        if found.slot is None:
            return Fresh(drop_slot=False)
        if found.stream.created:
            _usable(found)
            return Fresh(True, "stream and state bucket are empty: a start that was taken back, or one made by hand")
        raise Gap(
            f"the slot {found.slot_name} exists, but neither stream nor state know of it: what it has confirmed "
            f"({lsn.show(found.slot.confirmed_flush)}) is in no log",
            f"drop it with `bridge drop` and start again, or choose another [source] slot; {START_ANEW}",
        )
    slot = _usable(found)
    _not_rewound(found, None)
    if _ends_within_snapshot(found):
        return _again(found, Position.parse(found.tail.position).end)
    _no_hole(found)
    return Resume(_position(found, slot, None))


def _nobody_elses(found: Found) -> None:
    """Slots are the cluster's: one of this name may be another database's, which lives by it."""
    slot = found.slot
    if slot is not None and (slot.plugin, slot.database) != (PLUGIN, found.database):
        raise OtherDatabase(
            f"the slot {slot.name} belongs to plugin {slot.plugin} in database {slot.database}, not to {PLUGIN} in "
            f"{found.database}",
            "give this one another [source] name, or slot: each bridge needs its own",
        )


def refuse_another(checkpoint: Checkpoint, system_id: str, database: str, stream: str) -> None:
    """Raise OtherDatabase where the stream was not written from this database of this system."""
    if (checkpoint.system_id, checkpoint.database) != (system_id, database):
        raise OtherDatabase(
            f"the stream {stream} was written from database {checkpoint.database} of system "
            f"{checkpoint.system_id}; this is {database} of system {system_id}",
            "correct [source] dsn, or give this database a source name of its own; to start anew: "
            "`bridge drop --stream --state`, then `bridge run`",
        )


def _not_rewound(found: Found, checkpoint: Checkpoint | None) -> None:
    """The server's history holds everything that the stream and PostgreSQL itself have said so far."""
    identity, known = found.identity, lsn.parse(checkpoint.lsn) if checkpoint else 0
    last = Position.parse(found.tail.position) if found.tail.position else None
    end = last.end if last else known
    reached = max(end, known)
    timeline = checkpoint.timeline if checkpoint else last.timeline if last else identity.timeline
    if timeline != identity.timeline:
        left = dict(found.history).get(timeline)
        if left is None or left < end:
            raise Rewound(
                f"the server is on timeline {identity.timeline}, which left timeline {timeline} at "
                f"{lsn.show(left) if left is not None else 'no known place'}; the stream goes on to {lsn.show(end)}",
                f"this server lacks changes that the stream has (a restored backup?); {START_ANEW}",
            )
    elif identity.flushed < reached:
        raise Rewound(
            f"the server's log ends at {lsn.show(identity.flushed)}, the stream {found.stream.name} goes on to "
            f"{lsn.show(reached)}",
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
    return slot


def _ends_within_snapshot(found: Found) -> bool:
    """Whether the last message is a row or marker of an initial snapshot, and nothing after it was removed."""
    if not found.tail.position or _last(found) < found.stream.last_seq:
        return False
    position = Position.parse(found.tail.position)
    return position.lsn == 0 and position.sub > 0


def _again(found: Found, consistent_point: int) -> Fresh:
    """The initial snapshot again, as its last rows were taken back; unless PostgreSQL has forgotten what followed."""
    if found.slot is not None and found.slot.confirmed_flush > consistent_point:
        raise Gap(
            f"the stream {found.stream.name} ends at sequence {found.stream.last_seq}, within the snapshot of "
            f"{lsn.show(consistent_point)}; the slot {found.slot.name} was confirmed up to "
            f"{lsn.show(found.slot.confirmed_flush)}: what followed the snapshot is gone from PostgreSQL",
            f"find out what took the stream's end away; {START_ANEW}",
        )
    return Fresh(found.slot is not None, f"the stream ends at sequence {found.stream.last_seq}, within the snapshot")


def _last(found: Found) -> int:
    """The sequence of the stream's last message; what stood after it was removed, which leaves no hole."""
    return found.tail.seq if found.tail.at is None else found.tail.at


def _missing(found: Found) -> int:
    """How many messages are gone from between the stream's first and last."""
    stream = found.stream
    # A compacted one has a hole wherever a later message took a place.
    if stream.compacted or not stream.messages:
        return 0
    return _last(found) - stream.first_seq + 1 - stream.messages


def _no_hole(found: Found) -> None:
    stream = found.stream
    if missing := _missing(found):
        raise StreamHole(
            f"the stream {stream.name} holds {stream.messages:,} messages between sequence {stream.first_seq} and "
            f"{_last(found)}, {missing:,} are missing",
            "a block of its file store is damaged, or messages were deleted by hand; restore it from a backup "
            "(`nats backup restore stream`), or start anew: `bridge drop --stream --state`, then `bridge run`",
        )


def _position(found: Found, slot: Slot, checkpoint: Checkpoint | None) -> str:
    """The position to go on after; Gap where PostgreSQL no longer has all that follows it."""
    position, whole = found.tail.position, found.tail.whole
    removed = not found.stream.messages or _last(found) < found.stream.last_seq
    if checkpoint is not None and checkpoint.stream_seq <= found.stream.last_seq and removed:
        whole = whole and position >= checkpoint.position
        position = max(position, checkpoint.position)
    end = Position.parse(position).end if position else 0
    # A transaction of which the stream has only a part must still come, as a whole, from PostgreSQL.
    if max(end if whole else end - 1, _explained(found, checkpoint)) >= slot.confirmed_flush:
        return position
    raise Gap(
        f"the slot {slot.name} was confirmed up to {lsn.show(slot.confirmed_flush)}, the stream {found.stream.name} "
        f"ends at {lsn.show(end)}: what was between them is gone from PostgreSQL",
        f"find out who advanced the slot, or what took the stream's end away; {START_ANEW}",
    )


def _valid(found: Found, checkpoint: Checkpoint) -> list[Pair]:
    """The checkpoint's pairs that hold for the stream as it is now, oldest first."""
    pairs = [*([checkpoint.confirmed] if checkpoint.confirmed else []), *checkpoint.held]
    return [pair for pair in pairs if pair.stream_seq <= found.stream.last_seq]


def _explained(found: Found, checkpoint: Checkpoint | None) -> int:
    """The LSN up to which everything is in the stream, by what the checkpoint says."""
    if checkpoint is None:
        return 0
    if checkpoint.stream_seq <= found.stream.last_seq:
        return lsn.parse(checkpoint.lsn)
    return max((lsn.parse(pair.lsn) for pair in _valid(found, checkpoint)), default=0)


def continued(found: Found, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint to go on from, once it is decided that nothing is missing: what of it holds for the stream as it
    is, few pairs, and first the one that explains what PostgreSQL was told."""
    confirmed = found.slot.confirmed_flush if found.slot else 0
    later = [pair for pair in _valid(found, checkpoint) if lsn.parse(pair.lsn) >= confirmed]
    told = later[0] if later else Pair(lsn.show(confirmed), found.stream.last_seq)
    held = later[1:]
    kept = msgspec.structs.replace(checkpoint, confirmed=told, held=held[:: -(-len(held) // KEPT) or 1])
    if checkpoint.stream_seq <= found.stream.last_seq:
        return kept
    return msgspec.structs.replace(
        kept,
        lsn=lsn.show(max(_explained(found, checkpoint), confirmed)),
        position=found.tail.position,
        stream_seq=found.stream.last_seq,
    )


def healed(found: Found, error: Contradiction, on_gap: str) -> Fresh:
    """The new slot and complete snapshot that mend a contradiction, where they do and the configuration says so.

    Raises:
        Contradiction: `error` itself, where a person must decide.
    """
    if on_gap != "resnapshot" or not error.heals:
        raise error
    return Fresh(found.slot is not None, error.what)


def timeline_of(end: int, identity: Identity, history: list[tuple[int, int]]) -> int:
    """The timeline to which a commit that ends at `end` belongs (PostgreSQL's history file, oldest first)."""
    for timeline, left in history:
        if end <= left:
            return timeline
    return identity.timeline
