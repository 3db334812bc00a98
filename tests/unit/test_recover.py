"""What a start decides from slot, checkpoint and stream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bridge.errors import (
    Contradiction,
    EventLost,
    ForeignWriter,
    Gap,
    OtherDatabase,
    Rewound,
    SlotLost,
    SlotMissing,
    StreamGone,
    StreamHole,
)
from bridge.event import Position
from bridge.pipeline.recover import Found, Fresh, Resume, continued, decide, healed, timeline_of
from bridge.source.slot import Identity, Slot
from bridge.stream.server import StreamState
from bridge.stream.state import Checkpoint, Pair
from bridge.stream.tail import Tail

AT = str(Position(1, 0x2000, 0x1F00, 0, 0))
READ = str(Position(1, 0x1000, 0, 0, 7))
SLOT = Slot("bridge_main", "wal2json", "app", 0, 0x1000, 0x1800, "reserved")
STREAM = StreamState("cdc_main", "2026-01-01", 10, 1, 10, {})
CHECKPOINT = Checkpoint(
    phase="stream", lsn="0/1A00", position=AT, stream="cdc_main", stream_seq=9, stream_created="2026-01-01",
    system_id="77", timeline=1, database="app", slot="bridge_main", consistent_point="0/1000", snapshot_seq=5, at="",
)  # fmt: skip
FOUND = Found("bridge_main", "app", Identity("77", 1, 0x3000), [], SLOT, CHECKPOINT, STREAM, Tail(10, AT, 3))


def found(**changes: Any) -> Found:
    """The healthy case with some of its parts changed; `slot__confirmed_flush=…` changes a part's field."""
    parts = FOUND._asdict()
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if not field:
            parts[part] = value
        elif isinstance(parts[part], msgspec.Struct):
            parts[part] = msgspec.structs.replace(parts[part], **{field: value})
        else:
            parts[part] = parts[part]._replace(**{field: value})
    return Found(**parts)


GONE = {"stream": StreamState("cdc_main", "", 0, 0, 0, {}), "tail": Tail(0, "", 0)}
EMPTY = {"stream": StreamState("cdc_main", "2026-01-01", 0, 1, 0, {}), "tail": Tail(0, "", 0)}


def test_a_healthy_start_goes_on_after_the_tail() -> None:
    assert decide(FOUND) == Resume(AT)


def test_nothing_anywhere_is_a_fresh_start() -> None:
    assert decide(found(slot=None, checkpoint=None, **EMPTY)) == Fresh(drop_slot=False)


def starts_over(case: Found) -> bool:
    """Whether a start reads every table again, dropping the slot if there is one."""
    start = decide(case)
    assert not isinstance(start, Fresh) or start.drop_slot == (case.slot is not None)
    return isinstance(start, Fresh)


@pytest.mark.parametrize("slot", [SLOT, None])
def test_a_snapshot_that_did_not_finish_starts_over_with_a_new_slot(slot: Slot | None) -> None:
    assert starts_over(found(slot=slot, checkpoint__phase="snapshot"))


INTERRUPTED = {"checkpoint__phase": "snapshot", "checkpoint__snapshot_seq": 0, "tail": Tail(10, READ, 1),
               "slot__confirmed_flush": 0x1000, "stays": True}  # fmt: skip


def test_a_snapshot_that_was_interrupted_is_taken_up_where_whole_tables_of_it_can_stay() -> None:
    assert decide(found(**INTERRUPTED)) == Resume(READ)


@pytest.mark.parametrize(
    "change",
    [
        {"stays": False},
        {"slot": None},
        {"slot__wal_status": "lost"},
        {"slot__confirmed_flush": 0x1001},
        {"checkpoint__consistent_point": "0/F00"},
        {"tail": Tail(10, AT, 1)},
        {"tail": Tail(9, READ, 1, at=9)},
        {"stream__messages": 9},
    ],
)
def test_it_starts_over_where_something_contradicts(change: dict[str, Any]) -> None:
    parts = {name: value for name, value in INTERRUPTED.items() if not ("slot" in change and name.startswith("slot"))}
    assert starts_over(found(**(parts | change)))


@pytest.mark.parametrize("change", [{"slot__plugin": "pgoutput"}, {"slot__database": "other"}])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_slot_of_somebody_else_is_never_dropped(change: dict[str, Any], checkpoint: bool) -> None:
    without = {} if checkpoint else {"checkpoint": None, "tail": Tail(0, "", 0), "stream__messages": 0}
    parts = {name: value for name, value in INTERRUPTED.items() if checkpoint or not name.startswith("checkpoint")}
    with pytest.raises(OtherDatabase, match="belongs to plugin") as error:
        decide(found(**(parts | change | without)))
    assert not error.value.heals


def test_a_snapshot_whose_end_a_power_failure_took_back_starts_over() -> None:
    assert starts_over(found(checkpoint__snapshot_seq=11, slot__confirmed_flush=0x1000))


def test_a_snapshot_whose_end_was_taken_back_together_with_the_checkpoint_starts_over() -> None:
    within = {"tail": Tail(10, READ, 3, whole=False), "slot__confirmed_flush": 0x1000}
    assert starts_over(found(**within))
    assert starts_over(found(checkpoint=None, **within))
    assert not starts_over(found(checkpoint__snapshot_seq=10, **within))


def test_a_first_start_that_a_power_failure_took_back_altogether_starts_over() -> None:
    assert starts_over(found(checkpoint=None, **EMPTY))


def test_one_of_the_pairs_explains_what_postgresql_was_told_however_the_stream_is_cut() -> None:
    held = [Pair("0/2200", 4), Pair("0/2600", 7), Pair("0/2A00", 9)]
    ahead = {"checkpoint__stream_seq": 12, "checkpoint__lsn": "0/2F00", "checkpoint__confirmed": Pair("0/1F00", 2),
             "checkpoint__held": held, "checkpoint__snapshot_seq": 1}  # fmt: skip
    for confirmed, last, good in ((0x2200, 4, True), (0x2200, 5, True), (0x2600, 5, False), (0x2600, 8, True)):
        cut = found(
            **ahead,
            slot__confirmed_flush=confirmed,
            stream__last_seq=last,
            stream__messages=last,
            tail=Tail(last, AT, 3),
        )
        if not good:
            with pytest.raises(Gap):
                decide(cut)
            continue
        assert decide(cut) == Resume(AT)
        assert cut.checkpoint is not None
        kept = continued(cut, cut.checkpoint)
        assert kept.stream_seq == last
        assert kept.lsn == max(p.lsn for p in held if p.stream_seq <= last)
        assert kept.confirmed == next(p for p in held if p.lsn >= f"0/{confirmed:X}")
        assert all(p.stream_seq <= last for p in kept.held)


def test_a_checkpoint_that_the_stream_is_not_behind_goes_on_as_it_is() -> None:
    assert FOUND.checkpoint is not None
    kept = continued(FOUND, FOUND.checkpoint)
    assert (kept.lsn, kept.stream_seq, kept.position) == ("0/1A00", 9, AT)
    assert kept.confirmed == Pair("0/1800", 10)


def test_a_transaction_of_which_the_stream_has_only_a_part_must_still_come() -> None:
    part = Tail(10, AT, 3, whole=False)
    assert decide(found(tail=part, slot__confirmed_flush=0x1FFF)) == Resume(AT)
    with pytest.raises(Gap):
        decide(found(tail=part, slot__confirmed_flush=0x2000))


@pytest.mark.parametrize(
    ("error", "heals"),
    [
        (Gap, True), (SlotMissing, True), (SlotLost, True), (StreamGone, True), (Rewound, True),
        (OtherDatabase, False), (StreamHole, False), (ForeignWriter, False),
    ],
)  # fmt: skip
def test_only_what_a_snapshot_mends_is_healed_and_only_on_request(error: type[Contradiction], heals: bool) -> None:
    with pytest.raises(error):
        healed(FOUND, error("what", "remedy"), "stop")
    if heals:
        assert healed(FOUND, error("what", "remedy"), "resnapshot") == Fresh(True, "what")
    else:
        with pytest.raises(error):
            healed(FOUND, error("what", "remedy"), "resnapshot")


def test_an_idle_advance_explains_a_slot_that_is_ahead_of_the_tail() -> None:
    ahead = found(slot__confirmed_flush=0x2800, checkpoint__lsn="0/2800", checkpoint__stream_seq=10)
    assert decide(ahead) == Resume(AT)


def test_a_checkpoint_ahead_of_a_shortened_stream_explains_nothing() -> None:
    with pytest.raises(Gap, match=r"0/2800.*0/2000"):
        decide(found(slot__confirmed_flush=0x2800, checkpoint__lsn="0/2800", checkpoint__stream_seq=11))


def test_a_stream_whose_messages_all_expired_goes_on_from_the_checkpoint() -> None:
    gone = StreamState("cdc_main", "2026-01-01", 0, 11, 10, {})
    assert decide(found(stream=gone, tail=Tail(10, "", 0))) == Resume(AT)


def test_messages_that_were_removed_from_the_end_go_on_from_the_checkpoint() -> None:
    shorter = found(stream__messages=9, tail=Tail(10, READ, 3, at=9))
    assert decide(shorter) == Resume(AT)


def test_messages_that_retention_took_from_the_start_are_no_hole() -> None:
    assert decide(found(stream=StreamState("cdc_main", "2026-01-01", 4, 7, 10, {}))) == Resume(AT)


def test_a_lost_bucket_is_made_again_where_the_stream_explains_itself() -> None:
    assert decide(found(checkpoint=None)) == Resume(AT)


def test_a_promoted_standby_goes_on_if_it_branched_off_after_the_tail() -> None:
    assert decide(found(identity=Identity("77", 2, 0x4000), history=[(1, 0x2000)])) == Resume(AT)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tail": Tail(10, "", 0)}, ForeignWriter),
        ({"identity__system_id": "78"}, OtherDatabase),
        ({"database": "other"}, OtherDatabase),
        ({"identity": Identity("77", 2, 0x4000), "history": [(1, 0x1FFF)]}, Rewound),
        ({"identity": Identity("77", 1, 0x4000), "checkpoint__timeline": 2}, Rewound),
        ({"identity": Identity("77", 1, 0x1FFF)}, Rewound),
        ({"identity": Identity("77", 1, 0x2000), "checkpoint__lsn": "0/2001"}, Rewound),
        ({"checkpoint": None, "identity": Identity("77", 1, 0x1FFF)}, Rewound),
        ({"checkpoint": None, "identity": Identity("77", 2, 0x4000), "history": [(1, 0x1FFF)]}, Rewound),
        ({"slot__database": "other"}, OtherDatabase),
        ({"slot__plugin": "pgoutput"}, OtherDatabase),
        ({"stream__created": "2026-02-02"}, StreamGone),
        (GONE, StreamGone),
        ({"checkpoint__snapshot_seq": 11}, Gap),
        ({"tail": Tail(10, READ, 3)}, Gap),
        ({"slot": None}, SlotMissing),
        ({"slot__wal_status": "lost"}, SlotLost),
        ({"slot__confirmed_flush": 0x2001}, Gap),
        ({"stream__messages": 9}, StreamHole),
        ({"checkpoint__lost": "sequence 7 holds no event of a bridge"}, EventLost),
        ({"stream__messages": 8, "tail": Tail(10, AT, 3, at=9)}, StreamHole),
        ({"checkpoint": None, "slot": None}, SlotMissing),
        ({"checkpoint": None, "tail": Tail(10, READ, 3)}, Gap),
        ({"checkpoint": None, "slot__confirmed_flush": 0x2001}, Gap),
        ({"checkpoint": None, **GONE}, Gap),
    ],
)
def test_a_contradiction_is_named(changes: dict[str, Any], error: type[Contradiction]) -> None:
    with pytest.raises(error) as raised:
        decide(found(**changes))
    assert raised.value.exit_code == 3
    assert raised.value.remedy


def test_a_commit_belongs_to_the_timeline_that_had_not_been_left_yet() -> None:
    history = [(1, 0x2000), (2, 0x3000)]
    identity = Identity("77", 3, 0x9000)
    assert [timeline_of(end, identity, history) for end in (0x1000, 0x2000, 0x2001, 0x3000, 0x3001)] == [1, 1, 2, 2, 3]


COMPACTED = msgspec.structs.replace(
    STREAM, first_seq=4, messages=3, config={"max_msgs_per_subject": 1, "allow_msg_ttl": True}
)
MOVED = str(Position(1, 0x2000, 0x1F00, 0, 1))


def test_a_compacted_log_has_holes_and_may_end_with_the_second_message_of_a_changed_key() -> None:
    assert decide(found(stream=COMPACTED)) == Resume(AT)
    assert decide(found(stream=COMPACTED, checkpoint=None, tail=Tail(10, MOVED, 3))) == Resume(MOVED)
    again = decide(found(stream=COMPACTED, checkpoint=None, slot__confirmed_flush=0x1000, tail=Tail(10, READ, 3)))
    assert isinstance(again, Fresh)


def test_a_compacted_log_whose_last_tombstone_is_gone_goes_on_after_the_checkpoint() -> None:
    earlier = str(Position(1, 0x1900, 0x1880, 0, 0))
    assert decide(found(stream=COMPACTED, tail=Tail(10, earlier, 3, at=7))) == Resume(AT)
