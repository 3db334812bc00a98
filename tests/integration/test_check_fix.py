"""`bridge check --fix`: says what it will run, asks, runs exactly that, and looks again."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path
from subprocess import CompletedProcess

import anyio
import pytest

from bridge.embedded import NatsServer
from bridge.source import connection
from tests.running import command, execute, source

pytestmark = pytest.mark.anyio

TABLES = (
    "CREATE TABLE fit (a int NOT NULL UNIQUE)",
    'CREATE TABLE "Plain t" (a int)',
    "CREATE TABLE keyed (a int PRIMARY KEY)",
)
INDEXED = 'ALTER TABLE "public"."fit" REPLICA IDENTITY USING INDEX "fit_a_key"'
FULL = 'ALTER TABLE "public"."Plain t" REPLICA IDENTITY FULL'
IDENTITIES = "SELECT relname::text, relreplident::text FROM pg_class WHERE relname IN ('fit', 'Plain t') ORDER BY 1"


async def answered(folder: Path, answer: bytes) -> CompletedProcess[bytes]:
    """The command with a person at a terminal who says so."""
    parent, child = pty.openpty()
    os.write(parent, answer)
    try:
        called = [sys.executable, "-m", "bridge", "--config", str(folder / "bridge.toml"), "check", "--fix", "--quiet"]
        return await anyio.run_process(called, stdin=child, check=False)
    finally:
        os.close(parent)
        os.close(child)


async def test_it_asks_and_runs_what_it_says(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    alone = await command("check", config, tmp_path, "--fix")
    assert (alone.code, "--fix would run 2 steps, and there is nobody to ask" in alone.err) == (2, True)
    assert await execute(pg_db, IDENTITIES) == [("Plain t", "d"), ("fit", "d")]

    refused = await answered(tmp_path, b"n\n")
    assert (refused.returncode, b"nothing was changed" in refused.stdout) == (1, True)
    assert await execute(pg_db, IDENTITIES) == [("Plain t", "d"), ("fit", "d")]

    agreed = await answered(tmp_path, b"y\n")
    text = agreed.stdout.decode()
    assert agreed.returncode == 0, text
    plan = text.partition("These can be mended now:\n")[2]
    assert all(f"  {step}\n" in plan and f"done: {step}\n" in plan for step in (INDEXED, FULL))
    assert "writes the whole old row" in plan
    assert "error" not in plan
    assert await execute(pg_db, IDENTITIES) == [("Plain t", "f"), ("fit", "i")]
    again = await command("check", config, tmp_path, "--fix", "--yes")
    assert (again.code, "nothing that --fix could mend" in again.out) == (0, True)


async def test_what_cannot_be_mended_from_here_is_left_and_said(pg_db: str, nats: NatsServer, tmp_path: Path) -> None:
    config = source(pg_db, nats.url)
    await execute(pg_db, *TABLES)
    # Somebody reads the one table just now: nobody else has to wait behind a statement that waits.
    async with connection.connect(pg_db) as sql:
        await sql.execute("BEGIN")
        await sql.execute("SELECT * FROM fit")
        busy = await command("check", config, tmp_path, "--fix", "--yes", "--quiet")
        await sql.execute("COMMIT")
    assert busy.code == 1
    assert f"failed: {INDEXED}: the table was in use for 3s" in busy.out
    assert f"done: {FULL}" in busy.out
    assert await execute(pg_db, IDENTITIES) == [("Plain t", "f"), ("fit", "d")]
    # A role that owns nothing may mend nothing.
    await execute(pg_db, "DROP ROLE IF EXISTS nobodys", "CREATE ROLE nobodys LOGIN REPLICATION")
    poor = source(pg_db.replace("//postgres@", "//nobodys@"), nats.url)
    try:
        theirs = await command("check", poor, tmp_path, "--fix", "--yes", "--quiet")
        assert (theirs.code, "nothing that --fix could mend" in theirs.out) == (1, True)
        assert "GRANT SELECT ON" in theirs.out
        # … and one that owns a table it may not read gives itself the right.
        await execute(pg_db, "GRANT ALL ON SCHEMA public TO nobodys", "ALTER TABLE keyed OWNER TO nobodys")
        await execute(pg_db, "REVOKE ALL ON keyed FROM nobodys", 'GRANT SELECT ON fit, "Plain t" TO nobodys')
        own = await command("check", poor, tmp_path, "--fix", "--yes", "--quiet")
        assert 'done: GRANT SELECT ON "public"."keyed" TO "nobodys"' in own.out
        assert "tables.select" not in own.out.partition("done: ")[2]
    finally:
        await execute(pg_db, "REASSIGN OWNED BY nobodys TO postgres", "DROP OWNED BY nobodys", "DROP ROLE nobodys")


@pytest.mark.parametrize("options", [("--json", "--fix"), ("--yes",)])
async def test_options_that_contradict_each_other_are_refused(
    pg_db: str, nats: NatsServer, tmp_path: Path, options: tuple[str, ...]
) -> None:
    done = await command("check", source(pg_db, nats.url), tmp_path, *options)
    assert (done.code, done.out) == (2, "")
