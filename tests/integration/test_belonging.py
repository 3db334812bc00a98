"""A table's changes are read when it is dropped, detached, attached or replaced already: the log has them under the
name, and with the choices, of what it was when they were made."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import pytest

from bridge.config import Config, Table
from bridge.embedded import NatsServer
from bridge.event import Event
from bridge.source import chunks, connection
from bridge.source.catalog import Catalog
from bridge.source.chunks import Gone
from bridge.stream import asking
from bridge.stream.state import State
from tests.oracle import agrees
from tests.rewriting import caught_up
from tests.running import (
    MARK,
    Process,
    bridge,
    broker_of,
    execute,
    messages,
    settled,
    source,
    state_of,
    toml,
)

pytestmark = pytest.mark.anyio

OPERATIONS = {"insert", "update", "delete", "truncate"}
LONG, SECRET = "repeat('long', 1000)", "SECRET"
COLUMNS = "id int PRIMARY KEY, a int, body text"
PARTED = [
    f"CREATE TABLE t ({COLUMNS}) PARTITION BY RANGE (id)",
    "CREATE TABLE one PARTITION OF t FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE mid PARTITION OF t FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id)",
    "CREATE TABLE two PARTITION OF mid FOR VALUES FROM (10) TO (20)",
    "CREATE TABLE rest PARTITION OF t DEFAULT",
    *(f"ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL" for name in ("one", "two", "rest")),
    f"INSERT INTO t SELECT g, g, {LONG} FROM generate_series(1, 3) g",
    f"INSERT INTO t VALUES (11, 11, {LONG}), (50, 50, 'small')",
]
PLAIN = [
    f"CREATE TABLE t ({COLUMNS})",
    "ALTER TABLE t ALTER body SET STORAGE EXTERNAL",
    f"INSERT INTO t SELECT g, g, {LONG} FROM generate_series(1, 3) g",
    f"CREATE TABLE u ({COLUMNS}, more text)",
    "ALTER TABLE u ALTER body SET STORAGE EXTERNAL, ALTER more SET STORAGE EXTERNAL",
    f"INSERT INTO u SELECT g, g, {LONG}, {LONG} FROM generate_series(1, 3) g",
]


def told(events: list[Event]) -> list[str]:
    """What each event says: the table, its partition, the operation, the key and the columns left alone."""
    found = []
    for one in events:
        key = ",".join(f"{name}={value}" for name, value in (msgspec.json.decode(one.key) or {}).items())
        parts = [one.table, one.op, one.partition.removeprefix("public.") if one.partition else "", key]
        found.append(" ".join(part for part in [*parts, *(f"~{name}" for name in one.unchanged)] if part))
    return found


def bare(events: list[str]) -> list[list[str]]:
    """The operations and keys alone."""
    return [[word for word in one.split()[1:] if word in OPERATIONS or "=" in word] for one in events]


async def changes(config: Config) -> list[Event]:
    """The events of what somebody did, but for the schemas of tables."""
    return [
        one
        for _, one in await messages(config)
        if one.op in OPERATIONS and one.txid is not None and one.table != "mark"
    ]


CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "dropped partition": (
        PARTED,
        ["INSERT INTO t VALUES (4, 4, 'x')", "UPDATE t SET a = 0 WHERE id = 1", "DELETE FROM t WHERE id = 2",
         "DROP TABLE one", "INSERT INTO t VALUES (5, 5, 'x')"],
        ["t insert one id=4", "t update one id=1 ~body", "t delete one id=2", "t insert rest id=5"],
    ),
    "truncated and dropped partition": (PARTED, ["TRUNCATE one", "DROP TABLE one"], ["t truncate one"]),
    "detached partition": (
        PARTED,
        ["UPDATE t SET a = 0 WHERE id = 1", "ALTER TABLE t DETACH PARTITION one", "UPDATE one SET a = 1 WHERE id = 1",
         "INSERT INTO one VALUES (4, 4, 'x')"],
        ["t update one id=1 ~body", "one update id=1 ~body", "one insert id=4"],
    ),
    "detached level": (
        PARTED,
        ["UPDATE t SET a = 0 WHERE id = 11", "ALTER TABLE t DETACH PARTITION mid",
         "INSERT INTO mid VALUES (12, 0, '')"],
        ["t update two id=11 ~body", "mid insert two id=12"],
    ),
    "attached partition": (
        [*PARTED, f"CREATE TABLE three ({COLUMNS})", "INSERT INTO three VALUES (20, 0, 'x')"],
        ["INSERT INTO three VALUES (21, 0, 'x')", "ALTER TABLE t ATTACH PARTITION three FOR VALUES FROM (20) TO (30)",
         "INSERT INTO t VALUES (22, 0, 'x')"],
        ["three insert id=21", "t insert three id=22"],
    ),
    "detached and attached": (
        PARTED,
        ["INSERT INTO t VALUES (4, 4, 'x')", "ALTER TABLE t DETACH PARTITION one",
         "ALTER TABLE t ATTACH PARTITION one FOR VALUES FROM (0) TO (10)", "INSERT INTO t VALUES (5, 4, 'x')"],
        ["t insert one id=4", "t insert one id=5"],
    ),
    "partition made again": (
        PARTED,
        ["UPDATE t SET a = 0 WHERE id = 1", "DROP TABLE one",
         "CREATE TABLE one PARTITION OF t FOR VALUES FROM (0) TO (5)",
         "INSERT INTO t VALUES (1, 1, 'x')"],
        ["t update one id=1 ~body", "t insert one id=1"],
    ),
    "name of a partition taken": (
        PARTED,
        ["UPDATE t SET a = 0 WHERE id = 1", "DROP TABLE one", "CREATE TABLE one (k int PRIMARY KEY, body int)",
         "INSERT INTO one VALUES (7, 7)"],
        ["t update one id=1 ~body", "one insert k=7"],
    ),
    "another table": (
        PLAIN,
        ["UPDATE t SET a = 0 WHERE id = 1", "DROP TABLE t", "CREATE TABLE t (k int PRIMARY KEY, note text)",
         "INSERT INTO t VALUES (9, 'x')", "UPDATE t SET note = 'y'", "DELETE FROM t"],
        ["t update id=1 ~body", "t insert k=9", "t update k=9", "t delete k=9"],
    ),
    "names exchanged": (
        PLAIN,
        ["UPDATE t SET a = 0 WHERE id = 1", "UPDATE u SET a = 0 WHERE id = 1",
         "ALTER TABLE t RENAME TO x; ALTER TABLE u RENAME TO t; ALTER TABLE x RENAME TO u",
         "UPDATE t SET a = 1 WHERE id = 1", "UPDATE u SET a = 1 WHERE id = 1"],
        ["t update id=1 ~body", "u update id=1 ~body ~more", "t update id=1 ~body ~more", "u update id=1 ~body"],
    ),
    "renamed, and its columns": (
        PLAIN,
        [
            "UPDATE t SET a = 0 WHERE id = 1",
            "ALTER TABLE t RENAME body TO text",
            "UPDATE t SET a = 1 WHERE id = 1",
            "ALTER TABLE t RENAME TO x",
            "ALTER TABLE x ADD body text",
            "UPDATE x SET a = 2 WHERE id = 1",
        ],
        ["t update id=1 ~body", "t update id=1 ~text", "x update id=1 ~text"],
    ),
    "renamed and dropped": (
        PLAIN,
        ["UPDATE t SET a = 0 WHERE id = 1", "ALTER TABLE t RENAME TO x", "UPDATE x SET a = 1 WHERE id = 1",
         "DROP TABLE x"],
        ["t update id=1 ~body", "x update id=1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("within", ["one by one", "behind a savepoint"])
@pytest.mark.parametrize("case", CASES)
async def test_changes_stand_under_what_their_table_was(pg_db: str, nats: NatsServer, case: str, within: str) -> None:
    config = source(pg_db, nats.url)
    made, steps, wanted = CASES[case]
    await execute(pg_db, MARK, *made)
    async with bridge(config):
        await settled(config)
    before = len(await changes(config))
    for step in steps:
        saved = within != "one by one" and not step.startswith(("INSERT", "UPDATE", "DELETE", "TRUNCATE"))
        await execute(pg_db, f"BEGIN; SAVEPOINT s; {step}; RELEASE s; COMMIT" if saved else step)
    async with bridge(config):
        await caught_up(config)
    found = told((await changes(config))[before:])
    if within == "one by one":
        assert found == wanted
    else:
        # PostgreSQL does not tell which transaction a savepoint's was of: until the bridge has looked, the table is
        # taken for what it was.
        assert bare(found) == bare(wanted)
    roots = {one.split()[0] for one in wanted} & {"t", "one", "mid", "three"}
    if not case.startswith("renamed"):  # what it was before under the new name is in no log
        await agrees(config, strict=False, rewritten=roots)


@pytest.mark.parametrize("case", [case for case, (made, _, _) in CASES.items() if made is PARTED])
async def test_what_may_not_leave_stays_though_the_partition_has_gone(pg_db: str, nats: NatsServer, case: str) -> None:
    hidden = Table(exclude=["body"])
    apart = {
        f"public.{name}": hidden for name in ("one", "mid") if f"DETACH PARTITION {name}" in " ".join(CASES[case][1])
    }
    config = source(pg_db, nats.url, table={"public.t": hidden, **apart})
    made, steps, _ = CASES[case]
    await execute(pg_db, MARK, *made)
    async with bridge(config):
        await settled(config)
    await execute(pg_db, f"INSERT INTO t VALUES (7, 0, '{SECRET}'), (17, 0, '{SECRET}'), (57, 0, '{SECRET}')", *steps)
    async with bridge(config):
        await caught_up(config)
    assert {SECRET.encode() in message.data for message, _ in await messages(config)} == {False}


@pytest.mark.parametrize(
    "steps",
    [
        ["CREATE TABLE new PARTITION OF t FOR VALUES FROM (30) TO (40)", "INSERT INTO t VALUES (31, 7, 'SECRET')"],
        [
            "CREATE TABLE new (id int PRIMARY KEY, a int, body text, email text)",
            "INSERT INTO new VALUES (1, 7, 'SECRET')",
        ],
        ["ALTER TABLE u RENAME TO new", "INSERT INTO new VALUES (31, 7, 'SECRET', 'SECRET')", "DELETE FROM new"],
        ["ALTER TABLE m RENAME TO new", "INSERT INTO new VALUES (31, 7, 'SECRET')"],
    ],
)
async def test_what_came_and_went_unseen_gives_nothing_away(pg_db: str, nats: NatsServer, steps: list[str]) -> None:
    choices = {
        "public.t": Table(exclude=["body"]),
        "public.u": Table(columns=["id", "a"]),
        "public.m": Table(mask={"body": "constant:x"}),
    }
    config = source(pg_db, nats.url, table=choices)
    await execute(pg_db, MARK, *PARTED, *PLAIN[3:], f"CREATE TABLE m ({COLUMNS})")
    async with bridge(config):
        await settled(config)
    await execute(pg_db, *steps, "UPDATE new SET a = 8", "DROP TABLE new")
    async with bridge(config):
        await settled(config)
    found = await messages(config)
    assert {SECRET.encode() in message.data for message, _ in found} == {False}
    assert [msgspec.json.decode(one.after)["a"] for _, one in found if one.table == "new" and one.op == "insert"] == [7]


ROWS = "id int PRIMARY KEY, a int, x text, y text"
APART = [
    "DO $$ BEGIN CREATE ROLE somebody; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    f"CREATE TABLE t ({ROWS}) PARTITION BY RANGE (id)",
    "CREATE TABLE one PARTITION OF t FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE two PARTITION OF t FOR VALUES FROM (10) TO (20)",
    f"CREATE TABLE q ({ROWS}) PARTITION BY RANGE (id)",
    f"CREATE TABLE p ({ROWS})",
    f"CREATE TABLE u ({ROWS})",
    "INSERT INTO u VALUES (1, 1, 'o', 'o')",
]
X, Y, ALL = Table(exclude=["x"]), Table(exclude=["y"]), Table()
EACH = {"public.t": X, "public.q": Y, "public.one": Y, "public.p": Y, "public.u": ALL, "public.old": Y}
DETACH, MINE = "ALTER TABLE t DETACH PARTITION one", "INSERT INTO one VALUES (3, 3, 'open', 'SECRET')"
ATTACH = "ALTER TABLE t ATTACH PARTITION p FOR VALUES FROM (30) TO (40)"
THEIRS = "INSERT INTO t VALUES (31, 3, 'SECRET', 'open')"
AGAIN = ["DROP TABLE one", f"CREATE TABLE one ({ROWS})", MINE]

# What is done, with which choices, and what the log says of it: None where nobody can know that.
LATER: dict[str, tuple[dict[str, Table], list[str], list[str] | None]] = {
    f"detached, then {what}": (EACH, [DETACH, MINE, what], ["one insert id=3", *more])
    for what, more in {
        "TRUNCATE one": ["one truncate"],
        "GRANT SELECT ON one TO public": [],
        "ALTER TABLE one SET (fillfactor = 90)": [],
        "ALTER TABLE one REPLICA IDENTITY FULL": [],
        "ALTER TABLE one ADD c int": [],
        "ALTER TABLE one OWNER TO somebody": [],
        "ALTER TABLE one RENAME TO old": [],
        "VACUUM FULL one": [],
    }.items()
} | {
    "detached, dropped": (EACH, [DETACH, MINE, "DROP TABLE one"], None),
    "detached, attached elsewhere": (
        EACH, [DETACH, MINE, "ALTER TABLE q ATTACH PARTITION one FOR VALUES FROM (0) TO (10)"], None,
    ),
    "made again, with an owner": (EACH, [*AGAIN, "ALTER TABLE one OWNER TO somebody"], ["one insert id=3"]),
    "another table, with an owner": (
        {},
        ["DROP TABLE u", "CREATE TABLE u (k int PRIMARY KEY, note text)", "INSERT INTO u VALUES (7, 'o')",
         "UPDATE u SET note = 'b'", "ALTER TABLE u OWNER TO somebody"],
        ["u insert k=7", "u update k=7"],
    ),
    "root renamed, with rights": (
        {"public.t": X, "public.old": Y},
        ["ALTER TABLE t RENAME TO old", "INSERT INTO old VALUES (3, 3, 'o', 'SECRET')",
         "GRANT SELECT ON old TO public"],
        ["old insert one id=3"],
    ),
    "attached, dropped": ({"public.t": X}, [ATTACH, THEIRS, "DROP TABLE p"], None),
    "attached, renamed": ({"public.t": X}, [ATTACH, THEIRS, "ALTER TABLE p RENAME TO z"], ["t insert p id=31"]),
    "attached, detached": (
        {"public.t": X, "public.p": ALL},
        [ATTACH, THEIRS, "DELETE FROM t", "ALTER TABLE t DETACH PARTITION p"],
        None,
    ),
    "a partition in the place of a table, dropped": (
        {"public.t": X},
        ["DROP TABLE p", "CREATE TABLE p PARTITION OF t FOR VALUES FROM (30) TO (40)", THEIRS, "DROP TABLE p"],
        None,
    ),
    "columns exchanged, dropped": (
        {"public.u": X},
        ["ALTER TABLE u RENAME x TO z; ALTER TABLE u RENAME y TO x; ALTER TABLE u RENAME z TO y",
         "INSERT INTO u VALUES (2, 1, 'SECRET', 'o')", "DROP TABLE u"],
        ["u insert id=2"],
    ),
    "archived": (
        {"public.t": X, "s2.one": X},
        ["INSERT INTO t VALUES (1, 1, 'SECRET', 'o')", DETACH, "CREATE SCHEMA s2", "ALTER TABLE one SET SCHEMA s2",
         "UPDATE s2.one SET a = 4"],
        ["t insert one id=1", "one update id=1"],
    ),
    "new partition, renamed": (
        {},
        ["CREATE TABLE three PARTITION OF t FOR VALUES FROM (30) TO (40)", "INSERT INTO t VALUES (35, 5, 'o', 'o')",
         "ALTER TABLE three RENAME TO old"],
        None,
    ),
    "partition again, exchanged with a table": (
        {},
        ["DROP TABLE one; CREATE TABLE one PARTITION OF t FOR VALUES FROM (0) TO (10)",
         "INSERT INTO t VALUES (5, 5, 'o', 'o')",
         "ALTER TABLE one RENAME TO z; ALTER TABLE p RENAME TO one; ALTER TABLE z RENAME TO p"],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
async def test_what_is_done_later_does_not_count_for_what_was_before(pg_db: str, nats: NatsServer, case: str) -> None:
    choices, steps, wanted = LATER[case]
    config = source(pg_db, nats.url, table=choices, tables=["*.*"])
    await execute(pg_db, MARK, *APART)
    async with bridge(config):
        await settled(config)
    before = len(await changes(config))
    for step in steps:
        await execute(pg_db, step)
    async with bridge(config):
        await caught_up(config)
    assert {SECRET.encode() in message.data for message, _ in await messages(config)} == {False}
    if wanted is not None:
        assert told((await changes(config))[before:]) == wanted
    await agrees(config, strict=False, rewritten={"t", "q", "p", "u", "one", "old"})


async def test_names_with_dots_are_no_others(pg_db: str, nats: NatsServer) -> None:
    choices = {'a."b.c"': X, '"a.b".c': Y, '"a.b".d': Y}
    config = source(pg_db, nats.url, table=choices, tables=["*.*"])
    tables = [f'CREATE TABLE a."b.c" ({ROWS})', f'CREATE TABLE "a.b".c ({ROWS})']
    await execute(pg_db, MARK, "CREATE SCHEMA a", 'CREATE SCHEMA "a.b"', *tables)
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        """INSERT INTO "a.b".c VALUES (1, 1, 'open', 'SECRET')""",
        'ALTER TABLE "a.b".c RENAME TO d',
        """INSERT INTO a."b.c" VALUES (1, 1, 'SECRET', 'open')""",
        'ALTER TABLE a."b.c" REPLICA IDENTITY FULL',
    )
    async with bridge(config):
        await caught_up(config)
    assert told(await changes(config)) == ["c insert id=1", "b.c insert id=1"]
    assert {SECRET.encode() in message.data for message, _ in await messages(config)} == {False}


async def test_a_table_that_comes_again_while_nobody_looks_is_read(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, MARK, *APART)
    async with bridge(config):
        await settled(config)
    await execute(pg_db, "DROP TABLE u")
    async with bridge(config):
        await caught_up(config)
    await execute(pg_db, f"CREATE TABLE u ({ROWS})")
    async with bridge(config):
        await caught_up(config)
    await agrees(config, rewritten=["u"])


async def test_a_schema_that_is_renamed_before_its_tables_are_read(
    pg_db: str, nats: NatsServer, tmp_path: Path
) -> None:
    config = source(pg_db, nats.url, tables=["*.*"])
    await execute(pg_db, MARK, "CREATE SCHEMA s1", f"CREATE TABLE s1.v ({ROWS})", "INSERT INTO s1.v VALUES (1, 1)")
    process = Process(tmp_path, toml(config))
    process.start(failpoint="snapshot.prepared:stop")
    try:
        await process.said("failpoint snapshot.prepared: stop")
        await execute(pg_db, "INSERT INTO s1.v VALUES (2, 2)", "ALTER SCHEMA s1 RENAME TO s3")
        assert process.process is not None
        process.process.send_signal(signal.SIGCONT)
        await process.said("streaming")
        await caught_up(config)
        await process.end()
    finally:
        process.close()
    await agrees(config, interrupted=True, rewritten=["v"])


@pytest.mark.parametrize("again", [True, False], ids=["asked for", "not asked for"])
async def test_a_table_that_is_a_partition_by_now_is_read_with_that(pg_db: str, nats: NatsServer, again: bool) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, MARK, *APART, "INSERT INTO p VALUES (31, 1)")
    async with bridge(config):
        await settled(config)
    async with state_of(config) as state, broker_of(config) as broker:
        if again:
            await asking.ask(await State.open(broker, config.state.bucket), config.source.name, ("public", "p"))
        await execute(pg_db, ATTACH)
        async with bridge(config):
            await caught_up(config)
        assert ("public", "p") not in await asking.tables(state, config.source.name)
    await agrees(config, strict=False, rewritten=["t"])


async def test_the_remedy_names_what_a_partition_is_of(pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *APART)
    async with connection.connect(pg_db) as sql:
        with pytest.raises(Gone, match=r"public\.one is a partition of public\.t now") as found:
            await chunks.leaves(Catalog(sql, config.source), "public", "one")
    assert "name public.t" in found.value.remedy
