"""What follows from how a status was before: how fast each part goes, and when it will be done or lost. Pure."""

from __future__ import annotations

from datetime import datetime
from functools import partial

import msgspec

from bridge.operate.status.history import LONG, SHORT, History, Sample
from bridge.operate.status.parts import Generation, Index, Lag, Rates, Status
from bridge.source import lsn

# Of a shorter time an average says little.
LEAST = 10.0


def left(amount: float, rate: float | None) -> float | None:
    """Seconds until `amount` is used up at `rate` a second; None where that is not known, or never."""
    return amount / rate if rate is not None and rate > 0 else None


def rates(past: History) -> Rates:
    """How fast each part goes, by the samples; those of the indexes by their names."""
    return Rates(
        events_10=past.growth(lambda s: s.events, SHORT),
        events_60=past.growth(lambda s: s.events, LONG),
        stream_bytes_10=past.rate(lambda s: s.stream_bytes, SHORT),
        wal_10=past.growth(lambda s: s.wal, SHORT),
        wal_60=past.growth(lambda s: s.wal, LONG),
    )


def watched(found: Status, past: History) -> Status:
    """A status with what its history tells; the newest sample is the status' own."""
    speed = rates(past)
    indexes = [
        msgspec.structs.replace(index, generations=[_paced(one, past) for one in index.generations])
        for index in found.indexes
    ]
    indexed = {i.name: g.rate for i in indexes for g in i.generations if g.state == "live" and g.rate is not None}
    wal = speed.wal_60 if speed.wal_60 is not None else speed.wal_10
    rated = msgspec.structs.replace(speed, indexed=indexed)
    return _endangered(msgspec.structs.replace(found, rates=rated, indexes=indexes, lag=_lag(found, past)), wal)


def _lag(found: Status, past: History) -> Lag | None:
    """How far the stream is behind: no longer than since a look that found all WAL of then in the checkpoint."""
    lag, kept = found.lag, found.checkpoint
    if lag is None or kept is None or not lag.seconds:
        return lag
    reached, looks = lsn.parse(kept.lsn), list(past)
    covered = [one.at for one in looks if one.wal is not None and one.wal <= reached]
    if not covered:
        return lag
    return msgspec.structs.replace(lag, seconds=min(lag.seconds, round(max(looks[-1].at - covered[-1], 0.0), 1)))


def once(found: Status) -> Status:
    """A status that nobody has watched, with what can be told from the times in it: averages over the whole time."""
    now = datetime.fromisoformat(found.at)
    indexes = [_averaged(index, now) for index in found.indexes]
    kept, lag = found.checkpoint, found.lag
    wal = lag.bytes / kept.age if kept is not None and lag is not None and kept.age >= LEAST else None
    return _endangered(msgspec.structs.replace(found, indexes=indexes), wal)


def _paced(one: Generation, past: History) -> Generation:
    """A generation with its rate, and when it has caught up with what comes meanwhile, too."""
    rate = past.growth(partial(_taken, one.physical))
    behind = past.rate(partial(_behind, one.physical))
    eta = left(one.behind, -behind) if one.behind and behind is not None else None
    return msgspec.structs.replace(one, rate=rate, eta=eta)


def _averaged(index: Index, now: datetime) -> Index:
    return msgspec.structs.replace(
        index, generations=[_since(one, now) if index.builder else one for one in index.generations]
    )


def _since(one: Generation, now: datetime) -> Generation:
    """A generation that is being built, and when it will be done if the rest goes as what is done went."""
    if not one.done or not one.since:
        return one
    spent = (now - datetime.fromisoformat(one.since)).total_seconds()
    return msgspec.structs.replace(one, eta=round(spent * (1 - one.done) / one.done, 1)) if spent >= LEAST else one


def _endangered(found: Status, wal: float | None) -> Status:
    slot = found.slot
    if slot is None or slot.safe is None:
        return found
    return msgspec.structs.replace(found, slot=msgspec.structs.replace(slot, lost_in=left(max(slot.safe, 0), wal)))


def _taken(physical: str, one: Sample) -> int | None:
    return one.taken.get(physical)


def _behind(physical: str, one: Sample) -> int | None:
    return one.behind.get(physical)
