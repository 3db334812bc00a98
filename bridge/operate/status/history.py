"""What a status was over the last minutes, a sample a look: for rates and charts. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from bridge.operate.status.parts import Status
from bridge.source import lsn

# Seconds, and as many looks where they are a second apart.
KEPT = 600
SHORT, LONG = 10.0, 60.0
# Of a shorter time two looks say too little.
ENOUGH = 2.5

Count = Callable[["Sample"], int | float | None]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look. A figure is None where its server was away.

    at: when, in seconds since 1970, by this process's clock.
    lag_bytes, lag_seconds: how far the checkpoint is behind PostgreSQL.
    wal: the position up to which PostgreSQL has flushed its WAL, in bytes.
    events: the stream's last sequence; stream_bytes: its size; retained: bytes of WAL that the slot holds.
    indexed: the sequence up to which the live generation of each index is, by the index's name.
    behind, taken: the events that each generation does not have yet, and those that its consumer has brought it, by
    the name of its physical index.
    """

    at: float
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    wal: int | None = None
    events: int | None = None
    stream_bytes: int | None = None
    retained: int | None = None
    indexed: dict[str, int] = {}
    behind: dict[str, int] = {}
    taken: dict[str, int] = {}


def sample(found: Status, at: float) -> Sample:
    """The figures of a status."""
    slot, stream, lag = found.slot, found.stream, found.lag
    there = stream is not None and stream.exists
    every = [generation for index in found.indexes for generation in index.generations]
    return Sample(
        at=at,
        lag_bytes=lag.bytes if lag is not None else None,
        lag_seconds=lag.seconds if lag is not None else None,
        wal=lsn.parse(slot.flushed) if slot is not None and slot.flushed else None,
        events=stream.last_seq if stream is not None and there else None,
        stream_bytes=stream.bytes if stream is not None and there else None,
        retained=slot.retained if slot is not None and slot.exists else None,
        indexed={i.name: g.seq for i in found.indexes for g in i.generations if g.state == "live"},
        behind={g.physical: g.behind for g in every if g.behind is not None},
        taken={g.physical: g.taken for g in every if g.taken is not None},
    )


class History:
    """The samples of the last ten minutes, oldest first; one look a second at most."""

    def __init__(self, kept: int = KEPT) -> None:
        self._samples: deque[Sample] = deque(maxlen=kept)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def last(self) -> Sample | None:
        """The newest; None before the first."""
        return self._samples[-1] if self._samples else None

    def add(self, one: Sample) -> None:
        """Keep a sample; the oldest goes where there are too many, and all of them where the clock was set back."""
        if self._samples and one.at < self._samples[-1].at:
            self._samples.clear()
        while self._samples and one.at - self._samples[0].at > KEPT:
            self._samples.popleft()
        self._samples.append(one)

    def rate(self, count: Count, seconds: float = SHORT) -> float | None:
        """How much a count grows a second, over the last `seconds`; negative where it shrinks.

        None where it was not known for long enough, or not in the newest sample.
        """
        if self.last is None or count(self.last) is None:
            return None
        known = [(s.at, value) for s in self._within(seconds) if (value := count(s)) is not None]
        (began, first), (ended, last) = known[0], known[-1]
        return (last - first) / (ended - began) if ended - began >= ENOUGH else None

    def growth(self, count: Count, seconds: float = SHORT) -> float | None:
        """As `rate`, of what only grows: one that began anew meanwhile (the stream was made again) has no rate."""
        found = self.rate(count, seconds)
        return None if found is None or found < 0 else found

    def _within(self, seconds: float) -> list[Sample]:
        since, found = self._samples[-1].at - seconds, list[Sample]()
        for one in reversed(self._samples):
            # Half a look's grace: looks are not exactly a second apart.
            if one.at < since - 0.5:
                break
            found.append(one)
        return found[::-1]
