"""What tells that rows of a table were changed by DDL: files, columns, keys and partitions, of all tables in one query.

PostgreSQL's log has no word of it: a rewritten table only gets another file, a column's default for the rows that are
there stands in the catalogue, a partition comes and goes with its rows. All of it is read with one snapshot, so that
it is known which transactions are in it. pg_relation_filenode() and the like would see later ones.

Whether a table was made as it is shows from which transactions wrote its rows of the catalogue: the hidden columns'
rows in pg_attribute are written when a table is made and never again, its row in pg_type when it is named.

Source: PostgreSQL documentation, "System Catalogs"; commands/tablecmds.c, catalog/heap.c.
"""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg

from bridge.source import connection
from bridge.source.altering import Snapshot
from bridge.source.catalog import ONE, TABLES


class Column(msgspec.Struct, frozen=True, array_like=True):
    """A column: its place in the table, which it keeps under any name; its type by oid, and as `format_type` has it."""

    place: int
    name: str
    oid: int
    type: str


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A table that holds rows: a root table itself, or one of its partitions.

    file: its relfilenode; by: the transaction that wrote its row of pg_class last; link: stands for how it became a
    partition; inplace: whether it was made as one; missing: the columns that rows without them get a value for; made:
    whether columns, key and file are those that it was made with; named: whether name and owner are.
    """

    oid: int
    schema: str
    table: str
    file: int
    by: int
    link: str
    inplace: bool
    key: list[str]
    missing: list[str]
    made: bool
    named: bool = True

    @property
    def name(self) -> str:
        """schema.table, as events name a partition."""
        return f"{self.schema}.{self.table}"


class Today(msgspec.Struct, frozen=True):
    """A root table as the catalogue has it now.

    named: the transaction that gave it its name or its owner; made: whether it and all its parts are as they were made,
    so that whatever has happened to its rows since is in PostgreSQL's log.
    """

    schema: str
    table: str
    oid: int
    named: int
    owner: int
    columns: list[Column]
    parts: list[Part]
    made: bool

    @property
    def root(self) -> tuple[str, str]:
        """(schema, table)."""
        return self.schema, self.table

    @property
    def partitioned(self) -> bool:
        """Whether its rows are in partitions."""
        return [part.oid for part in self.parts] != [self.oid]


# Keys are chosen as in catalog.py. What concerns one table is asked for table by table: the planner cannot know how
# many there are.
_SHAPES = """
WITH RECURSIVE tree AS (
    SELECT c.oid AS top, c.oid, c.relkind AS kind, '' AS link, true AS inplace
      FROM pg_class c WHERE NOT c.relispartition AND {where}
    UNION ALL
    SELECT t.top, c.oid, c.relkind, t.link || i.xmin || ' ', t.inplace AND i.xmin = b.xmin
      FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid
      JOIN pg_class c ON c.oid = i.inhrelid AND c.relispartition AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
      JOIN pg_attribute b ON b.attrelid = c.oid AND b.attnum = -1
     WHERE t.kind = 'p'
), parts AS (
    SELECT t.top, bool_and(t.inplace AND s.made) AS made,
           jsonb_agg(jsonb_build_array(t.oid::int8, s.nspname, s.relname, s.file, s.by, t.link, t.inplace,
                     coalesce(s.key, '[]'), coalesce(s.missing, '[]'), s.made, s.named) ORDER BY t.oid) AS parts
      FROM tree t CROSS JOIN LATERAL (
               SELECT n.nspname, c.relname, c.relfilenode::int8 AS file, c.xmin::text::int8 AS by, k.key, a.missing,
                      coalesce(a.made, true) AND coalesce(k.made, true) AND c.relfilenode = c.oid AS made,
                      y.xmin = b.xmin AS named
                 FROM pg_class c JOIN pg_type y ON y.oid = c.reltype JOIN pg_namespace n ON n.oid = c.relnamespace
                 JOIN pg_attribute b ON b.attrelid = c.oid AND b.attnum = -1
                 CROSS JOIN LATERAL (
                     SELECT bool_and(a.xmin = b.xmin AND NOT a.attisdropped AND NOT a.atthasmissing) AS made,
                            jsonb_agg(a.attname) FILTER (WHERE a.atthasmissing AND NOT a.attisdropped) AS missing
                       FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0) a
                 CROSS JOIN LATERAL (
                     SELECT bool_and(x.xmin = b.xmin) AS made, jsonb_agg(a.attname ORDER BY a.attnum) AS key
                       FROM pg_index x CROSS JOIN unnest(x.indkey::int2[]) WITH ORDINALITY k (attnum, ord)
                       JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
                      WHERE x.indrelid = c.oid AND x.indisvalid AND x.indimmediate AND k.ord <= x.indnkeyatts
                        AND CASE WHEN c.relreplident = 'i' THEN x.indisreplident ELSE x.indisprimary END
                        AND c.relreplident <> 'n') k
                WHERE c.oid = t.oid
                OFFSET 0) s
     WHERE t.kind = 'r'
     GROUP BY t.top
), found AS (
    SELECT c.oid::int8 AS oid, n.nspname, c.relname, y.xmin::text::int8 AS named, c.relowner::int8 AS owner,
           coalesce(a.columns, '[]') AS columns, coalesce(p.parts, '[]') AS parts,
           coalesce(a.made, true) AND coalesce(p.made, true) AND y.xmin = b.xmin AND y.cmin = b.cmin AS made
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_type y ON y.oid = c.reltype
      JOIN pg_attribute b ON b.attrelid = c.oid AND b.attnum = -1
      CROSS JOIN LATERAL (
          SELECT bool_and(a.xmin = b.xmin AND NOT a.attisdropped) AS made,
                 jsonb_agg(jsonb_build_array(a.attnum, a.attname, a.atttypid::int8,
                           format_type(a.atttypid, a.atttypmod)) ORDER BY a.attnum)
                   FILTER (WHERE NOT a.attisdropped) AS columns
            FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0) a
      LEFT JOIN parts p ON p.top = c.oid
     WHERE NOT c.relispartition AND {where}
)
SELECT txid_current_snapshot()::text, f.oid, f.nspname, f.relname, f.named, f.owner, f.columns::text, f.parts::text,
       f.made
  FROM (VALUES (1)) one LEFT JOIN found f ON true
"""
_columns = msgspec.json.Decoder(list[Column]).decode
_parts = msgspec.json.Decoder(list[Part]).decode


async def read(sql: psycopg.AsyncConnection[Any], root: tuple[str, str] | None = None) -> tuple[Snapshot, list[Today]]:
    """Every root table, or the one of that (schema, table); and which transactions are in what the catalogue says.

    As the connection's transaction sees them, where it is in one.
    """
    try:
        if root is None:
            cursor = await sql.execute(_SHAPES.format(where=TABLES))
        else:
            where = f"{TABLES.replace('%', '%%')} AND {ONE}"
            cursor = await sql.execute(_SHAPES.format(where=where), (root[1], root[0]) * 2)
        rows = await cursor.fetchall()
    except psycopg.Error as error:
        raise connection.refusal(error, "reading the catalogue") from None
    found = [
        Today(schema, table, oid, named, owner, _columns(columns), _parts(parts), made)
        for _, oid, schema, table, named, owner, columns, parts, made in rows
        if oid is not None
    ]
    return Snapshot.parse(rows[0][0]), found
