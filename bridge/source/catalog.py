"""What the database says of its tables: which are published, their columns, types, keys and partitions.

Read with SQL when a table is first met and again when a change shows that it is out of date. wal2json's records name
tables and columns as they were when the change was made, the catalogue as they are now: the record wins.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import psycopg
from psycopg.rows import class_row

from bridge.config import Source, join_name, split_name
from bridge.errors import ServerRefused
from bridge.source import connection
from bridge.source.altering import Snapshot
from bridge.source.values import Codec, Type, codec


class Column(msgspec.Struct, frozen=True):
    """A column: `toast` tells whether its value can be stored out of line, and so be left out of an update; `virtual`
    whether it is generated when read, and so not in the log; `base` what a type that has domains in it is without
    them, else empty; `number` is the place that no other column of the table has ever had, `xid` the transaction that
    altered it last."""

    name: str
    oid: int
    type: str
    toast: bool
    virtual: bool
    base: str = ""
    number: int = 0
    xid: int = 0


class Dropped(msgspec.Struct, frozen=True):
    """A column that was dropped, by the transaction `xid`; its name and type are gone."""

    number: int
    toast: bool
    xid: int


class Relation(msgspec.Struct, frozen=True):
    """A table as the catalogue has it now.

    root: the (schema, table) under whose name its events appear: itself, or the partitioned table at the top;
    key: the columns that identify a row, in the order of the root table, () where none do;
    identity: pg_class.relreplident (d, f, i, n);
    filenode: as the reading transaction's snapshot has it;
    named: the transaction that gave it its name, or its owner; made: the one that made it; links: those that made it,
    and what it is a partition of, partitions; freed: one that did not come before it was last detached, where it was;
    chosen: the one that last wrote which index the key is of.
    """

    oid: int
    schema: str
    table: str
    kind: str
    root: tuple[str, str]
    identity: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    estimate: int = 0
    filenode: int = 0
    dropped: tuple[Dropped, ...] = ()
    named: int = 0
    links: tuple[int, ...] = ()
    made: int = 0
    freed: int = 0
    chosen: int = 0

    @property
    def name(self) -> str:
        """schema.table, for messages."""
        return f"{self.schema}.{self.table}"

    @property
    def quoted(self) -> str:
        """schema.table, as SQL takes it."""
        return f"{quote_name(self.schema)}.{quote_name(self.table)}"

    @property
    def is_partition(self) -> bool:
        """Whether its events appear under another table's name."""
        return self.root != (self.schema, self.table)


class Filter:
    """Which tables are published: those that a pattern names and no pattern with ! excludes.

    Patterns are schema.table with * and ? as wildcards; partitions go by the name of their root.
    """

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns
        self._yes = [_pattern(p) for p in patterns if not p.startswith("!")]
        self._no = [_pattern(p[1:]) for p in patterns if p.startswith("!")]

    def matches(self, schema: str, table: str) -> bool:
        """Whether the table's changes go into the log."""
        return _any(self._yes, schema, table) and not _any(self._no, schema, table)

    @property
    def literal(self) -> list[tuple[str, str]]:
        """The tables that are named without a wildcard and so must exist."""
        return [split_name(p) for p in self.patterns if not p.startswith("!") and "*" not in p and "?" not in p]


def _pattern(text: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    schema, table = (
        re.compile(re.escape(part).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL) for part in split_name(text)
    )
    return schema, table


def _any(patterns: list[tuple[re.Pattern[str], re.Pattern[str]]], schema: str, table: str) -> bool:
    return any(s.fullmatch(schema) and t.fullmatch(table) for s, t in patterns)


def quote_name(name: str) -> str:
    """An identifier as SQL takes it, always in double quotes."""
    return '"' + name.replace('"', '""') + '"'


_TYPES = """
SELECT t.oid::int8 AS oid, t.typname AS name,
       CASE WHEN t.typcategory = 'A' AND t.typsubscript = 'array_subscript_handler'::regproc
            THEN t.typelem::int8 ELSE 0 END AS element,
       CASE WHEN t.typtype = 'd' THEN t.typbasetype::int8 ELSE 0 END AS base, coalesce(e.typdelim, ',') AS delimiter,
       t.typlen = -1 AS varying
  FROM pg_type t LEFT JOIN pg_type e ON e.oid = t.typelem
"""
# Before PostgreSQL 14 there was no typsubscript: an array was what has an element and a variable length.
_TYPES_13 = _TYPES.replace("t.typsubscript = 'array_subscript_handler'::regproc", "t.typlen = -1")

_RELATIONS = """
WITH RECURSIVE up AS (
    SELECT c.oid, c.oid AS top, ARRAY[]::int8[] AS links FROM pg_class c WHERE {where}
    UNION ALL
    SELECT up.oid, i.inhparent, up.links || i.xmin::text::int8 FROM up
      JOIN pg_class c ON c.oid = up.top AND c.relispartition JOIN pg_inherits i ON i.inhrelid = up.top
), down AS (
    -- Through domains and elements of arrays: a domain may be of an array, and an array of domains. Of all arrays only
    -- true ones have elements and no array type of their own.
    SELECT of.oid AS of, of.oid, -1 AS modifier, '' AS many, 0 AS depth
      FROM pg_type d CROSS JOIN LATERAL (VALUES (d.oid), (d.typarray)) of (oid) WHERE d.typtype = 'd'
    UNION ALL
    SELECT down.of, CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.typelem END,
           CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE down.modifier END,
           CASE WHEN t.typtype = 'd' THEN down.many ELSE down.many || '[]' END, down.depth + 1
      FROM down JOIN pg_type t ON t.oid = down.oid
     WHERE t.typtype = 'd' OR (t.typelem <> 0 AND t.typarray = 0 AND t.typlen = -1)
), based AS (
    SELECT DISTINCT ON (of) of, format_type(oid, modifier) || many AS base FROM down ORDER BY of, depth DESC
)
SELECT c.oid::int8 AS oid, n.nspname AS schema, c.relname AS "table", c.relkind::text AS kind,
       ARRAY[rn.nspname, r.relname]::text[] AS root, c.relreplident::text AS identity,
       greatest(c.reltuples, 0)::int8 AS estimate, c.relfilenode::int8 AS filenode, up.links,
       coalesce((SELECT b.xmin::text::int8 FROM pg_attribute b WHERE b.attrelid = c.oid AND b.attnum = -1), 0) AS made,
       coalesce((SELECT o.xmin::text::int8 FROM pg_constraint o WHERE o.conrelid = c.oid AND o.contype = 'p'),
                c.xmin::text::int8) AS freed,
       coalesce((SELECT x.xmin::text::int8 FROM pg_index x WHERE x.indrelid = c.oid AND
                   CASE WHEN c.relreplident = 'i' THEN x.indisreplident ELSE x.indisprimary END), 0) AS chosen,
       coalesce((SELECT y.xmin::text::int8 FROM pg_type y WHERE y.oid = c.reltype), 0) AS named,
       coalesce((SELECT array_agg(a.attname::text ORDER BY coalesce(top.attnum, a.attnum))
                   FROM pg_index x, unnest(x.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
                   JOIN pg_attribute a ON a.attnum = k.attnum
                   LEFT JOIN pg_attribute top
                     ON top.attrelid = r.oid AND top.attname = a.attname AND NOT top.attisdropped
                  WHERE x.indrelid = c.oid AND a.attrelid = c.oid AND x.indisvalid AND x.indimmediate
                    AND k.ord <= x.indnkeyatts
                    AND CASE WHEN c.relreplident = 'i' THEN x.indisreplident ELSE x.indisprimary END
                    AND c.relreplident <> 'n'), ARRAY[]::text[]) AS key,
       (SELECT coalesce(jsonb_agg(jsonb_build_object('name', a.attname, 'oid', a.atttypid::int8,
                 'type', format_type(a.atttypid, a.atttypmod), 'toast', a.attlen = -1 AND a.attstorage <> 'p',
                 'virtual', a.attgenerated = 'v', 'base', coalesce(b.base, ''), 'number', a.attnum,
                 'xid', a.xmin::text::int8, 'dropped', a.attisdropped)
                 ORDER BY a.attnum), '[]')
          FROM pg_attribute a LEFT JOIN based b ON b.of = a.atttypid
         WHERE a.attrelid = c.oid AND a.attnum > 0) AS columns
  FROM up JOIN pg_class c ON c.oid = up.oid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class r ON r.oid = up.top JOIN pg_namespace rn ON rn.oid = r.relnamespace
 WHERE NOT r.relispartition
"""
TABLES = (
    "c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.relnamespace NOT IN "
    "(SELECT oid FROM pg_namespace WHERE nspname LIKE 'pg\\_%' OR nspname = 'information_schema')"
)
_KINDS = {
    "r": "UNLOGGED, or the system's",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
}
ONE = "c.relname = %s AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)"
# A table, and of a partition all that it belongs to.
_FAMILY = """c.oid IN (
    WITH RECURSIVE above AS (
        SELECT c.oid, c.relispartition FROM pg_class c WHERE {where}
        UNION ALL
        SELECT p.oid, p.relispartition FROM above JOIN pg_inherits i ON i.inhrelid = above.oid
          JOIN pg_class p ON p.oid = i.inhparent WHERE above.relispartition
    ) SELECT oid FROM above)"""
# What decides under which name, with which key and columns, and whether at all, a table's changes are published.
# A row that is written anew has another xmin; VACUUM and ANALYZE write theirs in place.
_VERSION = """
SELECT txid_current_snapshot()::text,
       (SELECT md5(string_agg(oid || ':' || xmin, ',' ORDER BY oid)) FROM pg_class
         WHERE relkind IN ('r', 'p', 'm', 'f') AND relpersistence <> 't')
    || (SELECT coalesce(md5(string_agg(inhrelid || ':' || xmin, ',' ORDER BY inhrelid, inhseqno)), '') FROM pg_inherits)
    || (SELECT md5(string_agg(indexrelid || ':' || xmin, ',' ORDER BY indexrelid)) FROM pg_index
         WHERE indisreplident OR indisprimary)
    || (SELECT md5(string_agg(oid || ':' || xmin, ',' ORDER BY oid)) FROM pg_namespace
         WHERE nspname !~ '^pg_(toast_)?temp_')
    || (SELECT coalesce(md5(string_agg(attrelid || ':' || attnum || ':' || xmin, ',' ORDER BY attrelid, attnum)), '')
          FROM pg_attribute WHERE attrelid = ANY (%s::oid[]) AND attnum > 0)
"""


async def has_rows(sql: psycopg.AsyncConnection[Any], schema: str, table: str, *, partitioned: bool = False) -> bool:
    """Whether the table has a row now, or a partition of it; where it may not be read, or not now, it may have some."""
    name = f"{quote_name(schema)}.{quote_name(table)}"
    try:
        cursor = await sql.execute(f"SELECT EXISTS (SELECT FROM {'' if partitioned else 'ONLY '}{name})")
        row = await cursor.fetchone()
        return row is None or bool(row[0])
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return False
    except psycopg.Error as error:
        found = connection.refusal(error, f"reading {schema}.{table}")
        if isinstance(found, ServerRefused):
            return True
        raise found from None


class _Row(msgspec.Struct):
    oid: int
    schema: str
    table: str
    kind: str
    root: list[str]
    identity: str
    estimate: int
    filenode: int
    key: list[str]
    columns: list[dict[str, Any]]
    named: int
    links: list[int]
    made: int
    freed: int
    chosen: int

    def relation(self) -> Relation:
        return Relation(
            oid=self.oid,
            schema=self.schema,
            table=self.table,
            kind=self.kind,
            root=(self.root[0], self.root[1]),
            identity=self.identity,
            key=tuple(self.key),
            columns=tuple(msgspec.convert(c, Column) for c in self.columns if not c["dropped"]),
            estimate=self.estimate,
            filenode=self.filenode,
            dropped=tuple(msgspec.convert(c, Dropped) for c in self.columns if c["dropped"]),
            named=self.named,
            links=tuple(self.links),
            made=self.made,
            freed=self.freed,
            chosen=self.chosen,
        )


class Catalog:
    """The catalogue over one SQL connection; types and relations are kept until a change shows that they are old."""

    def __init__(self, sql: psycopg.AsyncConnection[Any], source: Source) -> None:
        self._sql = sql
        self._source = source
        self.filter = Filter(source.tables)
        self._types: dict[int, Type] = {}
        self._codecs: dict[int, Codec] = {}

    async def codec(self, oid: int) -> Codec:
        """How values of the type `oid` are written; a type that is gone from the catalogue is text."""
        found = self._codecs.get(oid)
        if found is None:
            if oid not in self._types:
                await self._read_types()
            found = self._codecs[oid] = codec(oid, self._types)
        return found

    async def varying(self, oids: Iterable[int]) -> dict[int, bool]:
        """Whether values of these types vary in length, and so can be TOASTed; without the types that are gone."""
        if not self._types.keys() >= (wanted := set(oids)):
            await self._read_types()
        return {oid: self._types[oid].varying for oid in wanted & self._types.keys()}

    async def type_name(self, oid: int) -> str:
        """A type's name as PostgreSQL prints it; of one that is gone, "???"."""
        try:
            cursor = await self._sql.execute("SELECT format_type(%s, NULL)", [oid])
            found = await cursor.fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "reading pg_type") from None
        return str(found[0]) if found else ""

    async def _read_types(self) -> None:
        sql = _TYPES if self._sql.pgconn.server_version >= 140000 else _TYPES_13
        try:
            async with self._sql.cursor(row_factory=class_row(Type)) as cursor:
                await cursor.execute(sql)
                self._types = {found.oid: found async for found in cursor}
        except psycopg.Error as error:
            raise connection.refusal(error, "reading pg_type") from None

    async def relation(self, schema: str, table: str) -> Relation | None:
        """The table as it is now; None where there is none of that name any more."""
        found = await self.relations(self._sql, ONE, (table, schema))
        return found[0] if found else None

    async def family(self, schema: str, table: str) -> tuple[Relation, Relation] | None:
        """The table as it is now, and the one whose name its events have, itself where it is no partition, both of one
        moment; None where there is none of that name any more."""
        return await self._family(ONE, (table, schema), lambda r: (r.schema, r.table) == (schema, table))

    async def family_of(self, oid: int) -> tuple[Relation, Relation] | None:
        """As `family`, of the table with an oid, whatever its name is now."""
        return await self._family("c.oid = %s", (oid,), lambda r: r.oid == oid)

    async def _family(
        self, where: str, values: tuple[object, ...], is_it: Callable[[Relation], bool]
    ) -> tuple[Relation, Relation] | None:
        every = await self.relations(self._sql, _FAMILY.format(where=where), values)
        found = {(r.schema, r.table): r for r in every}
        relation = next(filter(is_it, every), None)
        return (relation, found[relation.root]) if relation is not None else None

    async def published(self, known: Callable[[tuple[str, str]], Awaitable[object]] | None = None) -> list[Relation]:
        """The tables with rows of their own (partitions, not their parents) that the patterns choose, by name.

        Args:
            known: what is known of a table that has been published, None where it has not: one that was dropped since
                is missed by nobody.

        Raises:
            ServerRefused: what is named without wildcard does not exist, or is nothing whose changes are logged under
                that name.
        """
        found = await self.relations(self._sql, TABLES, ())
        names = {(r.schema, r.table) for r in found if not r.is_partition or self.filter.matches(*r.root)}
        missing = [name for name in self.filter.literal if name not in names]
        if known is not None:
            missing = [name for name in missing if await known(name) is None or await self.relation(*name) is not None]
        if missing:
            raise await self._unfit(missing)
        chosen = [r for r in found if r.kind == "r" and self.filter.matches(*r.root)]
        return sorted(chosen, key=lambda r: (r.root, r.schema, r.table))

    async def _unfit(self, names: list[tuple[str, str]]) -> ServerRefused:
        """The error for names in [source] tables under which no change is logged."""
        absent, others = [], []
        for schema, table in names:
            name, found = join_name(schema, table), await self.relation(schema, table)
            if found is None:
                absent.append(name)
            elif found.is_partition:
                others.append(f"{name} is a partition: its changes stand under the name {join_name(*found.root)}")
            else:
                kind = _KINDS.get(found.kind, "no table")
                others.append(f"{name} is {kind}: no change of it is in PostgreSQL's log")
        what = [f"{', '.join(absent)} {'does' if len(absent) == 1 else 'do'} not exist"] if absent else []
        return ServerRefused(
            f"[source] tables names what cannot be published of {self._sql.info.dbname}: {'; '.join([*what, *others])}",
            "correct [source] tables: of partitions name the root, of a view the tables behind it; or create what does "
            "not exist, and SET LOGGED what is UNLOGGED",
        )

    async def unlogged(self) -> list[str]:
        """The tables that the patterns choose and that are UNLOGGED, by name."""
        found = await self.relations(self._sql, "c.relkind = 'r' AND c.relpersistence = 'u'", ())
        return sorted(r.name for r in found if self.filter.matches(*r.root))

    async def all(self) -> list[Relation]:
        """Every table that there is, partitions and their parents included."""
        return await self.relations(self._sql, TABLES, ())

    async def version(self, tables: Iterable[int] = ()) -> tuple[Snapshot, str]:
        """Which transactions are in what the catalogue says, and a value that is another one when it says otherwise.

        Args:
            tables: the oids of those whose columns count.
        """
        try:
            row = await (await self._sql.execute(_VERSION, [sorted(tables)])).fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the catalogue") from None
        assert row is not None
        return Snapshot.parse(row[0]), row[1]

    async def origin(self, number: int) -> str:
        """The name of a replication origin; `#` and its number where it is not there any more."""
        try:
            query = "SELECT roname FROM pg_replication_origin WHERE roident::int8 = %s"
            row = await (await self._sql.execute(query, (number,))).fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the catalogue") from None
        return str(row[0]) if row is not None else f"#{number}"

    async def bounds(self) -> tuple[int | None, int]:
        """What is sure of the log that the slot has: a transaction id before which all have ended there, None where
        there is no slot; and an LSN before which everything stands that the catalogue said until now."""
        query = (
            "SELECT (SELECT catalog_xmin::text::int8 FROM pg_replication_slots WHERE slot_name = %s),"
            " (pg_current_wal_insert_lsn() - '0/0')::int8"
        )
        try:
            row = await (await self._sql.execute(query, [self._source.slot])).fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the slot") from None
        assert row is not None
        return row[0], row[1]

    async def snapshot(self) -> Snapshot:
        """Which transactions are to be seen now."""
        try:
            row = await (await self._sql.execute("SELECT txid_current_snapshot()::text")).fetchone()
        except psycopg.Error as error:
            raise connection.refusal(error, "looking at the running transactions") from None
        assert row is not None
        return Snapshot.parse(row[0])

    async def relations(
        self, sql: psycopg.AsyncConnection[Any], where: str, values: tuple[object, ...]
    ) -> list[Relation]:
        """The relations that a condition on pg_class chooses."""
        try:
            async with sql.cursor(row_factory=class_row(_Row)) as cursor:
                await cursor.execute(_RELATIONS.format(where=where), values or None)
                return [row.relation() async for row in cursor]
        except psycopg.Error as error:
            raise connection.refusal(error, "reading the catalogue") from None
