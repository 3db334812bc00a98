"""Rows of one table, a chunk at a time by its key, each with the snapshot that it was read with.

    BEGIN (repeatable read), LOCK (fixes no snapshot yet), the snapshot S, the rows behind a key, the WAL's end H, end

Whatever S shows was committed before H in the WAL. Nothing is written, and no transaction is longer than a chunk. Names
and columns are those of the catalogue as S shows it. The rows come in the order of the key's index, with its collations
and operators: another order would cost a sort of the whole table for each chunk.

Source: PostgreSQL documentation, "Transaction Isolation", "System Information Functions" (txid_current_snapshot,
pg_current_wal_insert_lsn), pg_index, pg_amop; nodes of PostgreSQL that need no snapshot: PlannedStmtRequiresSnapshot.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from shlex import quote as typed
from typing import Any, NamedTuple

import anyio.lowlevel
import msgspec
import psycopg
from psycopg import pq

from bridge.config import join_name
from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.source import connection, rows, unreadable
from bridge.source.altering import Snapshot
from bridge.source.catalog import Catalog, Relation, quote_name
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.rows import Plan

# What passes by itself: a cancelled query, a lock or statement that took too long, a deadlock, a snapshot too old; no
# memory, disk or connection left.
PASSING = ("57014", "55P03", "40P01", "40001", "72000", "53")
CANCELLED = "57014"
# Errors about values quote them.
ABOUT_VALUES = ("22", "23")
ABOUT_CONDITIONS = ("22", "42")
NOT_ALLOWED = "42501"
SYNTAX = "42601"

AT_ONCE = 64 << 10
# So many bytes of rows are held at a time, and one row more.
MOST_BYTES = 16 << 20
# How long a chunk waits for its table's lock before that is said.
LOCK_MS = 5_000
# Types whose JSON is what PostgreSQL reads.
_PLAIN = {16, 18, 19, 20, 21, 23, 25, 26, 1042, 1043, 1700, 2950}
_NAME = """
SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = %s
"""
# It must not wait for a standby that is away.
_NUDGE = "SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'bridge', '')"
_WIDTH = """
SELECT CASE WHEN reltuples > 0 THEN coalesce(pg_table_size(oid), 0) / reltuples ELSE 0 END::float8
  FROM pg_class WHERE oid = %s
"""
# Of each column of the key's index: its type, of a domain the one that it is of (rows need not fulfil what the domain
# demands today); its collation where the index has another than the column; the schema of its "greater than" where the
# search path does not lead there.
_ORDER = """
SELECT a.attname::text,
       (WITH RECURSIVE based (type, modifier) AS (
            SELECT a.atttypid, a.atttypmod
            UNION ALL
            SELECT t.typbasetype, t.typtypmod FROM based JOIN pg_type t ON t.oid = type WHERE t.typtype = 'd'
        ) SELECT format_type(type, modifier) FROM based JOIN pg_type t ON t.oid = type WHERE t.typtype <> 'd'),
       CASE WHEN i.indcollation[k.place] NOT IN (0, a.attcollation)
            THEN (SELECT quote_ident(n.nspname) || '.' || quote_ident(c.collname)
                    FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
                   WHERE c.oid = i.indcollation[k.place]) ELSE '' END,
       coalesce((SELECT n.nspname::text FROM pg_opclass o JOIN pg_amop m ON m.amopfamily = o.opcfamily
                   AND m.amoplefttype = o.opcintype AND m.amoprighttype = o.opcintype AND m.amopstrategy = 5
                   JOIN pg_operator p ON p.oid = m.amopopr JOIN pg_namespace n ON n.oid = p.oprnamespace
                  WHERE o.oid = i.indclass[k.place] AND NOT pg_operator_is_visible(p.oid)), '')
  FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
       AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END
  CROSS JOIN LATERAL (SELECT attnum, (ord - 1)::int AS place
                        FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(attnum, ord)) k
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
 WHERE c.oid = %s AND k.place < i.indnkeyatts ORDER BY k.place
"""
_PATH = """
SELECT set_config('search_path', (SELECT string_agg(quote_ident(s), ', ')
                                    FROM unnest(current_schemas(false)::text[] || %s::text[]) s), true)
"""
_LOCKERS = """
SELECT coalesce(string_agg(DISTINCT pid::text, ', '), '') FROM pg_locks
 WHERE relation = %s AND granted AND mode = 'AccessExclusiveLock'
"""


class Gone(ServerRefused):
    """The table is not there any more."""


class Passing(Unavailable):
    """The chunk could not be read now: it was cancelled, or a lock could not be had. `long`: it took too long."""

    long = False


class Reordered(Unavailable):
    """The key's columns are others, or in another order, than those behind which the chunk was to begin."""


class Order(NamedTuple):
    """How a key's index sorts: its columns, their types, and the collations of those that have another there, else
    empty."""

    names: list[str]
    types: list[str]
    collations: list[str]


class Chunk(NamedTuple):
    """What one transaction read.

    rows: the `read` events, still without what they close with, by their keys as JSON; key: the key's columns, in their
    index' order; after: the last row's values of them as PostgreSQL's text, empty where there was none; high: H; whole:
    whether nothing is left behind it; size: of the rows in bytes; seconds: how long it took.
    """

    plan: Plan
    snapshot: Snapshot
    rows: dict[bytes, bytes]
    key: list[str]
    after: list[str]
    high: int
    whole: bool
    size: int
    seconds: float


class Where(NamedTuple):
    """Which rows: those behind the values `after` of the columns `key`, and those with one of the keys `among` (each by
    column), all of them as text; at most `limit`."""

    key: Sequence[str] = ()
    after: Sequence[str] = ()
    among: Sequence[Mapping[str, str]] = ()
    condition: str = ""
    limit: int = 0


Planned = Callable[[Relation], Awaitable[Plan]]


async def leaves(catalog: Catalog, schema: str, table: str) -> list[Relation]:
    """The tables that hold a table's rows: itself, or its partitions, in the order of their oids.

    Raises:
        Gone: there is no such table. ServerRefused: there is, but what changes in it is in no log.
    """
    found = [r for r in await catalog.all() if r.kind == "r" and r.root == (schema, table)]
    if not found:
        await _refuse_unlogged(catalog, schema, table)
    return sorted(found, key=lambda relation: relation.oid)


async def _refuse_unlogged(catalog: Catalog, schema: str, table: str) -> None:
    """A partitioned table may have no partitions; whatever else holds no rows that are logged is not to be read."""
    relation, name = await catalog.relation(schema, table), join_name(schema, table)
    if relation is None:
        raise Gone(f"the table {name} does not exist (any more)", "name one that does")
    if relation.is_partition:
        root = join_name(*relation.root)
        raise Gone(f"{name} is a partition of {root} now", f"name {root}: its rows are read with that")
    if relation.kind == "r":
        raise ServerRefused(
            f"{name} is not logged (UNLOGGED): no change of it reaches the log",
            f"ALTER TABLE {name} SET LOGGED; then: bridge snapshot {typed(name)} --resume",
        )
    if relation.kind != "p":
        raise Gone(f"{name} is no table any more", "name one that is")


async def read(sql: psycopg.AsyncConnection[Any], catalog: Catalog, oid: int, planned: Planned, where: Where) -> Chunk:
    """Read one chunk of the table with that oid.

    Args:
        planned: the plan of the relation as the chunk's snapshot shows it.

    Raises:
        Gone: the table was dropped. Passing: try again. ServerRefused: it may not be read, or has no key.
        Reordered: `where` begins behind a key that has other columns by now.
        BadRecord: a row holds what is no valid text. Unavailable: the connection is gone.
    """
    began, name = time.monotonic(), "a chunk"
    try:
        row = await (await sql.execute(_NAME, (oid,))).fetchone()
        if row is None:
            raise Gone("the table was dropped", "name one that is there")
        name = row[0]
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            await _lock(sql, oid, name)
            return await _chunk(sql, catalog, oid, planned, where, began)
        finally:
            # Of a COPY that was not read to its end the connection is of no more use: it would hide why.
            active = sql.pgconn.transaction_status == pq.TransactionStatus.ACTIVE
            if sql.pgconn.status == pq.ConnStatus.OK and not active:
                await sql.execute("ROLLBACK")
    except psycopg.Error as error:
        raise _refusal(error, name) from None


async def _lock(sql: psycopg.AsyncConnection[Any], oid: int, name: str) -> None:
    """Before anything is read: a table that is being rewritten would be shown as it was, empty."""
    await sql.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
    try:
        await sql.execute(f"LOCK TABLE ONLY {name} IN ACCESS SHARE MODE")
    except psycopg.errors.LockNotAvailable:
        await sql.execute("ROLLBACK")
        row = await (await sql.execute(_LOCKERS, (oid,))).fetchone()
        pids = f" by {row[0]}" if row is not None and row[0] else ""
        raise Passing(f"{name} is locked (ACCESS EXCLUSIVE{pids})", "see pg_stat_activity for these pids") from None
    await sql.execute("SET LOCAL lock_timeout = 0")


async def width(sql: psycopg.AsyncConnection[Any], oid: int) -> float:
    """About how many bytes a row has; 0 where that is not known."""
    row = await (await sql.execute(_WIDTH, (oid,))).fetchone()
    return float(row[0]) if row is not None else 0.0


async def end(sql: psycopg.AsyncConnection[Any]) -> int:
    """The WAL's end as it is now; what was to be seen before is in front of it."""
    try:
        return await _end(sql)
    except psycopg.Error as error:
        raise connection.refusal(error, "asking for the WAL's end") from None


async def _end(sql: psycopg.AsyncConnection[Any]) -> int:
    row = await (await sql.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")).fetchone()
    assert row is not None
    return int(row[0])


async def nudge(sql: psycopg.AsyncConnection[Any]) -> None:
    """Write a commit record of no change, which the stream can pass: on an idle server it would wait for the next."""
    try:
        await sql.execute(_NUDGE)
    except psycopg.Error as error:
        raise connection.refusal(error, "writing an empty transaction") from None


def plain(part: Relation) -> bool:
    """Whether rows can be asked for by their keys as JSON; else they must be looked for among all rows."""
    types = {column.name: column.oid for column in part.columns}
    return all(types.get(name) in _PLAIN for name in part.key)


def texts(key: bytes, names: Sequence[str]) -> dict[str, str] | None:
    """A key's values, of JSON, as PostgreSQL reads them; None where the key has other columns by now, or a value that
    wal2json cannot say (NaN, before 2.6): no key is null."""
    found = {name: bytes(value) for name, value in msgspec.json.decode(key, type=dict[str, msgspec.Raw]).items()}
    if found.keys() != set(names) or b"null" in found.values():
        return None
    return {n: msgspec.json.decode(v, type=str) if v.startswith(b'"') else v.decode() for n, v in found.items()}


def refuse_keyless(name: str, key: Sequence[str]) -> None:
    """Raise ServerRefused where nothing tells a table's rows apart."""
    if not key:
        raise ServerRefused(
            f"{name} has no key by which its rows could be read in parts",
            "give it a primary key; or read everything anew: stop the bridge, `bridge drop --stream --state`, start it",
        )


def _refusal(error: psycopg.Error, name: str) -> BridgeError:
    state = error.sqlstate or ""
    if state in ("42P01", "3F000"):
        return Gone("the table was dropped or renamed", "name one that is there")
    return _passing(state, str(error).splitlines()[0], name) or connection.refusal(error, f"reading {name}")


def _passing(state: str, message: str, what: str) -> Passing | None:
    if not state.startswith(PASSING):
        return None
    found = Passing(f"reading {what} was interrupted ({message[:200]}, SQLSTATE {state})", "trying again")
    found.long = state == CANCELLED
    return found


async def _chunk(
    sql: psycopg.AsyncConnection[Any], catalog: Catalog, oid: int, planned: Planned, where: Where, began: float
) -> Chunk:
    shown = await (await sql.execute("SELECT txid_current_snapshot()::text")).fetchone()
    order = await _order(sql, oid)
    found = await catalog.relations(sql, "c.oid = %s", (oid,))
    if not found or shown is None:
        raise Gone("the table was dropped", "name one that is there")
    plan = await planned(found[0])
    refuse_keyless(plan.name, plan.key)
    if where.after and list(where.key) != order.names:
        raise Reordered(f"the key of {plan.name} was altered", "reading it from its beginning")
    reader = rows.Reader(plan, b"")
    read = await _copy(sql, plan, reader, order, where)
    if read.cut:
        # The transaction has ended with that; any later end of the WAL will do.
        await sql.execute("ROLLBACK")
    high = await _end(sql)
    whole = not read.cut and (not where.limit or read.lines < where.limit)
    after = [dict(zip(plan.key, read.last, strict=True))[name] for name in order.names] if read.last else []
    return Chunk(
        plan, Snapshot.parse(shown[0]), read.rows, order.names, after, high, whole, read.size, time.monotonic() - began
    )


async def _order(sql: psycopg.AsyncConnection[Any], oid: int) -> Order:
    """How the key's index sorts, with its operators in the search path."""
    found = await (await sql.execute(_ORDER, (oid,))).fetchall()
    hidden = sorted({schema for *_, schema in found if schema})
    if hidden:
        await sql.execute(_PATH, (hidden,))
    names, types, collations = ([row[place] for row in found] for place in range(3))
    return Order(names, types, collations)


def _statement(sql: psycopg.AsyncConnection[Any], plan: Plan, reader: rows.Reader, order: Order, where: Where) -> bytes:
    names = ", ".join(quote_name(name) for name in order.names)
    sorts = ", ".join(
        quote_name(name) + (f" COLLATE {collation}" if collation else "")
        for name, collation in zip(order.names, order.collations, strict=True)
    )

    def values(texts: Sequence[str]) -> str:
        escaping = pq.Escaping(sql.pgconn)
        literals = [escaping.escape_literal(text.encode()).decode() for text in texts]
        pairs = zip(literals, order.types, strict=True)
        return "(" + ", ".join(f"{literal}::{kind}" for literal, kind in pairs) + ")"

    # On lines of its own: it may end with a comment.
    conditions = [f"(\n{where.condition}\n)"] if where.condition else []
    if where.after:
        conditions.append(f"({sorts}) > {values(where.after)}")
    if where.among:
        among = ", ".join(values([one[name] for name in order.names]) for one in where.among)
        conditions.append(f"({names}) IN ({among})")
    chosen = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    limit = f" LIMIT {where.limit}" if where.limit else ""
    name = plan.relation.quoted
    return f"COPY (SELECT {reader.columns} FROM ONLY {name}{chosen} ORDER BY {sorts}{limit}) TO STDOUT".encode()


class _Read(NamedTuple):
    """`last`: the last row's key as text, in the plan's order; cut: whether there was more than may be held."""

    rows: dict[bytes, bytes]
    last: list[str]
    lines: int
    size: int
    cut: bool


async def _copy(
    sql: psycopg.AsyncConnection[Any], plan: Plan, reader: rows.Reader, order: Order, where: Where
) -> _Read:
    pgconn, made, last = sql.pgconn, dict[bytes, bytes](), b""
    count = size = 0
    statement = _statement(sql, plan, reader, order, where)
    try:
        for result in await connection.command(pgconn, statement, single=True):
            connection.check(pgconn, result)
        copy = CopyReader(pgconn, limit=AT_ONCE)
        try:
            while taken := await copy.take():
                try:
                    for line in taken:
                        if isinstance(line, Notice) or size > MOST_BYTES:
                            continue
                        last = bytes(line)
                        payload = reader.payload(last)
                        made[reader.key(payload)] = payload
                        count, size = count + 1, size + len(payload)
                        if size > MOST_BYTES:
                            await sql.cancel_safe()
                except unreadable.ERRORS:
                    raise unreadable.row(plan, last) from None
                # What streams meanwhile must not wait for more than these.
                await anyio.lowlevel.checkpoint()
        finally:
            copy.close()
        await connection.finish(pgconn)
    except CommandError as error:
        if size <= MOST_BYTES or error.sqlstate != CANCELLED:
            raise _failed(plan, error, where) from None
    return _Read(made, reader.texts(last) if last else [], count, size, cut=size > MOST_BYTES)


def _failed(plan: Plan, error: CommandError, where: Where) -> BridgeError:
    state, message = error.sqlstate, error.message
    passing = _passing(state, message, plan.name)
    if passing is not None:
        return passing
    if state.startswith(ABOUT_VALUES):
        message = "a value does not fit"
    if state == SYNTAX:
        # What stands there may be a literal.
        message = message.split(" at or near ")[0]
    found = connection.server_error(state, message, f"reading {plan.name}")
    if where.condition and state.startswith(ABOUT_CONDITIONS) and state != NOT_ALLOWED:
        return ServerRefused(found.what, "correct --where, and ask again")
    return found
