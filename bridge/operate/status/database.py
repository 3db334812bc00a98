"""What PostgreSQL says of itself, of the slot and of who works with it: one query over one connection."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime

import msgspec
from psycopg import sql

from bridge.config import Config
from bridge.source import connection


class Database(msgspec.Struct, frozen=True):
    """LSNs as integers, 0 where NULL; the rest is None or empty where this version does not say it.

    lock_pid, lock_client: the backend that holds the slot's lock, and where its client is.
    reading_since: since when the slot's reader is connected; inactive_since: since when there is none.
    limit: max_slot_wal_keep_size, negative where there is none; safe: what may still be written before the slot is
    lost; both in bytes. idle_timeout: idle_replication_slot_timeout in seconds. failover, synced, reason:
    pg_replication_slots' failover, synced and invalidation_reason.
    """

    now: datetime
    flushed: int
    lock_pid: int
    lock_client: str
    slot: bool
    active: bool
    wal_status: str
    confirmed: int
    restart: int
    reading_since: datetime | None
    inactive_since: datetime | None
    limit: int | None
    safe: int | None
    idle_timeout: float | None
    failover: bool | None
    synced: bool | None
    reason: str


# Where a version of PostgreSQL lacks a column, its JSON has no such key.
_QUERY = """
SELECT to_jsonb(found)::text AS found FROM (
SELECT clock_timestamp() AS now,
       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END - '0/0')::int8
           AS flushed,
       coalesce(l.pid, 0) AS lock_pid,
       coalesce(host(a.client_addr), CASE WHEN l.pid IS NOT NULL THEN 'a local socket' END, '')::text AS lock_client,
       s.slot_name IS NOT NULL AS slot, coalesce(s.active, false) AS active,
       coalesce(to_jsonb(s) ->> 'wal_status', '')::text AS wal_status,
       coalesce(s.confirmed_flush_lsn - '0/0', 0)::int8 AS confirmed,
       coalesce(s.restart_lsn - '0/0', 0)::int8 AS restart,
       r.backend_start AS reading_since,
       (to_jsonb(s) ->> 'inactive_since')::timestamptz AS inactive_since,
       pg_size_bytes(current_setting('max_slot_wal_keep_size', true)) AS limit,
       (to_jsonb(s) ->> 'safe_wal_size')::int8 AS safe,
       extract(epoch FROM current_setting('idle_replication_slot_timeout', true)::interval)::float8 AS idle_timeout,
       (to_jsonb(s) ->> 'failover')::bool AS failover, (to_jsonb(s) ->> 'synced')::bool AS synced,
       coalesce(to_jsonb(s) ->> 'invalidation_reason', '') AS reason
  FROM (SELECT hashtextextended('bridge:' || {slot}::text, 0) AS key) k
  LEFT JOIN pg_replication_slots s ON s.slot_name = {slot}
  LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
  LEFT JOIN pg_locks l ON l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
       AND l.classid::int8 = (k.key >> 32) & 4294967295 AND l.objid::int8 = k.key & 4294967295
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 LIMIT 1) found
"""


@contextlib.asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Callable[[], Awaitable[Database]]]:
    """What to ask with, over a connection that is closed at the end.

    A question may be cancelled at any time, and the connection is of no use then. (A statement of psycopg's own would
    first be cancelled on the server, for as long as that does not answer.)

    Raises:
        Unavailable: the server is away. ServerRefused: a person must act.
    """
    async with connection.connect(config.source.dsn) as client:
        text = sql.SQL(_QUERY).format(slot=sql.Literal(config.source.slot)).as_string(client)

        async def ask() -> Database:
            try:
                [row] = await connection.query(client.pgconn, text)
            except connection.CommandError as error:
                raise connection.server_error(error.sqlstate, error.message, "reading the slot") from None
            return msgspec.json.decode(row["found"] or "", type=Database)

        yield ask
