"""Asks PostgreSQL what `bridge check` wants to know: the server, its settings and slots, wal2json, the tables."""

from __future__ import annotations

import secrets
import time
from typing import Any, NamedTuple

import anyio
import psycopg
from psycopg.rows import class_row, dict_row

from bridge.config import Config, Source
from bridge.errors import BridgeError, ServerRefused
from bridge.operate.checks.clocks import Reading, read_at
from bridge.operate.checks.postgres import Database, Plugin, SlotRow
from bridge.operate.checks.tables import Rights, Tables
from bridge.source import connection, slot, wal2json
from bridge.source.catalog import Catalog
from bridge.source.connection import CommandError

PROBE_SECONDS = 5.0
PROBE, PROBES = "bridge_check_", r"bridge\_check\_%"
UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

# What later versions have beside the rest of a row comes by way of JSON: an older one has nothing there.
_DATABASE = """
SELECT clock_timestamp() AS now, pg_backend_pid() AS backend,
       split_part(current_setting('server_version'), ' ', 1) AS version,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       current_setting('max_replication_slots')::int AS slots,
       (SELECT count(*) FROM pg_replication_slots WHERE slot_name NOT LIKE %(probe)s OR NOT active)::int AS slots_used,
       current_setting('max_wal_senders')::int AS senders,
       (SELECT count(*) FROM pg_stat_replication)::int AS senders_used,
       (SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size') AS keep,
       (SELECT setting || coalesce(unit, 's') FROM pg_settings WHERE name = 'idle_replication_slot_timeout') AS idle,
       (SELECT count(*) FROM pg_stat_replication r WHERE NOT EXISTS (
            SELECT FROM pg_replication_slots s
             WHERE s.active_pid = r.pid AND s.slot_type = 'logical'))::int AS standbys,
       current_setting('synchronized_standby_slots', true) AS waits_for,
       (SELECT coalesce(jsonb_object_agg(slot_name, active), '{}') FROM pg_replication_slots
         WHERE slot_type = 'physical') AS physical,
       EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE '%%slotsync worker') AS synchronized,
       ARRAY(SELECT slot_name::text FROM pg_replication_slots
              WHERE slot_name LIKE %(probe)s AND NOT active AND slot_name <> %(slot)s) AS leftover,
       (SELECT to_jsonb(s) FROM pg_replication_slots s WHERE slot_name = %(slot)s) AS slot,
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE
            (SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = %(slot)s) END
            ::int8 AS retained
"""
_RIGHTS = """
SELECT c.oid::int8 AS oid, has_schema_privilege(c.relnamespace, 'USAGE') AS enters,
       has_table_privilege(c.oid, 'SELECT') AS reads, row_security_active(c.oid) AS hidden,
       pg_has_role(c.relowner, 'USAGE') AS owns, pg_get_userbyid(c.relowner)::text AS owner
  FROM pg_class c WHERE c.oid = ANY(%s)
"""
_ROOTS = """
SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't' ORDER BY 1, 2
"""
# Indexes by which a table's rows can be told apart: unique at once, of all rows, of columns that are never NULL.
_FITTING = """
SELECT x.indrelid::int8, min(i.relname) FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
 WHERE x.indrelid = ANY(%s) AND x.indisunique AND x.indimmediate AND x.indisvalid AND x.indpred IS NULL
   AND x.indexprs IS NULL AND NOT EXISTS (
       SELECT 1 FROM unnest(x.indkey::int2[]) WITH ORDINALITY k (attnum, ord)
         JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
        WHERE k.ord <= x.indnkeyatts AND NOT a.attnotnull)
 GROUP BY x.indrelid
"""


class Answer(NamedTuple):
    """All that one connection was told."""

    database: Database
    tables: Tables
    clock: Reading


async def ask(config: Config) -> Answer:
    """What PostgreSQL says of itself and of the published tables.

    Raises:
        Unavailable: it is away. ServerRefused: it does not let the bridge in.
    """
    async with connection.connect(config.source.dsn) as sql:
        server = await slot.about(sql)
        async with sql.cursor(row_factory=dict_row) as cursor:
            began = time.time()
            await cursor.execute(_DATABASE, {"slot": config.source.slot, "probe": PROBES})
            row = await cursor.fetchone()
        assert row is not None
        clock = read_at(began, row.pop("now").timestamp(), time.time())
        found, retained = row.pop("slot"), row.pop("retained")
        row["keep"] = row["keep"] * (1 << 20) if row["keep"] is not None and row["keep"] > 0 else row["keep"]
        row["idle"] = _seconds(row["idle"]) if row["idle"] else 0.0
        database = Database(
            server=server,
            slot=_slot(found, int(retained or 0)) if found else None,
            greeted=sql.info.backend_pid,
            **row,
        )
        return Answer(database, await _tables(sql, config.source), clock)


async def ask_tables(config: Config) -> Tables:
    """What PostgreSQL says of the published tables alone. Raises as `ask` does."""
    async with connection.connect(config.source.dsn) as sql:
        return await _tables(sql, config.source)


def _slot(row: dict[str, Any], retained: int) -> SlotRow:
    return SlotRow(
        plugin=row["plugin"] or "",
        database=row["database"] or "",
        active=row["active"],
        wal_status=row.get("wal_status") or "",
        retained=max(retained, 0),
        safe=row.get("safe_wal_size"),
        failover=row.get("failover"),
        reason=row.get("invalidation_reason") or "",
        logical=row["slot_type"] == "logical",
    )


def _seconds(text: str) -> float:
    """A setting with its unit, as in 5min, in seconds."""
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * UNITS.get(unit, 1.0)


async def _tables(sql: psycopg.AsyncConnection[Any], source: Source) -> Tables:
    catalog = Catalog(sql, source)
    refused: ServerRefused | None = None
    try:
        chosen = await catalog.published()
    except ServerRefused as error:
        refused = error
        chosen = [r for r in await catalog.all() if r.kind == "r" and catalog.filter.matches(*r.root)]
    oids = [table.oid for table in chosen]
    lacking = [table.oid for table in chosen if not table.key and table.identity != "f"]
    try:
        async with sql.cursor(row_factory=class_row(Rights)) as cursor:
            await cursor.execute(_RIGHTS, [oids])
            rights = {found.oid: found for found in await cursor.fetchall()}
        indexes = await (await sql.execute(_FITTING, [lacking])).fetchall()
        roots = await (await sql.execute(_ROOTS)).fetchall()
    except psycopg.Error as error:
        raise connection.refusal(error, "reading the catalogue") from None
    return Tables(
        chosen=chosen,
        roots=[(schema, table) for schema, table in roots],
        unlogged=await catalog.unlogged(),
        rights=rights,
        indexes=dict(indexes),
        absent=(refused.what, refused.remedy) if refused is not None else None,
    )


async def try_plugin(config: Config) -> Plugin:
    """Try wal2json on a slot that is gone at once, with the option by which NaN and infinities arrive.

    A slot waits for the transactions that are open: then there is no telling.
    """
    name = f"{PROBE}{secrets.token_hex(4)}"
    timeout: float | None = None
    with anyio.move_on_after(PROBE_SECONDS):
        try:
            async with connection.connect(config.source.dsn, replication=True) as replication:
                shown = await connection.query(replication.pgconn, "SHOW wal_sender_timeout")
                timeout = _seconds(shown[0]["wal_sender_timeout"] or "0")
                made = f"CREATE_REPLICATION_SLOT {name} TEMPORARY LOGICAL {slot.PLUGIN} NOEXPORT_SNAPSHOT"
                try:
                    await connection.query(replication.pgconn, made)
                except CommandError as error:
                    return _refused(error, timeout)
                try:
                    await slot.start(replication.pgconn, name, wal2json.OPTIONS | {wal2json.NUMERIC_AS_STRING: "1"})
                except CommandError as error:
                    if wal2json.NUMERIC_AS_STRING in error.message:
                        return Plugin(exact=False, sender_timeout=timeout)
                    return Plugin(why=error.message[:200], sender_timeout=timeout)
                return Plugin(exact=True, sender_timeout=timeout)
        except BridgeError as error:
            return Plugin(why=error.what, sender_timeout=timeout)
    return Plugin(
        why=f"no slot within {PROBE_SECONDS:g} s; PostgreSQL waits for the transactions that are open",
        sender_timeout=timeout,
    )


def _refused(error: CommandError, timeout: float | None) -> Plugin:
    """Why no slot could be made: for want of the plugin, or for another reason that has a finding of its own."""
    meant = connection.server_error(error.sqlstate, error.message, "a slot with wal2json")
    if error.sqlstate == "58P01" or "output plugin" in error.message:
        return Plugin(refused=meant.what, remedy=meant.remedy, sender_timeout=timeout)
    return Plugin(why=error.message[:200], sender_timeout=timeout)
