"""Databases that others have made: rows of the snapshot and rows of the stream are the same events, but for the op."""

from __future__ import annotations

from collections import Counter

import anyio
import pytest

from bridge.embedded import NatsServer, Postgres
from bridge.event import Event
from bridge.stream.reader import Message
from tests.oracle import agrees
from tests.running import bridge, execute, settled, source, streaming
from tests.samples import CHINOOK

pytestmark = pytest.mark.anyio

COPY = "copied"


async def doubled(dsn: str, statement: str) -> list[str]:
    """Makes a table in another schema like each one in `public`; the statement for each, with {0} and {1} for the
    names."""
    tables = [name for (name,) in await execute(dsn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    await execute(dsn, f"CREATE SCHEMA {COPY}")
    for name in tables:
        await execute(dsn, f"CREATE TABLE {COPY}.{name} (LIKE public.{name} INCLUDING ALL)")
    return [statement.format(f"{COPY}.{name}", f"public.{name}") for name in tables]


def rows(found: list[tuple[Message, Event]], schema: str, op: str) -> Counter[tuple[str, bytes, bytes]]:
    """The rows of a schema's events of one kind, as often as they are there."""
    return Counter(
        (one.table, bytes(one.key), bytes(one.after))
        for _, one in found
        if (one.schema, one.op) == (schema, op) and one.table != "mark"
    )


async def test_a_music_shop(pg_db: str, nats: NatsServer) -> None:
    if not CHINOOK.exists():
        pytest.skip(f"{CHINOOK} is missing: the sample database lies beside the checkout")
    config = source(pg_db, nats.url, tables=["public.*", f"{COPY}.*"])
    _, _, script = CHINOOK.read_text().partition("\\c chinook;")
    await execute(pg_db, script)
    copies = await doubled(pg_db, "INSERT INTO {0} SELECT * FROM {1}")
    assert len(copies) == 11
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, *copies)
        await settled(config)
    found = await agrees(config)
    read, inserted = rows(found, "public", "read"), rows(found, COPY, "insert")
    assert read == inserted
    assert read.total() == 15_607


async def test_the_tables_of_pgbench_while_it_runs(pg: Postgres, pg_db: str, nats: NatsServer) -> None:
    config = source(pg_db, nats.url, tables=["public.*", f"{COPY}.*"])
    pgbench = str(pg.bindir / "pgbench")
    await anyio.run_process([pgbench, "-i", "-q", "-s", "1", pg_db])
    await anyio.run_process([pgbench, "-n", "-t", "10", pg_db])
    await execute(pg_db, "DELETE FROM pgbench_accounts WHERE aid > 3000 AND abalance = 0")
    copies = await doubled(pg_db, "INSERT INTO {0} SELECT * FROM {1}")
    async with bridge(config):
        await streaming(config)
        await execute(pg_db, *copies)
        await anyio.run_process([pgbench, "-n", "-c", "4", "-t", "50", pg_db])
        await settled(config)
    found = await agrees(config)
    assert rows(found, "public", "read") == rows(found, COPY, "insert")
    ops = Counter(one.op for _, one in found if one.schema == "public" and one.table.startswith("pgbench_"))
    assert (ops["insert"], ops["delete"]) == (200, 0)
    # An account that was deleted, above, is updated by none; those of a teller and a branch always are.
    assert 2 * 200 <= ops["update"] <= 3 * 200
