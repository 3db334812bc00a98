"""Every type: the snapshot and the stream give the same bytes for a value, and PostgreSQL reads them back the same."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from bridge.embedded import NatsServer
from bridge.pipeline import streaming as streaming_module
from bridge.source import pattern
from bridge.source.pattern import Patterns
from bridge.source.rows import Plan
from tests.oracle import agrees
from tests.running import bridge, events, execute, messages, settled, source, streaming

pytestmark = pytest.mark.anyio

TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"');
CREATE DOMAIN age AS int CHECK (value >= 0);
CREATE DOMAIN price AS numeric(12, 2);
CREATE DOMAIN flag AS boolean;
CREATE DOMAIN blob AS bytea;
CREATE DOMAIN tags AS text[];
CREATE TYPE pair AS (a int, b text);
CREATE TYPE floats AS RANGE (subtype = float8)
"""
# Column type: the values, as SQL expressions. Not there: JSON's own null in a json column, which an event cannot tell
# from SQL's NULL.
ZOO = {
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "0"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "oid": ["4294967295"],
    "numeric": ["1.10", "0.000", "-1e-20", "(repeat('9', 400))::numeric", "1e400"],
    "numeric(10,3)": ["5"],
    "real": ["1.1", "-0.0", "3.4028235e38", "1e-45"],
    "double precision": ["0.1::float8 + 0.2", "1.7976931348623157e308", "5e-324", "-0.0", "1e22", "1e-7"],
    "money": ["'-1234.50'"],
    "boolean": ["true", "false"],
    "text": [
        "''",
        "'NULL'",
        "E'\\b\\f\\n\\r\\t\\v\\\\ \"q\" / \\x01\\x7f'",
        "'ü日本😀'",
        "E'\\\\N'",
        "repeat('long', 30000)",
    ],
    "varchar(20)": ["'v '"],
    "char(5)": ["'ab'"],
    '"char"': ["'x'"],
    "name": ["'n'"],
    "bytea": ["''", "'\\x00ff5c22'", "decode(repeat('00ff', 5000), 'hex')"],
    "date": ["'2026-01-31'", "'0044-03-15 BC'", "'0001-12-31 BC'", "'12026-01-01'", "'infinity'", "'-infinity'"],
    "time": ["'24:00:00'", "'12:34:56.789012'"],
    "timetz": ["'12:00:00+05:30'"],
    "timestamp": ["'2026-01-31 12:00:00.5'", "'0044-03-15 00:00:00 BC'", "'infinity'", "'99999-01-01 00:00'"],
    "timestamptz": [
        "'2026-01-31 12:00:00+02'",
        "'0044-03-15 00:00:00+00 BC'",
        "'-infinity'",
        "'1900-01-01 00:00:00.000001+00'",
    ],
    "interval": ["'1 year -2 mons 3 days 04:05:06.789'", "'0'", "'-1 day'"],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "inet": ["'10.0.0.1/8'", "'::1'"],
    "cidr": ["'10.0.0.0/8'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "bit(5)": ["B'00101'"],
    "bit varying": ["B''", "B'1'"],
    "json": ['E\'{"b" : 1.10,\\n "a":[null, 1e5], "a":"\\\\u0041"}\'', "'\"x\"'", "'1.0'"],
    "jsonb": ['\'{"b": 1.10, "a": [null, 100000]}\'', "'[]'", "'\"t\"'"],
    "xml": ["'<a b=\"c\">d</a>'"],
    "tsvector": ["'a:1 b:2A ''q q'''"],
    "tsquery": ["'a & !b'"],
    "point": ["'(1.5,-2)'"],
    "box": ["'(1,1),(0,0)'"],
    "polygon": ["'((0,0),(1,1),(1,0))'"],
    "int4range": ["'[1,5)'", "'empty'", "'(,)'"],
    "tstzrange": ["'[2026-01-01 00:00+00, infinity)'"],
    "int4multirange": ["'{[1,2),[5,6)}'"],
    "floats": ["'[0.1,0.30000000000000004)'"],
    "regclass": ["'pg_class'"],
    "pg_lsn": ["'16/B374D848'"],
    "xid8": ["'12345678901'"],
    "mood": ["'sad'", "'it''s \"ok\"'"],
    "age": ["42"],
    "price": ["1.10"],
    "flag": ["true"],
    "blob": ["'\\x00ff'"],
    "tags": ["ARRAY['a', NULL, 'NULL']"],
    "pair": ["ROW(1, 'x, \"y\" (z)')", "ROW(NULL, '')"],
    "int[]": ["'{}'", "'{1,NULL,3}'", "'{{1,2},{3,4}}'", "'[0:1]={7,8}'", "'{{{1}}}'"],
    "text[]": ["ARRAY['', 'a,b', '{c}', '\"', E'\\\\', 'null', NULL, ' ', E'\\n']"],
    "numeric[]": ["'{1.10,400.0}'"],
    "float8[]": ["'{0.1,1e300}'"],
    "boolean[]": ["'{t,f,NULL}'"],
    "bytea[]": ["ARRAY['\\x00ff'::bytea, NULL, '']"],
    "date[]": ["'{2026-01-31,infinity,0044-03-15 BC}'"],
    "timestamptz[]": ["'{\"2026-01-31 12:00:00+02\"}'"],
    "json[]": ['ARRAY[\'{"a": [1, "}"]}\'::json, NULL]'],
    "jsonb[]": ["ARRAY['{\"a\": 1.10}'::jsonb]"],
    "mood[]": ["ARRAY['sad', 'it''s \"ok\"']::mood[]"],
    "age[]": ["'{1,2}'::int[]"],
    "pair[]": ["ARRAY[ROW(1, 'x')::pair, NULL]"],
    "box[]": ["'{(1,1),(0,0);(3,3),(2,2)}'"],
    "int4range[]": ["ARRAY['[1,5)'::int4range]"],
    "int2vector": ["'1 2 3'"],
    "uuid[]": ["'{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}'"],
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tables are busy from their first change on; the changes that their patterns take, by table."""
    found: Counter[str] = Counter()

    class Counted(Patterns):
        def read(self, data: bytes, closing: bytes) -> tuple[Plan, bytes, bytes] | None:
            change = super().read(data, closing)
            if change is not None:
                found[change[0].relation.table] += 1
            return change

    monkeypatch.setattr(pattern, "BUSY", 1)
    monkeypatch.setattr(streaming_module, "Patterns", Counted)
    return found


async def test_changes_of_a_busy_table_are_right_before_and_after_it_is_altered(
    pg_db: str, nats: NatsServer, taken: Counter[str]
) -> None:
    # Each event of a table that is being read again is looked at.
    config = source(pg_db, nats.url, on_rewrite="warn")
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text, at timestamptz DEFAULT now())")
    text = "chr(g + 200) || E'\\\\ }],' || CASE WHEN g % 10 = 0 THEN E'\"}]}\n' ELSE '' END"
    fill = f"INSERT INTO t (id, body) SELECT g, {text} FROM generate_series(%s, %s + 99) g"
    change = "UPDATE t SET body = body || 'x' WHERE id >= %s"
    async with bridge(config):
        await streaming(config)
        for first, alter in (
            (1, "ALTER TABLE t ADD COLUMN extra int[] DEFAULT '{1,NULL}'"),
            (101, "ALTER TABLE t DROP COLUMN at"),
            (201, "ALTER TABLE t ALTER COLUMN id TYPE numeric"),
            (301, "UPDATE t SET body = body"),  # the log has no word of what altering made of older rows
            (401, "ALTER TABLE t REPLICA IDENTITY FULL"),
            (501, "DELETE FROM t WHERE id % 3 = 0"),
        ):
            await execute(pg_db, fill.replace("%s", str(first)), change % first)
            await settled(config)  # else the catalogue is ahead of the stream, and more is decoded
            await execute(pg_db, alter)
        await settled(config)
    await agrees(config, strict=False)
    # All but the first of each kind and those with a quotation mark, and with FULL identity the inserts only.
    assert 1200 < taken["t"] < 1500


@pytest.mark.parametrize("busy", [False, True])
async def test_a_value_has_the_same_bytes_in_snapshot_and_stream(
    pg_db: str, nats: NatsServer, busy: bool, request: pytest.FixtureRequest
) -> None:
    taken: Counter[str] = request.getfixturevalue("taken") if busy else Counter()
    config = source(pg_db, nats.url)
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(ZOO))
    rows = max(map(len, ZOO.values()))
    values = [
        ", ".join(f"({found[row]})::{kind}" if row < len(found) else "NULL" for kind, found in ZOO.items())
        for row in range(rows)
    ]
    tables = [f"CREATE TABLE {name} (id int PRIMARY KEY, {columns})" for name in ("zoo", "copy", "whole")]
    await execute(
        pg_db,
        *TYPES.strip().split(";\n"),
        *tables,
        "ALTER TABLE whole REPLICA IDENTITY FULL",
        *(f"INSERT INTO zoo VALUES ({row}, {text})" for row, text in enumerate(values)),
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "INSERT INTO copy SELECT * FROM zoo",
            "INSERT INTO whole SELECT * FROM zoo",
            "UPDATE whole SET id = id + 100",
        )
        await settled(config)
    found = await agrees(config)
    after = {
        (event.table, event.op): [
            msgspec.json.decode(e.after, type=dict[str, msgspec.Raw])
            for _, e in found
            if (e.table, e.op) == (event.table, event.op)
        ]
        for _, event in found
        if event.op in ("read", "insert", "update")
    }
    assert bool(taken["copy"] and taken["whole"]) == busy
    kinds = ["id", *ZOO]
    for row, (read, inserted) in enumerate(zip(after["zoo", "read"], after["copy", "insert"], strict=True)):
        for kind, name in zip(kinds, read, strict=True):
            assert bytes(read[name]) == bytes(inserted[name]), f"row {row}, {kind}"
    olds = [
        msgspec.json.decode(e.before, type=dict[str, msgspec.Raw])
        for _, e in found
        if e.table == "whole" and e.op == "update"
    ]
    for old, read in zip(olds, after["zoo", "read"], strict=True):
        assert {n: bytes(v) for n, v in old.items()} == {n: bytes(v) for n, v in read.items()}


async def test_what_the_plugin_cannot_say_is_null_in_the_stream_only(pg_db: str, nats: NatsServer) -> None:
    """wal2json up to 2.5 sends NaN and infinities as null; from 2.6 on they are strings as in a snapshot."""
    config = source(pg_db, nats.url)
    row = "'NaN', 'Infinity', '-Infinity', 'NaN', 'Infinity', ARRAY['NaN', '1.5']::numeric[]"
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, a numeric, b numeric, c numeric, d float8, e real, f numeric[])",
        f"INSERT INTO t VALUES (1, {row})",
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, f"INSERT INTO t VALUES (1 + 1, {row})")
        await settled(config)
    read, inserted = await events(config, "t")
    exact = {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "NaN", "e": "Infinity", "f": ["NaN", 1.5]}
    assert read["after"] == {"id": 1, **exact}
    assert inserted["after"] in ({"id": 2, **exact}, {"id": 2, **dict.fromkeys("abcde"), "f": ["NaN", 1.5]})


async def test_generated_columns_are_the_same_in_snapshot_and_stream(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED)",
        "INSERT INTO t VALUES (1)",
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (2)")
        await settled(config)
    assert [e["after"] for e in await events(config, "t")] == [{"id": 1, "twice": 2}, {"id": 2, "twice": 4}]
    assert [m.op for m, e in await messages(config) if e.table == "t"] == ["snapshot", "read", "snapshot", "insert"]
