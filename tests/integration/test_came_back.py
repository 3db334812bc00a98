"""Altered and altered back: the catalogue shows nothing of it, and the log is put right all the same."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, until
from bridge.pipeline.rewrites import Rewrites
from tests import oracle
from tests.running import bridge, complete, events, execute, settled, source, statuses

pytestmark = pytest.mark.anyio

MOVED = "ALTER TABLE {0} DROP CONSTRAINT {0}_pkey; ALTER TABLE {0} ADD PRIMARY KEY ({1})"
NAME = [
    "ALTER TABLE t RENAME b TO bb",
    "UPDATE t SET bb = 'NEW' WHERE id = 1",
    "INSERT INTO t VALUES (3, 300, 'meanwhile')",
    "ALTER TABLE t RENAME bb TO b",
]
ALIKE = "ALTER TABLE t RENAME b TO c; ALTER TABLE t RENAME d TO b; ALTER TABLE t RENAME c TO d"
SWAPPED = [ALIKE, "UPDATE t SET b = 'NEW' WHERE id = 1", "INSERT INTO t VALUES (4, 400, 'four', 'vier')", ALIKE]
KEY = [MOVED.format("t", "a"), "DELETE FROM t WHERE a = 100", MOVED.format("t", "id")]
BACK = {
    "name": NAME,
    "one transaction": ["; ".join(["BEGIN", *NAME, "COMMIT"])],
    "name of the key": ["ALTER TABLE t RENAME id TO i", "DELETE FROM t WHERE i = 1", "ALTER TABLE t RENAME i TO id"],
    "swapped": [
        "ALTER TABLE t RENAME a TO c; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME c TO b",
        "UPDATE t SET a = 'NEW', b = 150 WHERE id = 1",
        "ALTER TABLE t RENAME a TO c; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME c TO b",
    ],
    "swapped, of one type": SWAPPED,
    "swapped, of one type, in one transaction": ["; ".join(["BEGIN", *SWAPPED, "COMMIT"])],
    "came, and renamed": [
        "ALTER TABLE t ADD e int",
        "INSERT INTO t VALUES (3, 300, 'x', 'y', 7)",
        "ALTER TABLE t RENAME e TO c",
    ],
    "came, and made again": [
        "ALTER TABLE t ADD e int",
        "INSERT INTO t VALUES (3, 300, 'x', 'y', 7)",
        "ALTER TABLE t DROP e",
        "ALTER TABLE t ADD e int",
    ],
    "key": KEY,
    "longer key": [
        MOVED.format("t", "id, a"),
        "UPDATE t SET b = 'q' WHERE id = 2",
        "DELETE FROM t WHERE id = 1",
        MOVED.format("t", "id"),
    ],
}
LATER = "INSERT INTO t VALUES (5, 500, 'later')"


async def read_again(config: Config) -> None:
    async def done() -> bool:
        found = (await statuses(config))["t"]
        return found.mode == "incremental" and found.state == "done" and found.again is None

    await until(done, 30, "the table has been read again")


async def made(dsn: str) -> None:
    await execute(
        dsn,
        "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL UNIQUE, b text, d text)",
        "INSERT INTO t VALUES (1, 100, 'x'), (2, 200, 'y')",
    )


async def met(config: Config, statements: list[str], *, away: bool) -> None:
    """Run the statements while the bridge is away or at work; then it has read again what it is to."""
    dsn = str(config.source.dsn)
    async with bridge(config):
        await settled(config)
        if not away:
            await execute(dsn, *statements)
            await settled(config)
            await read_again(config)
    if away:
        await execute(dsn, *statements)
    async with bridge(config):
        await settled(config)
        await read_again(config)
        await complete(config)


@pytest.mark.parametrize("away", [True, False], ids=["away", "live"])
@pytest.mark.parametrize("statements", BACK.values(), ids=BACK)
async def test_what_came_back_is_read_again_once(
    pg_db: str, nats: NatsServer, statements: list[str], away: bool
) -> None:
    await made(pg_db)
    config = source(pg_db, nats.url)
    await met(config, statements, away=away)
    await oracle.agrees(config, rewritten=["t"])
    # Nothing of it is left to be found again.
    before = len(await events(config, "t"))
    async with bridge(config):
        await execute(pg_db, LATER)
        await settled(config)
        await complete(config)
    await oracle.agrees(config, rewritten=["t"])
    assert [event["op"] for event in (await events(config, "t"))[before:]] == ["insert"]


async def test_the_key_is_the_catalogues_once_the_log_is_past_another_identity(pg_db: str, nats: NatsServer) -> None:
    """What is inserted shows no replica identity: the one that an update had must not stay for it."""
    await made(pg_db)
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        "ALTER TABLE t REPLICA IDENTITY USING INDEX t_a_key",
        "UPDATE t SET b = 'q' WHERE a = 200",
        "ALTER TABLE t REPLICA IDENTITY DEFAULT",
        "INSERT INTO t VALUES (3, 300, 'away')",
    )
    async with bridge(config):
        await settled(config)
        await execute(pg_db, "INSERT INTO t VALUES (4, 400, 'z')", "DELETE FROM t WHERE id = 3")
        await settled(config)
        await read_again(config)
    found = await events(config, "t")
    assert [event["key"] for event in found if event["op"] == "update"] == [{"a": 200}]
    assert [event["key"] for event in found if event["op"] == "insert"] == [{"id": 3}, {"id": 4}]
    await oracle.agrees(config, rewritten=["t"])


async def test_a_table_without_a_key_is_marked_where_its_rows_may_differ(pg_db: str, nats: NatsServer) -> None:
    """Columns that came and went are no reason to doubt it, nor is a name that no row was written under."""
    await execute(
        pg_db,
        *(f"CREATE TABLE {name} (a int NOT NULL, b text)" for name in ("renamed", "untouched", "widened")),
        *(f"ALTER TABLE {name} REPLICA IDENTITY FULL" for name in ("renamed", "untouched", "widened")),
        *(f"INSERT INTO {name} VALUES (1, 'x')" for name in ("renamed", "untouched", "widened")),
    )
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    await execute(
        pg_db,
        "ALTER TABLE renamed RENAME b TO bb",
        "INSERT INTO renamed VALUES (2, 'y')",
        "ALTER TABLE renamed RENAME bb TO b",
        "ALTER TABLE untouched RENAME b TO bb",
        "ALTER TABLE untouched RENAME bb TO b",
        "INSERT INTO untouched VALUES (2, 'y')",
        "ALTER TABLE widened ADD c text",
        "INSERT INTO widened VALUES (2, 'y', 'z')",
        "ALTER TABLE widened DROP c",
        "INSERT INTO widened VALUES (3, 'y')",
    )

    async def marked() -> bool:
        return (await statuses(config))["renamed"].state == "incomplete"

    async with bridge(config):
        await settled(config)
        await until(marked, 30, "the table is marked")
        await execute(pg_db, "ALTER TABLE widened ADD d int", "INSERT INTO widened VALUES (4, 'y', 5)")
        await execute(pg_db, "ALTER TABLE widened DROP d")
        await settled(config)
    async with bridge(config):
        await settled(config)
    found = await statuses(config)
    assert "column b had another name or type for a time" in found["renamed"].error
    assert "no key to be read again by" in found["renamed"].error
    assert [found[name].state for name in ("untouched", "widened")] == ["done", "done"]


@pytest.mark.parametrize("away", [True, False], ids=["away", "live"])
async def test_a_partitions_key_that_came_back(pg_db: str, nats: NatsServer, away: bool) -> None:
    await execute(
        pg_db,
        "CREATE TABLE t (id int NOT NULL, a int NOT NULL, b text) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF t (PRIMARY KEY (id)) FOR VALUES FROM (0) TO (50)",
        "CREATE TABLE high PARTITION OF t (PRIMARY KEY (id)) FOR VALUES FROM (50) TO (99)",
        "INSERT INTO t VALUES (1, 100, 'x'), (2, 200, 'y'), (60, 600, 'z')",
    )
    statements = [MOVED.format("low", "a"), "DELETE FROM t WHERE a = 100", MOVED.format("low", "id")]
    config = source(pg_db, nats.url)
    await met(config, statements, away=away)
    await oracle.agrees(config, rewritten=["t"])


async def test_what_turned_is_still_known_to_the_next_bridge(
    pg_db: str, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noted before the log has it: who ends before he has judged leaves that to his successor."""
    await made(pg_db)
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
    await execute(pg_db, *KEY)

    async def never(_: Rewrites) -> None:
        await anyio.sleep_forever()

    with monkeypatch.context() as patched:
        patched.setattr(Rewrites, "run", never)
        patched.setattr(Rewrites, "settled", lambda _: anyio.lowlevel.checkpoint())
        async with bridge(config):
            await settled(config)
    assert (await statuses(config))["t"].state == "done"
    async with bridge(config):
        await settled(config)
        await read_again(config)
    await oracle.agrees(config, rewritten=["t"])
