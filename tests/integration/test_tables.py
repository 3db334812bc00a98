"""Tables of every kind: the log has the rows of those that PostgreSQL logs, and says why it has no others."""

from __future__ import annotations

import psycopg
import pytest
from structlog.testing import capture_logs

from bridge.config import Config
from bridge.embedded import NatsServer
from bridge.errors import ServerRefused
from bridge.operate.verify import verify
from tests.oracle import agrees
from tests.reading.steps import ask, read_again
from tests.running import bridge, complete, events, execute, failure, messages, settled, source, streaming

pytestmark = pytest.mark.anyio

NO_TABLES = [
    "CREATE TABLE t (id int PRIMARY KEY, v int)",
    "INSERT INTO t VALUES (1, 1)",
    "CREATE UNLOGGED TABLE loose (id int PRIMARY KEY)",
    "INSERT INTO loose VALUES (1)",
    "CREATE VIEW seen AS SELECT * FROM t",
    "CREATE MATERIALIZED VIEW kept AS SELECT * FROM t",
    "CREATE EXTENSION postgres_fdw",
    "CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw",
    "CREATE FOREIGN TABLE abroad (id int) SERVER elsewhere",
    "CREATE SEQUENCE numbers",
    "CREATE TABLE other (id int PRIMARY KEY, day date) PARTITION BY LIST (id)",
    "CREATE TABLE part PARTITION OF other FOR VALUES IN (1)",
    "CREATE UNLOGGED TABLE loose_part PARTITION OF other FOR VALUES IN (2)",
    "INSERT INTO other VALUES (1), (2)",
]


async def verified(config: Config) -> dict[str, bool]:
    """Whether each table is what the log gives, by name without the schema."""
    return {report.table: report.same for report in await verify(config, list(config.stream.servers), [])}


async def test_what_postgresql_does_not_log_is_passed_over_and_unlogged_tables_are_named(
    pg_db: str, nats: NatsServer
) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *NO_TABLES)
    with capture_logs() as said:
        async with bridge(config), await psycopg.AsyncConnection.connect(pg_db, autocommit=True) as session:
            await streaming(config)
            await session.execute("CREATE TEMP TABLE passing (id int PRIMARY KEY, v text)")
            for statement in ("INSERT INTO passing SELECT g, 'x' FROM generate_series(1, 50) g", "DELETE FROM passing"):
                await session.execute(statement)
            await execute(
                pg_db, "INSERT INTO t VALUES (2, 2)", "INSERT INTO loose VALUES (2)", "TRUNCATE loose",
                "REFRESH MATERIALIZED VIEW kept", "UPDATE seen SET v = 3 WHERE id = 1", "SELECT nextval('numbers')",
                "CREATE UNLOGGED TABLE later (id int)", "CREATE TABLE made (id int PRIMARY KEY)",
                "INSERT INTO made VALUES (1)", "CREATE MATERIALIZED VIEW more AS SELECT * FROM t",
            )  # fmt: skip
            await settled(config)
    assert [line["table"] for line in said if line["event"] == "table not logged"] == [
        "public.loose",
        "public.loose_part",
    ]
    found = [one for _, one in await messages(config) if one.table != "mark" and one.op != "snapshot"]
    assert {one.table for one in found[:2]} == {"other", "t"}
    assert [one.op for one in found[:2]] == ["read", "read"]
    assert [(one.table, one.op, bytes(one.key)) for one in found[2:]] == [
        ("t", "insert", b'{"id":2}'), ("t", "update", b'{"id":1}'), ("made", "insert", b'{"id":1}'),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("loose", "public.loose is UNLOGGED"),
        ("seen", "public.seen is a view"),
        ("kept", "public.kept is a materialized view"),
        ("abroad", "public.abroad is a foreign table"),
        ("numbers", "public.numbers is a sequence"),
        ("part", "public.part is a partition: its changes stand under the name public.other"),
        ("absent", "public.absent does not exist"),
    ],
)
async def test_what_is_named_and_cannot_be_published_is_refused_by_what_it_is(
    pg_db: str, nats: NatsServer, name: str, why: str
) -> None:
    await execute(pg_db, *NO_TABLES)
    error = await failure(source(pg_db, nats.url, tables=["public.t", f"public.{name}"]))
    assert isinstance(error, ServerRefused)
    assert why in str(error)
    assert "public.t " not in str(error)


async def test_a_table_that_is_named_and_dropped_later_stops_nobody(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.t", "public.other", "public.mark"])
    await execute(pg_db, *NO_TABLES, "CREATE TABLE mark (id text PRIMARY KEY)")
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "DROP TABLE other", "INSERT INTO t VALUES (7)")
    with capture_logs() as said:
        async with bridge(config):
            await settled(config)
    assert [line["table"] for line in said if line["event"] == "table gone"][:1] == ["public.other"]
    assert [one["key"] for one in await events(config, "t") if one["op"] == "insert"] == [{"id": 7}]
    config.source.tables.append("public.others")
    assert "public.others does not exist" in str(await failure(config))


async def test_a_partition_may_be_named_beside_its_root(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.other", "public.part", "public.mark"])
    await execute(pg_db, *NO_TABLES, "CREATE TABLE mark (id text PRIMARY KEY)")
    async with bridge(config):
        await settled(config)
    assert [one["after"]["id"] for one in await events(config, "other")] == [1]


async def test_parents_and_children_are_tables_of_their_own(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE cities (id int PRIMARY KEY, name text, people int, CONSTRAINT counted CHECK (people >= 0))",
        "CREATE TABLE capitals (id int PRIMARY KEY, country text) INHERITS (cities)",
        "CREATE TABLE towns (mayor text) INHERITS (cities)",
        "ALTER TABLE towns REPLICA IDENTITY FULL",
        "CREATE TABLE alone (id int PRIMARY KEY, name text, people int, CONSTRAINT counted CHECK (people >= 0))",
        "CREATE VIEW parents AS SELECT * FROM ONLY cities",
        "INSERT INTO cities VALUES (1, 'Linz', 200), (2, 'Graz', 300)",
        "INSERT INTO capitals VALUES (1, 'Wien', 2000, 'AT'), (3, 'Bern', 130, 'CH')",
        "INSERT INTO towns VALUES (1, 'Melk', 5, 'x'), (1, 'Melk', 5, 'x')",
    )
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            "UPDATE cities SET people = people + 1",  # of the children, too
            "UPDATE ONLY cities SET id = 7 WHERE id = 2",
            "DELETE FROM cities WHERE id = 3",
            "INSERT INTO capitals VALUES (9, 'Rom', 2800, 'IT')",
            "INSERT INTO alone VALUES (1, 'Ulm', 120)",
            "ALTER TABLE alone INHERIT cities",
            "UPDATE cities SET name = name || '!'",
            "ALTER TABLE capitals NO INHERIT cities",
            "INSERT INTO capitals VALUES (4, 'Oslo', 700, 'NO')",
            "UPDATE cities SET people = 0",
        )
        await settled(config)
        found = await agrees(config)
        assert {one.table for _, one in found} == {"cities", "capitals", "towns", "alone", "mark"}
        assert not any(one.partition for _, one in found)
        for table in ("cities", "capitals", "alone"):
            await ask(config, table)
            await read_again(config, table)
        reports = await verified(config)
        assert {name: reports[f"public.{name}"] for name in ("cities", "capitals", "alone")} == dict.fromkeys(
            ("cities", "capitals", "alone"), True
        )
        await execute(pg_db, "TRUNCATE cities", "INSERT INTO towns VALUES (2, 'Krems', 25, NULL)")
        await settled(config)
    found = await agrees(config)
    assert [one.table for _, one in found if one.op == "truncate"] == ["cities", "towns", "alone"]
    reads = {table: sum(one["op"] == "read" for one in await events(config, table)) for table in ("cities", "towns")}
    assert reads == {"cities": 2 + 2, "towns": 2}


async def test_a_column_that_comes_to_a_parent_comes_to_its_children(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db,
        "CREATE TABLE cities (id int PRIMARY KEY, name text)",
        "CREATE TABLE capitals (PRIMARY KEY (id), country text) INHERITS (cities)",
        "INSERT INTO cities VALUES (1, 'Linz')",
        "INSERT INTO capitals VALUES (1, 'Wien', 'AT')",
    )
    async with bridge(config):
        await settled(config)
        await execute(
            pg_db, "ALTER TABLE cities ADD COLUMN people int DEFAULT 7", "UPDATE cities SET name = name || '!'"
        )
        await settled(config)
        await complete(config)
    await agrees(config, rewritten=["cities", "capitals"])
    for table in ("cities", "capitals"):
        assert (await events(config, table))[-1]["after"]["people"] == 7


async def test_a_table_without_any_key_has_its_inserts_as_often_as_they_are(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, on_missing_identity="stop")
    kinds = {
        "plain": "ALTER TABLE plain REPLICA IDENTITY DEFAULT",
        "nothing": "ALTER TABLE nothing ADD PRIMARY KEY (id), REPLICA IDENTITY NOTHING",
        "whole": "ALTER TABLE whole REPLICA IDENTITY FULL",
        "late": "ALTER TABLE late ADD PRIMARY KEY (id) DEFERRABLE",
    }
    for table, identity in kinds.items():
        await execute(pg_db, f"CREATE TABLE {table} (id int, v text)", identity, f"INSERT INTO {table} VALUES (1, 'a')")
    await execute(
        pg_db, "INSERT INTO plain VALUES (1, 'a'), (NULL, NULL)", "INSERT INTO whole VALUES (1, 'a'), (1, 'a')"
    )
    async with bridge(config):
        await streaming(config)
        for table in kinds:
            await execute(pg_db, f"INSERT INTO {table} VALUES (2, 'b')", f"INSERT INTO {table} VALUES (3, NULL)")
        await execute(
            pg_db,
            "INSERT INTO plain VALUES (2, 'b'), (NULL, NULL)",
            "INSERT INTO whole VALUES (NULL, NULL), (NULL, NULL)",
            "DELETE FROM whole WHERE ctid = (SELECT min(ctid) FROM whole WHERE id = 1)",
            "UPDATE whole SET v = 'c' WHERE ctid = (SELECT min(ctid) FROM whole WHERE id IS NULL)",
            "UPDATE whole SET id = 1, v = 'a' WHERE id = 2",
            "TRUNCATE nothing",
            "INSERT INTO nothing VALUES (1, 'again')",
        )
        await settled(config)
    found = await agrees(config)
    assert all(bytes(one.key) == b"null" for _, one in found if one.table in kinds)


async def test_a_table_without_columns_has_its_rows(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(
        pg_db, "CREATE TABLE empty ()", "INSERT INTO empty DEFAULT VALUES", "INSERT INTO empty DEFAULT VALUES"
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO empty DEFAULT VALUES", "TRUNCATE empty", "INSERT INTO empty DEFAULT VALUES")
        await settled(config)
    found = await events(config, "empty")
    assert [one["op"] for one in found] == ["read", "read", "insert", "truncate", "insert"]
    assert [one["after"] for one in found if "after" in one] == [{}] * 4


async def test_a_table_of_as_many_columns_as_there_can_be(pg_db: str, nats: NatsServer) -> None:
    """With a key of as many columns as an index can have, generated and identity columns, and keywords for names."""
    config = source(pg_db, nats.url)
    key = [f'"{word}"' for word in KEYWORDS] + [f"k{n}" for n in range(32 - len(KEYWORDS))]
    columns = [f"{name} smallint" for name in key]
    columns += ["c0 int GENERATED ALWAYS AS IDENTITY", "c1 int GENERATED BY DEFAULT AS IDENTITY", "c2 serial"]
    columns += ['c3 int GENERATED ALWAYS AS ("select" * 2) STORED']
    columns += [f"c{n} {('int2', 'bool', 'int4')[n % 3]}" for n in range(len(columns) - 32, 1600 - 32)]
    assert len(columns) == 1600
    values = ", ".join("g" for _ in key)
    some = {f"c{n}": "(g % 2 = 0)" if n % 3 == 1 else "g" for n in range(4, 1568, 2)}
    await execute(
        pg_db,
        *(f"CREATE TABLE {table} ({', '.join(columns)}, PRIMARY KEY ({', '.join(key)}))" for table in ("wide", "copy")),
    )
    rows = f"SELECT {values}, {', '.join(some.values())} FROM generate_series(1, 3) g"
    fill = f"INSERT INTO {{}} ({', '.join([*key, *some])}) {rows}"
    await execute(pg_db, fill.format("wide"))
    async with bridge(config):
        await streaming(config)
        await execute(
            pg_db,
            fill.format("copy"),
            'UPDATE wide SET "order" = 100 WHERE "order" = 2',
            "UPDATE wide SET c1566 = 5 WHERE k0 = 1",
            "DELETE FROM wide WHERE k0 = 3",
        )
        await settled(config)
        await ask(config, "wide")
        await read_again(config, "wide")
        assert (await verified(config))["public.wide"]
    await agrees(config)
    read, inserted = [[one["after"] for one in (await events(config, t))[:3]] for t in ("wide", "copy")]
    assert read == inserted
    assert len(read[0]) == 1600
    assert list((await events(config, "copy"))[0]["key"]) == [name.strip('"').replace('""', '"') for name in key]


KEYWORDS = ["select", "table", "order", "user", "null", "ctid_", "tableoid_", "%s", "a b", 'q""q', "a.b", "n\nl", "ü"]


async def test_columns_that_are_generated_when_read_are_in_neither(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    [(version,)] = await execute(pg_db, "SELECT current_setting('server_version_num')::int")
    if version < 180000:
        pytest.skip("PostgreSQL before 18 has no virtual generated columns")
    await execute(
        pg_db,
        "CREATE TABLE t (id int PRIMARY KEY, v text, twice int GENERATED ALWAYS AS (id * 2) VIRTUAL)",
        "INSERT INTO t VALUES (1, 'a')",
    )
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, "INSERT INTO t VALUES (2, 'a')", "UPDATE t SET v = 'b' WHERE id = 2")
        await settled(config)
    assert [one["after"] for one in await events(config, "t")] == [
        {"id": 1, "v": "a"}, {"id": 2, "v": "a"}, {"id": 2, "v": "b"},
    ]  # fmt: skip
