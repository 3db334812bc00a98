"""The logical replication slot and the server it lives on: what is there, what is allowed, making and dropping it.

Source: PostgreSQL documentation, "Streaming Replication Protocol" and "pg_replication_slots".
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

import anyio
import msgspec
import psycopg
from psycopg import pq
from psycopg.rows import class_row

from bridge import log
from bridge.errors import BridgeError, OtherDatabase, ServerRefused, SlotLost, SlotMissing, Unavailable
from bridge.source import connection, lsn
from bridge.source.connection import CommandError
from bridge.waiting import until

PLUGIN = "wal2json"
OLDEST = 120000
FAILOVER_SINCE = 170000
NAME_BLOCKERS_AFTER = 3.0
ENDS_WITHIN = 10.0


class Server(msgspec.Struct, frozen=True):
    """What the SQL side says of the server."""

    version: int
    wal_level: str
    encoding: str
    database: str
    role: str
    may_replicate: bool
    in_recovery: bool
    plugins: str | None


class Slot(msgspec.Struct, frozen=True):
    """One row of pg_replication_slots; LSNs as integers, 0 where NULL; failover is None before PostgreSQL 17."""

    name: str
    plugin: str
    database: str
    active_pid: int
    restart_lsn: int
    confirmed_flush: int
    wal_status: str
    failover: bool | None = None


class Identity(NamedTuple):
    """IDENTIFY_SYSTEM: which cluster, on which timeline, how far its WAL is flushed."""

    system_id: str
    timeline: int
    flushed: int


class Created(NamedTuple):
    """CREATE_REPLICATION_SLOT: changes after `consistent_point` will come; `snapshot` shows what was before it."""

    consistent_point: int
    snapshot: str


_SERVER = """
SELECT current_setting('server_version_num')::int AS version, current_setting('wal_level') AS wal_level,
       pg_encoding_to_char(d.encoding)::text AS encoding, d.datname::text AS database, current_user::text AS role,
       (r.rolsuper OR r.rolreplication) AS may_replicate, pg_is_in_recovery() AS in_recovery,
       current_setting('output_plugin_libraries', true) AS plugins
  FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = current_user
"""
_SLOT = """
SELECT slot_name::text AS name, coalesce(plugin, '')::text AS plugin, coalesce(database, '')::text AS database,
       coalesce(active_pid, 0) AS active_pid, coalesce(restart_lsn - '0/0', 0)::int8 AS restart_lsn,
       coalesce(confirmed_flush_lsn - '0/0', 0)::int8 AS confirmed_flush, coalesce(wal_status, '')::text AS wal_status,
       (to_jsonb(s) ->> 'failover')::bool AS failover
  FROM pg_replication_slots s WHERE slot_name = %s
"""

_HOLDER = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND (classid::int8 << 32 | objid::int8) = hashtextextended(%s, 0) AND pid = %s
"""
_READER = """
SELECT a.pid, s.database, current_database()
  FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
 WHERE s.slot_name = %s AND a.application_name = current_setting('application_name')
"""
# In whatever database: their transactions are all in the one log.
_BLOCKERS = """
SELECT ARRAY(SELECT pid FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
              ORDER BY xact_start),
       ARRAY(SELECT gid::text FROM pg_prepared_xacts ORDER BY prepared)
"""


class Refusal(NamedTuple):
    """A setting with which the bridge cannot work; `kind` is its name in `bridge check`."""

    kind: str
    what: str
    remedy: str


async def about(sql: psycopg.AsyncConnection[Any]) -> Server:
    """What the server says of itself and the role."""
    async with sql.cursor(row_factory=class_row(Server)) as cursor:
        found = await (await cursor.execute(_SERVER)).fetchone()
    assert found is not None
    return found


async def inspect(sql: psycopg.AsyncConnection[Any], *, failover: bool = False) -> Server:
    """What the server allows.

    Args:
        failover: the slot is to be a failover slot.

    Raises:
        ServerRefused: version, wal_level, plugin, privilege or encoding will not do; every one of them, with the
            remedies.
    """
    found = await about(sql)
    wrong = refusals(found, failover=failover)
    if wrong:
        raise ServerRefused("; ".join(one.what for one in wrong), "\n  → ".join(one.remedy for one in wrong))
    return found


def refusals(found: Server, *, failover: bool = False) -> list[Refusal]:
    """Every setting with which the bridge cannot work; `failover`: the slot is to be a failover slot."""
    wrong, major = [], found.version // 10000
    if found.version < OLDEST:
        wrong.append(
            Refusal(
                "version", f"this is PostgreSQL {major}, 12 or newer is needed", "upgrade it: pg_upgrade, or a dump"
            )
        )
    if failover and found.version < FAILOVER_SINCE:
        wrong.append(
            Refusal(
                "failover",
                f"[source] failover is on, and this is PostgreSQL {major}: failover slots came with 17",
                "upgrade it to 17 or newer, or leave [source] failover out: a promoted standby has no slot then",
            )
        )
    if found.in_recovery:
        wrong.append(Refusal("recovery", "this PostgreSQL server is a standby", "point [source] dsn at the primary"))
    if found.wal_level != "logical":
        wrong.append(
            Refusal(
                "wal_level",
                f"wal_level is {found.wal_level}, logical replication needs logical",
                "ALTER SYSTEM SET wal_level = logical; then restart PostgreSQL",
            )
        )
    if not found.may_replicate:
        role = found.role if re.fullmatch(r"[a-z_][a-z0-9_]*", found.role) else f'"{found.role}"'
        wrong.append(
            Refusal(
                "role", f"the role {found.role} may not replicate", f"as a superuser: ALTER ROLE {role} REPLICATION"
            )
        )
    if found.encoding == "SQL_ASCII":
        wrong.append(
            Refusal(
                "encoding",
                f"the database {found.database} has the encoding SQL_ASCII, which says nothing about its text",
                "move the data to a database with a real encoding, UTF8 for instance",
            )
        )
    if found.plugins is not None and PLUGIN not in [p.strip(' "') for p in found.plugins.split(",")]:
        wrong.append(
            Refusal(
                "plugin_libraries",
                f"output_plugin_libraries is {found.plugins}, so PostgreSQL will not load wal2json",
                "ALTER SYSTEM SET output_plugin_libraries = pgoutput, test_decoding, wal2json; SELECT pg_reload_conf()",
            )
        )
    return wrong


async def find(sql: psycopg.AsyncConnection[Any], name: str) -> Slot | None:
    """The slot, None where there is none of that name."""
    try:
        async with sql.cursor(row_factory=class_row(Slot)) as cursor:
            return await (await cursor.execute(_SLOT, (name,))).fetchone()
    except psycopg.Error as error:
        raise connection.refusal(error, "reading pg_replication_slots") from None


async def identify(pgconn: pq.abc.PGconn) -> Identity:
    """IDENTIFY_SYSTEM on a replication connection."""
    row = (await _ask(pgconn, "IDENTIFY_SYSTEM"))[0]
    return Identity(row["systemid"] or "", int(row["timeline"] or 0), lsn.parse(row["xlogpos"] or "0/0"))


async def _ask(pgconn: pq.abc.PGconn, command: str) -> list[dict[str, str | None]]:
    try:
        return await connection.query(pgconn, command)
    except CommandError as error:
        raise connection.server_error(error.sqlstate, error.message, command) from None


async def timeline_of(pgconn: pq.abc.PGconn, timeline: int) -> list[tuple[int, int]]:
    """The ancestors of `timeline` as (timeline, LSN at which it was left), oldest first; none for timeline 1."""
    if timeline == 1:
        return []
    row = (await _ask(pgconn, f"TIMELINE_HISTORY {timeline}"))[0]
    found = []
    for line in (row["content"] or "").splitlines():
        fields = line.split("\t")
        if len(fields) >= 2 and fields[0].strip().isdigit():
            found.append((int(fields[0]), lsn.parse(fields[1].strip())))
    return found


async def lock(sql: psycopg.AsyncConnection[Any], name: str, predecessor: int) -> None:
    """Hold the slot's advisory lock for as long as the connection lasts: it keeps away a bridge that has another lease
    (in another bucket, on another NATS), and whoever is paused is fenced from the slot by the end of his connection.

    Args:
        predecessor: backend of the bridge that held the lease before, 0 where there was none; it is ended where it
            still holds the lock, as that of a paused or vanished process does.

    Raises:
        Unavailable: another bridge works with the slot.
    """
    if await _locked(sql, name):
        return
    holder = await (await sql.execute(_HOLDER, (f"bridge:{name}", predecessor))).fetchone()
    if holder is not None:
        log.get().warning("ending the predecessor's session", slot=name, backend=predecessor)
        await _end(sql, predecessor)
    if holder is None or not await until(lambda: _locked(sql, name), seconds=ENDS_WITHIN):
        raise Unavailable(f"another bridge works with the slot {name}", "waiting to take over when it stops")


async def _locked(sql: psycopg.AsyncConnection[Any], name: str) -> bool:
    cursor = await sql.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", (f"bridge:{name}",))
    row = await cursor.fetchone()
    return bool(row and row[0])


async def free(sql: psycopg.AsyncConnection[Any], name: str) -> None:
    """End the walsender of a bridge that reads from the slot no more; call with the slot's lock in hand.

    A paused or vanished client would keep it for the whole wal_sender_timeout. What another program reads, such as
    pg_recvlogical, is left alone. The lock is of one database: a bridge of another one that has the slot is alive.

    Raises:
        OtherDatabase: a bridge of another database reads from the slot.
    """
    reader = await (await sql.execute(_READER, (name,))).fetchone()
    if reader is None:
        return
    if reader[1] != reader[2]:
        raise OtherDatabase(
            f"the slot {name} is being read by a bridge of the database {reader[1]}, not of {reader[2]}",
            "give this one another [source] name (or slot): each bridge needs its own",
        )
    log.get().warning("ending the predecessor's walsender", slot=name, backend=reader[0])
    await _end(sql, reader[0])

    async def gone() -> bool:
        return await (await sql.execute(_READER, (name,))).fetchone() is None

    await until(gone, seconds=ENDS_WITHIN)


async def _end(sql: psycopg.AsyncConnection[Any], pid: int) -> None:
    # By its pid alone: within a query that looks for it, the planner might end the sessions before it compares them.
    try:
        await sql.execute("SELECT pg_terminate_backend(%s)", (pid,))
    except psycopg.errors.InsufficientPrivilege:
        raise Unavailable(
            f"the predecessor's session {pid} cannot be ended: it has another role",
            "GRANT pg_signal_backend to the role in [source] dsn, or end it by hand",
        ) from None


def creation(name: str, *, failover: bool) -> str:
    """The command that makes the slot. What comes in brackets is understood from PostgreSQL 15 on, FAILOVER from 17."""
    options = "(SNAPSHOT 'export', FAILOVER)" if failover else "EXPORT_SNAPSHOT"
    return f"CREATE_REPLICATION_SLOT {name} LOGICAL {PLUGIN} {options}"


def alteration(found: Slot, failover: bool | None) -> str | None:
    """The command that makes a failover slot of one that is none, or the other way round; None where nothing is to be
    altered: it is what it is to be, nothing is said of it, or the server knows no such slots."""
    if failover is None or found.failover is None or found.failover is failover:
        return None
    return f"ALTER_REPLICATION_SLOT {found.name} (FAILOVER {'true' if failover else 'false'})"


async def create(
    pgconn: pq.abc.PGconn, sql: psycopg.AsyncConnection[Any], name: str, *, failover: bool = False
) -> Created:
    """Make the slot and export the snapshot that goes with it; the snapshot lives until the connection's next command.

    PostgreSQL first waits for the transactions that are open, prepared ones included; after a while the log names them.

    Args:
        failover: standbys that synchronize slots have it, too (PostgreSQL 17 and newer).
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_name_blockers, sql, name)
        try:
            rows = await connection.query(pgconn, creation(name, failover=failover))
        except CommandError as error:
            group.cancel_scope.cancel()
            failed = error
        else:
            group.cancel_scope.cancel()
            row = rows[0]
            return Created(lsn.parse(row["consistent_point"] or "0/0"), row["snapshot_name"] or "")
    raise connection.server_error(failed.sqlstate, failed.message, f"making the slot {name}")


async def _name_blockers(sql: psycopg.AsyncConnection[Any], name: str) -> None:
    await anyio.sleep(NAME_BLOCKERS_AFTER)
    with contextlib.suppress(psycopg.Error):
        row = await (await sql.execute(_BLOCKERS)).fetchone()
        assert row is not None
        log.get().warning(
            "slot waits",
            slot=name,
            for_transactions_of_pids=row[0],
            for_prepared=row[1],
            next="end them, or wait: COMMIT, ROLLBACK, ROLLBACK PREPARED; SELECT pg_terminate_backend(pid)",
        )


async def alter(pgconn: pq.abc.PGconn, found: Slot, failover: bool | None) -> None:
    """Make of the slot what the configuration says of it, if it is not that already; before anybody reads from it.

    Raises:
        SlotMissing, SlotLost, Unavailable: as `start`.
    """
    command = alteration(found, failover)
    if command is None:
        return
    try:
        await connection.query(pgconn, command)
    except CommandError as error:
        raise _unusable(found.name, error) or connection.server_error(error.sqlstate, error.message, command) from None
    log.get().info("slot altered", slot=found.name, failover=failover)


async def start(pgconn: pq.abc.PGconn, name: str, options: dict[str, str]) -> None:
    """START_REPLICATION from the slot's own position; the connection is in COPY mode afterwards.

    Raises:
        SlotMissing, SlotLost: PostgreSQL has no such slot, or not all of its WAL.
        Unavailable: somebody else is reading from the slot.
        CommandError: the plugin does not take an option (SQLSTATE 22023).
    """
    given = ", ".join(f"\"{option}\" '{value}'" for option, value in options.items())
    sql = f"START_REPLICATION SLOT {name} LOGICAL 0/0 ({given})"
    results = await connection.command(pgconn, sql.encode())
    if results and results[-1].status == pq.ExecStatus.COPY_BOTH:
        return
    try:
        connection.check(pgconn, results[-1])
    except CommandError as error:
        if (unusable := _unusable(name, error)) is not None:
            raise unusable from None
        raise
    raise Unavailable("PostgreSQL answered START_REPLICATION with nothing", "trying again")


def _unusable(name: str, error: CommandError) -> BridgeError | None:
    """What an error says of the slot; None where it is about something else."""
    if error.sqlstate == "42704":
        return SlotMissing(f"PostgreSQL has no slot {name}", "see `bridge drop` to start anew, or restore the slot")
    if error.sqlstate == "55006":
        return Unavailable(f"somebody else reads from the slot {name}: {error.message}", "waiting for it to stop")
    return lost(name) if error.sqlstate == "55000" else None


def lost(name: str) -> SlotLost:
    """The error for a slot whose WAL is gone."""
    return SlotLost(
        f"PostgreSQL removed WAL that the slot {name} still needed",
        "start anew with `bridge drop --stream --state` and `bridge run`; raise max_slot_wal_keep_size before",
    )


async def drop(sql: psycopg.AsyncConnection[Any], name: str) -> bool:
    """Drop the slot so that PostgreSQL can remove its WAL; False where there is none.

    Raises:
        Unavailable: it is being read from.
    """
    try:
        await sql.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    except psycopg.errors.UndefinedObject:
        return False
    except psycopg.errors.ObjectInUse as error:
        raise Unavailable(
            f"the slot {name} is in use ({str(error).strip()})", "stop the bridge that reads from it first"
        ) from None
    return True
