"""What a status consists of: one struct for each part. Pure.

A part is None where its server was away. Sizes are in bytes, spans in seconds; a time is ISO 8601 text in UTC, empty
where it is not known.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bridge.index.sight import Astray
from bridge.stream.state import Again, Missed

POSTGRES, NATS = "PostgreSQL", "NATS"

Running = Literal["streaming", "running", "stopped", "unknown"]


class Finding(msgspec.Struct, frozen=True):
    """One conclusion, and what to do about it (empty where nothing is to be done)."""

    level: Literal["problem", "note"]
    what: str
    next: str = ""


class Standby(msgspec.Struct, frozen=True):
    """Who waits for a lease: process and host, since when, and when it last said so; `why` says why it could not take
    over, as it has found itself (empty: nothing that it knows of keeps it from that)."""

    who: str
    since: str
    at: str
    why: str = ""


class Process(msgspec.Struct, frozen=True):
    """The bridge itself. streaming: it reads the slot; running: it holds the slot's lock or its lease, or has said so
    itself, and is not seen to read the slot (it waits for a server, or reads tables); unknown: the lease cannot be
    read; `who` names process or client as far as they are known, `since` when it took the lease; `standby` are those
    that would take over; `silent`, where it is stopped as far as one can see, the one that has not given its lease
    back."""

    state: Running
    who: str = ""
    epoch: int = 0
    since: str = ""
    standby: list[Standby] = []
    silent: Silent | None = None


class Slot(msgspec.Struct, frozen=True):
    """The replication slot.

    since: since when it is active or not (not before PostgreSQL 17).
    limit: max_slot_wal_keep_size; safe: bytes of WAL that can still be written before the slot is in danger of being
    lost. Both None where there is no limit.
    idle_timeout: idle_replication_slot_timeout; 0 where it is off, or PostgreSQL older than 18.
    failover: whether it is a failover slot, None before PostgreSQL 17; synced: it was made by synchronization, on a
    standby or before that was promoted.
    reason: why PostgreSQL has invalidated it, in its own word; empty before PostgreSQL 17.
    lost_in: when the slot would be lost if nothing more was confirmed, at the rate at which WAL is written now, or was
    since the checkpoint; None where it would not, or no rate is known.
    """

    name: str
    exists: bool
    active: bool = False
    wal_status: str = ""
    confirmed_flush: str = ""
    restart: str = ""
    retained: int = 0
    flushed: str = ""
    since: str = ""
    limit: int | None = None
    safe: int | None = None
    idle_timeout: float = 0.0
    lost_in: float | None = None
    failover: bool | None = None
    synced: bool = False
    reason: str = ""


class Checkpoint(msgspec.Struct, frozen=True):
    """The checkpoint in the state bucket, and its age."""

    lsn: str
    stream_seq: int
    phase: str
    at: str
    age: float
    stream_created: str = ""
    missed: dict[str, Missed] = {}


class Stream(msgspec.Struct, frozen=True):
    """The stream; `max_bytes`, `max_msgs` and `max_age` are 0 where there is no limit; `behind` names the replicas that
    are offline or not current; `used` and `allowed` are the account's storage (0: no limit); `where` is the server that
    was asked, without credentials."""

    name: str
    exists: bool
    created: str = ""
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    first_at: str = ""
    last_seq: int = 0
    last_at: str = ""
    replicas: int = 1
    leader: str = ""
    behind: list[str] = []
    discard: str = "old"
    max_bytes: int = 0
    max_msgs: int = 0
    max_age: float = 0.0
    atomic: bool = True
    compacted: bool = False
    used: int = 0
    allowed: int = 0
    where: str = ""


class Lag(msgspec.Struct, frozen=True):
    """How far the checkpoint is behind what PostgreSQL has flushed; seconds is None where it is not known.

    In events nobody can tell: they are counted once they are decoded. What an index is behind the stream is.
    """

    bytes: int
    seconds: float | None


class Table(msgspec.Struct, frozen=True):
    """One table's snapshot. `rebuild_from` is the sequence from which on the stream holds all of it; 0 where it does
    not, and `why` says why. `again`: how far it is with being read while the stream flows, where it is; `error`: what
    is wrong with what the stream holds. While it is read: `rate` in rows a second, `eta` the seconds that are left;
    `since`: when its reading began."""

    name: str
    state: str
    rows: int
    estimate: int
    rebuild_from: int = 0
    why: str = ""
    again: Again | None = None
    error: str = ""
    rate: float = 0.0
    eta: float | None = None
    since: str = ""


class Generation(msgspec.Struct, frozen=True):
    """One generation of an index and its consumer.

    behind: how many events are not in the index yet; None where the consumer is not there.
    elsewhere: it was built from another stream than there is now, so that nothing brings it up to date.
    behind_seconds: the age of the oldest of them; 0 where there is none, None where that cannot be told.
    since: when it was begun.
    done: while it is built, the part of the log that is in it, 0 to 1.
    taken: how many events its consumer, which each start of a reader makes anew, has brought it.
    rate: events a second of late, while somebody watches; None else. eta: seconds until it has caught up, at that rate
    or, where nobody watches, at that of the whole time.
    """

    number: int
    physical: str
    state: str
    seq: int
    behind: int | None = None
    behind_seconds: float | None = None
    since: str = ""
    done: float | None = None
    rate: float | None = None
    eta: float | None = None
    taken: int | None = None
    elsewhere: bool = False


class Engine(msgspec.Struct, frozen=True):
    """The search engine of an index: `where` are its urls without credentials, `away` why it cannot be asked (empty: it
    answers), `since` when that began, while somebody watches."""

    where: str
    away: str = ""
    since: str = ""


class Silent(msgspec.Struct, frozen=True):
    """Whoever streamed, or fed an index, has not renewed its lease for so many seconds and has not given it back: it
    may be dead, or come back, as bridges and readers do some seconds after an outage of NATS."""

    who: str
    seconds: float


class Index(msgspec.Struct, frozen=True):
    """One configured index; `reader` names the process that feeds it, empty where none is known to, and `silent` then
    one that may be about to; `reader_since` when that took the lease, `standby` who would take over; `builder` the
    process that rebuilds it, empty where none does; `changed` the keys of its configuration that wait for a rebuild;
    `dead` counts its dead letters; `past` names what was built of it for a point of the log; `astray`: what searches of
    its alias see instead of the live generation. `state` is what the record says, whatever searches see."""

    name: str
    alias: str
    state: str
    generation: int
    reader: str
    generations: list[Generation] = []
    changed: list[str] = []
    dead: int = 0
    past: list[str] = []
    reader_since: str = ""
    standby: list[Standby] = []
    builder: str = ""
    engine: Engine | None = None
    astray: Astray | None = None
    silent: Silent | None = None


class Rates(msgspec.Struct, frozen=True):
    """How fast, over the last 10 and 60 seconds; None where nobody has watched for long enough.

    events: messages stored a second; stream_bytes: bytes that the stream grows by; wal: bytes of WAL written (of all
    databases); indexed: events a second that each index has taken, over 10 seconds, by its name.
    """

    events_10: float | None = None
    events_60: float | None = None
    stream_bytes_10: float | None = None
    wal_10: float | None = None
    wal_60: float | None = None
    indexed: dict[str, float] = {}


class Settings(msgspec.Struct, frozen=True):
    """The part of the configuration that conclusions depend on; `hold_back` in seconds."""

    publish: str
    sync: str
    mode: str
    hold_back: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found.

    away: which server could not be asked, and why ("PostgreSQL", "NATS", "search engine at …").
    remedies: what to do about it, where it does not pass by itself.
    away_since: when it was first found away, while somebody watches.
    number: the number of the look, from 1 on; 0 where it was the only one.
    rates: None where it was the only one.
    """

    source: str
    at: str
    settings: Settings
    away: dict[str, str] = {}
    remedies: dict[str, str] = {}
    process: Process = Process("unknown")
    slot: Slot | None = None
    checkpoint: Checkpoint | None = None
    stream: Stream | None = None
    lag: Lag | None = None
    tables: list[Table] = []
    indexes: list[Index] = []
    publishing: str = ""
    publishing_why: str = ""
    durability: str = ""
    rebuild: str = ""
    findings: list[Finding] = []
    away_since: dict[str, str] = {}
    number: int = 0
    rates: Rates | None = None

    @property
    def in_step(self) -> bool:
        """Whether nothing needs an operator."""
        return not any(finding.level == "problem" for finding in self.findings)
