"""What an exported snapshot shows of tables, in ranges of ctid: which ranges there are, and a transaction for each.

    BEGIN (repeatable read), the exported snapshot, LOCK, is it the same file still, COPY of the range, COMMIT

A large table is read in several ranges, by several connections. The last range has no end: rows lie in it that came
since it was measured. Each range has a transaction of its own, so that nobody who alters a table waits for the whole of
it; what was rewritten or truncated between two ranges looks empty to the snapshot, and is told by its other file.

Source: PostgreSQL documentation, "SET TRANSACTION", "System Columns" (ctid), "Database File Layout".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import psycopg

from bridge.errors import Unavailable
from bridge.source import connection
from bridge.source.catalog import Relation

# Of blocks, 32 MB as PostgreSQL is usually built: a few seconds' reading.
RANGE = 4096
# Before PostgreSQL 14 a range of ctid was looked for in the whole table.
RANGES_SINCE = 140000

_BLOCKS = """
SELECT oid::int8, coalesce(pg_relation_size(oid), 0) / current_setting('block_size')::int8
  FROM unnest(%s::oid[]) AS oid
"""
# The name may be another table's by now, the file another one's.
_SAME = "SELECT relfilenode = pg_relation_filenode(oid) AND to_regclass(%s) = oid FROM pg_class WHERE oid = %s"


class Moved(Unavailable):
    """A table was rewritten, truncated or dropped after the snapshot was exported: not all of its rows can be seen."""


class Part(NamedTuple):
    """The rows of a table in its blocks from `low` on, up to before `high`; to its end where that is None."""

    relation: Relation
    low: int = 0
    high: int | None = None

    def statement(self, columns: str) -> bytes:
        """The COPY of its rows; to be executed within `begun`."""
        limits = [f"ctid >= '({self.low},0)'::tid"] if self.low else []
        if self.high is not None:
            limits.append(f"ctid < '({self.high},0)'::tid")
        chosen = f" WHERE {' AND '.join(limits)}" if limits else ""
        return f"COPY (SELECT {columns} FROM ONLY {self.relation.quoted}{chosen}) TO STDOUT".encode()


async def parts(sql: psycopg.AsyncConnection[Any], relations: list[Relation]) -> list[Part]:
    """The ranges of tables, in their order. A table without a key is one: it could not be read again by itself, were it
    rewritten between two ranges."""
    try:
        cursor = await sql.execute(_BLOCKS, ([relation.oid for relation in relations],))
        blocks: dict[int, int] = dict(await cursor.fetchall())
    except psycopg.Error as error:
        raise connection.refusal(error, "looking at the sizes of tables") from None
    found: list[Part] = []
    for relation in relations:
        single = not relation.key or sql.pgconn.server_version < RANGES_SINCE
        count = 1 if single else max(math.ceil(blocks.get(relation.oid, 0) / RANGE), 1)
        found += [Part(relation, n * RANGE, (n + 1) * RANGE if n + 1 < count else None) for n in range(count)]
    return found


async def adopt(sql: psycopg.AsyncConnection[Any], snapshot: str) -> None:
    """Begin a transaction that sees what the exported snapshot shows.

    Raises:
        Unavailable: the snapshot is gone. psycopg.Error: whatever else PostgreSQL says.
    """
    try:
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await sql.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
    except (psycopg.errors.InvalidParameterValue, psycopg.errors.ObjectNotInPrerequisiteState):
        raise Unavailable(
            "the exported snapshot is gone with its connection", "the snapshot is taken up again"
        ) from None


async def begin(sql: psycopg.AsyncConnection[Any], snapshot: str, relation: Relation) -> None:
    """Begin a transaction that sees what the exported snapshot shows, with the table locked against being rewritten.

    Raises:
        Moved: the table is another one by now. Unavailable: the snapshot or PostgreSQL is gone.
        ServerRefused: the table may not be read.
    """
    try:
        await adopt(sql, snapshot)
        await sql.execute(f"LOCK TABLE ONLY {relation.quoted} IN ACCESS SHARE MODE")
        row = await (await sql.execute(_SAME, (relation.quoted, relation.oid))).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        row = None
    except psycopg.Error as error:
        raise connection.refusal(error, f"reading {relation.name}") from None
    if row is None or not row[0]:
        raise moved(relation.name)


def moved(name: str, what: str = "was rewritten, truncated, renamed or dropped") -> Moved:
    """The error for a table that is not as the snapshot shows it."""
    return Moved(f"{name} {what} after the snapshot was taken", "it is read again")
