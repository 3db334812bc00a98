"""What is in the database before, and what writes to it meanwhile.

A template database is made once on a server; each scenario gets a copy. Its tables are such as differ in what
PostgreSQL logs of them: TOASTed columns that stay away, REPLICA IDENTITY FULL without a key, partitions, keys of two
columns that change.
"""

from __future__ import annotations

import random

from bridge.embedded import Postgres
from tests.crash.writers import Writers
from tests.running import execute

TEMPLATE = "crash_template"
TABLES = """
CREATE TABLE notes (id int PRIMARY KEY, title text, body text, seen int DEFAULT 0);
ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
CREATE TABLE loose (word text, number numeric, body text);
ALTER TABLE loose ALTER body SET STORAGE EXTERNAL;
ALTER TABLE loose REPLICA IDENTITY FULL;
CREATE TABLE days (day date, n int, note text, PRIMARY KEY (day, n)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
INSERT INTO notes SELECT g, 'title ' || g, repeat(md5(g::text), 200) FROM generate_series(1, 400) g;
INSERT INTO loose SELECT 'word ' || g, nullif(g % 5, 0), CASE WHEN g % 3 = 0 THEN repeat(md5(g::text), 150) END
  FROM generate_series(1, 100) g;
INSERT INTO days SELECT '2026-01-01'::date + g % 59, g, 'day' FROM generate_series(1, 200) g;
"""
MORE_TABLES = """
CREATE TABLE accounts (id int PRIMARY KEY, balance bigint, filler text, spare_0 int, spare_1 int, spare_2 int);
CREATE TABLE pairs (a text, b int, n int, PRIMARY KEY (a, b));
INSERT INTO accounts SELECT g, g * 100, repeat('x', 80), g, g, g FROM generate_series(1, {rows}) g;
INSERT INTO pairs SELECT 'a' || g % 10, g, g FROM generate_series(1, 300) g;
CREATE PROCEDURE burst(times int, r int) LANGUAGE plpgsql AS $$ BEGIN
  FOR i IN 1..times LOOP
    UPDATE accounts SET balance = balance + i WHERE id = 1 + (r + i * 17) % {rows}; COMMIT;
  END LOOP; END $$;
"""
ROWS = 5000
# What a transaction picks from; {r} is a random number.
EDITS = [
    "UPDATE notes SET seen = seen + 1 WHERE id % 10 = {r} % 10",
    "UPDATE notes SET title = 'edited {r}' WHERE id BETWEEN {r} % 400 AND {r} % 400 + 20",
    "UPDATE notes SET body = repeat(md5('{r}'), 150) WHERE id = {r} % 400",
    "UPDATE notes SET id = id + 1000000 WHERE id = {r} % 400",
    "DELETE FROM notes WHERE id = {r} % 400",
    "INSERT INTO notes SELECT g, 'new', repeat('x{r}', 900) FROM generate_series({r} * 100, {r} * 100 + 5) g",
    "UPDATE loose SET number = {r} WHERE word = 'word ' || {r} % 100",
    "UPDATE loose SET word = NULL WHERE number = {r} % 5 AND word < 'word 3'",
    "DELETE FROM loose WHERE word = 'word ' || {r} % 100",
    "INSERT INTO loose VALUES ('same', 1.10, NULL), ('same', 1.10, NULL), (NULL, NULL, repeat('{r}', 2500))",
    "UPDATE days SET day = day + 30 WHERE n = {r} % 200 AND day < '2026-01-28'",
    "UPDATE days SET note = 'edited {r}' WHERE n % 20 = {r} % 20",
    "SAVEPOINT a; INSERT INTO notes VALUES (-{r}, 'kept', NULL); SAVEPOINT b;"
    " INSERT INTO notes VALUES (-{r} - 1, 'undone', NULL); ROLLBACK TO b; DELETE FROM loose WHERE number = {r} % 7",
    "SELECT pg_logical_emit_message({r} % 2 = 0, 'app.' || {r} % 3, 'text {r}')",
    "SELECT pg_logical_emit_message({r} % 2 = 0, 'other', 'text {r}')",
]
MORE_EDITS = [
    "UPDATE accounts SET balance = balance - {r} WHERE id % 250 = {r} % 250",
    "DELETE FROM accounts WHERE id = {r} % 5000",
    "INSERT INTO accounts (id, balance) SELECT {r} * 1000 + g, g FROM generate_series(1, 60) g",
    "UPDATE pairs SET b = b + 1000, n = n + 1 WHERE b % 40 = {r} % 40",
    "UPDATE pairs SET a = 'b' || {r} WHERE b = {r} % 300",
    "INSERT INTO pairs VALUES ('c', {r}, 1) ON CONFLICT (a, b) DO UPDATE SET n = pairs.n + 1",
]
RARE = [
    "TRUNCATE days_1",
    "TRUNCATE loose, days",
    "TRUNCATE pairs",
    "ALTER TABLE pairs ADD COLUMN IF NOT EXISTS more_{r} int; UPDATE pairs SET more_{r} = n WHERE b % 3 = 0",
    "ALTER TABLE accounts DROP COLUMN IF EXISTS spare_0",
    "INSERT INTO notes SELECT {r} * 1000 + g, 'bulk', NULL FROM generate_series(1, 3000) g",
]
WRITERS = 3
# So many groups of transactions, and the writers slow down: what takes long must not take even longer to compare.
ENOUGH = 200


async def prepare(server: Postgres) -> None:
    """Make the template database."""
    await execute(server.dsn(), f"CREATE DATABASE {TEMPLATE}")
    await execute(server.dsn(TEMPLATE), TABLES, MORE_TABLES.replace("{rows}", str(ROWS)))


def load(dsn: str, seed: int) -> Writers:
    """What writes to the database."""

    def scripts(choose: random.Random) -> list[str]:
        return [statement(choose) for _ in range(choose.randint(1, 3))]

    return Writers(dsn, seed, scripts, count=WRITERS, enough=ENOUGH, soon=0.12, late=1)


def statement(choose: random.Random) -> str:
    """A transaction of one to five edits, rolled back at times; or many of one row each."""
    if choose.random() < 0.2:
        return f"CALL burst({choose.randint(5, 80)}, {choose.randint(1, 10**6)})"
    rare = choose.sample(RARE, choose.random() < 0.02)
    texts = choose.sample([*EDITS, *MORE_EDITS], choose.randint(1, 5)) + rare
    script = "; ".join(text.replace("{r}", str(choose.randint(1, 10**6))) for text in texts)
    return f"BEGIN; {script}; {'ROLLBACK' if choose.random() < 0.1 else 'COMMIT'}"
