"""What samples tell: rates, what is left, and when a slot would be lost."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from bridge.operate.status.health import judge
from bridge.operate.status.history import History, Sample, sample
from bridge.operate.status.outlook import left, once, rates, watched
from bridge.operate.status.parts import (
    Checkpoint,
    Generation,
    Index,
    Lag,
    Process,
    Rates,
    Settings,
    Slot,
    Status,
    Stream,
)

SLOT = Slot("s", exists=True, wal_status="reserved", restart="0/100", retained=0x100, flushed="0/200", limit=1 << 30)
STATUS = Status(
    source="main",
    at="2026-01-31T11:00:00Z",
    settings=Settings("auto", "always", "log", 0.0),
    process=Process("stopped"),
    slot=SLOT,
    stream=Stream("cdc", exists=True, bytes=10, last_seq=7),
    lag=Lag(5, 1.5),
)


def history(*values: Any, every: float = 1.0, of: str = "events") -> History:
    found = History()
    for number, value in enumerate(values):
        found.add(Sample(at=1000 + number * every, **{of: value}))
    return found


def events(one: Sample) -> int | None:
    return one.events


def test_a_sample_holds_the_figures_of_a_status() -> None:
    generations = [Generation(1, "t-1", "kept", 3, 4, taken=2), Generation(2, "t-2", "live", 6, 1, taken=5)]
    found = sample(msgspec.structs.replace(STATUS, indexes=[Index("t", "t", "live", 2, "", generations)]), 12.5)
    assert found == Sample(
        at=12.5, lag_bytes=5, lag_seconds=1.5, wal=0x200, events=7, stream_bytes=10, retained=0x100,
        indexed={"t": 6}, behind={"t-1": 4, "t-2": 1}, taken={"t-1": 2, "t-2": 5},
    )  # fmt: skip
    away = msgspec.structs.replace(STATUS, slot=None, stream=None, lag=None)
    assert sample(away, 1.0) == Sample(at=1.0)
    gone = msgspec.structs.replace(STATUS, slot=Slot("s", exists=False), stream=Stream("cdc", exists=False), lag=None)
    assert sample(gone, 1.0) == Sample(at=1.0), "what is not there is not a zero"


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ([], None),
        ([5], None),
        ([5, 6, 7], None),
        ([0, 10, 20, 30], 10.0),
        ([0] * 20 + [100], 10.0),
        ([100, *[0] * 20], 0.0),
        ([0, None, None, 30], 10.0),
        ([0, 10, 20, None], None),
        ([None, None, 0, 10], None),
        ([900, 0, 10, 20], None),
    ],
    ids=[
        "nothing is known", "one look", "too short", "steady", "a burst within the window", "a change before it",
        "away in between", "away now", "known for too short", "made again",
    ],
)  # fmt: skip
def test_a_rate_is_what_came_within_the_window(values: list[int | None], rate: float | None) -> None:
    assert history(*values).growth(events, 10) == rate


def test_a_longer_window_smooths_and_what_shrinks_has_a_negative_rate() -> None:
    burst = history(*[0] * 60, 600)
    assert burst.growth(events, 10) == 60
    assert burst.growth(events, 60) == 10
    assert history(40, 30, 20, 10).rate(events) == -10


def test_looks_that_come_late_count_by_their_time() -> None:
    assert history(0, 30, 60, every=3.0).growth(events, 10) == 10


def test_history_is_bounded_and_starts_anew_where_the_clock_was_set_back() -> None:
    found = History(kept=5)
    for number in range(9):
        found.add(Sample(at=float(number), events=number))
    assert [one.events for one in found] == [4, 5, 6, 7, 8]
    found.add(Sample(at=2.0, events=9))
    assert [one.events for one in found] == [9]
    assert found.growth(events) is None


def test_no_sample_is_kept_for_longer_than_ten_minutes_however_seldom_looks_are() -> None:
    found = history(*range(100), every=10.0)
    assert [one.events for one in found] == list(range(39, 100))


def test_what_is_left_has_a_time_only_at_a_rate() -> None:
    assert left(100, 10) == 10
    assert left(0, 10) == 0
    assert left(100, 0) is None
    assert left(100, -1) is None
    assert left(100, None) is None


def building(behind: int, taken: int, **changes: Any) -> Status:
    one = Generation(2, "t-2", "building", 5, behind, since="2026-01-31T10:50:00Z", done=0.25, taken=taken)
    return msgspec.structs.replace(STATUS, indexes=[Index("t", "t", "live", 1, "", [one], **changes)])


def watched_for(seconds: int, grows: int) -> tuple[History, Status]:
    """A rebuild that takes 100 events a second, while what it lacks grows by so many; the last look, too."""
    past, looks = History(), [building(1000 + grows * second, 100 * second) for second in range(seconds)]
    for second, one in enumerate(looks):
        past.add(sample(one, 100.0 + second))
    return past, looks[-1]


def test_a_rebuild_has_caught_up_when_what_it_lacks_is_gone_and_not_before_what_comes_meanwhile() -> None:
    past, found = watched_for(5, -50)
    [index] = watched(found, past).indexes
    [one] = index.generations
    assert one.rate == 100
    assert one.eta == 800 / 50, "of 100 events a second 50 are those that came meanwhile"


def test_a_rebuild_that_falls_behind_has_no_end() -> None:
    past, found = watched_for(5, 50)
    assert watched(found, past).indexes[0].generations[0].eta is None


def test_one_look_tells_a_rebuilds_end_by_the_whole_time_where_somebody_works_on_it() -> None:
    assert once(building(10, 1, builder="process 1")).indexes[0].generations[0].eta == 1800
    assert once(building(10, 1)).indexes[0].generations[0].eta is None
    assert once(building(10, 1)).rates is None


def test_rates_are_none_before_they_can_be_told() -> None:
    assert rates(History()) == Rates()


def with_slot(**changes: Any) -> Status:
    return msgspec.structs.replace(STATUS, slot=msgspec.structs.replace(SLOT, **changes))


def found_of(status: Status) -> str:
    return "\n".join(finding.what for finding in judge(status).findings)


def test_a_slot_is_lost_when_what_is_safe_is_written() -> None:
    past = history(0, 1000, 2000, 3000, of="wal")
    assert watched(with_slot(safe=60_000), past).slot == msgspec.structs.replace(SLOT, safe=60_000, lost_in=60.0)
    assert watched(with_slot(safe=-5), past).slot == msgspec.structs.replace(SLOT, safe=-5, lost_in=0.0)
    assert watched(with_slot(safe=None), past).slot == SLOT, "nothing limits it"
    still = history(0, 0, 0, 0, of="wal")
    assert watched(with_slot(safe=60_000), still).slot == msgspec.structs.replace(SLOT, safe=60_000)


def test_one_look_tells_when_a_slot_is_lost_by_the_time_since_the_checkpoint() -> None:
    stopped = msgspec.structs.replace(
        with_slot(safe=60_000), lag=Lag(100_000, 1.0), checkpoint=Checkpoint("0/200", 7, "stream", "", 100.0)
    )
    found = once(stopped)
    assert found.slot is not None
    assert found.slot.lost_in == 60
    assert "in about 1 min" in found_of(found)
    assert "in about" not in found_of(msgspec.structs.replace(found, process=Process("streaming"))), "it is read"
    young = msgspec.structs.replace(stopped, checkpoint=Checkpoint("0/200", 7, "stream", "", 2.0))
    assert once(young).slot == with_slot(safe=60_000).slot


def test_a_slot_that_nobody_reads_and_a_time_limit_for_that_are_a_problem() -> None:
    assert "once nobody has read it for 1 h" in found_of(with_slot(idle_timeout=3600.0))
    assert "once nobody has read it" not in found_of(with_slot(idle_timeout=3600.0, active=True))


def test_why_a_slot_was_given_up_is_said() -> None:
    assert "still needed (idle_timeout)" in found_of(with_slot(wal_status="lost", reason="idle_timeout"))
    assert "still needed (wal_removed)" in found_of(with_slot(reason="wal_removed"))


@pytest.mark.parametrize(
    ("wal", "seconds"),
    [
        ((0x100, 0x100, 0x200, 0x300), 2.0),  # what came later may belong to anybody: it is two looks old at most
        ((0x300, 0x300, 0x300, 0x300), 90.0),  # it has been so for as long as anybody has looked
        ((0x100, None, None, 0x300), 3.0),
    ],
)
def test_the_stream_is_behind_no_longer_than_since_a_look_that_found_it_was_not(
    wal: tuple[int | None, ...], seconds: float
) -> None:
    checkpoint = Checkpoint("0/100", 7, "stream", "2026-01-31T10:58:30Z", 90.0)
    found = msgspec.structs.replace(STATUS, checkpoint=checkpoint, lag=Lag(0x200, 90.0))
    assert watched(found, history(*wal, of="wal")).lag == Lag(0x200, seconds)
