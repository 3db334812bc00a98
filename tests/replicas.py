"""Copies of a PostgreSQL cluster: replicas that can be promoted, and backups that can be put in its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from bridge.embedded import Keeper, Postgres, until
from bridge.embedded.postgres import server_user
from bridge.embedded.process import throwaway_folder
from tests.running import execute


@asynccontextmanager
async def cold_copy(original: Postgres) -> AsyncIterator[Postgres]:
    """A copy of a stopped cluster's folder, slots included; not started, deleted at the end."""
    async with _empty(original) as copy:
        await anyio.run_process(["cp", "-a", str(original.data_dir), str(copy.data_dir)])
        yield copy


@asynccontextmanager
async def base_backup(original: Postgres) -> AsyncIterator[Postgres]:
    """A copy of a running cluster by pg_basebackup, which leaves slots out; not started, deleted at the end."""
    async with _empty(original) as copy:
        program = str(original.bindir / "pg_basebackup")
        await anyio.run_process([program, "-d", original.dsn(), "-D", str(copy.data_dir), "-X", "stream", "-c", "fast"])
        await anyio.run_process(["chown", "-R", f"--reference={copy.home}", str(copy.data_dir)])
        yield copy


@asynccontextmanager
async def _empty(original: Postgres) -> AsyncIterator[Postgres]:
    user = server_user()
    home = throwaway_folder(user)
    copy = Postgres(home, Keeper(home, user), original.bindir)
    try:
        yield copy
    finally:
        await copy.close()


async def start(copy: Postgres, follow: Postgres | None = None, slot: str = "") -> None:
    """Starts a copy as a server of its own, or as a replica that follows another; by way of a physical slot of that
    server it also keeps copies of its failover slots (PostgreSQL 17 and newer)."""
    lines = [f"unix_socket_directories = '{copy.home}'\n", "hot_standby = on\n"]
    if follow is not None:
        primary = f"host={follow.host} port={follow.port} user=postgres"
        if slot:
            primary += " dbname=postgres"
            lines += [f"primary_slot_name = '{slot}'\n", "hot_standby_feedback = on\n", "sync_replication_slots = on\n"]
        lines.append(f"primary_conninfo = '{primary}'\n")
        await anyio.run_process(["touch", str(copy.data_dir / "standby.signal")])
    with (copy.data_dir / "postgresql.conf").open("a") as config:
        config.writelines(lines)
    await copy.start()


async def caught_up(replica: Postgres, primary: Postgres) -> None:
    """Waits until the replica has replayed all that the primary has written."""
    [(wanted,)] = await execute(primary.dsn(), "SELECT pg_current_wal_lsn()::text")

    async def there() -> bool:
        found = await execute(replica.dsn(), f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'::pg_lsn")
        return found == [(True,)]

    await until(there, 30, "the replica has caught up")


async def promote(replica: Postgres) -> None:
    """Makes it a primary on a timeline of its own."""
    await execute(replica.dsn(), "SELECT pg_promote(true, 60)")
