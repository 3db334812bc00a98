"""Tables with keys of every kind, read while the stream flows: no row falls between two chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from bridge.embedded import NatsServer
from bridge.operate.verify import verify
from bridge.pipeline import reading
from bridge.source import chunks
from tests.oracle import agrees
from tests.reading.checker import from_last_begin, never_back
from tests.reading.steps import ask, chunks_of, read_again
from tests.running import bridge, execute, settled, source

pytestmark = pytest.mark.anyio

COUNT = 40


class Key(NamedTuple):
    """A column that is a key: its type, its values by g (1 … COUNT), and another value for one row."""

    type: str
    value: str
    other: str = ""


TYPES = [
    "CREATE SCHEMA ext",
    "CREATE EXTENSION citext SCHEMA ext",
    "CREATE EXTENSION ltree SCHEMA ext",
    """CREATE TYPE "Mood, or.so" AS ENUM ('b', 'a', 'C', 'o''k')""",
    "CREATE TYPE pair AS (n int, w text)",
    "CREATE DOMAIN even AS int",
    "CREATE DOMAIN word AS text",
    "CREATE DOMAIN words AS word[]",
    "CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
    "CREATE COLLATION de (provider = icu, locale = 'de')",
]
# Rows from before a domain was narrowed.
LATER = ["ALTER DOMAIN even ADD CONSTRAINT narrow CHECK (VALUE % 2 = 0) NOT VALID"]
KEYS = {
    "citext": Key("ext.citext", "CASE g % 2 WHEN 0 THEN 'K' ELSE 'k' END || lpad(g::text, 3, '0')", "'Z'"),
    "ltree": Key("ext.ltree", "('a.b' || g)::ext.ltree", "'a.Z'"),
    "domain": Key("even", "g", "2000"),
    "domain_text": Key("word", "chr(64 + g % 40) || g", "'a''b'"),
    "domain_array": Key("words", "ARRAY['x' || g % 3, NULL, 'a,\"' || g]", "'{}'"),
    "composite": Key("pair", "ROW(g % 3, 'a,\"' || g)::pair"),
    "range": Key("int4range", "int4range(g % 5, 10 + g)", "'empty'"),
    "ints": Key("int[]", "ARRAY[g % 3, g]", "'{}'"),
    "loose": Key("text COLLATE ci", "CASE g % 2 WHEN 0 THEN 'K' ELSE 'k' END || g", "'ä'"),
    "german": Key("text COLLATE de", "(ARRAY['ä', 'a', 'Z', 'z', 'ß'])[g % 5 + 1] || g", "'Ö'"),
    "numbers": Key("numeric", "CASE g WHEN 1 THEN 'NaN' WHEN 2 THEN '1.500' ELSE (g - 25)::numeric / 7 END", "1e30"),
    "floats": Key(
        "float8",
        "CASE g WHEN 1 THEN 'NaN' WHEN 2 THEN '-Infinity' WHEN 3 THEN 'Infinity' WHEN 4 THEN '-0'"
        " ELSE (g - 25.5) / 7.0 END::float8",
        "1e-300",
    ),
    "reals": Key("real", "(g - 25) / 7.0", "3.4e38"),
    "moments": Key(
        "timestamp",
        "CASE g WHEN 1 THEN '-infinity' WHEN 2 THEN 'infinity' WHEN 3 THEN '0044-03-15 10:00 BC' WHEN 4 THEN"
        " '12026-01-01' ELSE timestamp '2020-01-01' + (g - 25) * interval '1 day 1 us' END",
        "'0001-01-01'",
    ),
    "days": Key("date", "CASE g WHEN 1 THEN 'infinity' ELSE date '0001-02-01' - g END", "'2020-02-29'"),
    "spans": Key("interval", "(g - 25) * interval '1 mon -1 day 0.5 s'", "'100 years'"),
    "bytes": Key("bytea", "decode(md5(g::text), 'hex')", r"'\x00ff27'"),
    "uuids": Key("uuid", "md5(g::text)::uuid", "'00000000-0000-0000-0000-000000000000'"),
    "hosts": Key("inet", "CASE g % 2 WHEN 0 THEN inet '::1' + g ELSE inet '10.0.0.0/8' + g END", "'1.2.3.4'"),
    "documents": Key(
        "jsonb", """jsonb_build_object('a', g % 3, 'after', jsonb_build_object(',"after":{', g))""", "'[]'"
    ),
    "money": Key("money", "(g * 1000 - 25000)::money", "'-0.01'"),
    "bits": Key("bit(12)", "g::bit(12)", "B'111111111111'"),
    "hours": Key("timetz", "timetz '00:00+02' + g * interval '1 min'", "'23:00-05'"),
    "ids": Key("pg_lsn", "('0/' || to_hex(g))::pg_lsn", "'F/0'"),
    "names": Key("name", "('é''\\' || g)::name", "'x'"),
    "short": Key("char(6)", "g::text", "'zz'"),
    "vectors": Key("tsvector", "to_tsvector('simple', 'w' || g || ' ' || g % 3)", "''"),
}
PAIRED = {"mood": ('"Mood, or.so"', """(ARRAY['b', 'a', 'C', 'o''k'])[g % 4 + 1]::"Mood, or.so\"""")}
PAIRED |= {"flag": ("boolean", "g % 2 = 0"), "letter": ('"char"', 'chr(65 + g % 5)::"char"')}
ODD = {
    # Whatever is in quotes; a key whose index has another order than the table.
    "odd": (
        'CREATE TABLE "Odd.Näme ""q""" ("n.1" int, "B""" text, "v" bigint, "%s" text, "body" text, '
        'PRIMARY KEY ("B""", "n.1"))',
        """INSERT INTO "Odd.Näme ""q\""" SELECT g, 'w' || g % 7, g, 'p', repeat('x', 3000)"""
        " FROM generate_series(1, 40) g",
        """UPDATE "Odd.Näme ""q\""" SET "n.1" = -1, v = 1000 WHERE "n.1" = 36""",
        'Odd.Näme "q"',
    ),
    "many": (
        f"CREATE TABLE many ({', '.join(f'c{n} int' for n in range(32))}, v bigint, body text, "
        f"PRIMARY KEY ({', '.join(f'c{n}' for n in reversed(range(32)))}))",
        f"INSERT INTO many SELECT {', '.join(f'g % {n + 2}' for n in range(31))}, g, g, repeat('x', 3000)"
        " FROM generate_series(1, 40) g",
        "UPDATE many SET c31 = -1, v = 1000 WHERE c31 = 36",
        "many",
    ),
    # Equal in the column's collation, and not so in that of the index which is the identity.
    "other": (
        "CREATE TABLE other (id text COLLATE ci NOT NULL, v bigint, body text)",
        "INSERT INTO other SELECT CASE g % 2 WHEN 0 THEN 'K' ELSE 'k' END || g / 2, g, repeat('x', 3000)"
        " FROM generate_series(1, 40) g",
        "UPDATE other SET id = 'A', v = 1000 WHERE v = 36",
        "other",
    ),
}
IDENTITY = [
    'CREATE UNIQUE INDEX exact ON other (id COLLATE "C" DESC)',
    "ALTER TABLE other REPLICA IDENTITY USING INDEX exact",
]


async def _made(dsn: str) -> dict[str, str]:
    """The statement that moves a row of each table, by the table's name."""
    await execute(dsn, *TYPES)
    moves = {}
    for name, key in KEYS.items():
        await execute(
            dsn,
            f"CREATE TABLE {name} (k {key.type} PRIMARY KEY, v bigint NOT NULL, body text)",
            f"ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL",
            f"INSERT INTO {name} SELECT {key.value}, g, repeat('x', 3000) FROM generate_series(1, {COUNT}) g",
        )
        moves[name] = f"UPDATE {name} SET k = {key.other}, v = 1000 WHERE v = 36" if key.other else ""
    for name, (kind, value) in PAIRED.items():
        await execute(
            dsn,
            f"CREATE TABLE {name} (k {kind}, n int, v bigint NOT NULL, body text, PRIMARY KEY (k, n))",
            f"ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL",
            f"INSERT INTO {name} SELECT {value}, g, g, repeat('x', 3000) FROM generate_series(1, {COUNT}) g",
        )
        moves[name] = f"UPDATE {name} SET n = -1, v = 1000 WHERE v = 36"
    for table, rows, move, name in ODD.values():
        await execute(dsn, table)
        if name == "other":
            await execute(dsn, *IDENTITY)
        quoted = name.replace('"', '""')
        await execute(dsn, f'ALTER TABLE "{quoted}" ALTER body SET STORAGE EXTERNAL', rows)
        moves[name] = move
    await execute(dsn, *LATER)
    return moves


def _moving(monkeypatch: pytest.MonkeyPatch, dsn: str, moves: dict[str, str]) -> None:
    """After a table's first chunk a row of it moves, most likely to where no chunk comes by any more."""
    publish, left = reading.Reading._publish, dict(moves)

    async def moved(self: reading.Reading, sql: Any, chunk: chunks.Chunk) -> None:
        await publish(self, sql, chunk)
        if statement := left.pop(chunk.plan.relation.table, ""):
            await execute(dsn, statement)

    monkeypatch.setattr(reading.Reading, "_publish", moved)


async def test_keys_of_every_kind_are_read_whole_and_compared(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, 22)
    config = source(pg_db, nats.url, workers=4)
    moves = await _made(pg_db)
    _moving(monkeypatch, pg_db, moves)
    async with bridge(config):
        await settled(config)
        for name in moves:
            await ask(config, name)
        for name in moves:
            assert abs((await read_again(config, name)).rows - COUNT) <= 1, name
        await settled(config)
        for report in await verify(config, [nats.url], []):
            assert report.same, report
            assert report.rows == report.logged
    await execute(pg_db, "ALTER DOMAIN even DROP CONSTRAINT narrow")
    found = await agrees(config)
    for name in moves:
        assert never_back(found, name) >= 2 * COUNT - 1
        begin, rows = from_last_begin(found, name)
        assert begin > COUNT
        assert len(rows) == COUNT
