"""Every type that the server has: a column of it has the same bytes in snapshot and stream, and can be written back.

The types are those of the catalogue, with the extensions that are there and the types of `tests.pgvalues`: whatever a
column can be of. Each has a value where one of a few texts is one; a composite type has its parts' values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest

from bridge.embedded import NatsServer
from tests.documented import members
from tests.pgvalues import CREATED
from tests.running import bridge, execute, messages, settled, source, streaming
from tests.writing import written_back

pytestmark = pytest.mark.anyio

EXTENSIONS = ["cube", "seg", "isn", "intarray", "lo", "postgres_fdw"]
TEXTS = [
    "a \"q\" \\ é", "YES", "7", "-7.50", "true", "2026-01-31 12:00:00+00", "2026-01-31", "12:34:56", "1 day", "\\x00ff",
    "{1,2}", '{"a": [1.10, null]}', "'a':1 'b':2A", "<a b=\"c\">d</a>", "101", "1", "$1.50", "10.0.0.1", "10.0.0.0/8",
    "08:00:2b:01:02:03", "08:00:2b:01:02:03:04:05", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "16/B374D848", "(1,2)",
    "(1,2),(3,4)", "[(1,2),(3,4)]", "((1,2),(3,4),(5,6))", "<(1,2),3>", "{1,-2,3}", "1 2", "10:20:10,14,15", "empty",
    "{}", "pg_class", "pg_catalog", "simple", "english", "sum(int4)", "now", "+(int4,int4)", "now()", "int4",
    "postgres", "default", "a.b", "$.a[*]", "a=>1, b=>NULL", "sad", "(1,a,)", "1..2", "978-0-393-04002-9",
    "036000291452", "9771144875007", "1144-875X", "M-2306-7118-7", "postgres=arwdDxt/postgres",
]  # fmt: skip
# As one of the texts reads it, else NULL; quietly, for most texts are values of few types.
SAMPLE = """
CREATE FUNCTION pg_temp.sample(kind text, texts text[]) RETURNS text LANGUAGE plpgsql AS $$
DECLARE found text; one text;
BEGIN
    FOREACH one IN ARRAY texts LOOP
        BEGIN
            EXECUTE format('SELECT (%L::%s)::text', one, kind) INTO found;
            RETURN one;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    RETURN NULL;
END $$
"""
POSSIBLE = """
CREATE FUNCTION pg_temp.possible(kind text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TEMP TABLE tried (c %s)', kind);
    DROP TABLE tried;
    RETURN true;
EXCEPTION WHEN OTHERS THEN RETURN false;
END $$
"""
KINDS = """
SELECT t.oid::int8, format_type(t.oid, NULL), t.typtype::text, coalesce(e.oid::int8, 0), t.typdelim::text,
       coalesce((SELECT array_agg(a.atttypid::int8 ORDER BY a.attnum) FROM pg_attribute a
                  WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped), '{}'),
       coalesce(g.rngsubtype::int8, 0)
  FROM pg_type t
  LEFT JOIN pg_type e ON e.typarray = t.oid
  LEFT JOIN pg_range g ON t.oid IN (g.rngtypid, g.rngmultitypid)
 WHERE t.typtype <> 'p' AND t.typname NOT LIKE 'pg\\_temp%' AND pg_temp.possible(format_type(t.oid, NULL))
 ORDER BY t.oid
"""
# Types of indexes and statistics that PostgreSQL reads no text as: a column of them can only be empty.
UNREADABLE = {
    "pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list", "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary", "gtsvector", "ghstore", "ltree_gist", "intbig_gkey",
}  # fmt: skip
MANY = 120  # columns of a table: of more, not even the references to TOASTed values would fit into a row


class Kind(NamedTuple):
    """A type: `of` is that of an array's elements or a range's bounds, `parts` those of a composite type."""

    oid: int
    name: str
    kind: str
    element: int
    delimiter: str
    parts: list[int]
    of: int


async def kinds(sql: psycopg.AsyncConnection[Any]) -> list[Kind]:
    """The types that a column can be of."""
    for function in (SAMPLE, POSSIBLE):
        await sql.execute(function.encode())
    return [Kind(*row) for row in await (await sql.execute(KINDS.encode())).fetchall()]


async def values(sql: psycopg.AsyncConnection[Any], found: list[Kind]) -> dict[int, str]:
    """An expression of SQL for a value of each type, NULL where there is none."""
    made: dict[int, str] = {}
    waiting = found
    while waiting:
        ready = [one for one in waiting if not ({one.element, one.of, *one.parts} & {other.oid for other in waiting})]
        assert ready, waiting
        for one in ready:
            made[one.oid] = await value(sql, one, made)
        waiting = [one for one in waiting if one.oid not in made]
    return made


async def value(sql: psycopg.AsyncConnection[Any], one: Kind, made: dict[int, str]) -> str:
    if one.element:
        return f"ARRAY[{made.get(one.element, 'NULL')}, NULL]::{one.name}"
    if one.parts:
        return f"ROW({', '.join(made.get(part, 'NULL') for part in one.parts)})::{one.name}"
    texts = TEXTS
    if one.of:
        row = await (await sql.execute(f"SELECT ({made[one.of]})::text".encode())).fetchone()
        texts = [form.format(row[0].replace('"', '""')) for form in ('["{}",)', '{{["{}",)}}')] if row else []
    cursor = await sql.execute(
        "SELECT pg_temp.sample(%s, %s), quote_literal(pg_temp.sample(%s, %s))", [one.name, texts] * 2
    )
    row = await cursor.fetchone()
    assert row is not None
    return "NULL" if row[0] is None else f"{row[1]}::{one.name}"


async def test_a_column_of_any_type_that_there_is(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    [*there] = [name for (name,) in await execute(pg_db, "SELECT name FROM pg_available_extensions")]
    wanted = [f"CREATE EXTENSION {name}" for name in EXTENSIONS if name in there]
    await execute(pg_db, *CREATED.strip().split(";\n"), *wanted)
    async with await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as sql:
        found = await kinds(sql)
        made = await values(sql, found)
    tables = [found[start : start + MANY] for start in range(0, len(found), MANY)]
    for number, part in enumerate(tables):
        columns = ", ".join(f'"{one.oid}" {one.name}' for one in part)
        await execute(
            pg_db,
            *(f"CREATE TABLE {name}{number} (id int PRIMARY KEY, {columns})" for name in ("zoo", "copy")),
            f"INSERT INTO zoo{number} VALUES (1, {', '.join(made[one.oid] for one in part)})",
        )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, *(f"INSERT INTO copy{number} SELECT * FROM zoo{number}" for number in range(len(tables))))
        await settled(config)
    after = {(one.table, one.op): members(bytes(one.after)) for _, one in await messages(config) if bytes(one.after)}
    for number, part in enumerate(tables):
        read, inserted = after[f"zoo{number}", "read"], after[f"copy{number}", "insert"]
        for one in part:
            assert read[str(one.oid)] == inserted[str(one.oid)], one
        assert list(read) == ["id", *(str(one.oid) for one in part)]
        await written_back(config, f"zoo{number}", read)
    assert {one.name for one in found if made[one.oid] == "NULL"} <= UNREADABLE


async def test_columns_of_the_information_schemas_types(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    row = "1, 'tables', 12, 'YES', '2026-01-31 12:00:00.25+02', 'text', 'sad', ARRAY['a', NULL], ARRAY[1, 2]"
    of = "information_schema."
    await execute(
        pg_db,
        f"CREATE TABLE t (id int PRIMARY KEY, name {of}sql_identifier, count {of}cardinal_number, yes {of}yes_or_no,"
        f" at {of}time_stamp, data {of}character_data, kind text, names {of}sql_identifier[],"
        f" counts {of}cardinal_number[])",
        f"INSERT INTO t VALUES ({row})",
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, f"INSERT INTO t VALUES ({row.replace('1', '2', 1)})")
        await settled(config)
    read, inserted = [
        msgspec.json.decode(one.after)
        for _, one in await messages(config)
        if one.op in ("read", "insert") and one.table == "t"
    ]
    assert read == {
        "id": 1, "name": "tables", "count": 12, "yes": "YES", "at": "2026-01-31T10:00:00.25Z", "data": "text",
        "kind": "sad", "names": ["a", None], "counts": [1, 2],
    }  # fmt: skip
    assert inserted == read | {"id": 2}
