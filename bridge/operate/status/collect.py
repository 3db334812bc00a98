"""`bridge status`: ask PostgreSQL, the state bucket, JetStream and the engines, so that it works without a bridge.

What is away is said, the rest is shown. PostgreSQL is asked first, then the bucket, then the stream: each is written
before the one that is asked before it, so that nothing looks advanced by somebody else that was only read later. The
engines are asked meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec

from bridge import structured
from bridge.config import Config, join_name, past_name
from bridge.errors import BridgeError, NotStarted, Unavailable
from bridge.index.generation import Generation as Kept
from bridge.index.generation import IndexRecord
from bridge.index.own import differing
from bridge.index.sight import Astray, misled
from bridge.operate.status import database, engines, health, jetstream, outlook, parts
from bridge.operate.status.database import Database
from bridge.operate.status.engines import Searched
from bridge.operate.status.health import LEASE_SECONDS
from bridge.operate.status.jetstream import Log
from bridge.operate.status.line import Opened
from bridge.operate.status.parts import (
    NATS,
    POSTGRES,
    Engine,
    Generation,
    Index,
    Lag,
    Process,
    Settings,
    Silent,
    Slot,
    Standby,
    Status,
)
from bridge.source import lsn
from bridge.stream import standby, subjects
from bridge.stream.lease import Lease, dead, lease_key
from bridge.stream.server import Servers

T = TypeVar("T")

WITHIN = 15.0
# Who looks at a frozen engine learns it within two seconds; the question costs a busy one nothing.
ENGINE_WITHIN, GRACE = 1.0, 0.5


class Answers(msgspec.Struct):
    """What each server said; None where it is away, and `away` says why.

    searched: by an engine's `Group.what`, what searches see there; not there where it has not answered.
    remedies: what to do about one that is away and does not come back by itself.
    before: the log as it was before the aliases were asked for once more; None where they were not.
    """

    database: Database | None = None
    log: Log | None = None
    away: dict[str, str] = {}
    remedies: dict[str, str] = {}
    searched: dict[str, Searched] = {}
    before: Log | None = None

    def refused(self, what: str, error: BridgeError) -> None:
        """That server gives this error, and no answer."""
        self.away[what] = error.what
        if isinstance(error, NotStarted):
            self.remedies[what] = "start the bridge: `bridge run`"
        elif not isinstance(error, Unavailable):
            self.remedies[what] = error.remedy

    def forget(self, what: str) -> None:
        """That server is asked once more."""
        self.away.pop(what, None)
        self.remedies.pop(what, None)

    def misled(self, config: Config, name: str, what: str) -> Astray | None:
        """What is wrong with an index's alias, as far as it is known; `what` names its engine."""
        records = [log.records.get(name, IndexRecord()) for log in (self.before, self.log) if log is not None]
        alias = config.index[name].alias
        seen = self.searched.get(what, {}).get(alias)
        return misled(name, records, alias, *((seen.holders, seen.there) if seen is not None else (None,)))


async def collect(config: Config, servers: Servers) -> Status:
    """The state of everything now, with the conclusions. Nothing is changed anywhere."""
    found, groups = Answers(), {group.what: group for group in engines.groups(config)}

    async def ask_log() -> None:
        found.log = await _once(NATS, partial(jetstream.opened, config, servers), found)

    async def in_order() -> None:
        found.database = await _once(POSTGRES, partial(database.opened, config), found)
        await ask_log()

    async def ask_engine(what: str) -> None:
        opened = partial(engines.opened, groups[what], ENGINE_WITHIN)
        searched = await _once(what, opened, found, ENGINE_WITHIN + GRACE)
        if searched is not None:
            found.searched[what] = searched

    async with structured.group() as tasks:
        tasks.start_soon(in_order)
        for what in groups:
            tasks.start_soon(ask_engine, what)
    await confirmed(config, found, ask_engine, ask_log)
    return health.judge(outlook.once(assembled(config, found)))


async def confirmed(
    config: Config,
    found: Answers,
    ask_engine: Callable[[str], Coroutine[Any, Any, None]],
    ask_log: Callable[[], Awaitable[None]],
) -> None:
    """Where an alias is not where it should be, ask for it once more between two looks at the record: a rebuild may
    have moved it, and the engines are not asked in any order with NATS."""
    groups = engines.groups(config)
    doubtful = {one.what for one in groups if any(found.misled(config, name, one.what) for name in one.names)}
    if not doubtful:
        return
    found.before = found.log
    async with structured.group() as tasks:
        for what in doubtful:
            found.searched.pop(what)
            tasks.start_soon(ask_engine, what)
    await ask_log()


async def _once(what: str, opened: Opened[T], found: Answers, seconds: float = WITHIN) -> T | None:
    async def ask() -> T:
        async with opened() as question:
            return await question()

    return await asked(what, ask, found, seconds)


async def asked(what: str, ask: Callable[[], Awaitable[T]], found: Answers, seconds: float) -> T | None:
    """The answer of a server; None where there is none, and `found` then says why."""
    try:
        with anyio.fail_after(seconds):
            return await ask()
    except BridgeError as error:
        found.refused(what, error)
    except TimeoutError:
        found.away[what] = f"no answer within {seconds:g} s"
    return None


def assembled(config: Config, found: Answers) -> Status:
    """A status of what was said, without conclusions."""
    read, log = found.database, found.log
    now = read.now if read is not None else datetime.now(UTC)
    stream = config.stream
    # In the order of the pipeline, whoever was the first to be given up.
    order = [POSTGRES, NATS, *(group.what for group in engines.groups(config))]
    return Status(
        source=config.source.name,
        at=_text(now),
        settings=Settings(stream.publish, stream.sync, stream.mode, stream.hold_back),
        away={what: found.away[what] for what in order if what in found.away},
        remedies=found.remedies,
        process=_process(config, read, log, now),
        slot=_slot(config, read),
        checkpoint=_checkpoint(log, now),
        stream=log.stream if log is not None else None,
        lag=_lag(read, log, now),
        tables=_tables(log),
        indexes=_indexes(config, found, now),
    )


def _tables(log: Log | None) -> list[parts.Table]:
    kept = log.tables if log is not None else {}
    return [
        health.table(join_name(*subjects.table_of(key)), kept[key], log.stream if log else None) for key in sorted(kept)
    ]


def _indexes(config: Config, found: Answers, now: datetime) -> list[Index]:
    log, shown = found.log, list[Index]()
    if log is None:
        return shown
    past = jetstream.past(log.records)
    engine = {name: group for group in engines.groups(config) for name in group.names}
    for name, index in config.index.items():
        record = log.records.get(name) or IndexRecord(alias=index.alias)
        reader = _fresh(log, lease_key("index", config.source.name, name), now)
        silent = _silent(log, lease_key("index", config.source.name, name), now)
        builder = _fresh(log, lease_key("reindex", config.source.name, name), now)
        shown.append(
            Index(
                name,
                index.alias,
                record.state,
                record.generation,
                _who(reader),
                [_generation(one, log, now) for one in record.generations if one.state != "retired"],
                differing(index, record),
                log.dead.get(name, 0),
                sorted(one for one in past if one.startswith(past_name(name, 0)[:-1])),
                reader.since if reader is not None else "",
                _waiting(log, lease_key("index", config.source.name, name)),
                _who(builder),
                Engine(engine[name].where, found.away.get(engine[name].what, "")),
                found.misled(config, name, engine[name].what),
                silent,
            )
        )
    return shown


def _generation(one: Kept, log: Log, now: datetime) -> Generation:
    consumer, stream = log.consumers.get(one.physical), log.stream
    elsewhere = stream is not None and stream.exists and one.stream_created != stream.created
    since = _text(datetime.fromisoformat(one.at)) if one.at else ""
    if consumer is None:
        return Generation(one.number, one.physical, one.state, one.seq, since=since, elsewhere=elsewhere)
    seconds = _age(consumer.next_at, now) if consumer.next_at else None if consumer.behind else 0.0
    done = None
    if one.state == "building" and stream is not None:
        whole = stream.last_seq - one.first + 1
        read = max(one.seq, consumer.floor) - one.first + 1
        done = 1.0 if not consumer.behind or whole <= 0 else round(min(max(read / whole, 0.0), 1.0), 4)
    return Generation(
        one.number, one.physical, one.state, one.seq, consumer.behind, seconds, since, done, taken=consumer.taken,
        elsewhere=elsewhere,
    )  # fmt: skip


def _fresh(log: Log | None, key: str, now: datetime) -> Lease | None:
    """A lease whose holder is at work, as far as one can see from here."""
    lease = log.leases.get(key) if log is not None else None
    return lease if lease is not None and _age(lease.at, now) < LEASE_SECONDS and not dead(lease) else None


def _silent(log: Log | None, key: str, now: datetime) -> Silent | None:
    """The holder of a lease that is there and too old, where nobody can tell whether he is gone."""
    lease = log.leases.get(key) if log is not None else None
    if lease is None or dead(lease) or _fresh(log, key, now) is not None:
        return None
    return Silent(_who(lease), _age(lease.at, now))


def _process(config: Config, read: Database | None, log: Log | None, now: datetime) -> Process:
    key = lease_key("bridge", config.source.name)
    lease, epoch = _fresh(log, key, now), log.epoch if log is not None else 0
    who, since, others = _who(lease), lease.since if lease is not None else "", _waiting(log, key)
    if read is not None and read.lock_pid:
        who = who or f"connected from {read.lock_client}"
    if read is not None and read.active:
        reading = _text(read.reading_since) if read.reading_since is not None else ""
        return Process("streaming", who, epoch, since or reading, others)
    if lease is not None or (read is not None and read.lock_pid):
        return Process("running", who, epoch, since, others)
    # Without its lease nobody can tell: who waits for NATS has let go of the slot and its lock.
    known = read is not None and log is not None
    return Process("stopped" if known else "unknown", "", epoch, "", others, _silent(log, key, now))


def _who(lease: Lease | None) -> str:
    return named(lease.pid, lease.host) if lease is not None else ""


def named(pid: int, host: str) -> str:
    """How a status calls a process."""
    return f"process {pid} on {host.split('/')[0]}"


def _waiting(log: Log | None, key: str) -> list[Standby]:
    listed = log.waiting.get(key, []) if log is not None else []
    fresh = standby.waiting(listed, datetime.now(UTC))
    return [Standby(named(one.pid, one.host), one.since, one.at, one.why) for one in fresh]


def _slot(config: Config, read: Database | None) -> Slot | None:
    if read is None:
        return None
    if not read.slot:
        return Slot(config.source.slot, exists=False, flushed=lsn.show(read.flushed))
    limited = read.limit is not None and read.limit >= 0
    since = read.reading_since if read.active else read.inactive_since
    return Slot(
        config.source.slot,
        exists=True,
        active=read.active,
        wal_status=read.wal_status,
        confirmed_flush=lsn.show(read.confirmed),
        restart=lsn.show(read.restart),
        retained=max(read.flushed - read.restart, 0) if read.restart else 0,
        flushed=lsn.show(read.flushed),
        since=_text(since) if since is not None else "",
        limit=read.limit if limited else None,
        safe=read.safe if limited else None,
        idle_timeout=read.idle_timeout or 0.0,
        failover=read.failover,
        synced=bool(read.synced),
        reason=read.reason,
    )


def _checkpoint(log: Log | None, now: datetime) -> parts.Checkpoint | None:
    kept = log.checkpoint if log is not None else None
    if kept is None:
        return None
    return parts.Checkpoint(
        kept.lsn, kept.stream_seq, kept.phase, kept.at, _age(kept.at, now), kept.stream_created, kept.missed
    )


def _lag(read: Database | None, log: Log | None, now: datetime) -> Lag | None:
    """Bytes of WAL, of any table and database, behind the checkpoint; the time since the last commit that is in the
    stream, or, where the checkpoint is past that, since the checkpoint."""
    kept = log.checkpoint if log is not None else None
    if read is None or log is None or kept is None:
        return None
    behind = max(read.flushed - lsn.parse(kept.lsn), 0)
    if not behind:
        return Lag(0, 0.0)
    past = not log.committed or lsn.parse(kept.lsn) > lsn.parse(log.committed_lsn)
    since = kept.at if past else log.committed
    return Lag(behind, _age(since, now))


def _age(text: str, now: datetime) -> float:
    """Seconds since a time as text."""
    return round(max((now - datetime.fromisoformat(text)).total_seconds(), 0.0), 1)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
