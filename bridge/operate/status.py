"""`bridge status`: ask PostgreSQL, the state bucket and JetStream themselves, so that it works without a bridge.

What is away is said, the rest is shown. PostgreSQL is asked first, then the bucket, then the stream: each is written
before the one that is asked before it, so that nothing looks advanced by somebody else that was only read later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

import anyio
import msgspec
import psycopg
from psycopg.rows import class_row

from bridge.config import PAST, Config, join_name, past_name
from bridge.errors import BridgeError
from bridge.index.generation import IndexRecord
from bridge.index.own import differing
from bridge.operate import health
from bridge.operate.health import LEASE_SECONDS
from bridge.operate.parts import (
    NATS,
    POSTGRES,
    Generation,
    Index,
    Lag,
    Process,
    Settings,
    Slot,
    Status,
    Stream,
    Table,
)
from bridge.operate.parts import (
    Checkpoint as Kept,
)
from bridge.source import connection, lsn
from bridge.stream import deadletters, server, subjects
from bridge.stream.lease import Lease, lease_key
from bridge.stream.server import NOT_FOUND_CONSUMER, NOT_FOUND_STREAM, ApiError, Broker, Servers
from bridge.stream.state import Checkpoint, SnapshotStatus, State, Writer

T = TypeVar("T")

WITHIN = 15.0


class _Database(msgspec.Struct):
    """What one query says of server, slot and who works with it; LSNs as integers, 0 where NULL."""

    now: datetime
    flushed: int
    lock_pid: int
    lock_client: str
    slot: bool
    active: bool
    wal_status: str
    confirmed: int
    restart: int


_QUERY = """
SELECT clock_timestamp() AS now,
       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END - '0/0')::int8
           AS flushed,
       coalesce(l.pid, 0) AS lock_pid,
       coalesce(host(a.client_addr), CASE WHEN l.pid IS NOT NULL THEN 'a local socket' END, '')::text AS lock_client,
       s.slot_name IS NOT NULL AS slot, coalesce(s.active, false) AS active,
       coalesce(to_jsonb(s) ->> 'wal_status', '')::text AS wal_status,
       coalesce(s.confirmed_flush_lsn - '0/0', 0)::int8 AS confirmed,
       coalesce(s.restart_lsn - '0/0', 0)::int8 AS restart
  FROM (SELECT hashtextextended('bridge:' || %(slot)s::text, 0) AS key) k
  LEFT JOIN pg_replication_slots s ON s.slot_name = %(slot)s
  LEFT JOIN pg_locks l ON l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
       AND l.classid::int8 = (k.key >> 32) & 4294967295 AND l.objid::int8 = k.key & 4294967295
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 LIMIT 1
"""


class _Log(msgspec.Struct):
    """What the state bucket and the stream say."""

    checkpoint: Checkpoint | None = None
    lease: Lease | None = None
    epoch: int = 0
    stream: Stream | None = None
    tables: list[Table] = []
    indexes: list[Index] = []
    committed: str = ""
    committed_lsn: str = ""


async def collect(config: Config, servers: Servers) -> Status:
    """The state of everything now, with the conclusions. Nothing is changed anywhere."""
    away: dict[str, str] = {}
    database = await _asked(POSTGRES, lambda: _database(config), away)
    log = await _asked(NATS, lambda: _log(config, servers), away)
    now = database.now if database is not None else datetime.now(UTC)
    stream = config.stream
    found = Status(
        source=config.source.name,
        at=_text(now),
        settings=Settings(stream.publish, stream.sync, stream.mode, stream.hold_back),
        away=away,
        process=_process(database, log, now),
        slot=_slot(config, database),
        checkpoint=_checkpoint(log, now),
        stream=log.stream if log is not None else None,
        lag=_lag(database, log, now),
        tables=log.tables if log is not None else [],
        indexes=log.indexes if log is not None else [],
    )
    return health.judge(found)


async def _asked(what: str, ask: Callable[[], Awaitable[T]], away: dict[str, str]) -> T | None:
    try:
        with anyio.fail_after(WITHIN):
            return await ask()
    except BridgeError as error:
        away[what] = error.what
    except TimeoutError:
        away[what] = f"no answer within {WITHIN:g} s"
    return None


async def _database(config: Config) -> _Database:
    async with (
        connection.connect(config.source.dsn) as sql,
        sql.cursor(row_factory=class_row(_Database)) as cursor,
    ):
        try:
            found = await (await cursor.execute(_QUERY, {"slot": config.source.slot})).fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the slot") from None
    assert found is not None
    return found


async def _log(config: Config, servers: Servers) -> _Log:
    async with server.connect(config.stream, servers, name=f"bridge {config.source.name} status") as broker:
        found = _Log()
        state = await _state(broker, config)
        if state is not None:
            found.checkpoint = await _value(state, subjects.checkpoint_key(config.source.name), Checkpoint)
            found.lease = await _value(state, f"lease.bridge.{subjects.token(config.source.name)}", Lease)
            writers = await _value(state, subjects.epochs_key(config.source.name), list[Writer])
            found.epoch = max((writer.epoch for writer in writers or []), default=0)
        found.stream = await _stream(broker, config.stream.name)
        if found.stream.last_seq:
            last = await broker.message(config.stream.name, seq=found.stream.last_seq)
            event = msgspec.json.decode(last.data) if last is not None else {}
            found.committed, found.committed_lsn = event.get("committed_at") or "", event.get("commit_lsn") or ""
        if state is not None:
            found.tables = await _tables(config, state, found.stream)
            past = await _past(config, state)
            found.indexes = [await _index(config, broker, state, name, past) for name in config.index]
        return found


async def _state(broker: Broker, config: Config) -> State | None:
    """The bucket; None where there is none, which is not made here."""
    if await broker.stream(f"KV_{config.state.bucket}") is None:
        return None
    return await State.open(broker, config.state.bucket, config.stream.replicas)


async def _value(state: State, key: str, kind: type[T]) -> T | None:
    found = await state.get(key, kind)
    return found[0] if found is not None else None


async def _stream(broker: Broker, name: str) -> Stream:
    try:
        info = await broker.look(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.code == NOT_FOUND_STREAM:
            return Stream(name, exists=False)
        raise
    account = await broker.look("INFO")
    config, state, cluster = info["config"], info["state"], info.get("cluster") or {}
    others = cluster.get("replicas") or []
    return Stream(
        name,
        exists=True,
        created=info["created"],
        messages=state["messages"],
        bytes=state["bytes"],
        first_seq=state["first_seq"],
        compacted=config.get("max_msgs_per_subject") == 1,
        first_at=state["first_ts"] if state["messages"] else "",
        last_seq=state["last_seq"],
        last_at=state["last_ts"] if state["messages"] else "",
        replicas=config["num_replicas"],
        leader=cluster.get("leader") or "",
        behind=[other["name"] for other in others if other.get("offline") or not other.get("current")],
        discard=config["discard"],
        max_bytes=max(config["max_bytes"], 0),
        max_msgs=max(config["max_msgs"], 0),
        max_age=config["max_age"] / 1e9,
        atomic=bool(config.get("allow_atomic")),
        used=account.get("storage", 0),
        allowed=max(account.get("limits", {}).get("max_storage", 0), 0),
    )


async def _tables(config: Config, state: State, stream: Stream) -> list[Table]:
    found = []
    for key in await state.keys(f"snapshot.{subjects.token(config.source.name)}."):
        kept = await _value(state, key, SnapshotStatus)
        if kept is not None:
            name = join_name(*subjects.table_of(key))
            found.append(health.table(name, kept, stream))
    return found


async def _past(config: Config, state: State) -> list[str]:
    """The indexes that were built for a point of the log."""
    keys = await state.keys(f"index.{subjects.token(config.source.name)}.")
    return [name for name in (subjects.untoken(key.split(".")[2]) for key in keys) if PAST.fullmatch(name)]


async def _index(config: Config, broker: Broker, state: State, name: str, past: list[str]) -> Index:
    source, index = config.source.name, config.index[name]
    record = await _value(state, subjects.index_key(source, name), IndexRecord) or IndexRecord(alias=index.alias)
    lease = await _value(state, lease_key("index", source, name), Lease)
    generations = [
        Generation(one.number, one.physical, one.state, one.seq, await _behind(broker, one.stream, one.consumer))
        for one in record.generations
        if one.state != "retired"
    ]
    reader = _who(lease) if lease is not None and _age(lease.at, datetime.now(UTC)) < LEASE_SECONDS else ""
    dead = await deadletters.count(broker, config.stream, source, name)
    changed = differing(index, record)
    past = sorted(one for one in past if one.startswith(past_name(name, 0)[:-1]))
    return Index(name, index.alias, record.state, record.generation, reader, generations, changed, dead, past)


async def _behind(broker: Broker, stream: str, consumer: str) -> int | None:
    try:
        info = await broker.look(f"CONSUMER.INFO.{stream}.{consumer}")
    except ApiError as error:
        if error.code in (NOT_FOUND_CONSUMER, NOT_FOUND_STREAM):
            return None
        raise
    return int(info["num_pending"] + info["num_ack_pending"])


def _process(database: _Database | None, log: _Log | None, now: datetime) -> Process:
    lease = log.lease if log is not None else None
    fresh = lease is not None and _age(lease.at, now) < LEASE_SECONDS
    epoch = log.epoch if log is not None else 0
    who = _who(lease) if lease is not None and fresh else ""
    if database is not None and database.lock_pid:
        who = who or f"connected from {database.lock_client}"
    if database is not None and database.active:
        return Process("streaming", who, epoch)
    if fresh or (database is not None and database.lock_pid):
        return Process("running", who, epoch)
    return Process("stopped" if database is not None else "unknown", "", epoch)


def _who(lease: Lease) -> str:
    return f"process {lease.pid} on {lease.host.split('/')[0]}"


def _slot(config: Config, database: _Database | None) -> Slot | None:
    if database is None:
        return None
    if not database.slot:
        return Slot(config.source.slot, exists=False, flushed=lsn.show(database.flushed))
    return Slot(
        config.source.slot,
        exists=True,
        active=database.active,
        wal_status=database.wal_status,
        confirmed_flush=lsn.show(database.confirmed),
        restart=lsn.show(database.restart),
        retained=max(database.flushed - database.restart, 0) if database.restart else 0,
        flushed=lsn.show(database.flushed),
    )


def _checkpoint(log: _Log | None, now: datetime) -> Kept | None:
    kept = log.checkpoint if log is not None else None
    if kept is None:
        return None
    return Kept(kept.lsn, kept.stream_seq, kept.phase, kept.at, _age(kept.at, now), kept.stream_created, kept.missed)


def _lag(database: _Database | None, log: _Log | None, now: datetime) -> Lag | None:
    """Bytes of WAL, of any table and database, behind the checkpoint; the time since the last commit that is in the
    stream, or, where the checkpoint is past that, since the checkpoint."""
    kept = log.checkpoint if log is not None else None
    if database is None or log is None or kept is None:
        return None
    behind = max(database.flushed - lsn.parse(kept.lsn), 0)
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
