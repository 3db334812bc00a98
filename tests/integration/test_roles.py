"""The least-privileged role of docs/security.md is enough: the statements are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import psycopg
import pytest
from psycopg import conninfo

from bridge.config import Secret
from bridge.embedded import NatsServer
from bridge.errors import ServerRefused
from tests.running import bridge, events, execute, failure, settled, source, streaming

pytestmark = pytest.mark.anyio

SLOTS = """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
            WHERE database = current_database() AND NOT active"""
SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


async def test_the_documented_role_reads_snapshot_and_changes_and_nothing_else(pg_db: str, nats: NatsServer) -> None:
    name = str(conninfo.conninfo_to_dict(pg_db)["dbname"])
    role = f"bridge_{name}"
    (block,) = re.findall(r"```sql\n(.*?)```", SECURITY.read_text(), re.DOTALL)
    statements = [
        re.sub(r"\bbridge\b", role, s).replace("DATABASE app", f'DATABASE "{name}"') for s in block.split(";")
    ]
    await execute(pg_db, "CREATE TABLE t (id int PRIMARY KEY, body text)", "INSERT INTO t VALUES (1, 'before')")
    await execute(pg_db, "CREATE SCHEMA aside", "CREATE TABLE aside.secret (id int PRIMARY KEY)")
    await execute(pg_db, *[statement for statement in statements if statement.strip()])
    dsn = pg_db.replace("postgres@", f"{role}@")
    config = source(dsn, nats.url)
    ours = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, dsn=Secret(pg_db)))
    try:
        async with bridge(config):
            await streaming(config)
            await execute(pg_db, "CREATE TABLE later (id int PRIMARY KEY)", "INSERT INTO later VALUES (1)")
            await execute(pg_db, "UPDATE t SET body = 'after'")
            await settled(ours)
        assert [event["op"] for event in await events(config, "t")] == ["read", "update"]
        assert [event["key"] for event in await events(config, "later")] == [{"id": 1}]
        for wrong in ("SELECT * FROM aside.secret", "INSERT INTO t VALUES (9, 'x')", "CREATE TABLE mine (a int)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await execute(dsn, wrong)
        more = source(dsn, nats.url, tables=["public.*", "aside.*"])
        error = await failure(more)
        assert isinstance(error, ServerRefused)
        assert "GRANT SELECT" in error.remedy
    finally:
        await execute(pg_db, SLOTS, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
