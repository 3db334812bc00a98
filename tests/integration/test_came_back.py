"""Altered and altered back: the catalogue shows nothing of it, and the log is put right all the same."""

from __future__ import annotations

import pytest

from bridge.config import Config
from bridge.embedded import NatsServer, until
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
        "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL UNIQUE, b text)",
        "INSERT INTO t VALUES (1, 100, 'x'), (2, 200, 'y')",
    )


@pytest.mark.parametrize("away", [True, False], ids=["away", "live"])
@pytest.mark.parametrize("statements", BACK.values(), ids=BACK)
async def test_what_came_back_is_read_again_once(
    pg_db: str, nats: NatsServer, statements: list[str], away: bool
) -> None:
    await made(pg_db)
    config = source(pg_db, nats.url)
    async with bridge(config):
        await settled(config)
        if not away:
            await execute(pg_db, *statements)
            await settled(config)
            await read_again(config)
    if away:
        await execute(pg_db, *statements)
    async with bridge(config):
        await settled(config)
        await read_again(config)
        await complete(config)
    await oracle.agrees(config, rewritten=["t"])
    # Nothing of it is left to be found again.
    before = len(await events(config, "t"))
    async with bridge(config):
        await execute(pg_db, LATER)
        await settled(config)
        await complete(config)
    await oracle.agrees(config, rewritten=["t"])
    assert [event["op"] for event in (await events(config, "t"))[before:]] == ["insert"]
