"""The tables that are indexed, and what writes to them meanwhile.

Each is here for what is hard about it: `posts` has TOASTed columns that updates leave alone, keys that change, and
values of many types; `words` has a composite key of text that reads like something else; `days` has partitions between
which rows move. A template database is made once on a server; each scenario gets a copy.
"""

from __future__ import annotations

import random

from bridge.embedded import Postgres
from tests.crash.writers import Writers
from tests.crash_index.transforms import POISON
from tests.running import execute

TEMPLATE = "crash_index_template"
KEYS = {"posts": ["id"], "words": ["word", "lang"], "days": ["day", "n"]}
OTHERS = {
    "posts": ["title", "body", "seen", "price", "extra", "raw", "at"],
    "words": ["n", "body"],
    "days": ["note", "seen"],
}
TABLES = """
CREATE TABLE posts (id bigint PRIMARY KEY, title text NOT NULL, body text, seen int NOT NULL DEFAULT 0,
                    price numeric, extra jsonb, raw bytea, at timestamptz);
ALTER TABLE posts ALTER body SET STORAGE EXTERNAL, ALTER extra SET STORAGE EXTERNAL, ALTER raw SET STORAGE EXTERNAL;
CREATE TABLE words (word text, lang text, n numeric(20,8), body text, PRIMARY KEY (word, lang));
ALTER TABLE words ALTER body SET STORAGE EXTERNAL;
CREATE TABLE days (day date, n int, note text, seen int, PRIMARY KEY (day, n)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
ALTER TABLE days_1 ALTER note SET STORAGE EXTERNAL;
ALTER TABLE days_2 ALTER note SET STORAGE EXTERNAL;
INSERT INTO posts SELECT g, 'title ' || g, repeat(md5(g::text), 130), g % 5, g / 7.0, jsonb_build_object('n', g),
  decode(md5(g::text), 'hex'), '2026-01-01'::timestamptz + g * interval '1 minute' FROM generate_series(1, 300) g;
INSERT INTO words SELECT w, l, length(w) / 3.0, repeat(md5(w), 100) FROM unnest(ARRAY['', 'true', 'null', '42',
  '-1.5e3', 'a|b', 'a\\|b', '''x', '[1]', '{"a":1}', '#hash', '"quoted"', 'ü 語', E'line\\nbreak', ' ', '%2F/?&',
  repeat('long', 200)]) w, unnest(ARRAY['de', 'e|n', '1', '']) l;
INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, CASE WHEN g % 3 = 0 THEN repeat(md5(g::text), 120) END, 0
  FROM generate_series(1, 300) g;
"""
FULL = "ALTER TABLE {} REPLICA IDENTITY FULL"
PARTS = {"posts": ["posts"], "words": ["words"], "days": ["days", "days_1", "days_2"]}
# What a transaction picks from; {r} is a random number, the same in one text. No jsonb is null itself: an event spells
# that as it spells NULL.
EDITS = {
    "posts": [
        "UPDATE posts SET seen = seen + 1 WHERE id % 10 = {r} % 10 AND id < 9000",
        "UPDATE posts SET title = 'edited {r}' WHERE id BETWEEN {r} % 300 AND {r} % 300 + 15",
        "UPDATE posts SET body = repeat(md5('{r}'), 150), raw = decode(repeat(md5('{r}'), 90), 'hex')"
        " WHERE id = {r} % 300",
        "UPDATE posts SET body = NULL WHERE id = {r} % 300",
        "UPDATE posts SET extra = jsonb_build_object('a', {r}, 'b', repeat('x{r}', 700), 'c', '[1, {}, null]'::jsonb)"
        " WHERE id % 50 = {r} % 50 AND id < 9000",
        "UPDATE posts SET extra = (ARRAY['3.10', '\"text\"', '[]', 'true', '{\"_bridge\": 1e400}'])[1 + {r} % 5]::jsonb"
        " WHERE id % 50 = {r} % 50 AND id < 9000",
        "UPDATE posts SET price = {r} / 1000000000000.0, at = '2026-01-01'::timestamptz + {r} * interval '1.000001 s'"
        " WHERE id % 40 = {r} % 40 AND id < 9000",
        "UPDATE posts SET price = 12345678901234567890123456789.0123456789 WHERE id = {r} % 300",
        "UPDATE posts SET id = id + 1000 WHERE id = {r} % 300",
        "UPDATE posts SET id = id - 1000, seen = seen + 1 WHERE id BETWEEN 1000 AND 1300",
        "UPDATE posts SET id = -id WHERE id % 97 = {r} % 97",
        "UPDATE posts SET id = 5000 WHERE id = {r} % 300; UPDATE posts SET seen = seen + 1 WHERE id = 5000;"
        " UPDATE posts SET id = 5001 + {r} WHERE id = 5000; UPDATE posts SET title = 'moved' WHERE id = 5001 + {r}",
        "UPDATE posts SET id = 6000 WHERE id = {r} % 300; UPDATE posts SET id = {r} % 300 WHERE id = {r} % 300 + 1;"
        " UPDATE posts SET id = {r} % 300 + 1 WHERE id = 6000",
        "DELETE FROM posts WHERE id % 60 = {r} % 60",
        "DELETE FROM posts WHERE id = {r} % 300;"
        " INSERT INTO posts VALUES ({r} % 300, 'again {r}', repeat('{r}', 900), 1)",
        "INSERT INTO posts SELECT g, 'new', repeat('n{r}', 800), g % 7, g"
        " FROM generate_series({r} % 300, {r} % 300 + 9) g ON CONFLICT DO NOTHING",
        "INSERT INTO posts SELECT {r} + 9000 + g, 'more', NULL FROM generate_series(1, 20) g ON CONFLICT DO NOTHING",
        "DO $$ BEGIN FOR i IN 1..40 LOOP UPDATE posts SET seen = seen + 1, price = i WHERE id = {r} % 300;"
        " END LOOP; END $$",
        "DO $$ BEGIN FOR i IN 1..8 LOOP DELETE FROM posts WHERE id = 7000;"
        " INSERT INTO posts VALUES (7000, 'life ' || i, repeat(md5(i::text), 100)); UPDATE posts SET seen = i"
        " WHERE id = 7000; END LOOP; END $$",
        "SAVEPOINT a; UPDATE posts SET body = 'undone'; ROLLBACK TO a; UPDATE posts SET seen = 1 WHERE id = {r} % 300",
    ],
    "words": [
        "UPDATE words SET n = n + 0.00000001 WHERE lang = 'e|n'",
        "UPDATE words SET body = repeat(md5('{r}'), 90) WHERE word < 'a' AND lang = '1'",
        "UPDATE words SET lang = lang || '|' WHERE word = 'a|b' AND length(lang) < 8",
        "UPDATE words SET word = word || '\\' WHERE lang = '' AND length(word) < 12",
        "UPDATE words SET word = '''' || word, n = 1 WHERE lang = 'de' AND length(word) < 8 AND {r} % 3 = 0",
        "UPDATE words SET word = '{r}' WHERE word IN ('42', 'true') AND lang = '1'",
        "INSERT INTO words VALUES ('42', '1', 1, NULL), ('true', '', 2, repeat('{r}', 500)), ('', '', NULL, NULL)"
        " ON CONFLICT (word, lang) DO UPDATE SET n = words.n + 1",
        "INSERT INTO words VALUES (repeat('w{r}', 70), 'de', {r}, repeat('{r}', 600)), ('{r}', 'null', 0, NULL)"
        " ON CONFLICT DO NOTHING",
        "DELETE FROM words WHERE length(word) > 20 AND {r} % 4 = 0",
        "DELETE FROM words WHERE word = '42'",
        "DO $$ BEGIN FOR i IN 1..25 LOOP UPDATE words SET n = i WHERE word = 'null'; END LOOP; END $$",
    ],
    "days": [
        "UPDATE days SET day = day + 28 WHERE n % 40 = {r} % 40 AND day < '2026-02-01'",
        "UPDATE days SET day = day - 28 WHERE n % 40 = {r} % 40 AND day >= '2026-02-01'",
        "UPDATE days SET seen = seen + 1 WHERE n % 25 = {r} % 25",
        "UPDATE days SET n = n + 1000 WHERE n = {r} % 300",
        "UPDATE days SET note = repeat('{r}', 700) WHERE n % 50 = {r} % 50",
        "DELETE FROM days WHERE n % 70 = {r} % 70",
        "INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, repeat(md5(g::text), 100), 0"
        " FROM generate_series({r} % 300, {r} % 300 + 20) g ON CONFLICT DO NOTHING",
        "DO $$ BEGIN FOR i IN 1..20 LOOP UPDATE days SET seen = i WHERE n = {r} % 300; END LOOP; END $$",
    ],
}
RARE = {
    "posts": [
        "TRUNCATE posts",
        "INSERT INTO posts SELECT {r} + 9000 + g, 'bulk', NULL FROM generate_series(1, 1100) g",
    ],
    "words": ["TRUNCATE words"],
    "days": ["TRUNCATE days_1", "TRUNCATE days_2", "TRUNCATE days", "TRUNCATE days_1, days_2"],
}
ADDED = "ALTER TABLE {table} ADD COLUMN IF NOT EXISTS more_{c} {t}; UPDATE {table} SET more_{c} = '{v}' WHERE {some}"
SOME = {"posts": "id % 9 = 0 AND id < 9000", "words": "lang = '1'", "days": "n % 9 = 0"}
KINDS = [
    ("int", "7"),
    ("text", "some text"),
    ("numeric", "1.50"),
    ("timestamptz", "2026-05-05 05:05:05.5+02"),
    ("jsonb", "[1]"),
]
POISONS = [
    f"UPDATE posts SET title = '{POISON} {{r}}' WHERE id % 80 = {{r}} % 80",
    "UPDATE posts SET title = 'cured {r}' WHERE id % 20 = {r} % 20",
]
WRITERS = 2
# So many transactions, and the writers slow down: what takes long must not take even longer to compare.
ENOUGH = 150


async def prepare(server: Postgres) -> None:
    """Make the template database."""
    await execute(server.dsn(), f"CREATE DATABASE {TEMPLATE}")
    await execute(server.dsn(TEMPLATE), TABLES)


def added(table: str, number: int) -> str:
    """A new column of a table, and rows that have a value in it."""
    kind, value = KINDS[number % len(KINDS)]
    return ADDED.format(table=table, c=number, t=kind, v=value, some=SOME[table])


def load(dsn: str, seed: int, tables: list[str], *, poison: bool) -> Writers:
    """What writes to the tables of a scenario."""
    edits = [edit for table in tables for edit in EDITS[table]] + (POISONS if poison else [])
    rare = [edit for table in tables for edit in RARE[table]]

    def scripts(choose: random.Random) -> list[str]:
        texts = choose.sample(edits, choose.randint(1, 4)) + choose.sample(rare, choose.random() < 0.03)
        if choose.random() < 0.02:
            texts.append(added(choose.choice(tables), choose.randrange(len(KINDS))))
        choose.shuffle(texts)
        script = "; ".join(text.replace("{r}", str(choose.randint(1, 10**6))) for text in texts)
        return [f"BEGIN; {script}; {'ROLLBACK' if choose.random() < 0.1 else 'COMMIT'}"]

    return Writers(dsn, seed, scripts, count=WRITERS, enough=ENOUGH, soon=0.2, late=1.5)
