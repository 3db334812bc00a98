"""Rows of one table, a chunk at a time by its key, each with the snapshot that it was read with.

    BEGIN (repeatable read), LOCK (fixes no snapshot yet), the snapshot S, the rows behind a key, the WAL's end H, end

Whatever S shows was committed before H in the WAL. Nothing is written, and no transaction is longer than a chunk. Names
and columns are those of the catalogue as S shows it.

Source: PostgreSQL documentation, "Transaction Isolation", "System Information Functions" (txid_current_snapshot,
pg_current_wal_insert_lsn).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import anyio.lowlevel
import msgspec
import psycopg
from psycopg import pq

from bridge.errors import BridgeError, ServerRefused, Unavailable
from bridge.source import connection, rows, unreadable
from bridge.source.altering import Snapshot
from bridge.source.catalog import Catalog, Relation, quote_name
from bridge.source.connection import CommandError, CopyReader, Notice
from bridge.source.rows import Plan

# What passes by itself: a cancelled query, a lock or statement that took too long, a deadlock, a snapshot too old.
PASSING = ("57014", "55P03", "40P01", "40001", "72000")

AT_ONCE = 64 << 10
# Types whose JSON is what PostgreSQL reads.
_PLAIN = {16, 18, 19, 20, 21, 23, 25, 26, 1042, 1043, 1700, 2950}
_NAME = """
SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = %s
"""
# It must not wait for a standby that is away.
_NUDGE = "SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'bridge', '')"
_WIDTH = """
SELECT CASE WHEN reltuples > 0 THEN pg_table_size(oid) / reltuples ELSE 0 END::float8 FROM pg_class WHERE oid = %s
"""


class Gone(ServerRefused):
    """The table is not there any more."""


class Passing(Unavailable):
    """The chunk could not be read now: it was cancelled, or a lock could not be had."""


class Chunk(NamedTuple):
    """What one transaction read.

    rows: the `read` events, still without what they close with, by their keys as JSON; after: the last row's key as
    PostgreSQL's text, empty where there was none; high: H; whole: whether nothing is left behind it; size: of the rows
    in bytes; seconds: how long it took.
    """

    plan: Plan
    snapshot: Snapshot
    rows: dict[bytes, bytes]
    after: list[str]
    high: int
    whole: bool
    size: int
    seconds: float


class Where(NamedTuple):
    """Which rows: those behind a key (its values as text), or those with one of these keys; at most `limit`."""

    after: Sequence[str] = ()
    among: Sequence[Sequence[str]] = ()
    condition: str = ""
    limit: int = 0


Planned = Callable[[Relation], Awaitable[Plan]]


async def leaves(catalog: Catalog, schema: str, table: str) -> list[Relation]:
    """The tables that hold a table's rows: itself, or its partitions, in the order of their oids.

    Raises:
        Gone: there is no such table.
    """
    found = [r for r in await catalog.all() if r.kind == "r" and r.root == (schema, table)]
    if not found and await catalog.relation(schema, table) is None:
        raise Gone(f"the table {schema}.{table} does not exist (any more)", "name one that does")
    return sorted(found, key=lambda relation: relation.oid)


async def read(sql: psycopg.AsyncConnection[Any], catalog: Catalog, oid: int, planned: Planned, where: Where) -> Chunk:
    """Read one chunk of the table with that oid.

    Args:
        planned: the plan of the relation as the chunk's snapshot shows it.

    Raises:
        Gone: the table was dropped. Passing: try again. ServerRefused: it may not be read, or has no key.
        BadRecord: a row holds what is no valid text. Unavailable: the connection is gone.
    """
    began = time.monotonic()
    try:
        row = await (await sql.execute(_NAME, (oid,))).fetchone()
        if row is None:
            raise Gone("the table was dropped", "name one that is there")
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            # Before anything is read: a table that is being rewritten would be shown as it was, empty.
            await sql.execute(f"LOCK TABLE ONLY {row[0]} IN ACCESS SHARE MODE")
            return await _chunk(sql, catalog, oid, planned, where, began)
        finally:
            if sql.pgconn.status == pq.ConnStatus.OK:
                await sql.execute("ROLLBACK")
    except psycopg.Error as error:
        raise _refusal(error.sqlstate or "", error) from None


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


def texts(key: bytes, names: Sequence[str]) -> list[str] | None:
    """A key's values, of JSON, as PostgreSQL reads them; None where the key has other columns by now."""
    found = msgspec.json.decode(key, type=dict[str, msgspec.Raw])
    if found.keys() != set(names):
        return None
    values = [bytes(found[name]) for name in names]
    return [msgspec.json.decode(v, type=str) if v.startswith(b'"') else v.decode() for v in values]


def refuse_keyless(name: str, key: Sequence[str]) -> None:
    """Raise ServerRefused where nothing tells a table's rows apart."""
    if not key:
        raise ServerRefused(
            f"{name} has no key by which its rows could be read in parts",
            "give it a primary key; or read everything anew: stop the bridge, `bridge drop --stream --state`, start it",
        )


def _refusal(state: str, error: Exception) -> BridgeError:
    if state in PASSING:
        return Passing(f"a chunk could not be read ({str(error).splitlines()[0][:200]})", "trying again")
    if state in ("42P01", "3F000"):
        return Gone("the table was dropped or renamed", "name one that is there")
    return connection.refusal(error, "reading a chunk")


async def _chunk(
    sql: psycopg.AsyncConnection[Any], catalog: Catalog, oid: int, planned: Planned, where: Where, began: float
) -> Chunk:
    shown = await (await sql.execute("SELECT txid_current_snapshot()::text")).fetchone()
    found = await catalog.relations(sql, "c.oid = %s", (oid,))
    if not found or shown is None:
        raise Gone("the table was dropped", "name one that is there")
    plan = await planned(found[0])
    refuse_keyless(plan.name, plan.key)
    reader = rows.Reader(plan, b"")
    read = await _copy(sql, plan, reader, _statement(sql, plan, reader, where))
    high = await _end(sql)
    whole = not where.limit or len(read.rows) < where.limit
    return Chunk(
        plan, Snapshot.parse(shown[0]), read.rows, read.after, high, whole,
        sum(map(len, read.rows.values())), time.monotonic() - began,
    )  # fmt: skip


def _statement(sql: psycopg.AsyncConnection[Any], plan: Plan, reader: rows.Reader, where: Where) -> bytes:
    types = {column.name: column.type for column in plan.relation.columns}
    names = ", ".join(quote_name(name) for name in plan.key)

    def values(texts: Sequence[str]) -> str:
        escaping = pq.Escaping(sql.pgconn)
        literals = [escaping.escape_literal(text.encode()).decode() for text in texts]
        pairs = zip(literals, plan.key, strict=True)
        return "(" + ", ".join(f"{literal}::{types[name]}" for literal, name in pairs) + ")"

    conditions = [f"({where.condition})"] if where.condition else []
    if where.after:
        conditions.append(f"({names}) > {values(where.after)}")
    if where.among:
        conditions.append(f"({names}) IN ({', '.join(values(one) for one in where.among)})")
    chosen = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    limit = f" LIMIT {where.limit}" if where.limit else ""
    name = f"{quote_name(plan.relation.schema)}.{quote_name(plan.relation.table)}"
    return f"COPY (SELECT {reader.columns} FROM ONLY {name}{chosen} ORDER BY {names}{limit}) TO STDOUT".encode()


class _Read(NamedTuple):
    rows: dict[bytes, bytes]
    after: list[str]


async def _copy(sql: psycopg.AsyncConnection[Any], plan: Plan, reader: rows.Reader, statement: bytes) -> _Read:
    pgconn, made, last = sql.pgconn, dict[bytes, bytes](), b""
    try:
        for result in await connection.command(pgconn, statement):
            connection.check(pgconn, result)
        copy = CopyReader(pgconn, limit=AT_ONCE)
        try:
            while taken := await copy.take():
                try:
                    for line in taken:
                        if not isinstance(line, Notice):
                            last = bytes(line)
                            payload = reader.payload(last)
                            made[reader.key(payload)] = payload
                except unreadable.ERRORS:
                    raise unreadable.row(plan, last) from None
                # What streams meanwhile must not wait for more than these.
                await anyio.lowlevel.checkpoint()
        finally:
            copy.close()
        await connection.finish(pgconn)
    except CommandError as error:
        if error.sqlstate in PASSING:
            raise Passing(f"reading {plan.name} was interrupted ({error.message[:200]})", "trying again") from None
        raise connection.server_error(error.sqlstate, error.message, f"reading {plan.name}") from None
    return _Read(made, reader.texts(last) if last else [])
