"""What `bridge check` says of the published tables: what PostgreSQL does not log, and what wal2json cannot tell.

Source: PostgreSQL documentation, "Replica Identity"; wal2json's option `numeric-data-types-as-string` (2.6).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Literal

import anyio
import msgspec
import psycopg

from bridge.config import Config, Source, join_name
from bridge.source import connection, slot, wal2json
from bridge.source.catalog import Catalog, Relation, quote_name
from bridge.source.connection import CommandError
from bridge.source.leaving import astray, leaving, section
from bridge.source.values import FLOAT4, FLOAT8, NUMERIC

PROBE_SECONDS = 5.0

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


class Finding(msgspec.Struct, frozen=True):
    """One thing that was seen: why it matters, and what to do about it. `about` is the table that it concerns."""

    level: Literal["error", "warning"]
    about: str
    what: str
    why: str
    next: str


class Checked(msgspec.Struct, frozen=True):
    """All findings, and how many tables were looked at. exact: whether wal2json tells NaN and infinities; None where
    that could not be tried out."""

    tables: int
    exact: bool | None
    findings: list[Finding]


async def check(config: Config) -> Checked:
    """Look at the published tables.

    Raises:
        Unavailable: PostgreSQL is away. ServerRefused: it does not let the bridge in, or is not set up for it.
    """
    dsn = config.source.dsn
    async with connection.connect(dsn) as sql:
        await slot.inspect(sql)
        tables = await Catalog(sql, config.source).published()
        lacking = [table for table in tables if not table.key and table.identity != "f"]
        try:
            cursor = await sql.execute(_FITTING, [[table.oid for table in lacking]])
            indexes = dict(await cursor.fetchall())
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the catalogue") from None
    exact = await _is_exact(dsn)
    found = [unlogged(table, config.source, indexes.get(table.oid, "")) for table in lacking]
    found += [] if exact is not False else inexact(tables, config.source)
    found += [
        Finding(
            "warning",
            name,
            f"[source.table.{name!r}] is of no published table",
            "what it chooses counts for none: what may not leave does, if it is meant for a table of another name",
            "correct the name, as written in the catalogue, or take it out",
        )
        for name in astray(config.source, tables)
    ]
    return Checked(len(tables), exact, found + missing(tables, config.source))


async def _is_exact(dsn: str) -> bool | None:
    """Whether wal2json knows the option by which NaN and infinities arrive, tried on a slot that is gone at once.

    A slot waits for the transactions that are open: then there is no telling.
    """
    name = f"bridge_check_{secrets.token_hex(4)}"
    with anyio.move_on_after(PROBE_SECONDS):
        async with connection.connect(dsn, replication=True) as replication:
            made = f"CREATE_REPLICATION_SLOT {name} TEMPORARY LOGICAL {slot.PLUGIN} NOEXPORT_SNAPSHOT"
            try:
                await connection.query(replication.pgconn, made)
                await slot.start(replication.pgconn, name, wal2json.OPTIONS | {wal2json.NUMERIC_AS_STRING: "1"})
            except CommandError as error:
                return False if wal2json.NUMERIC_AS_STRING in error.message else None
            return True
    return None


def unlogged(table: Relation, source: Source, index: str = "") -> Finding:
    """A table of whose updates and deletes PostgreSQL logs nothing.

    Args:
        index: one by which its rows can be told apart, where there is one.
    """
    stops = (section(source, table.root).on_missing_identity or source.on_missing_identity) == "stop"
    name = table.quoted
    remedies = [f"ALTER TABLE {name} REPLICA IDENTITY FULL"]
    if index:
        remedies.insert(0, f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {quote_name(index)}")
    elif table.identity == "d":
        remedies.append("give it a primary key")
    return Finding(
        "error" if stops else "warning",
        join_name(table.schema, table.table),
        "no replica identity: its updates and deletes are not in PostgreSQL's log",
        "the bridge stops at the first one" if stops else "they are counted and shown, and are not in the log",
        "; or ".join(remedies),
    )


def inexact(tables: Iterable[Relation], source: Source) -> list[Finding]:
    """The columns whose NaN and infinities an older wal2json gives as null."""
    found = []
    for table in tables:
        hidden = leaving(source, table.root).hidden(column.name for column in table.columns)
        columns = [c.name for c in table.columns if c.oid in (FLOAT4, FLOAT8, NUMERIC) and c.name not in hidden]
        if columns:
            found.append(
                Finding(
                    "warning",
                    join_name(table.schema, table.table),
                    f"NaN and infinities of {', '.join(columns)} arrive as null",
                    "the installed wal2json cannot tell them; rows that a snapshot reads have them",
                    "install wal2json 2.6 or newer",
                )
            )
    return found


def missing(tables: Iterable[Relation], source: Source) -> list[Finding]:
    """The columns that are named and not there: one that was renamed may be published under its new name."""
    columns: dict[tuple[str, str], set[str]] = {}
    for table in tables:
        columns.setdefault(table.root, set()).update(column.name for column in table.columns)
    found = []
    for root, there in columns.items():
        gone = sorted(leaving(source, root).named - there)
        if gone:
            found.append(
                Finding(
                    "warning",
                    join_name(*root),
                    f"there is no column {', '.join(gone)}",
                    f'[source.table."{join_name(*root)}"] names it; it may have another name by now',
                    f'correct columns, exclude and mask of [source.table."{join_name(*root)}"]',
                )
            )
    return found
