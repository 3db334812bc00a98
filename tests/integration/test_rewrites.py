"""DDL that changes rows without a change in PostgreSQL's log: each kind on purpose, and what must not be taken for it.

Nobody asks for anything here: the log must come to be what the table is by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from bridge.config import Config
from bridge.embedded import NatsServer
from tests.oracle import agrees
from tests.rewriting import MADE, begins, caught_up
from tests.running import bridge, execute, settled, source, statuses

pytestmark = pytest.mark.anyio

FRESH = "CREATE TABLE {} (id int PRIMARY KEY, v int NOT NULL, body text)"
BEYOND = "FOR VALUES FROM (200) TO (300)"
LOOSE = f"ALTER TABLE p ATTACH PARTITION aside.loose {BEYOND}"
THIRD = f"CREATE TABLE p3 PARTITION OF p {BEYOND}"
INTO_THIRD = "INSERT INTO p VALUES (201, 1, 'n')"
# A bridge that runs is let see what has happened so far.
SEEN = ""

CHANGES = {
    "default": ["ALTER TABLE t ADD extra int DEFAULT 7"],
    "volatile default": ["ALTER TABLE t ADD extra float8 DEFAULT random()"],
    "stored": ["ALTER TABLE t ADD twice int GENERATED ALWAYS AS (v * 2) STORED"],
    "identity": ["ALTER TABLE t ADD n int GENERATED ALWAYS AS IDENTITY"],
    "domain": ["CREATE DOMAIN seven AS int DEFAULT 7", "ALTER TABLE t ADD extra seven"],
    "another type": ["ALTER TABLE t ALTER v TYPE numeric(10, 2) USING v / 4.0"],
    "the same type": ["ALTER TABLE t ALTER v TYPE int USING v - 1000"],
    "the same type after a truncate": [
        "TRUNCATE t; INSERT INTO t VALUES (1, 1, 'n')",
        "BEGIN; SAVEPOINT a; ALTER TABLE t ALTER v TYPE int USING v - 1000; COMMIT",
    ],
    "fewer digits": [
        "ALTER TABLE t ALTER v TYPE numeric(9, 3) USING v / 8.0",
        "ALTER TABLE t ALTER v TYPE numeric(9, 1)",
    ],
    "renamed column": ["ALTER TABLE t RENAME body TO words"],
    "column made again": ["ALTER TABLE t DROP body, ADD body text"],
    "column made again later": ["ALTER TABLE t DROP body", SEEN, "ALTER TABLE t ADD body text"],
    "another key": ["ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v)"],
    "another identity": ["CREATE UNIQUE INDEX tv ON t (v)", "ALTER TABLE t REPLICA IDENTITY USING INDEX tv"],
    "made again": ["DROP TABLE t", FRESH.format("t")],
    "made again with rows": ["DROP TABLE t", FRESH.format("t"), "INSERT INTO t VALUES (5, 5, 'x'), (99, 9, 'y')"],
    "made again later": ["DROP TABLE t", SEEN, FRESH.format("t"), "INSERT INTO t VALUES (5, 5, 'x')"],
    "swapped": [
        "BEGIN; CREATE TABLE n AS SELECT id, v * 2 AS v, body FROM t WHERE id % 2 = 0"
        "; ALTER TABLE n ADD PRIMARY KEY (id); DROP TABLE t; ALTER TABLE n RENAME TO t; COMMIT"
    ],
    "unlogged for a time": ["ALTER TABLE t SET UNLOGGED", "UPDATE t SET v = v - 1000", "ALTER TABLE t SET LOGGED"],
    "elsewhere for a time": [
        "ALTER TABLE t SET SCHEMA aside",
        "UPDATE aside.t SET v = v - 1000; DELETE FROM aside.t WHERE id < 5",
        "ALTER TABLE aside.t SET SCHEMA public",
    ],
    "elsewhere for longer": [
        "ALTER TABLE t SET SCHEMA aside",
        SEEN,
        "UPDATE aside.t SET v = v - 1000",
        "ALTER TABLE aside.t SET SCHEMA public",
    ],
    "published from now on": ["ALTER TABLE aside.loose SET SCHEMA public"],
    "root with default": ["ALTER TABLE p ADD extra int DEFAULT 7"],
    "dropped partition": ["DROP TABLE p1"],
    "detached partition": ["ALTER TABLE p DETACH PARTITION p1"],
    "detached tree": ["ALTER TABLE p DETACH PARTITION p2"],
    "dropped tree": ["DROP TABLE p2"],
    "dropped leaf": ["DROP TABLE p21"],
    "attached": [LOOSE],
    "attached leaf": [
        "CREATE TABLE q (id int PRIMARY KEY, v int, body text) PARTITION BY RANGE (id)",
        LOOSE.replace(" p ", " q "),
        "ALTER TABLE p ATTACH PARTITION q FOR VALUES FROM (200) TO (400)",
    ],
    "detached for a time": [
        "ALTER TABLE p DETACH PARTITION p1",
        "ALTER TABLE p1 SET SCHEMA aside",
        "UPDATE aside.p1 SET v = 0 WHERE id > 50",
        "ALTER TABLE p ATTACH PARTITION aside.p1 FOR VALUES FROM (0) TO (100)",
    ],
    "exchanged": [
        "BEGIN; ALTER TABLE p DETACH PARTITION p1; ALTER TABLE p1 SET SCHEMA aside"
        "; CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100); INSERT INTO p VALUES (4, 4, 'new'); COMMIT"
    ],
    "a partition for a time": [
        FRESH.format("u"),
        "INSERT INTO u SELECT g, g FROM generate_series(200, 220) g",
        SEEN,
        LOOSE.replace("aside.loose", "u"),
        SEEN,
        "UPDATE p SET v = 0 WHERE id >= 210",
        "ALTER TABLE p DETACH PARTITION u",
    ],
    "renamed partition": ["ALTER TABLE p1 RENAME TO p1_old", "TRUNCATE p1_old"],
    "a partition's own": ["ALTER TABLE p1 SET UNLOGGED", "UPDATE p1 SET v = 0", "ALTER TABLE p1 SET LOGGED"],
}

HARMLESS = {
    "truncate": ["TRUNCATE t"],
    "truncate and fill": ["BEGIN; TRUNCATE t; INSERT INTO t VALUES (1, 1, 'n'); COMMIT"],
    "truncate in a subtransaction": [
        "ALTER TABLE p ADD extra int",
        "BEGIN; SAVEPOINT a; TRUNCATE t; RELEASE a; INSERT INTO t VALUES (1, 1); COMMIT",
    ],
    "truncate twice": ["TRUNCATE t", "INSERT INTO t VALUES (1, 1, 'n')", "TRUNCATE t"],
    "truncate all partitions": ["TRUNCATE p", "INSERT INTO p VALUES (1, 1, 'n'), (120, 1, 'n')"],
    "truncate a partition": ["TRUNCATE p21"],
    "null": ["ALTER TABLE t ADD extra int", "UPDATE t SET extra = 1 WHERE id < 5", "ALTER TABLE p ADD extra int"],
    "dropped column": ["ALTER TABLE t DROP body", "ALTER TABLE p DROP body"],
    "varchar": ["ALTER TABLE t ALTER body TYPE varchar", "ALTER TABLE t ALTER w TYPE varchar(900)"],
    "new partition": [THIRD, INTO_THIRD],
    "new and truncated": [THIRD, INTO_THIRD, "TRUNCATE p3", INTO_THIRD],
    "new tree": [
        "BEGIN; CREATE TABLE p3 PARTITION OF p FOR VALUES FROM (200) TO (400) PARTITION BY RANGE (id)"
        f"; CREATE TABLE p31 PARTITION OF p3 {BEYOND}; {INTO_THIRD}; COMMIT",
        "CREATE TABLE p32 PARTITION OF p3 FOR VALUES FROM (300) TO (400)",
        "INSERT INTO p VALUES (301, 1, 'n')",
    ],
    "attached without rows": [FRESH.format("aside.e"), LOOSE.replace("loose", "e")],
    "filled and attached at once": [
        f"BEGIN; CREATE TABLE p3 (LIKE p INCLUDING ALL); INSERT INTO p3 VALUES (201, 1)"
        f"; ALTER TABLE p ATTACH PARTITION p3 {BEYOND}; COMMIT"
    ],
    "vacuum": ["DELETE FROM t WHERE id < 10", "VACUUM t", "ANALYZE t", "VACUUM (ANALYZE) p"],
    "index": ["CREATE INDEX ON t (body)", "CREATE INDEX ON p (body)", "REINDEX TABLE t"],
    "constraint": ["ALTER TABLE t ALTER body SET NOT NULL, ADD CHECK (id > 0)", "ALTER TABLE t ALTER v SET DEFAULT 3"],
    "owner and rights": [
        "DO $$ BEGIN CREATE ROLE other; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        "ALTER TABLE t OWNER TO other",
        "GRANT SELECT ON t TO PUBLIC",
        "GRANT SELECT (id) ON t TO PUBLIC",
    ],
    "full identity": ["ALTER TABLE t REPLICA IDENTITY FULL", "UPDATE t SET v = v - 100 WHERE id < 5"],
    "trigger": [
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER x BEFORE INSERT ON t EXECUTE FUNCTION f()",
    ],
    "temporary": ["CREATE TEMP TABLE x AS SELECT * FROM t; DROP TABLE x"],
}
MADE_MEANWHILE = {
    "new table": [
        "BEGIN; CREATE TABLE n (id serial PRIMARY KEY, u text UNIQUE, v int REFERENCES t); CREATE INDEX ON n (v)"
        "; INSERT INTO n (u) VALUES ('a'), ('b'); COMMIT",
        "INSERT INTO n (u) VALUES ('c')",
    ],
    "table of a query": ["CREATE TABLE n AS SELECT * FROM t", "INSERT INTO n VALUES (100, 100, 'n')"],
    "new table of partitions": [
        "CREATE TABLE n (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE n1 PARTITION OF n FOR VALUES FROM (0) TO (9)",
        "INSERT INTO n VALUES (1), (2)",
    ],
}


async def running(config: Config, statements: list[str]) -> None:
    """Runs them while a bridge runs."""
    async with bridge(config):
        await caught_up(config)
        for statement in statements:
            await (execute(str(config.source.dsn), statement) if statement != SEEN else caught_up(config))
        await caught_up(config)


async def between(config: Config, statements: list[str]) -> None:
    """Runs them while none does."""
    async with bridge(config):
        await caught_up(config)
    await execute(str(config.source.dsn), *filter(None, statements))
    async with bridge(config):
        await caught_up(config)


@pytest.mark.parametrize("when", [running, between])
@pytest.mark.parametrize("name", CHANGES)
async def test_rows_that_ddl_changes_come_into_the_log_by_themselves(
    pg_db: str, nats: NatsServer, name: str, when: Callable[[Config, list[str]], Awaitable[None]]
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    await when(config, CHANGES[name])
    async with bridge(config):
        # By a key that the log must know by now.
        await execute(pg_db, "DELETE FROM t WHERE id % 7 = 0", "DELETE FROM p WHERE id % 7 = 0")
        await settled(config)
    await agrees(config, rewritten=["t", "p"])
    assert {one.state for one in (await statuses(config)).values()} == {"done"}


@pytest.mark.parametrize("when", [running, between])
@pytest.mark.parametrize("name", HARMLESS)
async def test_what_changes_no_row_behind_the_log_is_not_read_again(
    pg_db: str, nats: NatsServer, name: str, when: Callable[[Config, list[str]], Awaitable[None]]
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    await when(config, HARMLESS[name])
    assert begins(await agrees(config)) == ["mark", "p", "t"]


@pytest.mark.parametrize("name", MADE_MEANWHILE)
async def test_a_table_that_is_made_while_the_bridge_runs_is_not_read(pg_db: str, nats: NatsServer, name: str) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *MADE)
    await running(config, MADE_MEANWHILE[name])
    assert begins(await agrees(config)) == ["mark", "p", "t"]
